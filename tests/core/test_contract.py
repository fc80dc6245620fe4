"""What every criterion, pattern, solver and allocation promises; a new entry of a table is tested when it is added."""

import dataclasses
import sys
from copy import deepcopy

import jaxtyping
import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from numpy.testing import assert_allclose
from support import reference
from support.layers import (
    DTYPES,
    allocate,
    assert_same,
    mean_of,
    random_layer,
    random_layers,
    solve,
    statistics,
    wide_layer,
)
from support.pairwise import pairwise
from support.refusals import refuses
from torch.testing import assert_close

from wanda_lightning.core.allocation import OWL, Allocation, Fisher, PerLayer, Uniform
from wanda_lightning.core.criteria import RIA, Criterion, Saliency
from wanda_lightning.core.patterns import NM, EqualShare, Pattern, Structured, Unstructured
from wanda_lightning.core.selection import Selection
from wanda_lightning.core.solvers import ADMM, Refit, Solver, SparseGPT, ZeroOut
from wanda_lightning.core.statistics import InputStatistics
from wanda_lightning.methods import ALLOCATIONS, CRITERIA, PATTERNS as PATTERN_CHOICES, SOLVERS

PATTERNS = {name: make() for name, make in PATTERN_CHOICES.items()}
EVERY_CRITERION = pytest.mark.parametrize("criterion", CRITERIA)
OF_WEIGHTS = [name for name in ALLOCATIONS if ALLOCATIONS[name]().cost == "units"]
EVERY_ALLOCATION = pytest.mark.parametrize("name", OF_WEIGHTS)
UNEQUAL = [name for name in OF_WEIGHTS if name != "uniform"]

TABLES = {Criterion: CRITERIA, Pattern: PATTERN_CHOICES, Allocation: ALLOCATIONS, Solver: SOLVERS}
EVERY_ENTRY = pytest.mark.parametrize(
    ("protocol", "make"),
    [
        pytest.param(protocol, make, id=name)
        for protocol, table in TABLES.items()
        for name, make in table.items()
    ],
)


def selection_of(criterion, pattern):
    pattern = PATTERNS[pattern]
    return Selection(CRITERIA[criterion](), pattern, getattr(pattern, "sparsity", 0.5))


def solver_for(solver, pattern):
    """The solver, or the refit in the place of one that cannot solve layers with whole columns of zeros."""
    solver = SOLVERS[solver]()
    if pattern.removes == "units" and not solver.fits_units:
        return Refit()
    return solver


def assert_counts(pattern, keep, sparsity):
    """How many zeros each comparison group has."""
    if pattern == EqualShare():
        # The search also ends where shares 0.001 apart differ by more: two weights of this matrix.
        assert abs((~keep).double().mean().item() - sparsity) <= max(0.001, 2 / keep.numel())
        return
    expected = reference.keep(pattern, np.ones(keep.shape), sparsity)
    assert reference.survivors(pattern, keep.numpy()) == reference.survivors(pattern, expected)
    if isinstance(pattern, Structured):
        assert (keep == keep[0]).all()


@EVERY_ENTRY
def test_entry_is_a_frozen_dataclass_whose_repr_makes_an_equal_one(protocol, make):
    entry = make()
    twin = eval(repr(entry), vars(sys.modules[type(entry).__module__]))
    assert isinstance(entry, protocol)
    assert entry == twin == make()
    assert hash(entry) == hash(twin)
    with pytest.raises(dataclasses.FrozenInstanceError):
        entry.anything = 1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@EVERY_CRITERION
def test_scores_are_those_of_a_loop(criterion, dtype):
    weight, tokens = random_layer(dtype)
    before = weight.clone()
    criterion_object = CRITERIA[criterion]()
    scores = criterion_object(weight, statistics(tokens, criterion_object))
    assert scores.dtype == torch.promote_types(dtype, torch.float32)
    assert_allclose(
        reference.array(scores),
        reference.SCORES[criterion](reference.array(weight), reference.array(tokens)),
        rtol=1e-5,
    )
    assert torch.equal(weight, before)


@dataclasses.dataclass
class Case:
    """A layer, and what prunes it."""

    weight: torch.Tensor
    inputs: InputStatistics
    selection: Selection
    solver: Solver

    def solve(self):
        return self.solver(self.weight, self.inputs, self.selection)


