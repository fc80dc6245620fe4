"""The loop without pruning: what a function outside of the package gets from it."""

from copy import deepcopy

import pytest
import torch
from support.layers import rng
from support.mlps import relu_mlp
from torch.testing import assert_close

from wanda_lightning import PruningConfig
from wanda_lightning.loop import Observer, begin, make_plan, pruning, visit_stops


@pytest.mark.parametrize("sequential", ["none", "layer"])
def test_each_layer_is_changed_with_the_inputs_that_the_choice_means(sequential):
    model = relu_mlp(16, 12, 16)
    dense = deepcopy(model)
    batches = list(torch.randn(3, 20, 16, generator=rng(0)))
    norms = {}

    def halve(run, stop, observation):
        for layer in stop.layers:
            norms[layer.name] = observation.inputs[layer.name].norm()
            layer.write(layer.read() / 2)

    plan = make_plan(PruningConfig(sequential=sequential), model)
    with pruning(begin(plan, batches, progress=False)) as run:
        visit_stops(run, Observer(frozenset({"square_sum"})), halve)

    for index in (0, 2):
        assert torch.equal(model[index].weight, dense[index].weight / 2)
    tokens = torch.cat(batches)
    seen = dense if sequential == "none" else model  # before the last layer
    with torch.no_grad():
        expected = {"0": tokens.norm(dim=0), "2": seen[:2](tokens).norm(dim=0)}
    assert_close(norms, expected, check_dtype=False)
