"""Several processes change one model: the same zeros everywhere, as in one process, and no hanging."""

import re
from functools import partial
from itertools import cycle, product, zip_longest

import pytest
import torch
from support import pair_cases as cases
from support.layers import assert_same
from support.pair_cases import (
    alone,
    assert_same_report,
    assert_same_weights,
)
from support.pairwise import pairwise, with_nightly
from support.quiet import prune
from support.samples import gradients, split
from support.zoo import batches_of, model_of
from torch.testing import assert_close

from wanda_lightning import Distill, Reconstruct
from wanda_lightning.core import Magnitude
from wanda_lightning.methods import SEQUENTIAL_CHOICES


def test_the_collectives(pair):
    for rank, found in enumerate(pair.run(cases.collectives)):
        assert found == {
            "add": [[3.0, 6.0], 21, [[2.0]], [], [[6.0], [8.0]]],  # the third one twice
            "minimum": 4,
            "share": ["of 0", "of 1"],
            "gather": [[0, 5], [1, 5]],
        }, rank


@pytest.mark.parametrize(
    ("inner", "outer", "expected"),
    [
        ([], [], ["fine", "fine"]),
        ([1], [], ["'RuntimeError', .*process 1 of 2 .* KeyError: 1", "'KeyError', .*1"]),
        ([], [0], ["'UserError', .*bad 0", "'UserError', .*process 0 of 2 .* bad 0"]),
        ([], [0, 1], ["'UserError', .*bad 0", "'UserError', .*bad 1"]),
        ([0, 1], [], ["'KeyError', .*0", "'KeyError', .*1"]),
    ],
)
def test_all_fail_together(pair, inner, outer, expected):
    ended = pair.run(cases.failures, {"inner": inner, "outer": outer})
    for (outcome, in_step), text in zip(ended, expected, strict=True):
        assert in_step == 3
        assert re.search(text, str(outcome))


# ------------------------------------------------------------------------------------------------- replicated (DDP)


def check(pair, name, shares=None, tolerance=1e-3, **choices):
    """Prune a model in both processes, and in one with all batches."""
    (first, report), (second, other) = pair.run(cases.replicated, name, shares, **choices)
    model, expected = alone(name, **choices)
    assert_same(first, second)
    assert_same_weights(first, dict(model.named_parameters()), tolerance)
    assert_same_report(report, expected)
    assert_same_report(other, expected)


ORDERS = [{"sequential": sequential} for sequential in SEQUENTIAL_CHOICES]
ARCHITECTURES = (
    "resnet18",
    "t5",
    "llama_padded",
    "block_twice",
    "mixtral_padded",
    "unreached",
)
EXPERTS = {"experts": 0.25}
UNITS = {"units": 0.5, "refit": False, "multiple_of": 4, "keep_batch_norm": True}
SAMPLE = [
    ("plain_mlp", {"pattern": "unstructured_layer"}),
    ("plain_mlp", {"pattern": "equal_share"}),
    ("plain_mlp", {"sequential": "block", "shares": ((), (0, 1, 2))}),
    ("mixtral_padded", EXPERTS),
    ("mixtral_padded", EXPERTS | {"shares": ((), (0, 1))}),
    ("block_twice", UNITS | {"sequential": "block"}),
    ("unreached", UNITS | {"sequential": "none"}),
    ("routed", UNITS | {"sequential": "layer"}),
    ("llama", UNITS | {"by": "loss"}),  # the gradients of all
]
for order in ORDERS:
    SAMPLE += [
        ("llama", {"pattern": "2:4"} | order),
        ("routed", order),  # a process may have no batch at a unit
    ]
SAMPLE += [("vit", {"allocation": "owl", "criterion": "ria"} | ORDERS[0])]
SAMPLE += zip(ARCHITECTURES, cycle(ORDERS))


@pytest.mark.parametrize(("name", "choices"), with_nightly(SAMPLE, product(ARCHITECTURES, ORDERS)))
def test_masks_are_those_of_one_process(pair, name, choices):
    check(pair, name, **choices)


# ------------------------------------------------------------------------------------- statistics by distinct input


def test_layers_with_one_input_are_added_up_once(pair):
    (found, groups, sent), (_, others, _) = pair.run(cases.statistics_of, "llama")
    attention = "model.layers.0.self_attn."
    mlp = "model.layers.0.mlp."
    assert groups == others
    assert [f"{attention}{name}_proj" for name in "qkv"] in groups
    assert [f"{mlp}gate_proj", f"{mlp}up_proj"] in groups
    assert len(groups) == 2 * 4
    distinct = [found[names[0]][1] for names in groups]
    numbers = sum(value.numel() for sums in distinct for value in sums.values())
    assert numbers <= sent <= numbers + 100  # besides some counts


