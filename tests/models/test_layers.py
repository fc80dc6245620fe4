"""Layer types beyond the plain ones: grouped convolutions, "same" padding, subclasses that only look different."""

import copy
from unittest import mock

import lightning as L
import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from hypothesis import assume, given
from hypothesis import strategies as st
from support import reference
from support.gradients import gradients
from timm.layers import Conv2dSame, ScaledStdConv2d, ScaledStdConv2dSame, StdConv2d, StdConv2dSame
from torch import nn
from transformers.models.bit.modeling_bit import WeightStandardizedConv2d

from wanda_lightning import KeepZeros, PruningReport, SparseGPT, prune
from wanda_lightning.models import find_layers

SEQUENTIAL_CHOICES = ("block", "layer", "none")
PAIRS = st.tuples(st.integers(1, 3), st.integers(1, 3))


class Holding(nn.Module):
    """A layer as a part of a model, behind another convolution of its kind, so that it is no stem."""

    def __init__(self, part):
        super().__init__()
        self.first = nn.Conv1d(1, 1, 1) if isinstance(part, nn.Conv1d) else nn.Conv2d(1, 1, 1)
        self.part = part


def layers_of(module, **choices):
    return [layer for layer in find_layers(Holding(module).double(), **choices).layers if layer.module is module]


def assert_is_a_product(layer, x):
    """The layer's rows of the output are its tokens times its matrix."""
    with torch.no_grad():
        bias = (
            0
            if layer.module.bias is None
            else layer.outputs(layer.module.bias[(..., *[None] * len(layer.module.kernel_size))])
        )
        expected = layer.outputs(layer.module(x))
        torch.testing.assert_close(layer.tokens(x) @ layer.read().T + bias, expected, rtol=1e-10, atol=1e-10)


# ---- grouped convolutions


@st.composite
def grouped(draw, make=nn.Conv2d):
    groups, per_group, out = draw(st.integers(2, 4)), draw(st.integers(2, 3)), draw(st.integers(1, 3))
    kernel, stride, dilation, padding = draw(PAIRS), draw(PAIRS), draw(PAIRS), draw(st.tuples(*[st.integers(0, 2)] * 2))
    options = {"stride": stride, "dilation": dilation, "groups": groups, "bias": draw(st.booleans())}
    if make is nn.Conv2d:
        options |= {"padding": padding, "padding_mode": draw(st.sampled_from(["zeros", "reflect", "circular"]))}
    module = make(groups * per_group, groups * out, kernel, **options)
    height, width = draw(st.tuples(st.integers(3, 8), st.integers(3, 8)))
    if make is nn.Conv2d:
        for size, k, d, p in zip((height, width), kernel, dilation, padding, strict=True):
            assume(size + 2 * p > d * (k - 1))
    batch = draw(st.sampled_from([(), (1,), (2,)])) if make is nn.Conv2d else (2,)
    return module, torch.randn(*batch, module.in_channels, height, width, dtype=torch.float64)


@st.composite
def grouped_in_a_row(draw):
    module, images = draw(grouped())
    options = {name: getattr(module, name)[1] for name in ("kernel_size", "stride", "padding", "dilation")}
    options |= {"groups": module.groups, "padding_mode": module.padding_mode, "bias": module.bias is not None}
    return nn.Conv1d(module.in_channels, module.out_channels, **options), images[..., 0, :]


@given(st.one_of(grouped(), grouped_in_a_row()))
def test_each_group_is_a_product_of_its_own_tokens(case):
    module, x = case
    layers = layers_of(module, include_grouped=True)
    assert [layer.name for layer in layers] == [f"part.group{index}" for index in range(module.groups)]
    assert sum(layer.size for layer in layers) == module.weight.numel()
    for layer in layers:
        assert_is_a_product(layer, x)


@given(st.one_of(grouped(), grouped(Conv2dSame), grouped_in_a_row()), st.integers(1, 2000))
def test_sums_that_do_not_need_all_tokens_at_once(case, at_once):
    module, images = case
    if images.ndim == len(module.kernel_size) + 1:
        images = images.unsqueeze(0)
    with mock.patch("wanda_lightning.models.layers._AT_ONCE", at_once):
        for layer in layers_of(module, include_grouped=True):
            tokens = layer.tokens(images)
            assert torch.equal(torch.cat(list(layer.token_parts(images))), tokens)
            torch.testing.assert_close(layer.squares(images).sum(dim=0), tokens.square().sum(dim=0))
            assert len(layer.squares(images)) * len(images) == len(tokens)
            assert torch.equal(layer.magnitudes(images).amax(dim=1), tokens.abs().amax(dim=1))


