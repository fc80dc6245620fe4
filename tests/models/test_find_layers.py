"""What `walk` finds: each matrix once, with units or a reason; and how each layer type is seen as a matrix product."""

import copy
import re
from collections import Counter

import pytest
import timm
import torch
import transformers as hf
from hypothesis import assume, given
from hypothesis import strategies as st
from support.zoo import ZOO, matching, matrices
from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import weight_norm
from transformers.pytorch_utils import Conv1D

from wanda_lightning.methods import SEQUENTIAL_CHOICES
from wanda_lightning.models import Layer, SkipReason, find_layers, layer_kinds

EVERY_GRANULARITY = pytest.mark.parametrize("sequential", SEQUENTIAL_CHOICES)

# ---- models without weights: only their shapes matter

_SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
_VIT = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
_DISTIL = {"vocab_size": 64, "dim": 32, "hidden_dim": 64, "n_layers": 2, "n_heads": 4, "pad_token_id": 0}

ON_META = {
    "bert_classifier": lambda: hf.BertForSequenceClassification(hf.BertConfig(**_SIZES)),
    "bert_masked": lambda: hf.BertForMaskedLM(hf.BertConfig(**_SIZES)),
    "bert_pretraining": lambda: hf.BertForPreTraining(hf.BertConfig(**_SIZES)),
    "roberta_classifier": lambda: hf.RobertaForSequenceClassification(hf.RobertaConfig(**_SIZES)),
    "distilbert_classifier": lambda: hf.DistilBertForSequenceClassification(hf.DistilBertConfig(**_DISTIL)),
    "llama_classifier": lambda: hf.LlamaForSequenceClassification(hf.LlamaConfig(**_SIZES)),
    "vit_classifier": lambda: hf.ViTForImageClassification(hf.ViTConfig(**_VIT, image_size=32, patch_size=8)),
    "mixtral": lambda: hf.MixtralForCausalLM(
        hf.MixtralConfig(**_SIZES, num_key_value_heads=2, num_local_experts=4, tie_word_embeddings=False)
    ),
    **{
        name: lambda name=name: timm.create_model(name)
        for name in (
            "deit_tiny_distilled_patch16_224",
            "resnet50d",
            "resnet26d",
            "resnext50_32x4d",
            "efficientnet_b0",
            "levit_128s",
            "ghostnet_100",
            "nfnet_f0",
            "sequencer2d_s",
            "test_vit",
        )
    },
}


def on_meta(name):
    with torch.device("meta"):
        return ON_META[name]()


def reasons(model, **choices):
    return {matrix.name: matrix.detail for matrix in find_layers(model, **choices).skipped}


class Wrapper(nn.Module):
    """A model as a part of another, as in a LightningModule."""

    def __init__(self, net):
        super().__init__()
        self.net = net


ALL = {
    **{name: specimen.build for name, specimen in ZOO.items()},
    **{name: (lambda name=name: on_meta(name)) for name in ON_META},
}
EVERY_MODEL = pytest.mark.parametrize("name", ALL)


# ---- completeness


@EVERY_GRANULARITY
@EVERY_MODEL
def test_each_matrix_is_there_once(name, sequential):
    model = ALL[name]()
    found = find_layers(model, sequential)
    everything = matrices(model)
    assert Counter([layer.name for layer in found.layers] + [m.name for m in found.skipped]) == Counter(
        list(everything)
    )
    once = [(id(layer.parameter), layer.expert) for layer in found.layers]
    once += [(id(everything[m.name]), None) for m in found.skipped if not m.detail.startswith("tied to ")]
    assert len(once) == len(set(once))
    assert {parameter for parameter, _ in once} == {id(p) for p in model.parameters() if p.ndim >= 2}
    for layer in found.layers:
        assert layer.parameter is everything[layer.name]
        assert layer.read().numel() == layer.size
        assert layer.parameter.numel() == layer.size * (1 if layer.expert is None else len(layer.parameter))
    for matrix in found.skipped:
        assert matrix.shape == tuple(everything[matrix.name].shape)
        assert matrix.detail
        assert matrix.reason not in (SkipReason.QUANTIZED, SkipReason.NO_SHAPE)


@EVERY_GRANULARITY
@EVERY_MODEL
def test_units_are_disjoint_and_hold_their_layers(name, sequential):
    model = ALL[name]()
    modules, units = dict(model.named_modules()), find_layers(model, sequential).units
    assert all(unit.layers for unit in units)
    if sequential == "none":
        assert [(unit.name, unit.module) for unit in units] == [("", None)]
        return
    inside = [module for unit in units for module in unit.module.modules()]
    assert len(inside) == len(set(inside))
    for unit in units:
        assert modules[unit.name] is unit.module
        assert {layer.module for layer in unit.layers} <= set(unit.module.modules())


