"""What `find_layers` finds: each matrix once, in a stop or with its reason."""

from functools import cache

import pytest
import timm
import torch
from support.detectors import build
from support.experts import reasons
from support.tiny import on_meta
from support.zoo import ZOO, matching, matrices, model_of
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from wanda_lightning.methods import SEQUENTIAL_CHOICES
from wanda_lightning.models import SkipReason, find_layers

# Models that are built on the meta device.
OF_TRANSFORMERS = [
    "BertForMaskedLM",
    "DistilBertForSequenceClassification",
    "LlamaForSequenceClassification",
    "ViTForImageClassification",
]
OF_TIMM = [
    "deit_tiny_distilled_patch16_224",
    "resnet50d",
    "efficientnet_b0",
    "levit_128s",
    "ghostnet_100",
    "nfnet_f0",
    "sequencer2d_s",
    "inception_v3",  # its matcher of stems is a function
]


@cache
def built(name):
    """A model for tests that do not change it."""
    if name in ZOO:
        return model_of(name)
    if name in OF_TRANSFORMERS:
        return on_meta(name)
    with torch.device("meta"):
        return timm.create_model(name)


@cache
def found_in(name, sequential="block"):
    return find_layers(built(name), sequential)


EVERY_MODEL = pytest.mark.parametrize("name", [*ZOO, *OF_TRANSFORMERS, *OF_TIMM])


@EVERY_MODEL
def test_each_matrix_is_a_layer_or_skipped_with_a_reason(name):
    """Each parameter is there once, unless it is tied."""
    model = built(name)
    found = found_in(name)
    parameters = matrices(model)
    once = [(id(layer.parameter), layer.expert) for layer in found.layers]
    listed = [matrix.name for matrix in (*found.layers, *found.skipped)]
    assert sorted(listed) == sorted(parameters)
    for layer in found.layers:
        assert layer.parameter is parameters[layer.name]
        experts = 1 if layer.expert is None else len(layer.parameter)
        assert layer.size == layer.read().numel() == layer.parameter.numel() // experts
    for matrix in found.skipped:
        assert matrix.shape == tuple(parameters[matrix.name].shape)
        assert matrix.detail
        assert matrix.reason not in (SkipReason.QUANTIZED, SkipReason.NO_SHAPE)
        if not matrix.detail.startswith("tied to "):
            once.append((id(parameters[matrix.name]), None))
    assert len(once) == len(set(once))
    expected = {id(parameter) for parameter in model.parameters() if parameter.ndim >= 2}
    assert {parameter for parameter, _ in once} == expected


@EVERY_MODEL
def test_stops_are_disjoint_and_hold_their_layers(name):
    assert [(stop.name, stop.module) for stop in found_in(name, "none").stops] == [("", None)]
    for sequential in ("block", "layer"):
        stops = found_in(name, sequential).stops
        modules = dict(built(name).named_modules())
        inside = [module for stop in stops for module in stop.module.modules()]
        assert len(inside) == len(set(inside))
        for stop in stops:
            assert stop.layers
            assert modules[stop.name] is stop.module
            assert {layer.module for layer in stop.layers} <= set(stop.module.modules())


@EVERY_MODEL
def test_layers_are_in_model_order_and_those_of_one_module_are_one_stop(name):
    """Several are its experts, which no forward tells apart."""
    order = [id(parameter) for parameter in built(name).parameters()]
    found = found_in(name, "layer")
    layers = list(found.layers)
    assert sorted(layers, key=lambda layer: order.index(id(layer.parameter))) == layers
    for stop in found.stops:
        assert stop.layers == tuple(layer for layer in layers if layer.module is stop.module)


@EVERY_MODEL
def test_sequential_changes_only_the_stops(name):
    expected = found_in(name, "layer")
    for sequential in SEQUENTIAL_CHOICES:
        found = found_in(name, sequential)
        assert {layer.name for layer in found.layers} == {layer.name for layer in expected.layers}
        assert found.skipped == expected.skipped