def make_case(criterion, pattern, solver, dtype=torch.float32):
    weight, tokens = random_layer(dtype)
    selection = selection_of(criterion, pattern)
    solver = solver_for(solver, selection.pattern)
    return Case(weight, statistics(tokens, selection.criterion, solver), selection, solver)


@pytest.fixture
def case(criterion, pattern, solver, dtype):
    return make_case(criterion, pattern, solver, dtype)


EVERY_CASE = pytest.mark.parametrize(
    ("criterion", "pattern", "solver", "dtype"),
    pairwise(CRITERIA, PATTERNS, SOLVERS, DTYPES),
    ids=str,
)


@EVERY_CASE
def test_prunes_exactly(case):
    pruned, keep = case.solve()
    assert pruned.dtype == case.weight.dtype
    assert keep.dtype == torch.bool
    assert pruned.shape == keep.shape == case.weight.shape
    assert_counts(case.selection.pattern, keep, case.selection.sparsity)
    assert torch.equal(pruned != 0, keep)
    assert pruned.isfinite().all()


@EVERY_CASE
def test_pruning_changes_no_argument(case):
    before = deepcopy(case)
    pruned, _ = case.solve()
    assert torch.equal(case.weight, before.weight)
    assert pruned.data_ptr() != case.weight.data_ptr()
    assert_same(case.inputs.sums, before.inputs.sums)


@EVERY_CASE
def test_pruning_again_in_any_layout_gives_the_same(case):
    pruned, keep = case.solve()
    by_columns = case.weight.t().contiguous().t()  # as in GPT-2
    for weight in (case.weight, by_columns):
        again, keep_again = case.solver(weight, case.inputs, case.selection)
        assert torch.equal(pruned, again)
        assert torch.equal(keep, keep_again)


@pytest.mark.parametrize(
    ("criterion", "pattern", "dtype"), pairwise(CRITERIA, PATTERNS, DTYPES), ids=str
)
def test_zero_out_scores_chooses_and_zeroes(criterion, pattern, dtype):
    weight, tokens = random_layer(dtype)
    selection = selection_of(criterion, pattern)
    pruned, keep = ZeroOut()(weight, statistics(tokens, selection.criterion), selection)
    scores = reference.SCORES[criterion](reference.array(weight), reference.array(tokens))
    reference.assert_keeps(keep, reference.keep(selection.pattern, scores, selection.sparsity))
    assert torch.equal(pruned[keep], weight[keep])
    assert not pruned[~keep].any()


@pytest.mark.parametrize(
    ("criterion", "pattern", "solver"), pairwise(CRITERIA, PATTERNS, SOLVERS), ids=str
)
def test_pruning_twice_changes_nothing(criterion, pattern, solver):
    case = make_case(criterion, pattern, solver)
    once, keep_once = case.solve()
    twice, keep_twice = dataclasses.replace(case, weight=once).solve()
    assert torch.equal(keep_twice, keep_once)
    assert_close(twice, once, rtol=0 if case.solver == ZeroOut() else 1e-4, atol=0)


@pytest.mark.parametrize(
    "solver", [*(make() for make in SOLVERS.values()), SparseGPT(mask="upfront")], ids=str
)
def test_pruning_further_keeps_the_zeros(solver):
    weight, tokens = wide_layer()
    some, _ = solve(solver, weight, tokens, sparsity=0.3)
    more, _ = solve(solver, some, tokens, sparsity=0.7)
    assert not more[some == 0].any()
    assert (more == 0).sum() == 12 * 210


@pytest.mark.parametrize(
    ("criterion", "pattern", "solver", "number"),
    pairwise(
        CRITERIA, PATTERNS, SOLVERS, [40, 4000]
    ),  # with 4000 tokens the inputs hardly correlate
    ids=str,
)
def test_error_is_at_most_that_of_zero_out(criterion, pattern, solver, number):
    weight, tokens = random_layer(torch.float64, tokens=number)
    selection = selection_of(criterion, pattern)
    solver = solver_for(solver, selection.pattern)
    if solver == SparseGPT() or not solver.takes_any_criterion:
        # It chooses from weights that have moved, and there magnitude may choose badly.
        selection = dataclasses.replace(selection, criterion=solver.own_criterion)
    inputs = statistics(tokens, selection.criterion, solver)

    def error(some_solver):
        pruned, _ = some_solver(weight, inputs, selection)
        return (tokens @ (pruned - weight).T).square().sum().item()

    assert error(solver) <= error(ZeroOut()) * (1 + 1e-9)