@pytest.mark.parametrize(
    ("shares", "groups"),
    [
        (([0], [1]), [["first", "second"], ["third"]]),
        (([0, 1], [2, 3]), [["first"], ["second"], ["third"]]),
        (([0, 2], [1]), [["first"], ["second"], ["third"]]),
        (([0], []), [["first", "second"], ["third"]]),
        (([4], [1]), [["first"], ["second"], ["third"]]),
        (([4], [4]), [["first", "third"], ["second"]]),
        (([0, 1, 2], [3, 4]), [["first"], ["second"], ["third"]]),
    ],
)
def test_layers_whose_inputs_differ_in_one_process_are_added_up_alone(pair, shares, groups):
    expected = {}
    model = cases.Fork()
    batches = cases.fork_batches()
    for name in ("first", "second", "third"):
        getattr(model, name).register_forward_pre_hook(
            lambda _, args, name=name: expected.setdefault(name, []).append(args[0])
        )
    with torch.no_grad():
        for index in [*shares[0], *shares[1]]:
            model(batches[index])
    for found, found_groups, _ in pair.run(cases.statistics_of, "fork", shares):
        assert found_groups == groups
        for name, (count, sums) in found.items():
            tokens = torch.cat(expected.get(name, [torch.zeros(0, 8)]))
            assert count == len(tokens)
            close = partial(assert_close, atol=1e-4, rtol=1e-4)
            close(sums["gram"], tokens.T @ tokens)
            close(sums["square_sum"], tokens.square().sum(0))


def in_turns(batches, shares):
    """The batches in the order in which a loader that is the same for all processes is divided."""
    first, second = (cases.share_of(batches, rank, shares) for rank in (0, 1))
    return [batch for turn in zip_longest(first, second) for batch in turn if batch is not None]


UNEVEN = None, ((0, 1, 2), ()), ((0,), (1, 2))


@pytest.mark.parametrize(
    ("name", "shares", "samples"), pairwise(["llama", "llama_padded"], UNEVEN, [None, 1, 3, 5])
)
def test_fisher_counts_the_samples_of_all_processes(pair, name, shares, samples):
    """The labels are those of one process."""
    model = model_of(name).double()
    expected = gradients(model, in_turns(split(batches_of(name), 1), shares), samples)
    for sums in pair.run(cases.fisher_of, name, shares, samples):
        assert_close(sums, expected, rtol=1e-4, atol=1e-12)


def losses_of(report):
    if report.training:
        return [vars(losses) for losses in report.training.passes]
    return [vars(layer.part) for layer in report.layers]


DISTILL = Distill(passes=2, batch_size=2)
RECONSTRUCT = Reconstruct(epochs=2)


@pytest.mark.parametrize(
    ("name", "shares", "recovery", "times", "size", "tolerance"),
    [
        ("llama_padded", None, DISTILL, 1, 2, 1e-5),
        ("mixtral", UNEVEN[1], DISTILL, 1, 2, 1e-5),
        ("llama_padded", UNEVEN[2], RECONSTRUCT, 1, 1, 1e-6),
        ("mixtral", UNEVEN[1], RECONSTRUCT, 1, 1, 1e-6),
        ("llama_padded", None, RECONSTRUCT, 18, 18, 1e-6),  # a batch of 18 has two steps
    ],
)
def test_a_recovery_is_that_of_one_process(pair, name, shares, recovery, times, size, tolerance):
    """The same steps on the same samples, whichever process runs them."""
    model = model_of(name).double()
    turns = in_turns(split(batches_of(name) * times, size), shares)
    choices = {"method": "magnitude", "recovery": recovery}
    expected = prune(model, turns, **choices)
    (weights, report), (others, _) = pair.run(
        cases.replicated, name, shares, size, times, wide=True, **choices
    )
    assert_same(weights, others)
    for key, value in model.named_parameters():
        assert torch.equal(weights[key] == 0, value == 0)
        assert_close(weights[key], value.detach(), rtol=tolerance, atol=tolerance / 100)
    for one, other in zip(losses_of(report), losses_of(expected), strict=True):
        assert one == pytest.approx(other)


@pytest.mark.parametrize("shares", [((), (0, 1)), None])
def test_one_process_measures_what_units_cost(pair, shares):
    (first, report), (second, other) = pair.run(
        cases.replicated, "llama", shares, units=0.5, by="seconds"
    )
    assert_same(first, second)
    assert report.config["unit_costs"] == other.config["unit_costs"]


def test_only_the_first_process_shows_progress(pair):
    first, second = pair.run(cases.progress)
    assert "done" in first
    assert second == ""


SPOILT = [
    ("input", "UserError", "NaN or infinity"),
    ("weight", "UserError", "has weights that are NaN or infinite"),
    ("mask", "UserError", "attention_mask must have the shape of the tokens"),
    ("nothing", "UserError", "there is none"),
    ("iterator", "OSError", "no more disk"),
    ("forward", "OSError", "no more disk"),
]


@pytest.mark.parametrize(
    ("sequential", "spoil", "kind", "text"),
    [
        *((sequential, *spoil) for sequential in SEQUENTIAL_CHOICES for spoil in SPOILT),
        ("block", "training", "OSError", "no more disk"),
    ],
)
def test_what_is_wrong_in_one_process_ends_all(pair, sequential, spoil, kind, text):
    (first_error, unchanged), (error, _) = pair.run(cases.spoilt, sequential, spoil)
    kind_in_first, text_in_first = first_error
    assert text in text_in_first
    assert text in error[1]
    assert error[0] == kind
    assert unchanged
    if spoil == "nothing":  # both processes find that out by themselves
        return

    assert kind_in_first == "UserError"
    assert "process 1 of 2" in text_in_first
    assert "process 1 of 2" not in error[1]
    if spoil == "input":
        assert "batch 0 of process 1" in error[1]


def test_criteria_without_statistics_send_no_batches(pair):
    check(pair, "plain_mlp", tolerance=0, criterion=Magnitude())
