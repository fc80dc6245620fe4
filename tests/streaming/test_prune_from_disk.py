"""What is pruned or shrunk block by block equals what is in memory."""

import itertools
import re
from functools import partial

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.disk import (
    CHOICES,
    add_predictions,
    batches,
    count_blocks,
    in_memory,
    same,
    stream,
    weights,
)
from support.experts import build
from support.layers import rng
from support.pairwise import with_nightly
from support.quiet import prune, shrink, shrinks
from support.refusals import alike, refuses
from support.reports import read_json
from support.zoo import causal, names, other
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    T5Config,
    T5ForConditionalGeneration,
)

from wanda_lightning import OWL
from wanda_lightning.common import progress
from wanda_lightning.common.errors import UserError
from wanda_lightning.evaluation import WindowPerplexity
from wanda_lightning.streaming import measure_perplexity, perplexity_from_disk

pytestmark = pytest.mark.filterwarnings("ignore")


# Variants of other choices, which take the same way through the files.
LIKE_OTHERS = {
    "wanda",
    "owl without statistics",
    "none without statistics",
    "units_reconstruct",
}


@pytest.mark.parametrize(
    "name", with_nightly([name for name in CHOICES if name not in LIKE_OTHERS], CHOICES)
)
def test_the_files_and_the_report_are_those_in_memory(source_for, streamed, tmp_path, name):
    expected = in_memory(source_for(name), tmp_path / "memory", batches(), **CHOICES[name])
    report, folder = streamed(name)
    assert same(weights(folder), weights(tmp_path / "memory"))
    assert (report.layers, report.skipped, report.zeros) == (
        expected.layers,
        expected.skipped,
        expected.zeros,
    )
    assert (report.notes, report.config) == (expected.notes, expected.config)
    reloaded = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    assert same(reloaded, AutoModelForCausalLM.from_pretrained(tmp_path / "memory").state_dict())
    for file in ("config.json", "generation_config.json"):
        assert (folder / file).read_text() == (tmp_path / "memory" / file).read_text()


FAMILIES = (
    "mixtral",
    "qwen3_moe",
    "deepseek_v3",
    "gpt_oss",
    "gemma3_text",
    "falcon_mamba",
    "llama4_text",
    "cpmant",
)
FAMILY_CHOICES = {
    "block": {},
    "layer": {"sequential": "layer"},
    "none": {"sequential": "none"},
    "owl": {"allocation": OWL(m=2.0)},
}
# The last changes weights of all blocks first.
REFUSED = {
    "emu3",
    "mllama",
    "musicgen",
    "musicgen_melody",
    "rwkv",
}
EVERY_FAMILY = [
    *itertools.product(FAMILIES, FAMILY_CHOICES),
    *itertools.product([name for name in names("causal") if name not in REFUSED], ["layer"]),
]


@pytest.mark.parametrize(
    ("name", "choices"),
    with_nightly(zip(FAMILIES, itertools.cycle(FAMILY_CHOICES), strict=False), EVERY_FAMILY),
)
def test_families_are_converted_as_transformers_does(tmp_path, name, choices):
    check(tmp_path, causal(name), **FAMILY_CHOICES[choices])


def check(folder, family, auto_class=AutoModelForCausalLM, **choices):
    """Prune a model from disk and in memory, by Wanda, and compare the weights."""
    family.build().save_pretrained(folder / "source", max_shard_size="100KB")
    samples = family.batches()
    in_memory(folder / "source", folder / "memory", samples, auto_class, method="wanda", **choices)
    stream(folder / "source", folder / "disk", samples, method="wanda", **choices)
    assert same(weights(folder / "disk"), weights(folder / "memory"))