@EVERY_MODEL
def test_granularity_changes_only_the_units(name):
    model = ALL[name]()
    by_granularity = {sequential: find_layers(model, sequential) for sequential in SEQUENTIAL_CHOICES}
    order = [id(parameter) for parameter in model.parameters()]
    layers = by_granularity["layer"].layers
    assert sorted(layers, key=lambda layer: order.index(id(layer.parameter))) == list(layers)
    for found in by_granularity.values():
        assert {layer.name for layer in found.layers} == {layer.name for layer in layers}
        assert found.skipped == by_granularity["layer"].skipped
    alone = [unit for unit in by_granularity["layer"].units if len(unit.layers) == 1]
    for unit, layer in zip(alone, [layer for layer in layers if layer.expert is None], strict=True):
        assert (unit.name, unit.module, unit.layers) == (layer.name, layer.module, (layer,))
    for unit in by_granularity["layer"].units:
        if unit not in alone:  # the experts of a module, which no forward tells apart
            assert unit.module is model.get_submodule(unit.name)
            assert unit.layers == tuple(layer for layer in layers if layer.module is unit.module)


@pytest.mark.parametrize("name", ZOO)
def test_blocks_of_the_zoo(name):
    model = ZOO[name].build()
    blocks = {unit.name for unit in find_layers(model).units if unit.module is not unit.layers[0].module}
    assert blocks == matching(dict(model.named_modules()), ZOO[name].blocks)
    dense = {matrix.name for matrix in find_layers(model).skipped if not matrix.detail.startswith("tied to ")}
    assert dense <= matching(matrices(model), ZOO[name].dense)


@EVERY_MODEL
def test_a_model_inside_another_is_found_the_same(name):
    model = ALL[name]()
    alone, inside = find_layers(model), find_layers(Wrapper(model))
    assert [f"net.{unit.name}" for unit in alone.units] == [unit.name for unit in inside.units]
    assert [f"net.{matrix.name}" for matrix in alone.skipped] == [matrix.name for matrix in inside.skipped]
    assert [m.detail for m in alone.skipped] == [m.detail.replace("tied to net.", "tied to ") for m in inside.skipped]


def compile_parts(model):
    """Compile every child that holds other modules, and the members of lists."""
    for name, child in [*model.named_children()]:
        if isinstance(child, nn.ModuleList):
            compile_parts(child)
        elif [*child.children()]:
            setattr(model, name, torch.compile(child, backend="eager"))
    return model


@pytest.mark.parametrize("sequential", ["block", "layer", "none"])
@pytest.mark.parametrize("compiled", [lambda model: torch.compile(model, backend="eager"), compile_parts])
@pytest.mark.parametrize("name", ["llama", "vit", "convnext", "plain_mlp", "tied"])
def test_a_compiled_model_is_found_the_same(name, compiled, sequential):
    """With the names that it has without `torch.compile`."""
    alone, found = find_layers(ALL[name](), sequential), find_layers(compiled(ALL[name]()), sequential)
    assert alone.layers
    assert [unit.name for unit in found.units] == [unit.name for unit in alone.units]
    assert [layer.name for layer in found.layers] == [layer.name for layer in alone.layers]
    assert found.skipped == alone.skipped
    assert found.blocks == alone.blocks


UNTIED = [name for name in ZOO if name not in ("gemma2", "gemma3", "opt", "gpt2", "t5", "tied")]


@pytest.mark.parametrize("name", UNTIED)  # moving to the meta device unties weights
def test_works_on_the_meta_device(name):
    model = ZOO[name].build()
    real, meta = find_layers(model), find_layers(copy.deepcopy(model).to("meta"))
    assert [layer.name for layer in real.layers] == [layer.name for layer in meta.layers]
    assert real.skipped == meta.skipped
    assert [unit.name for unit in real.units] == [unit.name for unit in meta.units]
    for here, there in zip(real.layers, meta.layers, strict=True):
        assert here.read().shape == there.read().shape


def test_blocks_of_models_that_declare_them():
    found = find_layers(on_meta("bert_classifier"))
    assert [unit.name for unit in found.units] == ["bert.encoder.layer.0", "bert.encoder.layer.1", "bert.pooler.dense"]
    assert [len(unit.layers) for unit in found.units] == [6, 6, 1]


