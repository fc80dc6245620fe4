"""Taking out units: the outputs stay, and whatever would change them stays, too."""

from copy import deepcopy
from functools import partial

import pytest
import timm
import torch
import torch.nn.functional as F
import transformers as hf
from peft import LoraConfig, get_peft_model
from support.disk import same
from support.layers import rng
from support.mlps import MIXING, Mlp, relu_mlp
from support.modules import VIT
from support.quiet import shrink, zero_units
from support.refusals import refuses
from support.tiny import tiny
from support.zoo import batches_of, model_of, number_of_weights
from torch import nn
from torch.testing import assert_close

import wanda_lightning as wl
from wanda_lightning.units.block_runs import BlockRuns
from wanda_lightning.units.zero_units import take_out_zero_units

IMAGES = {
    "vit": ("vit_tiny_patch16_224", VIT),
    "convnext": ("convnext_atto", {"depths": (1, 1, 1, 1), "dims": (16, 24, 32, 40)}),
    "resnet": ("test_resnet", {}),
    "squeeze-and-excitation": ("test_efficientnet", {}),
}


def pruned_image_model(name, in_chans=3):
    torch.manual_seed(0)
    architecture, kwargs = IMAGES[name]
    model = timm.create_model(architecture, num_classes=10, in_chans=in_chans, **kwargs).eval()
    images = torch.randn(4, in_chans, 32, 32)
    zero_units(model, [images])
    return model, images


def shrunk(model, batch):
    """What was taken out without a change of the outputs."""
    expected = model(batch).detach()
    taken = take_out_zero_units(model, partial(model, batch), progress=False)
    assert_close(model(batch).detach(), expected, rtol=1e-3, atol=1e-4)
    return taken


def widths(taken):
    """The number of units that each layer reads, before and after."""
    return {
        name: (layer.shape[1], round(layer.shape[1] * (1 - layer.sparsity)))
        for name, layer in taken.layers.items()
    }


@pytest.mark.parametrize("name", IMAGES)
def test_an_image_model_computes_the_same_with_fewer_parameters(name):
    model, images = pruned_image_model(name)
    matrices = {
        module: module.weight
        for module in model.modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
    }
    nonzero = sum(int(weight.count_nonzero()) for weight in matrices.values())
    report = shrunk(model, images)
    assert (bool(report.layers), report.unproven) == (True, 0)
    # Since only whole units were zero.
    assert sum(module.weight.numel() for module in matrices) <= nonzero
    assert report.parameters[1] == number_of_weights(model)


def small(between=None):
    return Mlp(between, 1e-6, 16, 8)


def normed(name):
    return small(MIXING[name](16))