@pytest.mark.parametrize("name", with_nightly(["emu3"], sorted(REFUSED - {"rwkv"})))
def test_families_that_are_refused(tmp_path, name):
    family = causal(name)
    message = "Unrecognized configuration class|does not recognize this architecture"
    family.build().save_pretrained(tmp_path / "source")
    with refuses(message):  # of every auto class
        AutoModelForCausalLM.from_pretrained(tmp_path / "source")
    with refuses(message):
        stream(tmp_path / "source", tmp_path / "disk", family.batches(), 0.5)


def test_an_encoder_decoder(tmp_path):
    family = other("T5ForConditionalGeneration")
    check(tmp_path, family, AutoModelForSeq2SeqLM, allocation="owl")


# Tensors that transformers does not load, such as multi-token prediction


def qwen3_next(folder, size="100KB"):
    """Save a mixture whose configuration asks for a layer that predicts more tokens; return that layer's weights."""
    model = causal("qwen3_next").build()
    model.config.num_nextn_predict_layers = 1
    model.save_pretrained(folder, max_shard_size=size)
    return add_predictions(folder)


@pytest.mark.parametrize("size", ["100KB", "1GB"])
def test_what_transformers_does_not_load_is_copied(tmp_path, caplog, size):
    predictions = qwen3_next(tmp_path / "source", size)
    samples = causal("qwen3_next").batches()
    in_memory(tmp_path / "source", tmp_path / "memory", samples, method="wanda")
    report = stream(tmp_path / "source", tmp_path / "disk", samples, method="wanda")
    assert same(weights(tmp_path / "disk"), weights(tmp_path / "memory") | predictions)
    listed = read_json(tmp_path / "disk/model.safetensors.index.json")["weight_map"]
    assert all(name in load_file(tmp_path / "disk" / listed[name]) for name in predictions)
    assert read_json(tmp_path / "disk/config.json")["num_nextn_predict_layers"] == 1
    note = "transformers does not load 2 stored tensors, mtp.fc.weight first: copied as stored"
    assert note in report.notes[-1]
    assert note in caplog.text


@pytest.mark.parametrize("sequential", ["none", "block"])
def test_what_may_not_fit_fewer_experts_is_left_out(tmp_path, caplog, sequential):
    predictions = qwen3_next(tmp_path / "source")
    samples = causal("qwen3_next").batches()
    report = stream(
        tmp_path / "source", tmp_path / "disk", samples, experts=0.5, sequential=sequential
    )
    assert not predictions.keys() & weights(tmp_path / "disk").keys()
    assert read_json(tmp_path / "disk/config.json")["num_nextn_predict_layers"] == 0
    note = "transformers does not load 2 stored tensors, mtp.fc.weight first: left out"
    assert note in report.notes[-1]
    assert "num_nextn_predict_layers is now 0" in report.notes[-1]
    assert note in caplog.text