@pytest.mark.parametrize(("name", "convolutions"), [("resnet18", 19), ("resnet50", 52)])
def test_no_convolution_of_a_resnet_is_forgotten(name, convolutions):
    """19 of ResNet-18's 20; the obvious search for the longest list of equal blocks finds 15."""
    with torch.device("meta"):
        layers = find_layers(timm.create_model(name)).layers
    assert sum(isinstance(layer.module, nn.Conv2d) for layer in layers) == convolutions == len(layers)


# ---- reasons

NO_LAYER = "is not the weight of a supported layer"
REASONS = {
    "bert_classifier": {
        "bert.embeddings.word_embeddings": "embedding",
        "bert.embeddings.position_embeddings": "embedding",
        "classifier": "output head",
    },
    "bert_masked": {
        "cls.predictions.transform.dense": "output head",
        "cls.predictions.decoder": "tied to bert.embeddings.word_embeddings",
    },
    "bert_pretraining": {"cls.seq_relationship": "output head"},
    "roberta_classifier": {"classifier.dense": "output head", "classifier.out_proj": "output head"},
    "distilbert_classifier": {"pre_classifier": "output head", "classifier": "output head"},
    "llama_classifier": {"model.embed_tokens": "embedding", "score": "output head"},
    "vit_classifier": {
        "vit.embeddings.cls_token": "cls_token of ViTEmbeddings",
        "vit.embeddings.patch_embeddings.projection": "stem",
        "classifier": "output head",
    },
    "mixtral": {
        "model.layers.0.mlp.gate": "router",
        "lm_head": "output head",
    },
    "deit_tiny_distilled_patch16_224": {
        "patch_embed.proj": "stem",
        "pos_embed": "pos_embed of",
        "head": "output head",
        "head_dist": "output head",
    },
    "resnet50d": {"conv1.0": "stem", "conv1.3": "stem", "conv1.6": "stem", "fc": "output head"},
    "resnet26d": {"conv1.0": "stem", "conv1.3": "stem", "conv1.6": "stem", "fc": "output head"},
    "resnext50_32x4d": {"conv1": "stem: reads the raw image", "layer1.0.conv2": "grouped convolution"},
    "efficientnet_b0": {"conv_stem": "stem: reads the raw image", "blocks.0.0.conv_dw": "depthwise convolution"},
    "levit_128s": {"head.linear": "output head", "head_dist.linear": "output head", "stem.conv4.linear": "stem"},
    "nfnet_f0": {"stages.0.0.conv1": "ScaledStdConv2d standardizes its weight in each forward"},
    "sequencer2d_s": {
        "stages.0.blocks.0.rnn_tokens.rnn_v.weight_hh_l0": f"weight_hh_l0 of LSTM {NO_LAYER}",
        "head.fc": "output head",
    },
}


@pytest.mark.parametrize("name", REASONS)
def test_reasons(name):
    found = reasons(on_meta(name))
    for matrix, reason in REASONS[name].items():
        assert found[matrix].startswith(reason), matrix


@pytest.mark.parametrize("name", ["resnet50d", "resnet26d"])
def test_only_the_deep_stem_and_the_head_are_left_out(name):
    assert reasons(on_meta(name)).keys() == {"conv1.0", "conv1.3", "conv1.6", "fc"}


def test_vectors_are_not_listed():
    model = on_meta("bert_classifier")
    found = find_layers(model)
    names = [layer.name for layer in found.layers] + [matrix.name for matrix in found.skipped]
    assert any(isinstance(module, nn.LayerNorm) for module in model.modules())
    assert not [name for name in names if "Norm" in name or name.endswith("bias")]


class Overriding(nn.Linear):
    def forward(self, x):
        return super().forward(x) * 2


class Inheriting(nn.Linear):
    pass


class Several(nn.Module):
    def __init__(self, **parts):
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)


def int8_linear():
    layer = nn.Linear(8, 8)
    layer.weight = nn.Parameter(torch.ones(8, 8, dtype=torch.int8), requires_grad=False)
    return layer


