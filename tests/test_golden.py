"""Equal to the reference implementation, on the tiny random models in `golden/`."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM

from wanda_lightning import EqualShare, Magnitude, Unstructured, Wanda, prune
from wanda_lightning.config import resolve_pattern
from wanda_lightning.core.solvers import SparseGPT
from wanda_lightning.core.statistics import InputStatistics

GOLDEN = Path(__file__).parent / "golden"


SIZES = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 256}


def llama():
    more = {
        "intermediate_size": 176,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
    }
    return LlamaForCausalLM(
        LlamaConfig(**SIZES, **more, max_position_embeddings=64, tie_word_embeddings=False)
    )


def opt():
    return OPTForCausalLM(
        OPTConfig(**SIZES, ffn_dim=176, max_position_embeddings=64, word_embed_proj_dim=64)
    )


def load_dense(name):
    if name in ("llama", "opt"):
        model = {"llama": llama, "opt": opt}[name]()
    else:
        model = timm.create_model(**json.loads((GOLDEN / f"{name}.json").read_text())["spec"])
    weights = load_file(GOLDEN / f"{name}_dense.safetensors")
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected
    assert set(missing) <= {"lm_head.weight"}
    return model.eval()


def runs(name, *methods):
    entries = json.loads((GOLDEN / f"{name}.json").read_text())
    for run in entries if isinstance(entries, list) else entries["runs"]:
        if run["tag"].startswith(methods):
            yield run


def in_turns(names, *methods):
    """Every second run of each of two models; all others run at night."""
    return [
        pytest.param(
            name,
            run,
            id=f"{name}-{run['tag']}",
            marks=[pytest.mark.nightly] * (index % 2 != number),
        )
        for number, name in enumerate(names)
        for index, run in enumerate(runs(name, *methods))
    ]


def expected_keep(name, tag, weights):
    packed = load_file(GOLDEN / f"{name}_pruned.safetensors")
    keep = {}
    for key, bits in packed.items():
        if key.startswith(f"{tag}/keep/"):
            shape = weights[key.split("/")[-1]].shape
            flat = np.unpackbits(bits.numpy())[: shape.numel()].astype(bool)
            keep[key.split("/")[-1]] = torch.from_numpy(flat).reshape(shape)
    assert keep
    return keep


@pytest.mark.parametrize(("name", "run"), in_turns(["opt", "llama"], "magnitude", "wanda"))
def test_language_models(name, run):
    method, sparsity, kind, *variant = run["tag"].split("_")
    model = load_dense(name)
    ids = load_file(GOLDEN / "calibration.safetensors")["input_ids"]
    if kind != "unstructured":
        pattern = resolve_pattern(kind)
    elif variant:
        pattern = EqualShare()
    else:
        pattern = Unstructured("layer" if method == "magnitude" else "row")
    criterion = {"magnitude": Magnitude(), "wanda": Wanda()}[method]

    report = prune(
        model,
        [ids[i : i + 1] for i in range(8)],
        float(sparsity),
        criterion=criterion,
        pattern=pattern,
    )

    check_masks(name, run, model, allow_one_more=method == "magnitude" and kind == "unstructured")
    assert report.sparsity == pytest.approx(run["sparsity"], abs=2e-4)
    if method == "wanda":
        with torch.no_grad():
            logits = model(ids[:1], use_cache=False).logits
        assert logits.abs().mean().item() == pytest.approx(run["logits_absmean"], rel=1e-5)


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


@pytest.mark.parametrize(("name", "run"), in_turns(["llama", "opt"], "sparsegpt", "ablate"))
def test_weight_updates(name, run, monkeypatch):
    *method, sparsity, kind = run["tag"].split("_")
    before = method[-1] == "seq"
    # This one compares rows, with `<`.
    one_more = kind == "unstructured" and method[1:] != [
        "wanda",
        "seq",
    ]
    pattern = OneMore("layer", float(sparsity)) if one_more else resolve_pattern(kind)
    criterion = {"mag": Magnitude(), "wanda": Wanda()}.get(method[1]) if len(method) > 1 else None
    if "wanda" in method:
        monkeypatch.setattr("wanda_lightning.calibration.observer.InputStatistics", Fading)
    model = load_dense(name)
    ids = load_file(GOLDEN / "calibration.safetensors")["input_ids"]
    report = prune(
        model,
        [ids[i : i + 1] for i in range(8)],
        float(sparsity),
        criterion=criterion,
        pattern=pattern,
        solver=SparseGPT(mask="upfront" if before else "block"),
        progress=False,
    )

    assert report.sparsity == pytest.approx(run["sparsity"], abs=2e-4)
    weights = model.state_dict()
    for parameter, keep in expected_keep(name, run["tag"], weights).items():
        assert ((weights[parameter] != 0) != keep).float().mean() < 0.005, parameter
    stored = load_file(GOLDEN / f"{name}_pruned.safetensors")
    first_block = {
        key.split("/")[-1]: value for key, value in stored.items() if f"{run['tag']}/weight/" in key
    }
    assert len(first_block) >= 6
    for parameter, expected in first_block.items():
        assert (weights[parameter] - expected).norm() <= 1e-3 * expected.norm(), parameter
    with torch.no_grad():
        logits = model(ids[:1], use_cache=False).logits.abs().mean().item()
    assert logits == pytest.approx(run["logits_absmean"], rel=1e-3)


@pytest.mark.parametrize(("name", "run"), in_turns(["vit", "convnext"], "magnitude", "wanda"))
def test_image_classifiers(name, run):
    method, sparsity, group = run["tag"].split("_")
    model = load_dense(name)
    images = load_file(GOLDEN / "images.safetensors")["images"]
    report = prune(
        model,
        list(images.split(4)),
        float(sparsity),
        criterion={"magnitude": Magnitude(), "wanda": Wanda()}[method],
        pattern=Unstructured(group),
        sequential="none",
        skip=["*.downsample.*"] if name == "convnext" else [],  # the reference leaves these dense
    )

    check_masks(name, run, model, allow_one_more=group == "layer")
    assert report.sparsity == pytest.approx(run["sparsity"], abs=3e-4)
    if group == "row":
        with torch.no_grad():
            assert model(images).abs().mean().item() == pytest.approx(
                run["logits_absmean"], rel=1e-5
            )


def check_masks(name, run, model, allow_one_more):
    """The reference's layer-wise threshold prunes with `<=`: one more than the count."""
    weights = model.state_dict()
    for parameter, keep in expected_keep(name, run["tag"], weights).items():
        ours = weights[parameter] != 0
        if allow_one_more:
            assert (ours & ~keep).sum() <= 1, parameter
            assert not (~ours & keep).any(), parameter
        else:
            assert torch.equal(ours, keep), parameter
