"""Taking out units: the outputs stay, and whatever would change them stays, too."""

import copy

import onnxruntime
import pytest
import timm
import torch
import torch.nn.functional as F
import transformers as hf
from support.mlps import MIXING, Mlp
from torch import nn

import wanda_lightning as wl
from wanda_lightning.calibration.block_runs import BlockRuns

IMAGES = {
    "vit": ("vit_tiny_patch16_224", {"img_size": 32, "patch_size": 8, "depth": 2, "embed_dim": 32, "num_heads": 4}),
    "convnext": ("convnext_atto", {"depths": (1, 1, 1, 1), "dims": (16, 24, 32, 40)}),
    "resnet18": ("resnet18", {}),
    "efficientnet": ("efficientnet_lite0", {}),
    "squeeze-and-excitation": ("test_efficientnet", {}),
}


def pruned_image_model(name, sparsity=0.5):
    torch.manual_seed(0)
    architecture, kwargs = IMAGES[name]
    model = timm.create_model(architecture, num_classes=10, **kwargs).eval()
    images = torch.randn(4, 3, 32, 32)
    wl.prune(model, [images], sparsity, pattern="structured", progress=False)
    return model, images


def matrices_of(model):
    return [module.weight for module in model.modules() if isinstance(module, nn.Linear | nn.Conv2d)]


def same(model, batch, expected):
    torch.testing.assert_close(model(batch).detach(), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", IMAGES)
def test_an_image_model_computes_the_same_with_fewer_parameters(name):
    model, images = pruned_image_model(name)
    zeros = sum(int((weight == 0).sum()) for weight in matrices_of(model))
    coupled, expected = sum(weight.numel() for weight in matrices_of(model)), model(images).detach()
    report = wl.shrink(model, images)
    same(model, images, expected)
    assert report.layers
    assert not report.unproven
    # Every zero is gone, since only whole units were zero.
    assert sum(weight.numel() for weight in matrices_of(model)) <= coupled - zeros
    assert not any((weight == 0).flatten(1).all(dim=1).any() for weight in matrices_of(model))
    assert report.parameters[1] == sum(parameter.numel() for parameter in model.parameters())


def test_units_are_still_out_after_training_with_zeros_kept():
    model, images = pruned_image_model("efficientnet")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    with wl.keep_zeros(model, optimizer):
        model.train()
        F.cross_entropy(model(images), torch.arange(4)).backward()
        optimizer.step()
    model.eval()
    expected = model(images).detach()
    report = wl.shrink(model, images)
    same(model, images, expected)
    assert 0 < report.units == sum(before // 2 // 8 * 8 if before > 8 else 0 for before, _ in report.layers.values())


def small(between=None):
    """A block with a residual of a tiny scale."""
    return Mlp(between, 1e-6, 16, 8)


class Gated(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(8, 16), nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x):
        return x + self.down(F.silu(self.gate(x)) * self.up(x))


def blocks(make):
    torch.manual_seed(0)
    return nn.Sequential(*(make() for _ in range(2)), nn.Linear(8, 3)).eval()


@torch.no_grad()
def zero(block, units, readers=("down",), writers=("up",)):
    """Set the columns of readers and the rows of writers to zero; biases stay."""
    for name in readers:
        getattr(block, name).weight[:, units] = 0
    for name in writers:
        getattr(block, name).weight[units] = 0


X = torch.randn(5, 8, generator=torch.Generator().manual_seed(1))


def test_biases_of_units_that_are_out_may_be_anything():
    model = blocks(small)
    zero(model[0], slice(0, 6))
    expected = model(X).detach()
    report = wl.shrink(model, X)
    assert report.layers == {"0.down": (16, 10)}
    assert str(report) == "Took out 6 of 16 hidden units in 1 layer; 485 of 587 parameters are left."
    same(model, X, expected)


@pytest.mark.parametrize("name", MIXING)
def test_units_below_a_norm_stay(name):
    """Although the model returns the same to rounding: what the norm changes has a tiny scale here."""
    model = blocks(lambda: small(MIXING[name](16)))
    zero(model[0], slice(0, 4))
    before = copy.deepcopy(model.state_dict())
    report = wl.shrink(model, X)
    assert not report.layers
    assert report.unproven == 4
    assert "4 units stay, zero on both sides" in str(report)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert model[0].up.out_features == 16


def test_units_that_a_gate_has_revived_stay():
    model = blocks(Gated)
    zero(model[0], slice(0, 6), writers=("gate", "up"))
    with torch.no_grad():
        model[0].gate.weight[:2] = 0.1  # as training might
    expected = model(X).detach()
    report = wl.shrink(model, X)
    assert report.layers == {"0.down": (16, 12)}
    same(model, X, expected)


def test_a_layer_keeps_one_unit():
    model = blocks(small)
    zero(model[0], slice(None))
    expected = model(X).detach()
    assert wl.shrink(model, X).layers == {"0.down": (16, 1)}
    same(model, X, expected)
    assert not wl.shrink(model, X).layers


def tied():
    model = blocks(small)
    model[1].up.weight = model[0].up.weight
    zero(model[0], slice(0, 6))
    return model


def on_one_side():
    model = blocks(small)
    zero(model[0], slice(0, 3), writers=())
    zero(model[1], slice(0, 2), readers=())
    return model


def scattered():
    model = blocks(small)
    wl.prune(model, [X], 0.5, progress=False)
    return model


def quantized():
    torchao = pytest.importorskip("torchao.quantization")
    model = blocks(small)
    zero(model[0], slice(0, 6))
    torchao.quantize_(model[0], torchao.Int8WeightOnlyConfig())
    return model


@pytest.mark.parametrize("make", [tied, on_one_side, scattered, quantized])
def test_other_zeros_stay(make):
    model = make()
    expected = model(X).detach()
    report = wl.shrink(model, X)
    assert str(report) == "Nothing can be removed: no hidden unit is zero on both sides."
    same(model, X, expected)


def test_a_shared_block_is_taken_out_once():
    model = blocks(small)
    model[1] = model[0]
    zero(model[0], slice(0, 6))
    expected = model(X).detach()
    assert wl.shrink(model, X).units == 6
    same(model, X, expected)


class Unreached(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(small() for _ in range(2))

    def forward(self, x):
        return self.blocks[int(x.mean() > 100)](x)


def test_layers_that_the_batch_does_not_reach_stay():
    model = Unreached()
    for block in model.blocks:
        zero(block, slice(0, 6))
    report = wl.shrink(model, X)
    assert list(report.layers) == ["blocks.0.down"]
    assert report.unproven == 6


def test_a_model_that_shrink_cannot_call_needs_a_batch():
    model = blocks(small)
    zero(model[0], slice(0, 6))
    with pytest.raises(ValueError, match=r"cannot make one for a Sequential\. Give batch="):
        wl.shrink(model)
    assert wl.shrink(model, {"x": X}, forward=lambda batch: model(batch["x"])).units == 6


@pytest.mark.parametrize("channels", [1, 4])
def test_a_model_for_images_with_other_channels_needs_no_batch(channels):
    model = timm.create_model("convnext_atto", num_classes=10, in_chans=channels, **IMAGES["convnext"][1]).eval()
    images = torch.randn(4, channels, 32, 32)
    wl.prune(model, [images], 0.5, pattern="structured", progress=False)
    expected = model(images).detach()
    assert wl.shrink(model).layers
    same(model, images, expected)


def test_an_interrupted_run_leaves_the_model_as_it_was(monkeypatch):
    model, images = pruned_image_model("convnext")
    before, calls = copy.deepcopy(model.state_dict()), []

    def interrupted(runs, change, read):
        change()
        calls.append(read)
        if len(calls) > 2:
            raise KeyboardInterrupt
        return True

    monkeypatch.setattr(BlockRuns, "same_after", interrupted)
    with pytest.raises(KeyboardInterrupt):
        wl.shrink(model, images)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


def test_adapters_are_refused():
    peft = pytest.importorskip("peft")
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**LLAMA))
    model = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match=r"shrink would break adapters.*Merge them first"):
        wl.shrink(model)