@pytest.mark.parametrize(
    ("family", "prefix"), [("qwen3_next", "mtp.layers.0"), ("deepseek_v3", "model.layers.9")]
)
def test_a_layer_that_is_not_loaded_loses_as_many_experts(tmp_path, family, prefix):
    source = tmp_path / "source"
    model = build(family, 8) if family == "deepseek_v3" else causal(family).build()
    model.config.num_nextn_predict_layers = 1
    model.save_pretrained(source)
    stored = weights(source)
    last = max(key.split(".mlp.")[0] for key in stored if ".mlp.experts." in key)
    layer = {
        key.replace(last, prefix): tensor.clone()
        for key, tensor in stored.items()
        if key.startswith(f"{last}.")
    }
    generator = rng(1)
    router = f"{prefix}.mlp.gate.weight"
    layer[router] = torch.randn(layer[router].shape, generator=generator)
    save_file(stored | layer, source / "model.safetensors", metadata={"format": "pt"})

    report = stream(source, tmp_path / "disk", causal(family).batches(), experts=0.5)
    number = len(layer[router])
    sizes = layer[router].norm(dim=1).tolist()
    groups = model.config.n_group if family == "deepseek_v3" else 1
    kept = []
    for group in range(groups):
        members = range(group * number // groups, (group + 1) * number // groups)
        kept += sorted(members, key=lambda expert: -sizes[expert])[: len(members) // 2]
    kept.sort()

    after = {key: value for key, value in weights(tmp_path / "disk").items() if prefix in key}
    assert alike(after[router], layer[router][kept])
    for place, expert in enumerate(kept):
        name = f"{prefix}.mlp.experts.{{}}.up_proj.weight"
        assert alike(after[name.format(place)], layer[name.format(expert)])
    assert sum(".experts." in key for key in after) * 2 == sum(".experts." in key for key in layer)
    assert all(alike(after[key], layer[key]) for key in layer if ".mlp." not in key)
    assert read_json(tmp_path / "disk/config.json")["num_nextn_predict_layers"] == 1
    assert f"with the {len(kept)} experts of {prefix}.mlp whose rows" in report.notes[-1]


def routed(model, batch, end=None):
    """Run the blocks from number `batch["first"]` on."""
    inner = model.model
    states = inner.embed_tokens(batch["input_ids"])
    rotary = inner.rotary_emb(states, position_ids=torch.arange(states.shape[1])[None])
    for layer in inner.layers[batch["first"] : end]:
        states = layer(states, position_embeddings=rotary)
    return states


def repeated(model, batch):
    """Run the first blocks twice, as a model that shares blocks does."""
    return routed(model, {**batch, "input_ids": model.lm_head(routed(model, batch, 2)).argmax(-1)})


@pytest.mark.parametrize(("forward", "name"), [(routed, "owl"), (repeated, "units")])
def test_batches_may_take_different_routes(source, tmp_path, forward, name):
    samples = [{**batch, "first": first} for batch, first in zip(batches(), (1, 0, 2), strict=True)]
    choices = CHOICES[name]
    model = AutoModelForCausalLM.from_pretrained(source)
    change = shrink if shrinks(choices) else prune
    expected = change(model, samples, forward=partial(forward, model), **choices)
    model.save_pretrained(tmp_path / "memory")
    report = stream(source, tmp_path / "disk", samples, forward=forward, **choices)
    assert same(weights(tmp_path / "disk"), weights(tmp_path / "memory"))
    assert report.layers == expected.layers


@pytest.mark.parametrize(("name", "most"), [("owl", 2), ("experts", 1), ("experts_block", 2)])
def test_few_blocks_are_in_memory(source_for, out, monkeypatch, name, most):
    loaded, counts = count_blocks(monkeypatch)
    stream(source_for(name), out, batches(), **CHOICES[name])
    assert max(counts) == most
    assert loaded == {""}


def test_the_perplexity_is_that_of_the_model_in_memory(source, monkeypatch, capsys):
    monkeypatch.setattr(measure_perplexity, "AT_ONCE", 2)
    monkeypatch.setattr(progress, "_SECONDS_BETWEEN_LINES", 0)
    model = AutoModelForCausalLM.from_pretrained(source)
    metric = WindowPerplexity()
    with torch.no_grad():
        for batch in batches():
            metric.update(model(**batch).logits, batch["input_ids"])
    assert perplexity_from_disk(source, batches()) == pytest.approx(
        float(metric.compute()), rel=1e-6
    )
    assert re.search(
        r"Measuring 5/8 model\.layers\.1 \(\d+ s, \d+ s left\)", capsys.readouterr().err
    )


def test_what_has_no_perplexity_is_refused(source, tmp_path):
    ids = torch.ones(1, 8, dtype=torch.long)
    for given in ([], [{"input_ids": ids[:, :1]}], [{"input_ids": ids, "attention_mask": 0 * ids}]):
        with refuses("batches must hold at least two tokens in a row, but there are none"):
            perplexity_from_disk(source, given, progress=False)
    T5ForConditionalGeneration(
        T5Config(d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    ).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="model must be a decoder, but t5 is an encoder-decoder"):
        perplexity_from_disk(tmp_path, batches(), progress=False)
