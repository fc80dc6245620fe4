"""What a module may define for the package: our modules are examples of it."""

import inspect

import pytest

from wanda_lightning import CausalLMModule, ImageClassifierModule, PrunableModule

METHODS = {name: each for name, each in vars(PrunableModule).items() if inspect.isfunction(each) and name[0] != "_"}


@pytest.mark.parametrize("module", [CausalLMModule, ImageClassifierModule])
def test_our_modules_take_the_documented_arguments(module):
    found = {name: [*inspect.signature(getattr(module, name)).parameters] for name in METHODS if hasattr(module, name)}
    assert {"calibration_step", "save_pretrained"} < found.keys()
    for name, arguments in found.items():
        documented = [*inspect.signature(METHODS[name]).parameters]
        assert arguments[: len(documented)] == documented
