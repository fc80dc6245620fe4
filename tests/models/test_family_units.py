"""A sample of the families in support/family_units.py, and proof that its checks can fail."""

import pytest
import torch
from support import families, family_units
from support.family_units import NO_FOLDER, ORDINARY, OWN_FILE, Units

from wanda_lightning import shrink

# Models of transformers and timm warn about their own renamed arguments and missing kernels.
pytestmark = pytest.mark.filterwarnings("ignore")

SAMPLE = {
    ("causal", "llama"): ORDINARY,
    ("causal", "bloom"): OWN_FILE,  # its configuration has no width
    ("causal", "sarvam_moe"): OWN_FILE,  # names of its own for tensors in the files
    ("causal", "xlm"): OWN_FILE,  # its layers write into a cache
    ("timm", "test_vit"): ORDINARY,
}
NIGHTLY = {
    ("causal", "gpt2"): ORDINARY,
    ("causal", "qwen3_next"): ORDINARY,  # shared experts
    ("causal", "deepseek_v3"): OWN_FILE,  # dense layers and shared experts
    ("causal", "gemma3n_text"): OWN_FILE,  # its forward reads a number of its configuration that is a width by chance
    ("other", "T5ForConditionalGeneration"): ORDINARY,
    ("other", "LlavaForConditionalGeneration"): ORDINARY,
    ("timm", "test_convnext"): NO_FOLDER,  # no argument of timm gives the widths
    ("timm", "test_efficientnet"): NO_FOLDER,
    ("timm", "test_resnet"): NO_FOLDER,
}


def of(kind, name):
    return families.of_timm(name) if kind == "timm" else families.family(kind, name)


def passes(kind, name, folder):
    result = family_units.check(of(kind, name))
    assert result.mlp
    assert 0 < result.removed == result.zero < result.width
    assert result.folder == folder, result.cause


@pytest.mark.parametrize(("kind", "name"), SAMPLE)
def test_a_sample_of_families(kind, name):
    passes(kind, name, SAMPLE[kind, name])


@pytest.mark.nightly
@pytest.mark.parametrize(("kind", "name"), NIGHTLY)
def test_more_families(kind, name):
    passes(kind, name, NIGHTLY[kind, name])


@pytest.mark.parametrize(
    ("name", "kind", "cause"),
    [
        ("mamba", "causal", "no MLP"),
        ("mixtral", "causal", "no MLP outside of experts"),
        ("SqueezeBertForMaskedLM", "other", "its layers are grouped convolutions, which stay dense"),
        ("AlbertForMaskedLM", "other", "a block that runs more than once stays dense"),
    ],
)
def test_families_without_hidden_units(name, kind, cause):
    result = family_units.check(of(kind, name))
    assert (result.width, result.cause) == (0, cause)


def test_other_outputs_are_seen(monkeypatch):
    def sabotage(model, *args):
        result = shrink(model, *args)
        with torch.no_grad():
            model.model.layers[1].mlp.down_proj.weight.mul_(1.01)
        return result

    monkeypatch.setattr(family_units, "shrink", sabotage)
    with pytest.raises(AssertionError, match="outputs differ by"):
        family_units.check(of("causal", "llama"))


# ---- the document


def test_the_document_counts_shares():
    llama = Units("causal", "llama", "LlamaForCausalLM", "mlp.down_proj", 128, 32, 32, 0.115, ORDINARY)
    mamba = Units("causal", "mamba", "MambaForCausalLM", cause="no hidden units found")
    experts = Units("causal", "mixtral", "MixtralForCausalLM", "experts", cause="no hidden units found")
    stays = Units("timm", "vgg", "vgg11", "fc2", 128, 32, 30, 0.1, NO_FOLDER, "2 units stay")
    lines = family_units.document([llama, mamba, experts, stays]).splitlines()
    assert "| all | 4 | 3 | 2 | 1 | 1 | 0 |" in lines
    found = "hidden units are found for 2 (66.7%), taken out for 1 (33.3%), loaded for 1 (33.3%)."
    assert f"Of 3 models with an MLP, {found}" in lines
    assert "| llama | LlamaForCausalLM | yes | 128 | 32 of 32 | -12% | ordinary |  |" in lines
    assert "| no hidden units found | 2 |" in lines
