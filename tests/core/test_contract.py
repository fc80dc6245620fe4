"""What every criterion, pattern and solver promises; a new entry is tested on the day it is added.

For allocations see also `test_allocation.py`.
"""

import dataclasses
import itertools
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from jaxtyping import TypeCheckError
from support import reference
from support.layers import correlated_layer, output_error, random_layer, solve, statistics

from wanda_lightning.core.allocation import ALLOCATIONS, Allocation
from wanda_lightning.core.criteria import CRITERIA, RIA, Criterion, Magnitude, Saliency, Wanda
from wanda_lightning.core.keep_largest import keep_largest
from wanda_lightning.core.patterns import NM, PATTERNS, EqualShare, Pattern, Unstructured
from wanda_lightning.core.selection import Selection
from wanda_lightning.core.solvers import SOLVERS, Solver, SparseGPT, ZeroOut
from wanda_lightning.core.statistics import InputStatistics

EVERY_CRITERION = pytest.mark.parametrize("criterion", CRITERIA)
EVERY_PATTERN = pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS)
EVERY_SOLVER = pytest.mark.parametrize("solver", [SOLVERS[name]() for name in SOLVERS], ids=SOLVERS)
EVERY_DTYPE = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)

ENTRIES = [
    *((Criterion, CRITERIA[name]) for name in CRITERIA),
    *((Pattern, lambda pattern=pattern: dataclasses.replace(pattern)) for pattern in PATTERNS.values()),
    *((Allocation, ALLOCATIONS[name]) for name in ALLOCATIONS),
    *((Solver, SOLVERS[name]) for name in SOLVERS),
]
EVERY_ENTRY = pytest.mark.parametrize(("protocol", "make"), ENTRIES, ids=[*CRITERIA, *PATTERNS, *ALLOCATIONS, *SOLVERS])


def sparsity_of(pattern):
    return getattr(pattern, "sparsity", 0.5)