class Gated(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(8, 16)
        self.up = nn.Linear(8, 16)
        self.down = nn.Linear(16, 8)

    def forward(self, x):
        return x + self.down(F.silu(self.gate(x)) * self.up(x))


@torch.no_grad()
def zero(block, units, readers=("down",), writers=("up",)):
    """Set the columns of readers and the rows of writers to zero; biases stay."""
    for name in readers:
        getattr(block, name).weight[:, units] = 0
    for name in writers:
        getattr(block, name).weight[units] = 0


X = torch.randn(5, 8, generator=rng(1))


def with_zeros(make=small, units=slice(0, 6), **choices):
    torch.manual_seed(0)
    model = nn.Sequential(make(), make(), nn.Linear(8, 3))
    zero(model[0], units, **choices)
    return model


def revived():
    model = with_zeros(Gated, writers=("gate", "up"))
    model[0].gate.weight.data[:2] = 0.1  # as training might
    return model


def shared():
    model = with_zeros()
    model[1] = model[0]
    return model


def without_blocks():
    torch.manual_seed(0)
    model = relu_mlp(8, 16, 16, 3)
    model[0].weight.data[:4] = model[2].weight.data[:, :4] = 0
    model[2].weight.data[9:] = model[4].weight.data[:, 9:] = 0
    return model


def tied():
    model = with_zeros()
    model[1].up.weight = model[0].up.weight
    return model


def on_one_side():
    model = with_zeros(units=slice(0, 3), writers=())
    zero(model[1], slice(0, 2), readers=())
    return model


def quantized():
    from torchao.quantization import Int8WeightOnlyConfig, quantize_  # slow to import

    model = with_zeros()
    quantize_(model[0], Int8WeightOnlyConfig())
    return model


NOTHING = "Nothing can be removed: no hidden unit is zero on both sides."


@pytest.mark.parametrize(
    ("make", "layers", "text"),
    [
        # Whatever their biases are.
        (
            with_zeros,
            {"0.down": (16, 10)},
            "Took out 6 of 16 hidden units in 1 layer; 485 of 587 parameters are left.",
        ),
        (revived, {"0.down": (16, 12)}, "Took out 4 of"),
        (partial(with_zeros, units=slice(None)), {"0.down": (16, 1)}, "Took out 15 of"),
        (shared, {"0.down": (16, 10)}, "Took out 6 of"),
        (without_blocks, {"2": (16, 12), "4": (16, 9)}, "Took out 11 of"),
        *((make, {}, NOTHING) for make in (tied, on_one_side, quantized)),
        # The model returns the same to rounding: what the norm changes has a tiny scale here.
        *(
            (partial(with_zeros, partial(normed, name)), {}, "6 units stay, zero on both sides")
            for name in MIXING
        ),
    ],
)
def test_whole_units_are_taken_out_once_and_other_zeros_stay(make, layers, text):
    model = make()
    before = deepcopy(model.state_dict())
    report = shrunk(model, X)
    assert widths(report) == layers
    assert text in str(report)
    assert not shrunk(model, X).layers
    if not layers and make is not quantized:  # torchao compares no tensors
        assert same(model.state_dict(), before)


def test_layers_that_the_batch_does_not_reach_stay():
    model = model_of("unreached")
    for block in model.blocks:
        zero(block, slice(0, 6))
    report = shrink(model, batches_of("unreached"))
    assert [layer.name for layer in report.layers] == ["blocks.0.down", "blocks.2.down"]
    assert "6 units stay, zero on both sides" in report.notes[0]


def test_a_model_that_shrink_cannot_call_needs_a_batch():
    model = with_zeros()
    with refuses(r"cannot make one for a Sequential\. Give batches"):
        shrink(model)
    shrink(model, [{"x": X}], forward=lambda batch: model(batch["x"]))
    assert model[0].down.in_features == 10


@pytest.mark.parametrize("channels", [1, 4])
def test_a_model_for_images_with_other_channels_needs_no_batch(channels):
    model, _ = pruned_image_model("convnext", in_chans=channels)
    assert shrink(model).layers


def test_an_interrupted_run_leaves_the_model_as_it_was(monkeypatch):
    model, images = pruned_image_model("convnext")
    before = deepcopy(model.state_dict())
    calls = []

    def interrupted(runs, change, units, keep):
        change()
        calls.append(units)
        if len(calls) > 2:
            raise KeyboardInterrupt
        return True

    monkeypatch.setattr(BlockRuns, "same_after", interrupted)
    with pytest.raises(KeyboardInterrupt):
        shrink(model, [images])
    assert same(model.state_dict(), before)


def test_adapters_are_refused():
    model = get_peft_model(model_of("llama"), LoraConfig(target_modules=["q_proj"]))
    with refuses(r"shrink would break adapters.*Merge them first"):
        shrink(model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits_and_the_configuration_which_other_models_keep(dtype):
    config = tiny(hf.LlamaConfig, initializer_range=0.3)
    model, other = (hf.LlamaForCausalLM(config).to(dtype) for _ in range(2))
    ids = torch.randint(64, (2, 9))
    zero_units(model, [{"input_ids": ids}])
    expected = model(ids).logits.detach()
    shrink(model)
    assert_close(model(ids).logits, expected, rtol=0.1, atol=0.1)
    assert model.config.intermediate_size == model.model.config.intermediate_size == 32
    assert other.config.intermediate_size == config.intermediate_size == 64


def test_shrinking_shows_its_progress_and_computes_in_one_thread(capsys):
    model = model_of("llama")
    zero_units(model, batches_of("llama"))
    threads = []
    model.register_forward_hook(lambda *_: threads.append(torch.get_num_threads()))
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        wl.shrink(model)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert set(threads) == {1}
    assert "Shrinking 2/2 done" in capsys.readouterr().err