ONE_LAYER = {
    "linear": (lambda: nn.Linear(8, 8), {}),
    "inheriting": (lambda: Inheriting(8, 8), {}),
    "conv1d_of_gpt2": (lambda: Conv1D(8, 8), {}),
    "convolution": (lambda: nn.Conv2d(8, 8, 3), {}),
    "vector_norm": (lambda: nn.LayerNorm(8), None),
    "matrix_norm": (lambda: nn.LayerNorm((3, 8)), {"part": "weight of LayerNorm", "part.bias": "bias of LayerNorm"}),
    "patched": (
        lambda: Overriding(8, 8),
        {"part": "tests.models.test_find_layers.Overriding overrides the forward of Linear"},
    ),
    "depthwise": (lambda: nn.Conv2d(8, 8, 3, groups=8), {"part": "depthwise convolution"}),
    "depthwise_wider": (lambda: nn.Conv2d(8, 16, 3, groups=8), {"part": "depthwise convolution"}),
    "grouped": (lambda: nn.Conv2d(8, 8, 3, groups=2), {"part": "grouped convolution"}),
    "image": (lambda: nn.Conv2d(3, 8, 3), {"part": "stem: reads the raw image"}),
    "embedding": (lambda: nn.Embedding(8, 8), {"part": "embedding"}),
    "embedding_bag": (lambda: nn.EmbeddingBag(8, 8), {"part": "embedding"}),
    "int8": (int8_linear, {"part": "int8 weights"}),
    "float8": (lambda: nn.Linear(8, 8).to(torch.float8_e4m3fn), {"part": "float8_e4m3fn weights"}),
    "parametrized": (
        lambda: weight_norm(nn.Linear(8, 8)),
        {f"part.parametrizations.weight.original{i}": "parametrized" for i in range(2)},
    ),
    "one_dimensional": (lambda: nn.Conv1d(8, 8, 3), {}),
    "three_dimensional": (lambda: nn.Conv3d(8, 8, 3), {"part": "weight of Conv3d is not the weight of a supported"}),
    "transposed": (lambda: nn.ConvTranspose2d(8, 8, 3), {"part": "weight of ConvTranspose2d is not"}),
    "bilinear": (lambda: nn.Bilinear(8, 8, 8), {"part": "weight of Bilinear is not"}),
}


@pytest.mark.parametrize(("make", "expected"), ONE_LAYER.values(), ids=ONE_LAYER)
def test_one_layer(make, expected):
    """{} is pruned, None is not listed at all, else each matrix and how its reason starts."""
    found = find_layers(Several(part=make(), other=nn.Linear(8, 8)))
    assert [layer.name for layer in found.layers] == ["part", "other"] if expected == {} else ["other"]
    skipped = {matrix.name: matrix.detail for matrix in found.skipped}
    assert skipped.keys() == (expected or {}).keys()
    for name, start in (expected or {}).items():
        assert skipped[name].startswith(start)


def test_what_is_parametrized_says_how_to_go_on():
    model = Several(part=weight_norm(nn.Linear(8, 8)))
    assert all("remove_parametrizations" in reason for reason in reasons(model).values())
    parametrize.remove_parametrizations(model.part, "weight")
    assert [layer.name for layer in find_layers(model).layers] == ["part"]


@pytest.mark.parametrize("make", [int8_linear, lambda: nn.Linear(8, 8).to(torch.float8_e5m2)])
def test_packed_weights_are_for_the_user_to_decide(make):
    model = Several(part=make(), other=nn.Linear(8, 8))
    assert [matrix.reason in (SkipReason.QUANTIZED, SkipReason.NO_SHAPE) for matrix in find_layers(model).skipped] == [
        True
    ]
    assert [
        matrix.reason in (SkipReason.QUANTIZED, SkipReason.NO_SHAPE)
        for matrix in find_layers(model, skip=["part"]).skipped
    ] == [False]


def test_only_the_first_convolution_can_be_the_image_stem():
    found = find_layers(Several(first=nn.Conv2d(8, 3, 1), second=nn.Conv2d(3, 8, 1)))
    assert [layer.name for layer in found.layers] == ["first", "second"]
    found = find_layers(Several(first=nn.Conv2d(4, 3, 1), second=nn.Conv2d(3, 8, 1)))
    assert [layer.name for layer in found.layers] == ["second"]


@pytest.mark.parametrize("name", ["stem", "conv_stem", "patch_embed", "patch_embedding", "patch_embeddings"])
def test_stems_by_name(name):
    deep = {"first": nn.Conv2d(8, 8, 1), name: nn.Sequential(nn.Conv2d(8, 8, 1), nn.Linear(8, 8))}
    assert reasons(Several(**deep)) == dict.fromkeys([f"{name}.0", f"{name}.1"], "stem or patch embedding")
    other = Several(**{f"{name}x": nn.Linear(8, 8), f"x{name}": nn.Linear(8, 8)})
    assert reasons(other) == {}