TOGETHER = {
    "one pattern": [(Unstructured(), 0.5), (Unstructured(), 0.5)],
    "unequal shares": [(Unstructured("layer"), 0.3), (Unstructured("layer"), 0.7)],
    "2:4": [(NM(2, 4), 0.5), (NM(2, 4), 0.5)],
    "mixed N:M": [(NM(2, 4), 0.5), (NM(1, 4), 0.75)],
    "one dense": [(Unstructured(), 0.0), (NM(4, 8), 0.5)],
}


@pytest.mark.parametrize(("criterion", "together", "solver"), pairwise(CRITERIA, TOGETHER, SOLVERS))
def test_layers_solved_together_equal_layers_solved_alone(criterion, together, solver):
    weight, tokens = random_layer(torch.float64)
    criterion = CRITERIA[criterion]()
    solver = SOLVERS[solver]()
    inputs = statistics(tokens, criterion, solver)
    selections = [Selection(criterion, *target) for target in TOGETHER[together]]
    weights = [weight[:5], weight[5:].float()]
    weights[0][:, :30] = 0  # sparser than asked for, on the left

    solved = solver.solve_together(weights, inputs, selections)
    for layer, selection, (pruned, keep) in zip(weights, selections, solved, strict=True):
        alone, keep_alone = solver(layer, inputs, selection)
        assert pruned.dtype == layer.dtype
        assert torch.equal(keep, keep_alone)
        assert_close(pruned, alone, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(
    ("make", "values", "text"),
    [
        (RIA, {"a": float("nan")}, "a of RIA must be a number of at least 0"),
        (Saliency, {"dampening": 0.0}, "dampening of Saliency must be a number above 0"),
        (
            ADMM,
            {"iterations": True},
            "iterations of ADMM must be a whole number of at least 1",
        ),
        (
            OWL,
            {"lambda_": 0.6},
            "lambda_ of OWL must be a number of at least 0 and at most 0.5, but it is 0.6",
        ),
        (
            Fisher,
            {"max_deviation": 1.5},
            "max_deviation of Fisher must be a number of at least 0 and at most 1",
        ),
        (ADMM, {"rho": (0.0009, 1.0)}, "rho of ADMM must be two numbers of at least 0.001"),
        (
            SparseGPT,
            {"block_size": 0},
            "block_size of SparseGPT must be a whole number of at least 1, but it is 0",
        ),
        (
            Unstructured,
            {"group": "column"},
            "group of Unstructured must be one of row, layer, but it is 'column'",
        ),
        (
            Unstructured,
            {"weigh_rows": True},
            "weigh_rows of Unstructured must be False for group='row'",
        ),
        (NM, {"n": 4, "m": 4}, "as 2:4 keeps two of four, so N must be below M, but it is 4:4"),
        (
            PerLayer,
            {"sparsities": {"last": 1.0}},
            "sparsity of 'last' in PerLayer must be .* at least 0 and below 1",
        ),
    ],
)
def test_values_out_of_range_are_refused(make, values, text, monkeypatch):
    # Beartype refuses some before we do.
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with refuses(text):
        make(**values)


@pytest.mark.parametrize(
    ("allocation", "scaled"),
    [
        (Uniform(), Uniform()),
        (OWL(), OWL(lambda_=0.02)),
        (Fisher(num_samples=4), Fisher(max_deviation=0.0375, num_samples=4)),
        (PerLayer({"*.up": 0.8, "last": 0.2}), PerLayer({"*.up": 0.2, "last": 0.05})),
    ],
)
def test_a_stage_of_a_schedule_scales_the_differences(allocation, scaled):
    assert allocation.scaled(0.25) == scaled


@EVERY_ALLOCATION
@pytest.mark.parametrize("seed", range(2))
def test_sparsities_follow_the_formula_to_within_a_weight_per_row(name, seed):
    layers = random_layers(seed)
    sparsities = allocate(ALLOCATIONS[name](), layers, 0.5)
    arrays = []
    for layer in layers:
        arrays.append(
            layer._replace(
                weight=reference.array(layer.weight), tokens=reference.array(layer.tokens)
            )
        )
    expected = reference.SPARSITIES[name](arrays, 0.5)
    assert list(sparsities) == list(expected)
    for layer in layers:
        assert abs(sparsities[layer.name] - expected[layer.name]) < 1 / layer.weight.shape[1], (
            layer.name
        )
    assert len(set(expected.values())) >= {"uniform": 1, "owl": 4}.get(name, 5)


@pytest.mark.parametrize("name", UNEQUAL)
@given(
    pattern=st.sampled_from(list(PATTERNS.values())),
    seed=st.integers(0, 2**31),
    shapes=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 6)), min_size=1, max_size=3),
    blocks=st.integers(2, 5),
    sparsity=st.floats(0, 0.99),
)
@settings(max_examples=8)
def test_the_mean_is_the_target_as_near_as_the_pattern_allows(
    name, pattern, seed, shapes, blocks, sparsity
):
    layers = random_layers(seed, [(d_out, 8 * d_in) for d_out, d_in in shapes], blocks)
    sparsity = getattr(pattern, "sparsity", sparsity)
    sparsities = allocate(ALLOCATIONS[name](), layers, sparsity, pattern)
    assert all(0 <= value < 1 for value in sparsities.values())
    if set(sparsities.values()) == {sparsity}:
        return  # equal blocks: as Uniform

    sizes = [layer.weight.numel() for layer in layers]
    steps = [layer.weight.numel() / pattern.sparsity_steps(*layer.weight.shape) for layer in layers]
    reachable = min(sparsity * sum(sizes), sum(sizes) - sum(steps))
    missing = reachable - mean_of(sparsities, layers) * sum(sizes)
    assert abs(missing) <= max(steps) / 2 + 1e-6 * sum(sizes)


