"""What we recommend, as the callback and `prune` take it."""

import pytest
import torch
from support.callbacks import Net, loader, trainer
from support.zoo import ZOO

from wanda_lightning import NM, KeepZeros, PruningCallback, Uniform, Unstructured, WandaPrune, prune
from wanda_lightning.core.patterns import PATTERNS
from wanda_lightning.methods import METHODS, PRESETS

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*but have no `val_dataloader`"),
]
EVERY_PRESET = pytest.mark.parametrize("name", PRESETS)


@EVERY_PRESET
@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "4:8", *PATTERNS.values()], ids=str)
def test_every_preset_takes_every_pattern(name, pattern):
    specimen = ZOO["llama"]
    choices = PRESETS[name].choices(pattern)
    report = prune(specimen.build(), specimen.batches(), 0.5, **choices, progress=False)
    assert report.sparsity == pytest.approx(0.5, abs=0.01)
    if isinstance(choices["pattern"], NM):
        assert choices["allocation"] == Uniform()
        assert {layer.target for layer in report.layers} == {0.5}


@pytest.mark.parametrize("name", METHODS)
def test_every_method_prunes(name):
    specimen = ZOO["llama"]
    report = prune(specimen.build(), specimen.batches(), 0.5, **METHODS[name].choices(), progress=False)
    assert report.sparsity == pytest.approx(0.5, abs=0.01)


def test_what_is_compared_is_the_methods_choice():
    assert METHODS["wanda"].choices()["pattern"] == Unstructured("row")
    assert METHODS["sparsegpt"].choices()["pattern"] == Unstructured("layer")
    assert METHODS["sparsegpt"].choices(Unstructured("row"))["pattern"] == Unstructured("row")
    assert "sequential" not in METHODS["wanda"].choices()


@EVERY_PRESET
def test_a_preset_before_training(name):
    module = Net()
    callback = PruningCallback.preset(name, 0.5, num_samples=8)
    trainer(callback, max_steps=3).fit(module, loader())
    by_hand = Net()
    batches = [x for x, _ in loader()][:2]
    prune(by_hand, batches, 0.5, **PRESETS[name].choices(), progress=False)
    zeros = {key: value == 0 for key, value in by_hand.state_dict().items() if key.endswith("weight")}
    assert all(torch.equal(module.state_dict()[key] == 0, where) for key, where in zeros.items())
    assert callback.report.sparsity == pytest.approx(0.5, abs=0.01)


@EVERY_PRESET
def test_a_preset_before_measuring(name):
    module = Net()
    trainer(PruningCallback.preset(name, pattern="2:4", num_samples=4)).validate(module, loader(), verbose=False)
    weight = module.layers[0].weight
    assert ((weight != 0).view(len(weight), -1, 4).sum(dim=2) == 2).all()


@EVERY_PRESET
def test_mixed_precision_rounds_no_solver(name):
    reports, modules = [], [Net(), Net()]
    for module, precision in zip(modules, ("32-true", "bf16-mixed"), strict=True):
        callback = PruningCallback.preset(name, 0.5, allocation="uniform", num_samples=8)
        trainer(callback, precision=precision).validate(module, loader(), verbose=False)
        reports.append(callback.report)
    first, second = (module.layers[0].weight for module in modules)  # its inputs are the same
    assert torch.equal(first, second)
    assert reports[0].sparsity == reports[1].sparsity


def test_a_choice_of_a_preset_may_be_replaced():
    callback = PruningCallback.preset("best", 0.6, sequential="block", allocation="uniform", skip="lm_head")
    assert (callback.config.sequential, callback.config.allocation) == ("block", Uniform())
    assert callback.config.skip == ("lm_head",)


def test_what_is_no_preset_is_refused():
    with pytest.raises(ValueError, match="no preset is called 'bset': use one of fast, balanced, best"):
        PruningCallback.preset("bset")
    with pytest.raises(TypeError, match=r"as WandaPrune does: use PruningCallback.preset\('fast'\)"):
        WandaPrune.preset("fast")
    assert not hasattr(KeepZeros, "preset")