@pytest.mark.parametrize("name", ZOO)
def test_blocks_of_the_zoo(name):
    model = built(name)
    found = found_in(name)
    blocks = {stop.name for stop in found.stops if stop.is_block}
    assert blocks == matching(dict(model.named_modules()), ZOO[name].blocks)
    dense = {matrix.name for matrix in found.skipped if not matrix.detail.startswith("tied to ")}
    assert dense <= matching(matrices(model), ZOO[name].dense)


@EVERY_MODEL
def test_a_model_inside_another_is_found_the_same(name):
    alone = found_in(name)
    inside = find_layers(nn.ModuleDict({"net": built(name)}))
    assert [f"net.{stop.name}" for stop in alone.stops] == [stop.name for stop in inside.stops]
    for matrix, inner in zip(alone.skipped, inside.skipped, strict=True):
        assert inner.name == f"net.{matrix.name}"
        assert inner.detail == matrix.detail.replace("tied to ", "tied to net.")


@pytest.mark.parametrize("name", ["llama", "vit", "convnext", "plain_mlp", "tied"])
def test_a_compiled_model_is_found_the_same(name):
    """With the names that it has without `torch.compile`."""
    model = torch.compile(model_of(name), backend="eager")
    for sequential in SEQUENTIAL_CHOICES:
        alone = found_in(name, sequential)
        found = find_layers(model, sequential)
        assert alone.layers
        assert [stop.name for stop in found.stops] == [stop.name for stop in alone.stops]
        assert [layer.name for layer in found.layers] == [layer.name for layer in alone.layers]
        assert found.skipped == alone.skipped
        assert found.blocks == alone.blocks


def test_blocks_of_the_backbone_of_a_detector():
    """It holds them in a dictionary, which it runs in order."""
    found = find_layers(build("mask_rcnn"))
    assert [stop.name for stop in found.stops][:7] == [
        "backbone.body.1.conv.1",
        *(f"backbone.body.{number}" for number in range(2, 8)),
    ]
    assert {len(stop.layers) for stop in found.stops[1:7]} == {2}
    assert {len(stop.layers) for stop in found.stops[7:]} == {1}


NO_LAYER = "is not the weight of a supported layer"
REASONS = {
    "BertForMaskedLM": {
        "cls.predictions.transform.dense": "output head",
        "cls.predictions.decoder": "tied to bert.embeddings.word_embeddings",
    },
    "DistilBertForSequenceClassification": {
        "pre_classifier": "output head",
        "classifier": "output head",
    },
    "LlamaForSequenceClassification": {"model.embed_tokens": "embedding", "score": "output head"},
    "mixtral": {"model.layers.0.mlp.gate": "router", "lm_head": "output head"},
    "deit_tiny_distilled_patch16_224": {
        "patch_embed.proj": "stem",
        "pos_embed": "pos_embed of",
        "head": "output head",
        "head_dist": "output head",
    },
    "resnet50d": {"conv1.0": "stem", "conv1.3": "stem", "conv1.6": "stem", "fc": "output head"},
    "efficientnet_b0": {
        "conv_stem": "stem: reads the raw",
        "blocks.0.0.conv_dw": "depthwise convolution",
    },
    "levit_128s": {
        "head.linear": "output head",
        "head_dist.linear": "output head",
        "stem.conv4.linear": "stem",
    },
    # It standardizes its weight in each forward, so that zeros of the stored weight would not stay zero.
    "nfnet_f0": {
        "stages.0.0.conv1": "timm.layers.std_conv.ScaledStdConv2d overrides the forward of Conv2d"
    },
    "sequencer2d_s": {
        "stages.0.blocks.0.rnn_tokens.rnn_v.weight_hh_l0": f"weight_hh_l0 of LSTM {NO_LAYER}",
        "head.fc": "output head",
    },
}


@pytest.mark.parametrize("name", REASONS)
def test_reasons(name):
    found = reasons(built(name))
    for matrix, reason in REASONS[name].items():
        assert found[matrix].startswith(reason), matrix


class Overriding(nn.Linear):
    def forward(self, x):
        return super().forward(x) * 2