def assert_counts(pattern, keep, sparsity):
    """How many zeros each comparison group has."""
    d_out, d_in = keep.shape
    match pattern:
        case Unstructured(group="row"):
            assert (~keep).sum(dim=1).tolist() == [int(d_in * sparsity)] * d_out
        case Unstructured(group="layer"):
            assert (~keep).sum().item() == int(d_out * d_in * sparsity)
        case NM(n=n, m=m):
            assert keep.reshape(-1, m).sum(dim=1).tolist() == [n] * (d_out * d_in // m)
        case EqualShare():
            # The search also ends where shares 0.001 apart differ by more: two weights of this matrix.
            assert abs((~keep).double().mean().item() - sparsity) <= max(0.001, 2 / keep.numel())
        case _:
            raise NotImplementedError(f"write here how many weights {pattern} prunes")


# ---- each entry is a value


@EVERY_ENTRY
def test_entry_is_a_frozen_dataclass_equal_by_value(protocol, make):
    entry, twin = make(), make()
    assert isinstance(entry, protocol)
    assert dataclasses.is_dataclass(entry)
    assert entry == twin
    assert hash(entry) == hash(twin)
    with pytest.raises(dataclasses.FrozenInstanceError):
        entry.anything = 1


@EVERY_ENTRY
def test_repr_makes_the_entry_again(protocol, make):
    entry = make()
    assert eval(repr(entry), vars(sys.modules[type(entry).__module__])) == entry


def test_entries_of_one_dict_differ():
    for table in (CRITERIA, SOLVERS, ALLOCATIONS):
        assert len({make() for make in table.values()}) == len(table)
    assert len(set(PATTERNS.values())) == len(PATTERNS)


def test_every_needed_statistic_exists():
    for make in itertools.chain(CRITERIA.values(), SOLVERS.values(), ALLOCATIONS.values()):
        assert isinstance(make().needs, frozenset)
        InputStatistics(make().needs)


# ---- criteria


@EVERY_DTYPE
@EVERY_CRITERION
def test_scores_are_those_of_a_loop(criterion, dtype):
    weight, tokens = random_layer(dtype)
    before = weight.clone()
    scores = CRITERIA[criterion]()(weight, statistics(tokens, CRITERIA[criterion]))
    assert scores.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    expected = reference.SCORES[criterion](reference.array(weight), reference.array(tokens))
    np.testing.assert_allclose(reference.array(scores), expected, rtol=1e-5)
    assert torch.equal(weight, before)


@EVERY_CRITERION
def test_scores_do_not_depend_on_a_sign(criterion):
    weight, tokens = random_layer()
    criterion = CRITERIA[criterion]()
    inputs, negated = statistics(tokens, criterion), statistics(-tokens, criterion)
    assert torch.equal(criterion(weight, inputs), criterion(-weight, negated))


def test_only_what_has_no_needs_runs_without_inputs():
    weight, _ = random_layer()
    assert torch.equal(Magnitude()(weight, InputStatistics()), weight.abs())
    with pytest.raises(KeyError, match="square_sum"):
        Wanda()(weight, InputStatistics())


@pytest.mark.parametrize("criterion", [Wanda(), RIA()], ids=str)
@pytest.mark.parametrize(("dtype", "faint"), [(torch.float32, 1e-20), (torch.float64, 1e-150)], ids=str)
def test_inputs_that_are_never_active_score_below_the_faintest(criterion, dtype, faint):
    weight, tokens = random_layer(dtype)
    tokens[:, :20] = 0
    tokens[:, 20:40] *= faint
    scores = criterion(weight, statistics(tokens, criterion))
    assert 0 < scores[:, :20].min() <= scores[:, :20].max() < scores[:, 20:].min()


# ---- criterion x pattern x solver


@EVERY_DTYPE
@EVERY_SOLVER
@EVERY_PATTERN
@EVERY_CRITERION
def test_prunes_exactly_and_purely(criterion, pattern, solver, dtype):
    weight, tokens = random_layer(dtype)
    before, sparsity, criterion = weight.clone(), sparsity_of(pattern), CRITERIA[criterion]()
    inputs = statistics(tokens, criterion, solver)
    sums = {name: value.clone() for name, value in inputs.sums.items()}
    pruned, keep = solver(weight, inputs, Selection(criterion, pattern, sparsity))

    assert pruned.dtype == dtype
    assert keep.dtype == torch.bool
    assert pruned.shape == keep.shape == weight.shape
    assert_counts(pattern, keep, sparsity)
    assert torch.equal(pruned != 0, keep)
    assert pruned.isfinite().all()

    assert torch.equal(weight, before)
    assert pruned.data_ptr() != weight.data_ptr()
    assert all(torch.equal(inputs.sums[name], sums[name]) for name in sums)
    again, keep_again = solver(weight, inputs, Selection(criterion, pattern, sparsity))
    assert torch.equal(pruned, again)
    assert torch.equal(keep, keep_again)


@EVERY_DTYPE
@EVERY_PATTERN
@EVERY_CRITERION
def test_zero_out_is_score_keep_zero(criterion, pattern, dtype):
    weight, tokens = random_layer(dtype)
    sparsity, make = sparsity_of(pattern), CRITERIA[criterion]
    pruned, keep = ZeroOut()(weight, statistics(tokens, make), Selection(make(), pattern, sparsity))
    scores = reference.SCORES[criterion](reference.array(weight), reference.array(tokens))
    expected = reference.keep(pattern, scores, sparsity)
    np.testing.assert_array_equal(keep.numpy(), expected)
    assert torch.equal(pruned[keep], weight[keep])
    assert not pruned[~keep].any()


@EVERY_SOLVER
@EVERY_PATTERN
@EVERY_CRITERION
def test_pruning_twice_changes_nothing(criterion, pattern, solver):
    weight, tokens = random_layer()
    sparsity, criterion = sparsity_of(pattern), CRITERIA[criterion]()
    inputs = statistics(tokens, criterion, solver)
    once, keep_once = solver(weight, inputs, Selection(criterion, pattern, sparsity))
    twice, keep_twice = solver(once, inputs, Selection(criterion, pattern, sparsity))
    assert torch.equal(keep_twice, keep_once)
    torch.testing.assert_close(twice, once, rtol=0 if solver == ZeroOut() else 1e-4, atol=0)


@pytest.mark.parametrize("tokens", [40, 4000])  # with many the inputs hardly correlate
@EVERY_SOLVER
@EVERY_PATTERN
@EVERY_CRITERION
def test_error_is_at_most_that_of_zero_out(criterion, pattern, solver, tokens):
    weight, tokens = random_layer(torch.float64, tokens=tokens)
    sparsity, criterion = sparsity_of(pattern), CRITERIA[criterion]()
    if (
        solver == SparseGPT() or not solver.takes_any_criterion
    ):  # it chooses from weights that have moved, and there magnitude may choose badly
        criterion = solver.own_criterion
    inputs = statistics(tokens, criterion, solver)

    def error(some_solver):
        pruned, _ = some_solver(weight, inputs, Selection(criterion, pattern, sparsity))
        return (tokens @ (pruned - weight).T).square().sum().item()

    assert error(solver) <= error(ZeroOut()) * (1 + 1e-9)


TOGETHER = {
    "one pattern": [(Unstructured(), 0.5), (Unstructured(), 0.5)],
    "unequal shares": [(Unstructured("layer"), 0.3), (Unstructured("layer"), 0.7)],
    "2:4": [(NM(2, 4), 0.5), (NM(2, 4), 0.5)],
    "mixed N:M": [(NM(2, 4), 0.5), (NM(1, 4), 0.75)],
    "one dense": [(Unstructured(), 0.0), (NM(4, 8), 0.5)],
}


@EVERY_SOLVER
@pytest.mark.parametrize("targets", TOGETHER.values(), ids=TOGETHER)
@EVERY_CRITERION
def test_layers_with_the_same_inputs_are_pruned_as_each_alone(criterion, targets, solver):
    weight, tokens = random_layer(torch.float64)
    criterion = CRITERIA[criterion]()
    inputs = statistics(tokens, criterion, solver)
    weights = [weight[:5], weight[5:].float()]
    weights[0][:, :30] = 0  # sparser than asked for, on the left
    both = solver.solve_together(weights, inputs, [Selection(criterion, *target) for target in targets])
    for (pruned, keep), part, (pattern, sparsity) in zip(both, weights, targets, strict=True):
        alone, keep_alone = solver(part, inputs, Selection(criterion, pattern, sparsity))
        assert pruned.dtype == part.dtype
        assert torch.equal(keep, keep_alone)
        torch.testing.assert_close(pruned, alone, rtol=1e-6, atol=1e-9)


@EVERY_SOLVER
@EVERY_PATTERN
def test_layout_of_the_weight_does_not_matter(pattern, solver):
    weight, tokens = random_layer()
    inputs, selection = statistics(tokens, Wanda, solver), Selection(Wanda(), pattern, sparsity_of(pattern))
    transposed = weight.t().contiguous().t()  # GPT-2 keeps its weights so
    for got, expected in zip(
        solver(transposed, inputs, selection),
        solver(weight, inputs, selection),
        strict=True,
    ):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("pattern", [Unstructured(), Unstructured("layer"), NM(2, 4)], ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_each_solver_is_nearer_to_the_dense_layer_than_zero_out(pattern, seed):
    weight, tokens = correlated_layer(seed)
    errors = {
        name: output_error(weight, solve(make(), weight, tokens, pattern=pattern)[0], tokens)
        for name, make in SOLVERS.items()
    }
    assert errors["refit"] < errors["zero_out"]
    assert errors["sparsegpt"] < errors["zero_out"]
    assert errors["admm"] < min(errors["refit"], errors["sparsegpt"])


def test_every_solver_has_a_criterion_of_its_own():
    assert {name: make().own_criterion for name, make in SOLVERS.items()} == {
        "zero_out": Wanda(),
        "sparsegpt": Saliency(),
        "refit": Wanda(),
        "admm": Wanda(),
    }


# ---- laws of Wanda


@given(st.integers(0, 2**32 - 1), st.integers(-10, 10), st.integers(-10, 10), st.integers(0, 7))
def test_wanda_rows_do_not_change_with_the_scale_of_all_inputs_or_of_a_row(seed, input_power, row_power, row):
    weight, tokens = random_layer(seed=seed, shape=(8, 24), tokens=10)
    inputs = statistics(tokens, Wanda)
    keep = Unstructured()(Wanda()(weight, inputs), 0.5)
    scaled = weight.clone()
    scaled[row] *= 2.0**row_power
    assert torch.equal(Unstructured()(Wanda()(scaled, inputs), 0.5), keep)
    louder = statistics(tokens * 2.0**input_power, Wanda)
    assert torch.equal(Unstructured()(Wanda()(weight, louder), 0.5), keep)
    assert torch.equal(NM(2, 4)(Wanda()(scaled, louder), 0.5), NM(2, 4)(Wanda()(weight, inputs), 0.5))


@given(st.integers(0, 2**32 - 1))
def test_permuted_inputs_permute_the_scores_of_wanda(seed):
    weight, tokens = random_layer(seed=seed, shape=(4, 24), tokens=10)
    order = torch.randperm(24, generator=torch.Generator().manual_seed(seed))
    scores = Wanda()(weight, statistics(tokens, Wanda))
    permuted = Wanda()(weight[:, order], statistics(tokens[:, order], Wanda))
    torch.testing.assert_close(permuted, scores[:, order], rtol=1e-6, atol=0)


def test_wanda_prunes_a_dead_input_first():
    weight, tokens = random_layer()
    tokens[:, [5, 40]] = 0
    weight[:, [5, 40]] *= 1e6
    _, keep = ZeroOut()(weight, statistics(tokens, Wanda), Selection(Wanda(), Unstructured(), 2 / 64))
    assert keep.all(dim=0).logical_not().nonzero().flatten().tolist() == [5, 40]


def test_wanda_of_half_precision_tells_apart_what_bf16_would_not():
    weight = torch.tensor([[1.0, 1.0]], dtype=torch.bfloat16)
    tokens = torch.tensor([[1.0, 1.0], [0.0, 0.05]], dtype=torch.bfloat16)
    scores = Wanda()(weight, statistics(tokens, Wanda))
    assert scores[0, 0] < scores[0, 1]
    assert scores.bfloat16()[0, 0] == scores.bfloat16()[0, 1]


# ---- laws of RIA


def test_ria_of_a_row_and_a_column_of_zeros():
    """They score 0, not NaN, and what else an inactive input has scores above them."""
    weight, tokens = random_layer()
    weight[3], weight[:, 7], weight[5, 9] = 0, 0, 0
    tokens[:, 9] = 0
    scores = RIA()(weight, statistics(tokens, RIA))
    assert scores.isfinite().all()
    assert torch.equal(scores != 0, weight != 0)
    assert scores[weight != 0].min() == scores[:, 9].max()


@given(st.integers(0, 2**32 - 1), st.integers(-10, 10))
def test_ria_does_not_change_with_the_scale_of_the_weights(seed, power):
    weight, tokens = random_layer(seed=seed, shape=(8, 24), tokens=10)
    inputs = statistics(tokens, RIA)
    assert torch.equal(RIA()(weight * 2.0**power, inputs), RIA()(weight, inputs))


def test_ria_without_activations_is_relative_importance():
    weight, tokens = random_layer()
    quiet, loud = statistics(tokens, RIA), statistics(tokens * torch.arange(1, 65), RIA)
    assert torch.equal(RIA(a=0.0)(weight, quiet), RIA(a=0.0)(weight, loud))
    assert not torch.equal(RIA()(weight, quiet), RIA()(weight, loud))
    for a in (-0.5, float("nan")):
        with pytest.raises(ValueError, match="a of RIA must be a number of at least 0"):
            RIA(a=a)


# ---- shapes are checked


def test_wrong_shapes_are_refused():
    weight, tokens = random_layer()
    for wrong in (
        lambda: Magnitude()(
            torch.ones(2, 3, 4), InputStatistics()
        ),  # runs without complaint where shapes are not checked
        lambda: InputStatistics({"square_sum"}).update(torch.ones(2, 3, 4)),
        lambda: Wanda()(weight[:, :1], statistics(tokens, Wanda)),  # would broadcast
        lambda: keep_largest(torch.ones(2, 3, dtype=torch.int64), 1),
    ):
        with pytest.raises((TypeCheckError, RuntimeError)):
            wrong()
