"""A sample of the families in support/families.py, one per mechanism, and proof that its checks can fail."""

import pytest
import torch
import transformers as hf
from support import families, tiny
from torch import nn
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from wanda_lightning import RIA, prune

# Models of transformers and timm warn about their own renamed arguments and missing kernels.
pytestmark = pytest.mark.filterwarnings("ignore")

CAUSAL = {
    "llama": "grouped queries",
    "qwen3": "normed queries and keys",
    "gemma2": "two kinds of attention, soft caps",
    "gemma3_text": "two rotary tables",
    "gemma3n_text": "per-layer inputs, AltUp, shared keys and values",
    "phi": "parallel attention",
    "phi3": "fused qkv",
    "falcon": "parallel attention, its own linear class",
    "gptj": "parallel attention, partial rotary",
    "bloom": "ALiBi, fused qkv",
    "mpt": "ALiBi",
    "gpt2": "Conv1D",
    "gpt_neox": "fused qkv, parallel residual",
    "opt": "learned positions",
    "xlstm": "matrix memories",
    "reformer": "reversible blocks, hashing",
    "mamba": "state space",
    "mamba2": "state space",
    "recurrent_gemma": "recurrence and attention",
    "rwkv": "recurrence",
    "zamba": "shared blocks",
    "zamba2": "shared blocks with adapters",
    "bert": "a bidirectional model as a decoder",
}
EXPERTS = {
    "mixtral": "experts",
    "qwen2_moe": "experts and a shared one",
    "olmoe": "experts",
    "deepseek_v3": "grouped experts, latent attention",
    "gpt_oss": "transposed experts, sinks",
    "jamba": "state space, attention and experts",
}
OTHERS = (
    "T5ForConditionalGeneration",
    "BartForConditionalGeneration",
    "WhisperForConditionalGeneration",
    "AlbertForMaskedLM",
    "ModernBertForMaskedLM",
    "ViTForImageClassification",
    "SwinForImageClassification",
    "Swinv2ForImageClassification",  # widths that 4 does not divide
    "CLIPModel",
    "LlavaForConditionalGeneration",
    "Qwen2_5_VLForConditionalGeneration",
)
TIMM = {
    "test_vit": "fused qkv",
    "test_convnext": "depthwise convolutions, linear layers on images",
    "test_resnet": "convolutions and batch norm",
    "test_byobnet": "blocks by a table",
    "test_efficientnet": "inverted bottlenecks",
    "test_mambaout": "gates",
    "test_nfnet": "standardized weights, which are skipped",
    "test_coatnet": "alternating convolution and attention",
    "mobilevit_xxs": "patches unfolded inside",
    "levit_128s": "batch norm behind linear layers",
    "test_vit_relpos": "widths that 4 does not divide",
}
MANY_INPUTS = {"crossvit_tiny_240": "two branches", "coat_tiny": "blocks of several inputs, shared layers"}


def of(name):
    (family,) = families.families(["causal"], [name])
    return family


@pytest.mark.parametrize("name", CAUSAL)
def test_a_language_model(name):
    assert families.check(of(name)).coverage > 0.75


@pytest.mark.parametrize("name", EXPERTS)
def test_a_mixture_of_experts(name):
    families.check(of(name))


@pytest.mark.parametrize("name", OTHERS)
def test_an_encoder_or_a_vision_model(name):
    assert families.check(families.other(name)).coverage > 0.9


@pytest.mark.parametrize("name", TIMM)
def test_an_image_model(name):
    families.check(families.of_timm(name))


@pytest.mark.parametrize("name", MANY_INPUTS)
def test_an_image_model_of_many_units(name):
    families.check(families.of_timm(name), slowly=False)


# ---- the checks can fail


def sabotaged(monkeypatch, after=lambda model, report: None, **choices):
    def sabotage(model, *args, **kwargs):
        report = prune(model, *args, **{**kwargs, **choices})
        with torch.no_grad():
            after(model, report)
        return report

    monkeypatch.setattr(families, "prune", sabotage)