def test_a_patch_embedding_of_many_channels():
    """Satellite images: no raw image of three channels, but still the patch embedding."""
    model = timm.create_model("test_vit", in_chans=13)
    assert reasons(model)["patch_embed.proj"] == "stem or patch embedding"


def test_tied_weights_belong_to_the_first():
    found = find_layers(ZOO["tied"].build())
    assert [layer.name for layer in found.layers] == ["first", "third"]
    assert [(m.name, m.detail, m.shape) for m in found.skipped] == [("second", "tied to first", (32, 32))]


def test_skipping_one_of_a_tied_pair_leaves_both_dense():
    found = find_layers(ZOO["tied"].build(), skip=["second"])
    assert [layer.name for layer in found.layers] == ["third"]
    assert {matrix.name: matrix.detail for matrix in found.skipped} == {
        "first": "skip='second'",
        "second": "tied to first",
    }


def test_a_layer_tied_to_an_output_head_is_left_dense():
    class Classifier(type(ZOO["tied"].build())):
        def get_classifier(self):
            return self.second

    found = find_layers(Classifier())
    assert [layer.name for layer in found.layers] == ["third"]
    assert {matrix.name: matrix.detail for matrix in found.skipped} == {
        "first": "tied to second: output head",
        "second": "tied to first",
    }


def test_a_shared_module_is_there_under_its_first_name():
    found = find_layers(ZOO["block_twice"].build())
    names = {layer.name.rpartition(".")[0] for layer in found.layers}
    assert names == {"blocks.0", "blocks.1", "blocks.2", ""}
    assert found.skipped == ()


def test_unknown_granularity():
    with pytest.raises(ValueError, match=r"one of block, layer, none, but it is 'row'"):
        find_layers(nn.Linear(8, 8), "row")


# ---- skip


def twelve():
    return Several(blocks=nn.ModuleList(Several(up=nn.Linear(8, 8), down=nn.Linear(8, 8)) for _ in range(12)))


EVERYTHING = [f"blocks.{index}.{part}" for index in range(12) for part in ("up", "down")]
SKIPS = {
    "blocks.3.up": ["blocks.3.up"],
    "blocks.1": ["blocks.1.up", "blocks.1.down"],  # and not those of blocks 10 and 11
    "blocks": EVERYTHING,
    "blocks.1*": [name for name in EVERYTHING if name.startswith("blocks.1")],
    "*.up": [name for name in EVERYTHING if name.endswith("up")],
    "blocks.[02].*": [name for name in EVERYTHING if re.match(r"blocks\.[02]\.", name)],
    "blocks.?.up": [f"blocks.{index}.up" for index in range(10)],
    r"re:blocks\.[02]\..*": [name for name in EVERYTHING if re.match(r"blocks\.[02]\.", name)],
    r"re:blocks\.\d\.up": [f"blocks.{index}.up" for index in range(10)],
    r"re:.*(3|7).*": [name for name in EVERYTHING if "3" in name or "7" in name],
}


@EVERY_GRANULARITY
@pytest.mark.parametrize(("pattern", "names"), SKIPS.items(), ids=SKIPS)
def test_skip(pattern, names, sequential):
    found = find_layers(twelve(), sequential, [pattern])
    assert [matrix.name for matrix in found.skipped] == names
    assert {matrix.detail for matrix in found.skipped} == {f"skip={pattern!r}"}
    assert [layer.name for layer in found.layers] == [name for name in EVERYTHING if name not in names]
    assert all(unit.layers for unit in found.units)


def test_several_skips_add_up():
    found = find_layers(twelve(), skip=["blocks.0", "*.up"])
    assert [layer.name for layer in found.layers] == [f"blocks.{index}.down" for index in range(1, 12)]


@pytest.mark.parametrize(
    ("pattern", "nearest"),
    [
        ("blocks.3.upp", "blocks.3.up"),
        ("block.11.down", "blocks.11.down"),
        ("re:up", ""),  # a regular expression matches the whole name
        (r"re:blocks\.1", ""),
        ("", ""),
        ("Blocks.0.up", "blocks.0.up"),
        ("blocks.12", "blocks"),
    ],
)
def test_a_skip_that_matches_nothing_names_the_nearest(pattern, nearest):
    with pytest.raises(ValueError, match="matches no matrix of the model") as caught:
        find_layers(twelve(), skip=["*.up", pattern])
    assert f"skip={pattern!r}" in str(caught.value)
    assert f"the nearest is '{nearest}" in str(caught.value)
    assert "glob" in str(caught.value)