@EVERY_ALLOCATION
def test_an_allocation_changes_neither_weights_nor_tokens(name):
    layers = random_layers()
    allocate(ALLOCATIONS[name](), layers, 0.5)
    for layer, before in zip(layers, random_layers(), strict=True):
        assert torch.equal(layer.weight, before.weight)
        assert torch.equal(layer.tokens, before.tokens)


@EVERY_ALLOCATION
@pytest.mark.parametrize("blocks", [1, 3])
def test_one_block_and_equal_blocks_give_uniform(name, blocks):
    weight = torch.randn(6, 24)
    tokens = torch.randn(9, 24)
    layers = [(f"{block}.up", str(block), weight, tokens) for block in range(blocks)]
    assert set(allocate(ALLOCATIONS[name](), layers, 0.43).values()) == {0.43}


def pruned(layers, sparsities, pattern):
    """The layers with the sparsities, by magnitude."""
    sparse_layers = []
    for layer in layers:
        sparsity = sparsities[layer.name]
        keep = pattern.for_sparsity(sparsity)(layer.weight.abs(), sparsity)
        sparse_layers.append(layer._replace(weight=layer.weight * keep))
    return sparse_layers


@pytest.mark.parametrize("name", UNEQUAL)
@given(
    pattern=st.sampled_from([Unstructured(), Unstructured("layer"), NM(2, 4), NM(4, 8)]),
    seed=st.integers(0, 2**31),
    sparsity=st.floats(0.01, 0.95),
    rise=st.just(0.0) | st.floats(0, 1),
)
@settings(max_examples=12)
def test_pruning_again_adds_zeros_only_as_the_sparsity_rises(name, pattern, seed, sparsity, rise):
    """In the second pruning, statistics differ, which must not change the sparsities."""
    layers = random_layers(seed, ((6, 24), (24, 8)))
    if isinstance(pattern, NM):
        sparsity = pattern.sparsity
        rise = 0
    sparsities = allocate(ALLOCATIONS[name](), layers, sparsity, pattern)
    once = pruned(layers, sparsities, pattern)
    if len(set(sparsities.values())) == 1 or once[0].weight.all():
        return

    higher = sparsity + rise * (0.95 - sparsity)
    more = pruned(once, allocate(ALLOCATIONS[name](), once, higher, pattern), pattern)
    for layer, again in zip(once, more, strict=True):
        assert not again.weight[layer.weight == 0].any()
        assert rise or torch.equal(layer.weight, again.weight)
    size = sum(layer.weight.numel() for layer in layers)
    zeros = sum(int((layer.weight == 0).sum()) for layer in more)
    assert abs(zeros - higher * size) <= size / 8  # one weight per row