@given(st.one_of(grouped(), grouped_in_a_row()))
def test_a_group_is_written_where_it_was_read(case):
    module, _ = case
    layers, before = layers_of(module, include_grouped=True), module.weight.detach().clone()
    for layer in layers:
        layer.write(layer.read().clone())
    assert torch.equal(module.weight, before)
    layers[1].write(torch.zeros_like(layers[1].read()))
    rows = module.out_channels // module.groups
    assert not module.weight[rows : 2 * rows].any()
    before[rows : 2 * rows] = 0
    assert torch.equal(module.weight, before)


class Block(nn.Module):
    def __init__(self, groups):
        super().__init__()
        self.conv, self.mix = nn.Conv2d(16, 16, 3, 2, 1, groups=groups), nn.Conv2d(16, 16, 1)

    def forward(self, x):
        return F.relu(self.mix(self.conv(x)))


class Grouped(nn.Module):
    """Blocks around a grouped convolution, whose groups see inputs of very different sizes."""

    def __init__(self, groups=4):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.blocks = nn.Sequential(Block(groups), Block(groups))
        self.head = nn.Linear(16, 5)

    def forward(self, x):
        x = self.stem(x) * torch.arange(1, 17, device=x.device)[:, None, None] ** 2
        return self.head(self.blocks(x).mean(dim=(2, 3)))


def build(make=Grouped):
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        return make().double().eval()


def images():
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(n, 3, 8, 8, generator=generator, dtype=torch.float64) for n in (2, 3)]


def slow_tokens(module, x, group):
    """One row for each output position of each image, of the channels of one group."""
    each = module.in_channels // module.groups
    x = reference.array(x)[:, group * each : (group + 1) * each]
    return reference.im2col(x, module.kernel_size, module.stride, module.padding, module.dilation)


@pytest.mark.parametrize("sequential", SEQUENTIAL_CHOICES)
def test_groups_are_pruned_by_their_own_inputs(sequential):
    model, seen = build(), {}
    dense = copy.deepcopy(model)
    report = prune(model, images(), 0.5, include_grouped=True, sequential=sequential, progress=False)
    with torch.no_grad():
        for x in images():  # of the first grouped convolution, which every sequential sees dense
            dense.blocks[0].conv.register_forward_pre_hook(lambda m, args: seen.setdefault(id(args[0]), args[0]))
            dense(x)
    conv = dense.blocks[0].conv
    for group, rows in enumerate(conv.weight.detach().split(4)):
        tokens = np.concatenate([slow_tokens(conv, x, group) for x in seen.values()])
        weight = reference.array(rows.permute(0, 2, 3, 1).flatten(1))
        keep = reference.keep_by_row(reference.wanda(weight, tokens), 0.5)
        pruned = model.blocks[0].conv.weight.detach().split(4)[group].permute(0, 2, 3, 1).flatten(1)
        np.testing.assert_array_equal(reference.array(pruned), weight * keep)
        entry = next(layer for layer in report.layers if layer.name == f"blocks.0.conv.group{group}")
        assert (entry.shape, entry.tokens) == ((4, 36), len(tokens))


def test_grouped_convolutions_in_the_report():
    model = build()
    assert {m.name: m.detail for m in find_layers(model).skipped}["blocks.0.conv"].startswith(
        "grouped convolution: include_"
    )
    report = prune(model, images(), 0.5, include_grouped=True, progress=False)
    assert [layer.name for layer in report.layers][:5] == [
        *(f"blocks.0.conv.group{g}" for g in range(4)),
        "blocks.0.mix",
    ]
    assert report.parameters == sum(p.numel() for p in model.parameters())
    assert report.zeros == sum(int((p == 0).sum()) for p in model.parameters())
    assert {layer.sparsity for layer in report.layers} == {0.5}
    assert PruningReport.from_json(report.to_json()) == report


