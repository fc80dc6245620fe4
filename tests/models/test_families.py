"""A sample of the families in support/zoo.py, pruned and shrunk, and proof that the checks can fail."""

import pytest
from support import families
from support.families import ORDINARY, OWN_FILE
from support.pairwise import with_nightly
from support.zoo import family, names, of_timm

from wanda_lightning import prune
from wanda_lightning.core import RIA

# Models of transformers and timm warn about their own renamed arguments and missing kernels.
pytestmark = pytest.mark.filterwarnings("ignore")

SAMPLE = {
    ("causal", "gemma3n_text"): "per-layer inputs, AltUp, shared keys and values",
    ("causal", "reformer"): "reversible blocks, hashing",
    ("causal", "zamba2"): "state spaces, shared blocks with adapters",
    ("other", "AlbertForMaskedLM"): "one block for all layers",
    ("other", "LlavaForConditionalGeneration"): "images in text",
    ("timm", "test_efficientnet"): "inverted bottlenecks",
}
TIMM = [
    "test_byobnet",
    "test_vit",
    "test_convnext",
    "test_resnet",
    "test_mambaout",
    "test_nfnet",
    "test_coatnet",
    "mobilevit_xxs",
    "levit_128s",
    "test_vit_relpos",
    "crossvit_tiny_240",
    "coat_tiny",
]
WAYS = [("block", "unstructured"), ("layer", "2:4"), ("none", "unstructured")]
MANY_UNITS = ("crossvit_tiny_240", "coat_tiny")  # too slow for the slow procedure


def exists(kind, name):
    """Tell whether the installed versions have a family."""
    return kind == "timm" or name in names(kind)


def of(kind, name):
    return of_timm(name) if kind == "timm" else family(kind, name)


@pytest.mark.parametrize(("kind", "name"), SAMPLE)
def test_a_sample_of_families(kind, name):
    ways = WAYS if kind == "timm" else WAYS[:2]
    assert families.check(of(kind, name), ways=ways).coverage > 0.9


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("kind", "name"),
    [(kind, name) for kind in ("causal", "other") for name in names(kind)]
    + [("timm", name) for name in TIMM],
)
def test_every_family(kind, name):
    try:
        families.check(of(kind, name), slowly=name not in MANY_UNITS)
    except families.CannotBuild as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("choices", [{"criterion": RIA()}, {"sequential": "none"}])
def test_other_masks_are_seen(monkeypatch, choices):
    def prune_otherwise(*args, **kwargs):
        kwargs.update(choices)
        return prune(*args, **kwargs)

    monkeypatch.setattr(families, "prune", prune_otherwise)
    with pytest.raises(
        AssertionError, match=r"float64: \d+ of \d+ zeros are not those of the slow procedure"
    ):
        families.check(of("causal", "llama"), ways=WAYS[:1])


NONE = "no hidden units found"
SHRUNK = {
    ("causal", "llama"): ORDINARY,
    ("causal", "bloom"): OWN_FILE,  # its configuration has no width
    ("causal", "sarvam_moe"): OWN_FILE,  # names of its own for tensors in the files
    ("causal", "xlm"): OWN_FILE,  # its layers write into a cache
    ("timm", "test_vit"): ORDINARY,
    ("causal", "mamba"): NONE,
    ("causal", "mixtral"): NONE,  # experts in one tensor
    ("other", "SqueezeBertForMaskedLM"): NONE,  # grouped convolutions
    ("other", "AlbertForMaskedLM"): NONE,  # a block that runs more than once
}
SHRUNK_AT_NIGHT = {
    ("causal", "gpt2"): ORDINARY,
    ("causal", "qwen3_next"): ORDINARY,  # shared experts
    ("causal", "deepseek_v3"): OWN_FILE,  # dense layers and shared experts
    # Its forward reads a number of its configuration that is a width by chance.
    ("causal", "gemma3n_text"): OWN_FILE,
    ("other", "T5ForConditionalGeneration"): ORDINARY,
    ("other", "LlavaForConditionalGeneration"): ORDINARY,
    ("timm", "test_convnext"): OWN_FILE,
    ("timm", "test_efficientnet"): OWN_FILE,
    ("timm", "test_resnet"): OWN_FILE,
}


def rows(table):
    return [(kind, name, folder) for (kind, name), folder in table.items() if exists(kind, name)]


@pytest.mark.parametrize(
    ("kind", "name", "folder"), with_nightly(rows(SHRUNK), rows(SHRUNK_AT_NIGHT))
)
def test_hidden_units_of_families_are_taken_out(kind, name, folder):
    result = families.check_units(of(kind, name))
    assert result.folder == folder
    assert result.removed == result.zero
    assert (0 < result.removed < result.width) == (folder != NONE)


# Whether vLLM and SGLang can build the model: the class lets them replace its attention.
UNEVEN = {("causal", "llama"): True, ("other", "LlavaForConditionalGeneration"): True}
UNEVEN_AT_NIGHT = {
    ("causal", "qwen3_next"): False,
    ("causal", "gpt2"): True,
    ("causal", "bloom"): False,
    ("causal", "deepseek_v3"): None,  # its configuration says how many of its layers are dense
    ("other", "BertForMaskedLM"): True,
    ("other", "T5ForConditionalGeneration"): False,
    ("other", "ViTForImageClassification"): True,
}


@pytest.mark.parametrize(
    ("kind", "name", "is_served"), with_nightly(rows(UNEVEN), rows(UNEVEN_AT_NIGHT))
)
def test_layers_with_widths_of_their_own_are_built_as_servers_build_them(kind, name, is_served):
    assert families.check_uneven(of(kind, name)) is is_served