def int8_linear():
    layer = nn.Linear(8, 8)
    layer.weight = nn.Parameter(torch.ones(8, 8, dtype=torch.int8), requires_grad=False)
    return layer


ONE_LAYER = {
    "inheriting": (lambda: nn.modules.linear.NonDynamicallyQuantizableLinear(8, 8), {}),
    "parametrized_bias": (lambda: weight_norm(nn.Linear(8, 8), "bias"), {}),
    "vector_norm": (lambda: nn.LayerNorm(8), None),
    "matrix_norm": (
        lambda: nn.LayerNorm((3, 8)),
        {"part": "weight of LayerNorm", "part.bias": "bias of LayerNorm"},
    ),
    "patched": (
        lambda: Overriding(8, 8),
        {"part": "tests.models.test_inventory.Overriding overrides the forward of Linear"},
    ),
    "depthwise": (lambda: nn.Conv2d(8, 8, 3, groups=8), {"part": "depthwise convolution"}),
    "depthwise_wider": (lambda: nn.Conv2d(8, 16, 3, groups=8), {"part": "depthwise convolution"}),
    "embedding_bag": (lambda: nn.EmbeddingBag(8, 8), {"part": "embedding"}),
    "int8": (int8_linear, {"part": "int8 weights"}),
    "float8": (lambda: nn.Linear(8, 8).to(torch.float8_e4m3fn), {"part": "float8_e4m3fn weights"}),
    "one_dimensional": (lambda: nn.Conv1d(8, 8, 3), {}),
    "three_dimensional": (
        lambda: nn.Conv3d(8, 8, 3),
        {"part": "weight of Conv3d is not the weight of a supported"},
    ),
    "transposed": (
        lambda: nn.ConvTranspose2d(8, 8, 3),
        {"part": "weight of ConvTranspose2d is not"},
    ),
}


@pytest.mark.parametrize(("make", "expected"), ONE_LAYER.values(), ids=ONE_LAYER)
def test_one_layer(make, expected):
    """{} is pruned, None is not listed at all, else each matrix and how its reason starts."""
    found = find_layers(nn.ModuleDict({"part": make(), "other": nn.Linear(8, 8)}))
    layers = ["part", "other"] if expected == {} else ["other"]
    assert [layer.name for layer in found.layers] == layers
    expected = expected or {}
    assert [matrix.name for matrix in found.skipped] == list(expected)
    for matrix in found.skipped:
        assert matrix.detail.startswith(expected[matrix.name])


def test_tied_weights_belong_to_the_first_and_either_name_chooses_them():
    found = found_in("tied")
    assert [layer.name for layer in found.layers] == ["first", "third"]
    assert [(m.name, m.detail, m.shape) for m in found.skipped] == [
        ("second", "tied to first", (32, 32))
    ]
    for name in ("first", "second"):
        assert [layer.name for layer in find_layers(built("tied"), only=[name]).layers] == ["first"]
    assert reasons(built("tied"), skip=["second"]) == {
        "first": "skip='second'",
        "second": "tied to first",
    }


class Classifier(type(built("tied"))):
    def get_classifier(self):
        return self.second


class Speech(nn.Sequential):
    def get_output_embeddings(self):
        raise NotImplementedError


def embedding_behind():
    model = nn.ModuleDict({"decoder": nn.Linear(8, 12, bias=False), "embed": nn.Embedding(12, 8)})
    model["embed"].weight = model["decoder"].weight
    return model


def stem_named(name):
    def make():
        return nn.ModuleDict(
            {
                "first": nn.Conv2d(8, 8, 1),
                name: nn.Sequential(nn.Conv2d(8, 8, 1), nn.Linear(8, 8)),
                f"{name}x": nn.Linear(8, 8),
                f"x{name}": nn.Linear(8, 8),
            }
        )

    return make, dict.fromkeys([f"{name}.0", f"{name}.1"], "stem or patch embedding")


