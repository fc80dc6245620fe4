"""What a module may define for the package: our language model is an example."""

import inspect

from wanda_lightning import CausalLMModule, PrunableModule


def test_our_module_takes_the_documented_arguments():
    for name, method in inspect.getmembers(PrunableModule, inspect.isfunction):
        if name[0] != "_" and name != "calibration_dataloader":  # which our datamodules have
            documented = [*inspect.signature(method).parameters]
            ours = [*inspect.signature(getattr(CausalLMModule, name)).parameters]
            assert ours[: len(documented)] == documented