@pytest.mark.parametrize("sequential", SEQUENTIAL_CHOICES)
@pytest.mark.parametrize(
    "choices", [{}, {"pattern": "2:4"}, {"solver": SparseGPT()}, {"allocation": "fisher"}], ids=repr
)
@pytest.mark.parametrize("grouped", [False, True])
def test_along_one_dimension_like_images_of_one_row(sequential, choices, grouped):
    """A Conv1d is pruned as the Conv2d that does the same."""

    class Convolving(nn.Module):
        def __init__(self, make, kernel, padding):
            super().__init__()
            self.stem = make(3, 16, kernel, padding=padding)
            self.blocks = nn.Sequential(
                *(
                    nn.Sequential(make(16, 16, kernel, stride=2, padding=padding), make(16, 16, kernel, groups=4))
                    for _ in range(2)
                )
            )
            self.head = nn.Linear(16, 5)

        def forward(self, x):
            return self.head(self.blocks(self.stem(x).relu()).flatten(2).mean(2))

    rows, images = build(lambda: Convolving(nn.Conv1d, 3, 1)), build(lambda: Convolving(nn.Conv2d, (1, 3), (0, 1)))
    with torch.no_grad():
        for one, other in zip(rows.parameters(), images.parameters(), strict=True):
            one.copy_(other.reshape(one.shape))
    generator = torch.Generator().manual_seed(1)
    signals = [torch.randn(n, 3, 40, generator=generator, dtype=torch.float64) for n in (2, 3)]
    options = {"sequential": sequential, "include_grouped": grouped, "progress": False, **choices}
    one = prune(rows, signals, 0.5, **options)
    other = prune(images, [x.unsqueeze(2) for x in signals], 0.5, **options)
    assert len(one.layers) == (3, 11)[grouped]
    assert [(x.name, x.tokens, x.target) for x in one.layers] == [(x.name, x.tokens, x.target) for x in other.layers]
    assert {"stem: reads the raw signal"} == {x.detail for x in one.skipped if x.name == "stem"}
    for (name, mine), theirs in zip(rows.named_parameters(), images.parameters(), strict=True):
        assert torch.equal(mine != 0, theirs.reshape(mine.shape) != 0), name
        torch.testing.assert_close(mine, theirs.reshape(mine.shape), rtol=1e-9, atol=1e-9)


def test_padding_does_not_count_along_one_dimension():
    """As in SqueezeBert, whose layers are convolutions over the tokens."""

    class Text(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Conv1d(16, 16, 1), nn.Conv1d(16, 16, 3)

        def forward(self, x, attention_mask):
            return self.second(self.first(x))

    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])
    report = prune(build(Text), [{"x": torch.randn(2, 16, 5).double(), "attention_mask": mask}], progress=False)
    assert [layer.tokens for layer in report.layers] == [7, 6]
    assert [bool(layer.note) for layer in report.layers] == [False, True]


def test_a_depthwise_convolution_stays_dense():
    reasons = {m.name: m.detail for m in find_layers(build(lambda: Grouped(groups=16)), include_grouped=True).skipped}
    assert reasons["blocks.1.conv"] == "depthwise convolution"


@pytest.mark.parametrize(
    ("choices", "names"),
    [
        ({"skip": ["blocks.0.conv"]}, [f"blocks.1.conv.group{g}" for g in range(4)]),
        ({"skip": ["*.group0", "blocks.1"]}, [f"blocks.0.conv.group{g}" for g in range(1, 4)]),
    ],
)
def test_skipping_groups(choices, names):
    found = find_layers(build(), include_grouped=True, **choices)
    assert [layer.name for layer in found.layers if "conv" in layer.name] == names
    assert {m.shape for m in found.skipped if "group" in m.name} == {(4, 4, 3, 3)}


def test_a_convolution_is_no_block_for_its_groups():
    model = nn.Sequential(nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3, groups=2), nn.Conv2d(8, 8, 3))
    for sequential in ("block", "layer"):
        found = find_layers(model, sequential, include_grouped=True)
        assert [(unit.name, len(unit.layers)) for unit in found.units] == [("0", 1), ("1", 2), ("2", 1)]


@pytest.mark.parametrize(
    "choices",
    [
        {"solver": SparseGPT()},
        {"solver": "admm"},
        {"recovery": "reconstruct"},
        {"allocation": "fisher"},
        {"allocation": "owl"},
        {"pattern": "2:4"},
    ],
    ids=str,
)
def test_groups_with_every_other_choice(choices):
    model = build().float()
    batches = [x.float() for x in images()]
    report = prune(model, batches, 0.5, include_grouped=True, skip=["head"], **choices, progress=False)
    assert len(report.layers) == 2 * 4 + 2
    assert report.sparsity == pytest.approx(0.5, abs=0.02)
    if "allocation" not in choices:
        assert {layer.sparsity for layer in report.layers} == {0.5}
    if choices.get("recovery") == "reconstruct":
        assert all(layer.part is not None for layer in report.layers)
    assert all(model(x).isfinite().all() for x in batches)