def test_a_missing_zero_is_seen(monkeypatch):
    def revive(model, report):
        weight = model.model.layers[1].mlp.up_proj.weight
        weight[3, weight[3] == 0] = 1.0

    sabotaged(monkeypatch, revive)
    with pytest.raises(AssertionError, match=r"not 0\.5 of each row: model\.layers\.1\.mlp\.up_proj"):
        families.check(of("llama"))


@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.0.mlp.up_proj.weight"])
def test_a_changed_value_is_seen(monkeypatch, name):
    sabotaged(monkeypatch, lambda model, report: model.get_parameter(name).mul_(2))
    with pytest.raises(AssertionError, match=rf"{name} changed"):
        families.check(of("llama"))


def test_a_matrix_that_the_report_omits_is_seen(monkeypatch):
    sabotaged(monkeypatch, lambda model, report: report.skipped.clear())
    with pytest.raises(AssertionError, match=r"neither pruned nor skipped: model\.embed_tokens"):
        families.check(of("llama"))


@pytest.mark.parametrize("choices", [{"criterion": RIA()}, {"sequential": "none"}])
def test_other_masks_are_seen(monkeypatch, choices):
    sabotaged(monkeypatch, **choices)
    with pytest.raises(AssertionError, match=r"float64: \d+ of \d+ zeros are not those of the slow procedure"):
        families.check(of("llama"))


def test_coverage_is_counted_by_hand(monkeypatch):
    sabotaged(monkeypatch, skip=["*.down_proj"])
    result = families.check(of("llama"), slowly=False)
    inside = {"q": 32 * 32, "k": 16 * 32, "v": 16 * 32, "o": 32 * 32, "up": 32 * 64, "gate": 32 * 64, "down": 64 * 32}
    assert result.coverage == 1 - inside["down"] / sum(inside.values())
    assert result.left_out == {"skip='*.down_proj'": 1 - result.coverage}


class Endless(nn.Linear):
    def forward(self, x):
        while True:
            pass


def test_an_error_is_a_result():
    broken = families.Family("timm", "broken", "none", nn.Linear, lambda model: [])
    assert families.examine(broken, 10).status == "cannot be built here"
    endless = families.Family("timm", "endless", "none", lambda: Endless(1, 1), lambda model: [(torch.zeros(1, 1),)])
    result = families.examine(endless, 1)
    assert (result.status, result.cause[:29]) == ("fails", "TimeoutError: took more than ")


# ---- tiny


def test_each_kind_of_layer_stays():
    config = tiny.tiny(hf.Gemma3TextConfig)
    assert config.layer_types == ["sliding_attention", "full_attention"]
    assert tiny.tiny(hf.Qwen3NextConfig).layer_types == ["linear_attention", "full_attention"]
    assert tiny.tiny(hf.LlamaConfig).num_hidden_layers == 2


def test_every_language_model_is_there():
    names = [family.name for family in families.families(["causal"])]
    assert len(names) == len(set(names)) == len(set(MODEL_FOR_CAUSAL_LM_MAPPING))


# ---- the document


def test_the_document_names_what_fails():
    passes = families.Result(
        "causal", "llama", "LlamaForCausalLM", "passes", "", 0.5, 0.75, {"a | b": 0.25}, "float64", 1
    )
    fails = families.Result("causal", "xlm", "XLMWithLMHeadModel", "fails", "RuntimeError: why")
    absent = families.Result("timm", "vit", "vit_tiny", "cannot be built here", "ImportError: no")
    text = families.document([passes, fails, absent])
    assert "1 of 2 families that can be built pass: 50.0%." in text.splitlines()
    assert "| llama | LlamaForCausalLM | 50.0% | 75% | 25% a \\| b | float64 | 1.0 |" in text.splitlines()
    assert "| xlm | XLMWithLMHeadModel | fails | RuntimeError: why |" in text.splitlines()
    assert "| vit | vit_tiny | cannot be built here | ImportError: no |" in text.splitlines()
