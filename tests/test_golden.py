"""Equal to the reference implementation, on the tiny random models in `golden/`."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file
from support.quiet import prune
from support.reports import read_json
from transformers import LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM

from wanda_lightning.config import resolve_pattern
from wanda_lightning.core import EqualShare, Magnitude, Unstructured, Wanda
from wanda_lightning.core.solvers import SparseGPT
from wanda_lightning.core.statistics import InputStatistics

GOLDEN = Path(__file__).parent / "golden"
CRITERIA = {"magnitude": Magnitude(), "wanda": Wanda()}
SIZES = {
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "vocab_size": 256,
    "max_position_embeddings": 64,
}


def llama():
    config = LlamaConfig(
        **SIZES,
        intermediate_size=176,
        num_key_value_heads=2,
        rms_norm_eps=1e-5,
        rope_theta=10000.0,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config)


def opt():
    return OPTForCausalLM(OPTConfig(**SIZES, ffn_dim=176, word_embed_proj_dim=64))


def description(name):
    return read_json(GOLDEN / f"{name}.json")


def tensors(name):
    return load_file(GOLDEN / f"{name}.safetensors")


def load_dense(name):
    if name == "llama":
        model = llama()
    elif name == "opt":
        model = opt()
    else:
        model = timm.create_model(**description(name)["spec"])
    missing, unexpected = model.load_state_dict(tensors(f"{name}_dense"), strict=False)
    assert not unexpected
    assert set(missing) <= {"lm_head.weight"}
    return model.eval()


def runs_in_turns(runs_of, *methods):
    """Every second run of each of two models; all others run at night."""
    sample = []
    for number, (name, runs) in enumerate(runs_of.items()):
        runs = [run for run in runs if run["tag"].startswith(methods)]
        for index, run in enumerate(runs):
            marks = () if index % 2 == number else pytest.mark.nightly
            sample.append(pytest.param(name, run, id=f"{name}-{run['tag']}", marks=marks))
    return sample


LLAMA = description("llama")
OPT = description("opt")
IMAGE_MODELS = {name: description(name)["runs"] for name in ("vit", "convnext")}


def stored(name, run, kind):
    """The masks (`"keep"`) or weights (`"weight"`) of a run, by the names of their parameters."""
    prefix = f"{run['tag']}/{kind}/"
    return {
        key.removeprefix(prefix): value
        for key, value in tensors(f"{name}_pruned").items()
        if key.startswith(prefix)
    }


def masks(name, run, model):
    """Yield the name of each pruned parameter, where it is not zero, and where the reference keeps it."""
    packed = stored(name, run, "keep")
    assert packed
    for parameter, bits in packed.items():
        ours = model.get_parameter(parameter) != 0
        flat = np.unpackbits(bits.numpy(), count=ours.numel()).astype(bool)
        yield parameter, ours, torch.from_numpy(flat).reshape(ours.shape)


def prune_language_model(model, sparsity, **choices):
    """Prune with the reference's samples; return the report, and the mean size of the logits for the first one."""
    samples = tensors("calibration")["input_ids"][:8].split(1)
    report = prune(model, samples, sparsity, **choices)
    with torch.no_grad():
        logits = model(samples[0], use_cache=False).logits
    return report, logits.abs().mean().item()


@pytest.mark.parametrize(
    ("name", "run"), runs_in_turns({"opt": OPT, "llama": LLAMA}, "magnitude", "wanda")
)
def test_language_models(name, run):
    method, sparsity, kind, *variant = run["tag"].split("_")
    if kind != "unstructured":
        pattern = resolve_pattern(kind)
    elif variant:
        pattern = EqualShare()
    else:
        pattern = Unstructured("layer" if method == "magnitude" else "row")
    model = load_dense(name)
    report, size_of_logits = prune_language_model(
        model, float(sparsity), criterion=CRITERIA[method], pattern=pattern
    )

    check_masks(name, run, model, allow_one_more=pattern == Unstructured("layer"))
    assert report.sparsity == pytest.approx(run["sparsity"], abs=2e-4)
    if method == "wanda":
        assert size_of_logits == pytest.approx(run["logits_absmean"], rel=1e-5)