def test_a_glob_means_everything_inside_as_a_name_does():
    def named(pattern):
        return {
            name
            for name, reason in reasons(on_meta("llama_classifier"), skip=[pattern]).items()
            if reason.startswith("skip=")
        }

    assert named("*.layers.?.mlp") == named("*.layers.*.mlp.*") == named("re:.*mlp.*") != set()
    assert named("*s.1") == named("model.layers.1")


def test_what_is_skipped_already_keeps_its_reason():
    model = on_meta("mixtral")
    found = reasons(model, skip=["lm_head", "*.gate", "*.q_proj"])
    default = reasons(model)
    assert found == {**default, **{f"model.layers.{i}.self_attn.q_proj": "skip='*.q_proj'" for i in range(2)}}


# ---- layers as matrix products


def layer_of(module):
    kind = next(kind for kind in layer_kinds().values() if type(module) is kind.layer_type)
    return Layer("layer", module.double(), kind)


def rows(module, output):
    """A layer's output with one row for each token."""
    if isinstance(module, nn.Conv1d | nn.Conv2d):
        output = output if output.ndim == module.weight.ndim else output[None]
        return output.movedim(1, -1).flatten(0, -2)
    return output.reshape(-1, output.shape[-1])  # a vector is one token


def assert_is_a_product(layer, x):
    with torch.no_grad():
        expected = rows(layer.module, layer.module(x))
        product = layer.tokens(x) @ layer.read().T
        if layer.module.bias is not None:
            product = product + layer.module.bias
    torch.testing.assert_close(product, expected, rtol=1e-10, atol=1e-10)


@torch.no_grad()
def assert_round_trip(layer):
    before, place = layer.parameter.clone(), layer.parameter.data_ptr()
    layer.write(layer.read().clone())
    assert torch.equal(layer.parameter, before)
    new = torch.randn_like(layer.read())
    layer.write(new)
    assert torch.equal(layer.read(), new)
    assert layer.parameter.data_ptr() == place
    assert layer.parameter.shape == before.shape
    assert sorted(layer.parameter.flatten().tolist()) == sorted(new.flatten().tolist())
    layer.write(torch.zeros_like(new))
    assert not layer.parameter.any()


PAIRS = st.tuples(st.integers(1, 3), st.integers(1, 3))


@st.composite
def convolutions(draw):
    """A convolution over one or two dimensions and what it takes, or a batch of that."""
    make = draw(st.sampled_from([nn.Conv1d, nn.Conv2d]))
    places = 1 if make is nn.Conv1d else 2

    def sizes(least, most):
        return tuple(draw(st.integers(least, most)) for _ in range(places))

    kernel, dilation, stride = sizes(1, 3), sizes(1, 3), sizes(1, 3)
    padding = draw(st.one_of(st.sampled_from(["same", "valid"]), st.just(sizes(0, 3))))
    if padding == "same":
        stride = (1,) * places
    size = sizes(4, 8)
    mode = draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"]))
    module = make(
        draw(st.integers(1, 4)),
        draw(st.integers(1, 3)),
        kernel,
        stride=stride,
        padding=padding,
        dilation=dilation,
        padding_mode=mode,
        bias=draw(st.booleans()),
    )
    batch = draw(st.sampled_from([(), (1,), (2,)]))
    pads = module._reversed_padding_repeated_twice[::-1]
    for dimension, (d, k) in enumerate(zip(dilation, kernel, strict=True)):
        assume(size[dimension] + sum(pads[2 * dimension : 2 * dimension + 2]) >= d * (k - 1) + 1)
    return module, torch.randn(*batch, module.in_channels, *size, dtype=torch.float64)


# PyTorch pads an image by itself where the two sides differ, and says so.
EVEN_SAME = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning")


@EVEN_SAME
@given(convolutions())
def test_a_convolution_is_a_product_of_its_tokens(case):
    module, x = case
    layer = layer_of(module)
    assert_is_a_product(layer, x)
    assert_round_trip(layer)


@EVEN_SAME
@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize("padding", ["same", "valid", 0, 1, (2, 1)])
@pytest.mark.parametrize("kernel", [1, (2, 3), 3])
@pytest.mark.parametrize("batch", [(), (2,)])
def test_every_padding_of_a_convolution(batch, kernel, padding, mode):
    """What hypothesis may not draw: each mode with each way to give a padding."""
    module = nn.Conv2d(3, 4, kernel, padding=padding, padding_mode=mode, dilation=(1, 2))
    assert_is_a_product(layer_of(module), torch.randn(*batch, 3, 7, 8, dtype=torch.float64))


