"""A model that is shrunk block by block equals the one that is shrunk in memory."""

from functools import partial

import pytest
import torch
import transformers as hf
from support.disk import add_predictions, count_blocks, same, weights
from support.layers import rng
from support.pairwise import spread
from support.quiet import prune
from support.refusals import refuses
from support.reports import read_json
from support.tiny import tiny
from support.zoo import causal, seeded
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

import wanda_lightning as wl

MODELS = {
    **{name: causal(name).build for name in ("llama", "phi3", "opt")},
    "tied": lambda: seeded(
        lambda: hf.LlamaForCausalLM(tiny(hf.LlamaConfig, tie_word_embeddings=True))
    ),
}
IDS = torch.randint(64, (4, 16), generator=rng())


prune_units = partial(wl.prune, pattern="structured", progress=False)


def shrink(folder):
    return wl.shrink_from_disk(folder / "zeros", folder / "small")


@pytest.mark.parametrize(("name", "allocation"), spread(MODELS, ["uniform", "fisher"]))
def test_equals_the_model_that_was_shrunk_in_memory(name, allocation, tmp_path, monkeypatch):
    """Only one block is in memory."""
    model = MODELS[name]()
    prune_units(model, [{"input_ids": IDS}], 0.4, allocation=allocation)
    model.save_pretrained(tmp_path / "zeros")
    _, counts = count_blocks(monkeypatch)
    report = shrink(tmp_path)
    assert max(counts) == 1
    with torch.no_grad():
        expected = model(IDS).logits
    assert report == wl.shrink(model)
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
    prune_units(model, [{"input_ids": IDS}])
    model.save_pretrained(tmp_path / "zeros")
    predictions = add_predictions(tmp_path / "zeros")
    report = shrink(tmp_path)
    assert not predictions.keys() & weights(tmp_path / "small").keys()
    assert read_json(tmp_path / "small/config.json")["num_nextn_predict_layers"] == 0
    note = "transformers does not load 2 stored tensors, mtp.fc.weight first: left out"
    assert note in str(report)
    assert note in caplog.text


def test_scattered_zeros_leave_no_folder(tmp_path):
    model = MODELS["llama"]()
    prune(model, sparsity=0.5, method="magnitude")
    model.save_pretrained(tmp_path / "zeros")
    with refuses("Nothing can be removed"):
        shrink(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["zeros"]
