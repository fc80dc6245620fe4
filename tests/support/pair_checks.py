"""Compare what two processes pruned with what one process prunes."""

import pytest
import torch
from support import pair_cases as cases

from wanda_lightning import prune


def alone(name, batches=None, wide=False, **choices):
    """The same in one process: what comes out, and the report."""
    model, own = cases.specimen(name, wide)
    report = prune(model, own if batches is None else batches, progress=False, **choices)
    return model, report


def assert_same_weights(weights, expected, tolerance=1e-3):
    """The same zeros but for near ties (sums in another order differ in the last bit); what stays is bit-equal."""
    expected = {name: value.detach() for name, value in expected.items()}
    assert weights.keys() == expected.keys()
    others = sum(int(((weights[name] == 0) != (expected[name] == 0)).sum()) for name in weights)
    assert others <= tolerance * sum(value.numel() for value in expected.values())
    for name, value in weights.items():
        kept = (value != 0) & (expected[name] != 0)
        assert torch.equal(value[kept], expected[name][kept]), name


def assert_same_report(report, expected):
    def plain(layers):
        return [(layer.name, layer.shape, layer.tokens, layer.note, layer.target) for layer in layers]

    assert plain(report.layers) == plain(expected.layers)
    assert [layer.zeros for layer in report.layers] == [layer.zeros for layer in expected.layers]
    for layer, other in zip(report.layers, expected.layers, strict=True):
        assert layer.error == (None if other.error is None else pytest.approx(other.error, rel=1e-3)), layer.name
    assert report.skipped == expected.skipped
    assert (report.parameters, report.zeros) == (expected.parameters, expected.zeros)
    assert report.config == expected.config
    assert report.notes == expected.notes


def assert_equal_everywhere(first, second):
    assert all(torch.equal(first[name], second[name]) for name in first)
