"""Solvers against numpy's own least squares and inverses."""

import copy
import logging

import numpy as np
import pytest
import torch
from support import reference
from support.callbacks import Net, loader, trainer
from support.layers import random_layer, statistics

from wanda_lightning import NM, SparseGPTPrune, Unstructured, prune
from wanda_lightning.core.criteria import Magnitude, Saliency, Wanda
from wanda_lightning.core.selection import Selection
from wanda_lightning.core.solvers import ADMM, SOLVERS, Refit, SparseGPT
from wanda_lightning.core.solvers.refit import refitted

WIDE = (12, 300)  # more than two blocks of columns


def solved(solver, weight, tokens, criterion=None, pattern=Unstructured(), sparsity=0.5):
    criterion = criterion or solver.own_criterion
    return solver(weight, statistics(tokens, criterion, solver), Selection(criterion, pattern, sparsity))


def output_error(weight, pruned, tokens):
    return (tokens.double() @ (pruned - weight).double().t()).square().sum().item()


# ---- SparseGPT


@pytest.mark.parametrize("shape", [(6, 64), WIDE])
@pytest.mark.parametrize("criterion", [Magnitude(), Wanda(), Saliency()])
def test_a_mask_of_before_gets_the_surgeons_update(criterion, shape):
    weight, tokens = random_layer(torch.float64, shape=shape, tokens=500)
    pruned, keep = solved(SparseGPT(mask="upfront"), weight, tokens, criterion)
    scores = reference.SCORES[type(criterion).__name__.lower()](weight.numpy(), tokens.numpy())
    np.testing.assert_array_equal(keep.numpy(), reference.keep_by_row(scores, 0.5))
    expected = reference.surgeon(weight.numpy(), tokens.numpy(), 0.01, keep.numpy())
    np.testing.assert_allclose(pruned.numpy(), expected, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("pattern", [Unstructured(), Unstructured("layer"), NM(2, 4), NM(3, 5), NM(1, 2)], ids=str)
@pytest.mark.parametrize("block_size", [128, 20, 1000])
def test_what_is_chosen_on_the_way_gets_the_surgeons_update(pattern, block_size):
    weight, tokens = random_layer(torch.float64, shape=WIDE, tokens=500)
    solver = SparseGPT(block_size=block_size)
    pruned, keep = solved(solver, weight, tokens, pattern=pattern, sparsity=getattr(pattern, "sparsity", 0.5))
    expected = reference.surgeon(weight.numpy(), tokens.numpy(), 0.01, keep.numpy())
    np.testing.assert_allclose(pruned.numpy(), expected, rtol=1e-7, atol=1e-9)
    if isinstance(pattern, NM):
        # Each group by the weights as they are when it is reached.
        start = pattern.m * 7
        others = keep.numpy().copy()
        others[:, start:] = True
        then = reference.surgeon(weight.numpy(), tokens.numpy(), 0.01, others)
        scores = reference.saliency(then, tokens.numpy())[:, start : start + pattern.m]
        group = reference.keep_n_of_m(scores, pattern.n, pattern.m)
        np.testing.assert_array_equal(keep.numpy()[:, start : start + pattern.m], group)


@pytest.mark.parametrize("sparsity", [0.1, 0.37, 0.6, 0.9])
@pytest.mark.parametrize("block_size", [128, 7])
def test_rows_have_their_exact_number_whatever_the_blocks(sparsity, block_size):
    weight, tokens = random_layer(shape=WIDE, tokens=500)
    _, keep = solved(SparseGPT(block_size=block_size), weight, tokens, sparsity=sparsity)
    assert (~keep).sum(dim=1).tolist() == [int(300 * sparsity)] * 12
    _, keep = solved(SparseGPT(block_size=block_size), weight, tokens, None, Unstructured("layer"), sparsity)
    assert (~keep).sum() == int(3600 * sparsity)


@pytest.mark.parametrize("pattern", [Unstructured(), Unstructured("layer"), NM(2, 4)], ids=str)
def test_what_is_sparser_than_asked_for_on_the_left_stays_so(pattern):
    weight, tokens = random_layer(shape=WIDE, tokens=500)
    weight[:, :128] = 0
    pruned, _ = solved(SparseGPT(), weight, tokens, pattern=pattern, sparsity=getattr(pattern, "sparsity", 0.3))
    assert not pruned[:, :128].any()
    dense_on_the_right = isinstance(pattern, Unstructured)  # what is zero already is more than was asked for
    assert bool(pruned[:, 128:256].all()) == dense_on_the_right


def test_an_input_that_is_never_active_loses_its_weights():
    weight, tokens = random_layer()
    tokens[:, [3, 40]] = 0
    pruned, keep = solved(SparseGPT(), weight, tokens)
    assert not pruned[:, [3, 40]].any()
    assert torch.equal(keep, pruned != 0)
    assert pruned.isfinite().all()


@pytest.mark.parametrize("solver", [SparseGPT(), ADMM(), SparseGPT(mask="upfront")], ids=str)
def test_more_sparsity_leaves_the_zeros_where_they_are(solver):
    weight, tokens = random_layer(shape=WIDE, tokens=500)
    some, _ = solved(solver, weight, tokens, sparsity=0.3)
    more, _ = solved(solver, some, tokens, sparsity=0.7)
    assert not more[some == 0].any()
    assert (more == 0).sum() == 12 * 210


def test_too_few_tokens_are_dampened(caplog):
    weight, tokens = random_layer(tokens=3)
    with caplog.at_level(logging.WARNING):
        pruned, _ = solved(SparseGPT(dampening=1e-9), weight, tokens)
    assert "no Cholesky factor with dampening 1e-09: using" in caplog.text
    assert pruned.isfinite().all()
    tokens[0, 0] = float("nan")
    with pytest.raises(ValueError, match="no Cholesky factor, not even with dampening"):
        solved(SparseGPT(), weight, tokens)


class Parallel(torch.nn.Module):
    """Three layers with one input, and one with another."""

    def __init__(self):
        super().__init__()
        self.q, self.out, self.k, self.v = (torch.nn.Linear(*shape) for shape in ((16, 8), (8, 16), (16, 8), (16, 8)))

    def forward(self, x):
        return self.out(self.q(x) * self.k(x) + self.v(x))


def test_one_factorisation_for_layers_with_one_input(monkeypatch):
    from wanda_lightning.core import statistics as module

    made = []
    original = module.inverse_factor
    monkeypatch.setattr(module, "inverse_factor", lambda *args: made.append(args) or original(*args))
    torch.manual_seed(0)

    for sequential, expected in {"block": 2, "layer": 2, "none": 2}.items():
        made.clear()
        blocks = torch.nn.Sequential(Parallel(), Parallel())
        prune(blocks, [torch.randn(40, 16)], solver="sparsegpt", sequential=sequential, progress=False)
        assert len(made) == 2 * expected


@pytest.fixture
def solved_together(monkeypatch):
    """The shapes of the matrices of each call of SparseGPT."""
    calls, original = [], SparseGPT.solve_together

    def spy(self, weights, *others):
        calls.append([tuple(weight.shape) for weight in weights])
        return original(self, weights, *others)

    monkeypatch.setattr(SparseGPT, "solve_together", spy)
    return calls


@pytest.mark.parametrize("sequential", ["block", "none"])
def test_rows_of_layers_with_one_input_are_solved_together(sequential, solved_together):
    blocks = torch.nn.Sequential(Parallel(), Parallel())
    report = prune(blocks, [torch.randn(40, 16)], solver="sparsegpt", sequential=sequential, progress=False)
    assert solved_together == [[(8, 16)] * 3, [(16, 8)]] * 2
    assert [layer.name for layer in report.layers] == [f"{i}.{name}" for i in "01" for name in ("q", "out", "k", "v")]
    assert {layer.sparsity for layer in report.layers} == {0.5}


def test_not_all_layers_with_one_input_are_held_at_once(solved_together, monkeypatch):
    from wanda_lightning import pruning

    torch.manual_seed(0)
    results = []
    for limit in (pruning._HELD_AT_ONCE, 2 * 8 * 16, 1):
        monkeypatch.setattr(pruning, "_HELD_AT_ONCE", limit)
        torch.manual_seed(0)
        blocks = torch.nn.Sequential(Parallel())
        prune(blocks, [torch.randn(40, 16)], solver="sparsegpt", progress=False, sequential="none")
        results.append(list(blocks.parameters()))
    assert list(map(len, solved_together)) == [3, 1, 2, 1, 1, 1, 1, 1, 1]
    for others in results[1:]:
        for one, other in zip(results[0], others, strict=True):
            torch.testing.assert_close(one, other)


# ---- least squares


@pytest.mark.parametrize("pattern", [Unstructured(), NM(2, 4)], ids=str)
@pytest.mark.parametrize("dampening", [0.01, 0.3])
def test_a_refit_is_numpys_least_squares(pattern, dampening):
    weight, tokens = random_layer(torch.float64, shape=(6, 32), tokens=200)
    pruned, keep = solved(Refit(dampening, steps=200), weight, tokens, pattern=pattern)
    assert torch.equal(keep, pattern(Wanda()(weight, statistics(tokens, Wanda)), 0.5))
    expected = reference.least_squares(weight.numpy(), tokens.numpy(), dampening, keep.numpy())
    np.testing.assert_allclose(pruned.numpy(), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("pattern", [Unstructured(), Unstructured("layer"), NM(2, 4)], ids=str)
def test_admm_leaves_the_zeros_of_before(pattern):
    weight, tokens = mixed_layer(3)
    weight[:, ::5] = 0
    weight[:, 8:16] = 0
    weight[3] = 0
    pruned, keep = solved(ADMM(), weight, tokens, pattern=pattern, sparsity=getattr(pattern, "sparsity", 0.6))
    assert torch.equal(keep, pruned != 0)
    assert not keep[weight == 0].any()
    if pattern == Unstructured():
        assert {int(row.sum()) for row in ~keep} == {int(0.6 * 96), 96}
    if pattern == Unstructured("layer"):
        assert (~keep).sum() == int(0.6 * keep.numel())


def test_admm_takes_wandas_mask_where_inputs_do_not_correlate():
    weight, _ = random_layer(torch.float64, shape=(6, 32))
    norms = torch.logspace(-2, 1, 32, dtype=torch.float64)
    tokens = torch.linalg.qr(torch.randn(64, 32, generator=torch.Generator().manual_seed(0)).double()).Q * norms
    tokens[0] += 1e-3  # a little, and ADMM errs
    pruned, keep = solved(ADMM(), weight, tokens)
    zeroed, wanda = solved(SOLVERS["zero_out"](), weight, tokens)
    assert torch.equal(keep, wanda)
    assert output_error(weight, pruned, tokens) <= output_error(weight, zeroed, tokens)


@pytest.mark.parametrize("steps", [1, 3, 200])
def test_a_refit_knows_its_error(steps):
    weight, tokens = mixed_layer(4, torch.float64, shape=(6, 32), tokens=200)
    gram, keep = tokens.t() @ tokens, NM(2, 4)(weight.abs(), 0.5)
    fitted, error = refitted(weight, weight * keep, keep, gram, steps)
    difference = fitted - weight
    np.testing.assert_allclose(error.squeeze(1), (difference @ gram * difference).sum(dim=1), rtol=1e-9)


def test_without_enough_tokens_a_refit_stays_near_the_weights():
    weight, tokens = random_layer(tokens=2)
    pruned, keep = solved(Refit(), weight, tokens)
    assert pruned.isfinite().all()
    assert (pruned - weight * keep).abs().max() < 10 * weight.abs().max()


def test_admm_ends_at_the_least_squares_of_its_mask():
    weight, tokens = random_layer(torch.float64, shape=(6, 32), tokens=200)
    pruned, keep = solved(ADMM(dampening=0.05, refit_steps=200), weight, tokens)
    expected = reference.least_squares(weight.numpy(), tokens.numpy(), 0.05, keep.numpy())
    np.testing.assert_allclose(pruned.numpy(), expected, rtol=1e-5, atol=1e-7)


def mixed_layer(seed, dtype=torch.float32, shape=(24, 96), tokens=600):
    """Inputs that depend on each other, where making up for a weight pays."""
    generator = torch.Generator().manual_seed(seed)
    weight, tokens = random_layer(dtype, seed=seed, shape=shape, tokens=tokens)
    return weight, tokens @ torch.randn(shape[1], shape[1], generator=generator).to(dtype) / 10


@pytest.mark.parametrize("pattern", [Unstructured(), Unstructured("layer"), NM(2, 4)], ids=str)
@pytest.mark.parametrize("iterations", [1, 6, 10])
def test_the_mask_of_admm_is_that_of_its_turns_one_by_one(pattern, iterations):
    weight, tokens = mixed_layer(1, torch.float64, shape=(6, 32), tokens=200)
    solver = ADMM(iterations=iterations)
    _, keep = solved(solver, weight, tokens, pattern=pattern)
    first, last = solver.rho
    rhos = [first * (last / first) ** (turn / max(1, iterations - 1)) for turn in range(iterations)]
    expected = reference.admm(
        weight.numpy(), tokens.numpy(), solver.dampening, rhos, lambda scores: reference.keep(pattern, scores, 0.5)
    )
    np.testing.assert_array_equal(keep.numpy(), expected)


@pytest.mark.parametrize("pattern", [Unstructured(), Unstructured("layer"), NM(2, 4)], ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_each_remedy_is_nearer_to_the_dense_layer(pattern, seed):
    weight, tokens = mixed_layer(seed)
    errors = {
        name: output_error(weight, solved(make(), weight, tokens, pattern=pattern)[0], tokens)
        for name, make in SOLVERS.items()
    }
    assert errors["reconstruct"] == errors["zero_out"]  # until the block is trained
    assert errors["refit"] < errors["zero_out"]
    assert errors["sparsegpt"] < errors["zero_out"]
    assert errors["admm"] < min(errors["refit"], errors["sparsegpt"])


# ---- what is refused


def test_a_solver_that_chooses_itself_takes_no_criterion():
    with pytest.raises(ValueError, match=r"ADMM\(.* chooses the weights itself, but criterion=Magnitude\(\) was given"):
        prune(torch.nn.Linear(4, 4), [], solver="admm", criterion="magnitude")


@pytest.mark.parametrize(
    ("make", "values"),
    [
        (SparseGPT, {"dampening": 0.0}),
        (SparseGPT, {"block_size": 0}),
        (Refit, {"dampening": -1.0}),
        (Refit, {"steps": 0}),
        (ADMM, {"rho": (0.0, 1.0)}),
        (ADMM, {"rho": (0.0009, 1.0)}),
        (ADMM, {"rho": (0.5, 0.1)}),
        (ADMM, {"dampening": 0.0}),
    ],
)
def test_values_out_of_range_are_refused(make, values):
    with pytest.raises(ValueError, match=f"{make.__name__} needs"):
        make(**values)


def test_every_solver_has_a_criterion_of_its_own():
    assert {name: make().own_criterion for name, make in SOLVERS.items()} == {
        "zero_out": Wanda(),
        "sparsegpt": Saliency(),
        "refit": Wanda(),
        "admm": Wanda(),
        "reconstruct": Wanda(),
    }


def test_gram_matrices_that_cannot_fit_are_refused(monkeypatch):
    model = torch.nn.Sequential(torch.nn.Linear(64, 4096), torch.nn.Linear(4096, 64))
    monkeypatch.setattr("wanda_lightning.refusals.free_memory", lambda device: 2**27)
    batches = [torch.randn(8, 64)]
    with pytest.raises(ValueError, match=r"needs at least 0.2 GiB .* widest of 1 with 4096 .* 0.1 GiB are free on cpu"):
        prune(model, batches, solver="sparsegpt", progress=False)
    prune(model, batches, solver="sparsegpt", skip=["1"], progress=False)
    prune(model, batches, progress=False)


def test_the_report_says_where_tokens_are_few():
    model = torch.nn.Sequential(torch.nn.Linear(32, 8), torch.nn.ReLU(), torch.nn.Linear(8, 8))
    dense = copy.deepcopy(model)
    report = prune(model, [torch.randn(16, 32)], solver="refit", progress=False)
    assert "1 layer saw fewer tokens than they have inputs, 0 first: 16 of 32" in "".join(report.notes)
    assert not prune(dense, [torch.randn(16, 32)], progress=False).notes


def test_the_callback_of_sparsegpt_is_prune_with_its_solver():
    module, by_hand = Net(), Net()
    callback = SparseGPTPrune(0.6, num_samples=12, sequential="layer")
    trainer(callback).validate(module, loader(), verbose=False)
    batches = [x for x, _ in loader()]
    options = {"pattern": Unstructured("layer"), "sequential": "layer", "progress": False}
    prune(by_hand.layers, batches, 0.6, solver=SparseGPT(), **options)
    for name, weight in module.named_parameters():
        torch.testing.assert_close(weight, by_hand.get_parameter(name), rtol=1e-4, atol=1e-6)
    assert callback.report.config["solver"]["name"] == "SparseGPT"