def read_raw(*order):
    inputs = {"signal": nn.Conv1d(2, 8, 3), "image": nn.Conv2d(3, 8, 3)}
    model = nn.ModuleDict({name: inputs[name] for name in order})
    model["later"] = nn.Conv2d(3, 8, 3)
    return model


RAW = "stem: reads the raw image or signal"
STEMS = ("stem", "conv_stem", "patch_embed", "patch_embedding", "patch_embeddings")
SMALL = [
    # Only the first convolution can read the image.
    (lambda: nn.Sequential(nn.Conv2d(8, 3, 1), nn.Conv2d(3, 8, 1)), {}),
    (lambda: nn.Sequential(nn.Conv2d(4, 3, 1), nn.Conv2d(3, 8, 1)), {"0": RAW}),
    (Classifier, {"first": "tied to second: output head", "second": "tied to first"}),
    (lambda: Speech(nn.Linear(8, 8)), {}),
    (embedding_behind, {"decoder": "tied to embed", "embed": "embedding"}),
    (lambda: read_raw("signal", "image"), {"signal": RAW, "image": RAW}),
    (lambda: read_raw("image", "signal"), {"signal": RAW, "image": RAW}),
    *map(stem_named, STEMS),
]


@pytest.mark.parametrize(("make", "expected"), SMALL)
def test_stems_heads_and_tied_weights(make, expected):
    assert reasons(make()) == expected


TWELVE = nn.ModuleDict(
    {
        "blocks": nn.ModuleList(
            nn.ModuleDict({"up": nn.Linear(8, 8), "down": nn.Linear(8, 8)}) for _ in range(12)
        )
    }
)
EVERYTHING = [f"blocks.{index}.{part}" for index in range(12) for part in ("up", "down")]


@pytest.mark.parametrize("sequential", SEQUENTIAL_CHOICES)
@pytest.mark.parametrize(
    ("choice", "dense", "detail"),
    [
        ({"skip": ["*.up"]}, "up", "skip='*.up'"),
        ({"only": ["*.up"]}, "down", "not in only=['*.up']"),
    ],
)
def test_skip_and_only_name_layers(sequential, choice, dense, detail):
    found = find_layers(TWELVE, sequential, **choice)
    left = [name for name in EVERYTHING if name.endswith(dense)]
    assert [matrix.name for matrix in found.skipped] == left
    assert {(matrix.detail, matrix.reason) for matrix in found.skipped} == {(detail, "user")}
    pruned = [name for name in EVERYTHING if name not in left]
    assert [layer.name for layer in found.layers] == pruned
    assert all(stop.layers for stop in found.stops)


@pytest.mark.parametrize("sequential", SEQUENTIAL_CHOICES)
def test_skip_and_only_together(sequential):
    found = find_layers(TWELVE, sequential, only=["blocks.0", "blocks.3.up"], skip=["*.0.down"])
    assert [layer.name for layer in found.layers] == ["blocks.0.up", "blocks.3.up"]
    details = {matrix.name: matrix.detail for matrix in found.skipped}
    assert details["blocks.0.down"] == "skip='*.0.down'"
    assert details["blocks.3.down"] == "not in only=['blocks.0', 'blocks.3.up']"


def test_only_chooses_among_what_can_be_pruned():
    """A head, an embedding or a matrix of no layer is not pruned by being named, and keeps its reason."""
    found = find_layers(built("mixtral"), only=["lm_head", "model.layers.0"])
    experts = [f"mlp.experts.gate_up_proj.{expert}" for expert in range(4)]
    experts += [f"mlp.experts.down_proj.{expert}" for expert in range(4)]
    inside = [*(f"self_attn.{part}_proj" for part in "qkvo"), *experts]
    assert {layer.name for layer in found.layers} == {f"model.layers.0.{name}" for name in inside}
    now = {matrix.name: matrix for matrix in found.skipped}
    for matrix in found_in("mixtral").skipped:
        named = matrix.name.startswith(("lm_head", "model.layers.0"))
        assert now[matrix.name].detail == matrix.detail
        assert matrix.reason is not SkipReason.USER
        assert (now[matrix.name].reason is SkipReason.USER) == (not named)