@dataclass(frozen=True)
class OneMore(Unstructured):
    """The reference's threshold prunes with `<=`: of each block of columns one weight more than the count."""

    share: float = 0.5

    def __call__(self, scores, sparsity):
        return super().__call__(scores, (int(scores.numel() * self.share) + 1.5) / scores.numel())

    def keep_block(self, scores, sparsity, block):
        return self(scores, sparsity)


class Fading(InputStatistics):
    """In the reference's ablations sample j counts 1/j in the norms: it divides by the number so far twice."""

    def merge(self, other):
        self.samples = getattr(self, "samples", 0) + 1
        if "square_sum" in other.sums:
            other.sums["square_sum"] = other.sums["square_sum"] / self.samples
        super().merge(other)


# What the names of the reference's methods mean for SparseGPT.
ABLATIONS = {
    "sparsegpt": {},
    "ablate_mag_seq": {"criterion": Magnitude(), "solver": SparseGPT(mask="upfront")},
    "ablate_wanda_seq": {"criterion": Wanda(), "solver": SparseGPT(mask="upfront")},
    "ablate_mag_iter": {"criterion": Magnitude()},
    "ablate_wanda_iter": {"criterion": Wanda()},
}


@pytest.mark.parametrize(
    ("name", "run"), runs_in_turns({"llama": LLAMA, "opt": OPT}, "sparsegpt", "ablate")
)
def test_weight_updates(name, run, monkeypatch):
    method, sparsity, kind = run["tag"].rsplit("_", 2)
    if kind == "unstructured" and method != "ablate_wanda_seq":
        pattern = OneMore("layer", float(sparsity))
    else:  # without blocks, Wanda compares rows, with `<`
        pattern = resolve_pattern(kind)
    if "wanda" in method:
        monkeypatch.setattr("wanda_lightning.calibration.observer.InputStatistics", Fading)
    model = load_dense(name)
    choices = {"solver": SparseGPT(), "pattern": pattern} | ABLATIONS[method]
    report, size_of_logits = prune_language_model(model, float(sparsity), **choices)

    assert report.sparsity == pytest.approx(run["sparsity"], abs=2e-4)
    for parameter, ours, keep in masks(name, run, model):
        assert (ours != keep).float().mean() < 0.005, parameter
    first_block = stored(name, run, "weight")
    assert len(first_block) >= 6
    for parameter, expected in first_block.items():
        difference = model.get_parameter(parameter) - expected
        assert difference.norm() <= 1e-3 * expected.norm(), parameter
    assert size_of_logits == pytest.approx(run["logits_absmean"], rel=1e-3)


@pytest.mark.parametrize(("name", "run"), runs_in_turns(IMAGE_MODELS, "magnitude", "wanda"))
def test_image_classifiers(name, run):
    method, sparsity, group = run["tag"].split("_")
    model = load_dense(name)
    images = tensors("images")["images"]
    report = prune(
        model,
        images.split(4),
        float(sparsity),
        criterion=CRITERIA[method],
        pattern=Unstructured(group),
        sequential="none",
        # The reference leaves these dense.
        skip=["*.downsample.*"] if name == "convnext" else [],
    )

    check_masks(name, run, model, allow_one_more=group == "layer")
    assert report.sparsity == pytest.approx(run["sparsity"], abs=3e-4)
    if group == "row":
        with torch.no_grad():
            size_of_logits = model(images).abs().mean().item()
        assert size_of_logits == pytest.approx(run["logits_absmean"], rel=1e-5)


def check_masks(name, run, model, allow_one_more):
    """The reference's layer-wise threshold prunes with `<=`: one more than the count."""
    for parameter, ours, keep in masks(name, run, model):
        if allow_one_more:
            assert (ours & ~keep).sum() <= 1, parameter
            assert not (~ours & keep).any(), parameter
        else:
            assert torch.equal(ours, keep), parameter