def test_fisher_looks_at_the_outputs_of_the_group():
    """Rows whose group has no way to the prediction do not matter, those of the others do."""
    model = build()
    with torch.no_grad():
        model.blocks[1].mix.weight[:, 4:8] = 0
    sums = gradients(model, images(), include_grouped=True)
    for each in sums["blocks.1.conv.group1"]:
        assert not each.any()
    for group in (0, 2, 3):
        assert all(each.all() for each in sums[f"blocks.1.conv.group{group}"])


class Training(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.model = build().float().train()

    def training_step(self, x):
        return self.model(x).square().mean()

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.01, weight_decay=0.1)


def test_zeros_of_groups_are_kept_while_training(tmp_path):
    module, batches = Training(), [x.float() for x in images()]
    prune(module.model, batches, 0.5, include_grouped=True, progress=False)
    before = {name: p.detach().clone() for name, p in module.model.named_parameters()}
    trainer = L.Trainer(
        max_steps=4,
        callbacks=[KeepZeros()],
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    loader = torch.utils.data.DataLoader(batches, batch_size=None)
    trainer.fit(module, loader)
    for name, p in module.model.named_parameters():
        if name.startswith("blocks") and p.ndim == 4:
            assert torch.equal(p == 0, before[name] == 0), name
            assert not torch.equal(p, before[name])


# ---- "same" padding


@given(grouped(make=Conv2dSame))
def test_same_padding_of_timm_is_seen_as_it_is_computed(case):
    module, x = case
    for layer in layers_of(module, include_grouped=True):
        assert_is_a_product(layer, x)


@given(PAIRS, PAIRS, PAIRS, st.integers(3, 9), st.integers(3, 9))
def test_same_padding_is_that_of_tensorflow(kernel, stride, dilation, height, width):
    """ceil(size / stride) places; what is missing goes around the image, the odd one right and below."""
    module = Conv2dSame(2, 3, kernel, stride=stride, dilation=dilation)
    (layer,) = layers_of(module)
    x = torch.randn(2, 2, height, width, dtype=torch.float64)
    pads = []
    for size, k, s, d in zip((width, height), kernel[::-1], stride[::-1], dilation[::-1], strict=True):
        missing = max(0, (-(-size // s) - 1) * s + d * (k - 1) + 1 - size)
        pads += [missing // 2, missing - missing // 2]
    padded = np.pad(x.numpy(), ((0, 0), (0, 0), (pads[2], pads[3]), (pads[0], pads[1])))
    np.testing.assert_array_equal(layer.tokens(x).numpy(), reference.im2col(padded, kernel, stride, (0, 0), dilation))


@pytest.mark.parametrize("name", ["tf_efficientnet_b0", "tf_mixnet_s"])
def test_ports_of_tensorflow_leave_only_the_usual_out(name):
    with torch.device("meta"):
        model = timm.create_model(name)
    assert any(isinstance(module, Conv2dSame) and module.groups > 1 for module in model.modules())
    usual = {"stem: reads the raw image", "depthwise convolution", "output head"}
    assert {matrix.detail for matrix in find_layers(model).skipped} == usual


# ---- standardised weights

STANDARDISED = [StdConv2d, StdConv2dSame, ScaledStdConv2d, ScaledStdConv2dSame, WeightStandardizedConv2d]


@pytest.mark.parametrize("kind", STANDARDISED)
def test_zeros_of_a_standardised_weight_would_not_stay(kind):
    """The reason given is true: inputs behind stored zeros still reach the output."""
    module = kind(4, 6, 3)
    with torch.no_grad():
        module.weight.normal_(mean=1.0)
        module.weight[:, :2] = 0
        x = torch.zeros(1, 4, 5, 5)
        nothing = module(x)
        x[:, :2] = 1
        assert not torch.allclose(module(x), nothing)
    (reason,) = [m.detail for m in find_layers(Holding(module)).skipped if m.name == "part"]
    assert reason.startswith(f"{kind.__name__} standardizes its weight in each forward")
    assert "Make it a Conv2d" in reason