LLAMA = {
    **{"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "initializer_range": 0.3},
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits(dtype):
    torch.manual_seed(0)
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**LLAMA)).to(dtype)
    for layer in model.model.layers:
        zero(layer.mlp, torch.arange(0, 64, 3), ("down_proj",), ("gate_proj", "up_proj"))
    ids = torch.randint(64, (2, 9))
    expected = model(ids).logits.detach()
    assert wl.shrink(model).units == 44
    torch.testing.assert_close(model(ids).logits, expected, rtol=0.1, atol=0.1)
    assert model.config.intermediate_size == 42


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # within onnxscript
def test_layers_of_several_widths_are_exported(tmp_path):
    """torch.export and ONNX take any shape, also that of a model that has no ordinary folder."""
    model, images = pruned_image_model("convnext")
    with torch.no_grad():
        model.stages[0].blocks[0].mlp.fc1.weight[-8:] = 0
        model.stages[0].blocks[0].mlp.fc2.weight[:, -8:] = 0
        expected = model(images)
    wl.shrink(model, images)
    exported = torch.export.export(model, (images,)).module()
    torch.testing.assert_close(exported(images), expected, rtol=1e-4, atol=1e-5)
    torch.onnx.export(model, (images,), tmp_path / "small.onnx", dynamo=True)
    session = onnxruntime.InferenceSession(tmp_path / "small.onnx")
    (found,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-3, atol=1e-4)


def test_other_models_with_the_same_configuration_keep_it():
    torch.manual_seed(0)
    config = hf.LlamaConfig(**LLAMA)
    model, other = (hf.LlamaForCausalLM(config) for _ in range(2))
    for layer in model.model.layers:
        zero(layer.mlp, slice(0, 8), ("down_proj",), ("gate_proj", "up_proj"))
    wl.shrink(model)
    assert model.config.intermediate_size == model.model.config.intermediate_size == 56
    assert other.config.intermediate_size == config.intermediate_size == 64


def test_a_model_without_blocks():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3))
    with torch.no_grad():
        model[0].weight[:4] = model[2].weight[:, :4] = 0
        model[2].weight[9:] = model[4].weight[:, 9:] = 0
    expected = model(X).detach()
    assert wl.shrink(model, X).layers == {"2": (16, 12), "4": (16, 9)}
    same(model, X, expected)


def test_experts_in_one_parameter_stay():
    torch.manual_seed(0)
    sizes = {"moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2, "pad_token_id": 0}
    model = hf.Qwen3MoeForCausalLM(hf.Qwen3MoeConfig(**LLAMA, **sizes))
    with torch.no_grad():
        model.model.layers[0].mlp.experts.down_proj[:, :, :8] = 0
    assert not wl.shrink(model).layers