@pytest.mark.parametrize("make", [nn.Linear, lambda d_in, d_out: Conv1D(d_out, d_in)], ids=["Linear", "Conv1D"])
@given(st.integers(1, 9), st.integers(1, 9), st.lists(st.integers(1, 4), max_size=3))
def test_a_linear_layer_is_a_product_of_its_tokens(make, d_in, d_out, sizes):
    layer = layer_of(make(d_in, d_out))
    assert layer.read().shape == (d_out, d_in)
    x = torch.randn(*sizes, d_in, dtype=torch.float64)
    assert_is_a_product(layer, x)
    assert layer.tokens(x).shape == (x.numel() // d_in, d_in)
    assert_round_trip(layer)


@pytest.mark.parametrize("make", [lambda: nn.Linear(4, 4), lambda: Conv1D(4, 4), lambda: nn.Conv2d(4, 4, 1)])
def test_read_carries_no_gradient_and_leaves_the_weight_alone(make):
    layer = layer_of(make())
    before = layer.parameter.detach().clone()
    assert not layer.read().requires_grad
    layer.read().masked_fill(layer.read() > 0, 0)
    assert torch.equal(layer.parameter, before)


def test_groups_of_a_convolution_are_channels_of_one_kernel_position():
    module = nn.Conv2d(8, 3, (2, 3))
    matrix, weight = layer_of(module).read(), module.weight
    for row in range(3):
        for group in range(matrix.shape[1] // 4):
            position, first = divmod(4 * group, 8)
            vertical, horizontal = divmod(position, 3)
            channels = weight[row, first : first + 4, vertical, horizontal]
            assert torch.equal(matrix[row, 4 * group : 4 * group + 4], channels)


def test_layers_with_equal_windows_have_equal_tokens():
    """Two convolutions of one input share statistics only where their tokens are the same."""
    x = torch.randn(2, 4, 8, 8, dtype=torch.float64)
    choices = [
        {"kernel_size": 1},
        {"kernel_size": 1, "stride": 2},
        {"kernel_size": 3},
        {"kernel_size": (3, 1)},
        {"kernel_size": 3, "padding": 1},
        {"kernel_size": 3, "padding": 1, "padding_mode": "circular"},
        {"kernel_size": 3, "padding": 1, "stride": 2},
        {"kernel_size": 3, "dilation": 2},
    ]
    layers = [layer_of(nn.Conv2d(4, width, **choice)) for choice in choices for width in (2, 3)]
    tokens = [layer.tokens(x) for layer in layers]
    for one, its_tokens in zip(layers, tokens, strict=True):
        for other, other_tokens in zip(layers, tokens, strict=True):
            assert (one.window == other.window) == torch.equal(its_tokens, other_tokens)
    linear = layer_of(nn.Linear(8, 2))
    assert linear.window == layer_of(nn.Linear(8, 3)).window != layers[0].window


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
def test_tokens_in_half_precision(mode, dtype):
    """Tokens are copies of inputs: rounding to half precision comes before or after, and is the same."""
    layer = layer_of(nn.Conv2d(3, 4, 3, padding=1, padding_mode=mode))
    x = torch.randn(2, 3, 5, 5).to(dtype)
    assert torch.equal(layer.tokens(x).double(), layer.tokens(x.double()))


# ---- what once went wrong


def test_models_whose_matcher_is_a_function_are_walked():
    with torch.device("meta"):
        found = find_layers(timm.create_model("inception_v3"))
    assert found.layers


def test_an_embedding_is_never_pruned_through_a_tied_layer():
    model = nn.ModuleDict({"decoder": nn.Linear(8, 12, bias=False), "embed": nn.Embedding(12, 8)})
    model["embed"].weight = model["decoder"].weight
    found = find_layers(model)
    assert {(matrix.name, matrix.detail) for matrix in found.skipped} == {
        ("decoder", "tied to embed"),
        ("embed", "embedding"),
    }
    assert not found.layers


def test_packed_weights_in_buffers_are_named():
    layer = nn.Linear(8, 8)
    layer.register_buffer("qweight", torch.zeros(8, 1, dtype=torch.int32))
    assert [
        (m.name, m.reason in (SkipReason.QUANTIZED, SkipReason.NO_SHAPE))
        for m in find_layers(nn.Sequential(layer)).skipped
    ] == [("0.qweight", True)]


def test_a_root_layer_has_a_name():
    assert [layer.name for layer in find_layers(nn.Linear(8, 8)).layers] == ["weight"]


def test_only_a_parametrized_weight_is_out_of_reach():
    layer = nn.Linear(8, 8)
    parametrize.register_parametrization(layer, "bias", nn.Identity())
    assert [found.name for found in find_layers(nn.Sequential(layer)).layers] == ["0"]


# ---- only

ONLY = {
    "blocks.1": ["blocks.1.up", "blocks.1.down"],
    "*.up": [name for name in EVERYTHING if name.endswith("up")],
    r"re:blocks\.[02]\..*": [name for name in EVERYTHING if re.match(r"blocks\.[02]\.", name)],
}


@EVERY_GRANULARITY
@pytest.mark.parametrize(("pattern", "names"), ONLY.items(), ids=ONLY)
def test_only(pattern, names, sequential):
    found = find_layers(twelve(), sequential, only=[pattern])
    assert [layer.name for layer in found.layers] == names
    assert [matrix.name for matrix in found.skipped] == [name for name in EVERYTHING if name not in names]
    assert {matrix.detail for matrix in found.skipped} == {f"not in only=[{pattern!r}]"}
    assert all(matrix.reason is SkipReason.USER for matrix in found.skipped)
    assert all(unit.layers for unit in found.units)


def test_several_only_add_up_and_skip_wins():
    found = find_layers(twelve(), only=["blocks.0", "blocks.3.up"], skip=["*.0.down"])
    assert [layer.name for layer in found.layers] == ["blocks.0.up", "blocks.3.up"]
    reasons = {matrix.name: matrix.detail for matrix in found.skipped}
    assert reasons["blocks.0.down"] == "skip='*.0.down'"
    assert reasons["blocks.3.down"] == "not in only=['blocks.0', 'blocks.3.up']"


def test_an_only_that_matches_nothing_names_the_nearest():
    with pytest.raises(
        ValueError, match=r"only='blocks.3.upp' matches no matrix of the model; the nearest is 'blocks.3"
    ):
        find_layers(twelve(), only=["blocks.1", "blocks.3.upp"])


def test_only_chooses_among_what_can_be_pruned():
    """A head, an embedding or a matrix of no layer is not pruned by being named, and keeps its reason."""
    model = on_meta("mixtral")
    found = find_layers(model, only=["lm_head", "model.layers.0"])
    experts = [f"mlp.experts.{part}.{e}" for part in ("gate_up_proj", "down_proj") for e in range(4)]
    inside = [*(f"self_attn.{part}_proj" for part in "qkvo"), *experts]
    assert {layer.name for layer in found.layers} == {f"model.layers.0.{name}" for name in inside}
    default, now = find_layers(model), {matrix.name: matrix for matrix in found.skipped}
    for matrix in default.skipped:
        assert now[matrix.name].detail == matrix.detail
        assert (now[matrix.name].reason is SkipReason.USER) == (
            not matrix.name.startswith(("lm_head", "model.layers.0"))
        )
    assert not any(matrix.reason is SkipReason.USER for matrix in default.skipped)


@pytest.mark.parametrize("name", ["first", "second"])
def test_either_name_of_a_tied_pair_chooses_it(name):
    found = find_layers(ZOO["tied"].build(), only=[name])
    assert [layer.name for layer in found.layers] == ["first"]


def test_packed_weights_outside_of_only_are_decided():
    model = Several(part=int8_linear(), other=nn.Linear(8, 8))
    assert [
        matrix.reason in (SkipReason.QUANTIZED, SkipReason.NO_SHAPE)
        for matrix in find_layers(model, only=["other"]).skipped
    ] == [False]
    assert [
        matrix.reason in (SkipReason.QUANTIZED, SkipReason.NO_SHAPE)
        for matrix in find_layers(model, only=["part", "other"]).skipped
    ] == [True]


@pytest.mark.parametrize("order", [("signal", "image"), ("image", "signal")])
def test_a_model_of_signals_and_images_has_two_stems(order):
    inputs = {"signal": nn.Conv1d(2, 8, 3), "image": nn.Conv2d(3, 8, 3)}
    model = nn.ModuleDict({**{name: inputs[name] for name in order}, "later": nn.Conv2d(3, 8, 3)})
    reasons = {matrix.name: matrix.detail for matrix in find_layers(model, "none").skipped}
    assert reasons == {name: f"stem: reads the raw {name}" for name in order}
