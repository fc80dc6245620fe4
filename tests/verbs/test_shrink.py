"""`shrink`: its parts one after the other, and what it refuses."""

from copy import deepcopy

import pytest
import torch
from support.experts import build
from support.layers import assert_same
from support.quiet import shrink, zero_units
from support.refusals import Untouched, refusal, refuses
from support.zoo import ZOO, batches_of, model_of, number_of_weights, run_all

from wanda_lightning.shrink_config import ShrinkConfig
from wanda_lightning.units.zero_units import take_out_zero_units

BATCHES = ZOO["mixtral_padded"].batches
DENSE_BLOCK = {"qwen3_moe": {"mlp_only_layers": [0]}, "deepseek_v3": {"first_k_dense_replace": 1}}


@pytest.mark.parametrize(
    ("name", "choices"), [("llama", {}), ("vit", {"by": "loss", "refit": False}), ("resnet18", {})]
)
def test_units_become_zero_and_then_leave(name, choices):
    model = model_of(name)
    expected = deepcopy(model)
    zeros = zero_units(expected, batches_of(name), 0.5, **choices)
    take_out_zero_units(expected, lambda: run_all(expected, batches_of(name)[:1]), progress=False)
    report = shrink(model, batches_of(name), units=0.5, **choices)
    assert_same(model, expected)
    assert number_of_weights(model) < report.parameters
    assert report.shrunk
    assert [layer.sparsity for layer in report.layers] == [layer.sparsity for layer in zeros.layers]


@pytest.mark.parametrize("family", DENSE_BLOCK)
def test_experts_leave_after_the_units_and_the_folder_loads(family, tmp_path):
    """In DeepSeek-V3, one number of the configuration is the width of routed and shared experts: it needs a file."""
    model = build(family, **DENSE_BLOCK[family])
    expected = deepcopy(model)
    # An iterator gives its batches to both parts.
    report = shrink(model, iter(BATCHES()), units=0.5, experts=0.25)
    one_by_one = [
        shrink(expected, BATCHES(), **part) for part in ({"units": 0.5}, {"experts": 0.25})
    ]
    assert_same(model, expected)
    assert report.layers == tuple(layer for part in one_by_one for layer in part.layers)
    assert report.zeros == report.parameters - number_of_weights(model)
    assert (report.config["sparsity"], report.config["experts"]) == (0.5, 0.25)

    names = [layer.name for layer in report.layers]
    skipped = {matrix.name for matrix in report.skipped}
    assert len({*names}) == len(names)
    assert skipped.isdisjoint(names)
    model.save_pretrained(tmp_path)
    assert bool(list(tmp_path.glob("*.py"))) == (family == "deepseek_v3")
    loaded = type(expected).from_pretrained(tmp_path).eval()
    assert all(map(torch.equal, run_all(loaded, BATCHES()), run_all(model, BATCHES())))


def test_a_model_without_experts_is_refused_before_its_units_leave():
    message = refusal(model_of("llama"), Untouched(), verb=shrink, units=0.5, experts=0.25)
    assert "experts=0.25 needs a mixture of experts" in message


REFUSED = [
    ({"units": 1.0}, "units must be a number above 0 and below 1, but it is 1.0"),
    ({"experts": 0}, "experts must be a number above 0 and below 1, but it is 0"),
    ({"units": 0.5, "by": "size"}, "by must be one of equal, loss, seconds"),
    ({"units": 0.5, "refit": "yes"}, "refit must be one of True, False"),
    ({"units": 0.5, "multiple_of": 0}, "multiple_of must be"),
    ({"by": "loss"}, "by='loss' would be ignored without units"),
    ({"refit": False}, "refit=False would be ignored without units"),
    ({"skip": "*.q_proj"}, "skip=.* would be ignored without units"),
    ({"experts": 0.5, "multiple_of": 4}, "multiple_of=4 would be ignored without units"),
    ({"experts": 0.5, "recovery": "distill"}, "recovery='distill' would be ignored without units"),
    ({"experts": 0.5, "max_size": "1GB"}, "max_size=1GB chooses how many experts leave"),
    ({"units": 0.5, "recovery": "nonsense"}, "recovery must be one of"),
    ({"units": 0.5, "sequential": "nonsense"}, "sequential must be one of"),
]


@pytest.mark.parametrize(("choices", "message"), REFUSED)
def test_choices_that_are_refused(choices, message):
    with refuses(message):
        ShrinkConfig(**choices)
