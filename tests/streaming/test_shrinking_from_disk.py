"""A model that is shrunk block by block equals the one that is shrunk in memory.

`test_prune_from_disk.py` compares those that lose units or experts.
"""

from dataclasses import replace

import pytest
import torch
import transformers as hf
from support.disk import add_predictions, count_blocks, same, weights
from support.layers import rng
from support.pairwise import spread
from support.quiet import prune, shrink, zero_units
from support.refusals import refuses
from support.reports import read_json
from support.tiny import tiny
from support.zoo import causal, seeded
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from wanda_lightning import shrink_from_disk

MODELS = {
    **{name: causal(name).build for name in ("llama", "phi3", "opt")},
    "tied": lambda: seeded(
        lambda: hf.LlamaForCausalLM(tiny(hf.LlamaConfig, tie_word_embeddings=True))
    ),
}
IDS = torch.randint(64, (4, 16), generator=rng())
BATCHES = [{"input_ids": IDS}]


def take_out(folder):
    return shrink_from_disk(folder / "zeros", folder / "small")


@pytest.mark.parametrize(("name", "by"), spread(MODELS, ["equal", "loss"]))
def test_equals_the_model_that_was_shrunk_in_memory(name, by, tmp_path, monkeypatch):
    """Only one block is in memory."""
    model = MODELS[name]()
    zero_units(model, BATCHES, 0.4, by=by)
    model.save_pretrained(tmp_path / "zeros")
    _, counts = count_blocks(monkeypatch)
    report = take_out(tmp_path)
    assert max(counts) == 1
    with torch.no_grad():
        expected = model(IDS).logits
    assert replace(report, seconds={}) == replace(shrink(model), seconds={})
    small, loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "small", trust_remote_code=True, output_loading_info=True
    )
    assert not any(loaded.values())
    assert same(small.state_dict(), model.state_dict())
    assert_close(small(IDS).logits, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:The model .* has no place")
def test_what_may_not_fit_is_left_out(tmp_path, caplog):
    model = MODELS["llama"]()
    model.config.num_nextn_predict_layers = 1
    zero_units(model, BATCHES)
    model.save_pretrained(tmp_path / "zeros")
    predictions = add_predictions(tmp_path / "zeros")
    report = take_out(tmp_path)
    assert not predictions.keys() & weights(tmp_path / "small").keys()
    assert read_json(tmp_path / "small/config.json")["num_nextn_predict_layers"] == 0
    note = "transformers does not load 2 stored tensors, mtp.fc.weight first: left out"
    assert note in report.notes[0]
    assert note in caplog.text


def test_scattered_zeros_leave_no_folder(tmp_path):
    model = MODELS["llama"]()
    prune(model, sparsity=0.5, method="magnitude")
    model.save_pretrained(tmp_path / "zeros")
    with refuses("Nothing can be removed"):
        take_out(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["zeros"]


def test_a_fraction_that_rounds_to_no_unit_copies_the_model(tmp_path):
    MODELS["llama"]().save_pretrained(tmp_path / "dense")
    report = shrink_from_disk(
        tmp_path / "dense", tmp_path / "same", BATCHES, units=0.01, progress=False
    )
    assert "units=0.01 rounds to no unit of any layer" in report.notes[0]
    assert not report.shrunk
    assert same(weights(tmp_path / "same"), weights(tmp_path / "dense"))
