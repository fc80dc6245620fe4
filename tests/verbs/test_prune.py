"""`prune` on every model of the zoo: nothing left out, and what a slow, independent procedure gives."""

from copy import deepcopy
from itertools import cycle, product

import pytest
import torch
from support.families import slow_prune, verify
from support.layers import assert_same, rng
from support.mlps import relu_mlp
from support.pairwise import with_nightly
from support.quiet import prune
from support.refusals import refuses, state_of
from support.samples import run_of
from support.zoo import ZOO, batches_of, cast, matching, matrices, model_of, run
from torch import nn
from torch.testing import assert_close

from wanda_lightning import ADMM, PruningConfig, Reconstruct, SparseGPT
from wanda_lightning.calibration.observer import PassiveCalibration
from wanda_lightning.core import Refit, Structured, statistics
from wanda_lightning.loop.plan import make_plan
from wanda_lightning.loop.steps import begin
from wanda_lightning.methods import SEQUENTIAL_CHOICES
from wanda_lightning.models import SkipReason, find_layers
from wanda_lightning.parallel import SINGLE_PROCESS
from wanda_lightning.training.held_zeros import HeldZeros
from wanda_lightning.verbs import prune_weights
from wanda_lightning.verbs.prune import prune_collected
from wanda_lightning.verbs.remove_units import remove_units


def assert_complete(report, model, specimen, dense):
    """Every matrix is pruned to one half of each row, or skipped as expected; the report counts right."""
    verify(model, dense, report, "unstructured")
    everything = matrices(model)
    dense_names = matching(everything, specimen.dense) | matching(everything, specimen.uncalled)
    skipped = {matrix.name: matrix.reason for matrix in report.skipped}
    untied = {name for name, reason in skipped.items() if reason is not SkipReason.TIED}
    assert untied <= dense_names <= skipped.keys()
    for layer in report.layers:
        assert layer.sparsity == pytest.approx(0.5, abs=0.5 / layer.shape[1])
        assert layer.tokens > 0 or layer.note.startswith("few tokens")
    parameters = nn.utils.parameters_to_vector(model.parameters())
    assert report.parameters == len(parameters)
    assert report.zeros == (parameters == 0).sum()
    inside = sum(layer.size for layer in report.layers)
    assert report.coverage == pytest.approx(inside / report.parameters)


# Blocks in bfloat16; layers that nothing calls; experts with padding, which test_expert_tokens.py compares.
NOT_SLOWLY = "autocast_inside", "torch_transformer", "mixtral_padded"
# Specimens that differ from another in nothing that pruning sees.
LIKE_OTHERS = "llama_left_padded", "qwen3_moe", "resnet50", "convnext_conv_mlp"


@pytest.mark.parametrize(
    ("name", "sequential"),
    with_nightly(
        zip([name for name in ZOO if name not in LIKE_OTHERS], cycle(SEQUENTIAL_CHOICES)),
        product(ZOO, SEQUENTIAL_CHOICES),
    ),
)
def test_equals_the_slow_procedure(name, sequential):
    specimen = ZOO[name]
    model = specimen.build()
    batches = specimen.batches()
    if name not in NOT_SLOWLY:
        model = model.double()
        batches = cast(batches)
    slow = deepcopy(model)
    if hasattr(slow, "set_experts_implementation"):
        # Grouped products are not intercepted, and have no float64.
        slow.set_experts_implementation("eager")

    report = prune(model, batches, 0.5, sequential=sequential, keep_batch_norm=True)
    assert_complete(report, model, specimen, dense=slow)
    if name not in NOT_SLOWLY:
        slow_prune(slow, batches, sequential)
        assert_same(model, slow)


@pytest.mark.parametrize("name", ["llama_padded", "resnet18"])
def test_passes_that_run_anyway_prune_like_one_pass(name):
    """Without a correction of BatchNorm layers, as the batches of a validation loop run only once."""
    model = model_of(name)
    expected = deepcopy(model)
    batches = batches_of(name)
    plan = run_of(model, batches, sequential="none").plan
    passive = PassiveCalibration(model, plan.whole_model, plan.observed, SINGLE_PROCESS)
    for batch in batches:
        with passive.collect(batch):
            run(model, batch)
    report = prune_collected(plan, passive)
    prune(expected, batches, sequential="none", keep_batch_norm=True)
    assert_same(model, expected)
    assert any("run only once" in note for note in report.notes) == (name == "resnet18")


# ---- laws


@pytest.mark.parametrize("sequential", ["block", "none"])
@pytest.mark.parametrize(("pattern", "sparsity"), [("unstructured", 0.7), ("2:4", 0.5)])
def test_pruning_twice_changes_nothing_where_inputs_become_inactive(pattern, sparsity, sequential):
    """After ReLU, few tokens leave some columns without input, and after pruning they are other ones."""
    model = model_of("block_twice")
    inactive = []
    for block in model.blocks:
        block.between = nn.ReLU()
    model.blocks[0].down.register_forward_pre_hook(
        lambda _, args: inactive.append((args[0] == 0).all(dim=(0, 1)))
    )
    for _ in range(2):
        before = deepcopy(model.state_dict())
        few = [torch.randn(1, 2, 32, generator=rng())]
        prune(model, few, sparsity, pattern=pattern, sequential=sequential)
    assert (inactive[-1] & ~inactive[0]).any()
    assert_same(model.state_dict(), before)


@pytest.mark.parametrize("sequential", SEQUENTIAL_CHOICES)
@pytest.mark.parametrize("allocation", ["uniform", "fisher"])
def test_the_model_is_left_as_it_was(allocation, sequential):
    model = model_of("llama").train()
    model.model.layers[0].eval()
    model.model.layers[1].requires_grad_(False)
    before = state_of(model)
    dense = deepcopy(model.state_dict())
    prune(
        model,
        batches_of("llama"),
        0.0,
        allocation=allocation,
        sequential=sequential,
    )
    assert state_of(model) == before
    assert model.config.use_cache
    assert torch.is_grad_enabled()
    assert_same(model.state_dict(), dense)


IDS = torch.arange(16).repeat(2, 1)  # starts with T5's padding, which also starts a sentence
LABELS = IDS.where(torch.tensor([[16], [5]]) > IDS, -100)


@pytest.mark.parametrize(
    ("decoder", "tokens"),
    [
        ({"decoder_input_ids": None, "labels": LABELS}, 16 + 5),
        ({"decoder_input_ids": IDS, "decoder_attention_mask": None}, 2 * 16),
        ({"decoder_input_ids": IDS, "decoder_attention_mask": (LABELS != -100).long()}, 16 + 5),
    ],
)
def test_padding_of_a_decoder_does_not_count(decoder, tokens):
    report = prune(model_of("t5"), [batches_of("t5")[0] | decoder])
    found = {layer.name: layer.tokens for layer in report.layers}
    assert found["encoder.block.0.layer.0.SelfAttention.q"] == 24 + 10
    assert found["decoder.block.0.layer.1.EncDecAttention.k"] == 24 + 10
    assert found["decoder.block.0.layer.0.SelfAttention.q"] == tokens


@pytest.mark.parametrize("method", ["wanda", "sparsegpt", "balanced", "best"])
def test_a_batch_that_fails_behind_the_first_block_changes_nothing(method):
    model = model_of("t5")
    dense = deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"decoder_input_ids|input_ids or inputs_embeds"):
        prune(model, [{"input_ids": IDS}], method=method)
    assert_same(model.state_dict(), dense)


def test_autocast_of_the_caller_reaches_the_batches():
    """Scores come from bfloat16 activations, and the cast of a dense weight is not used after it was pruned."""
    seen = []
    model = model_of("llama")
    model.model.layers[1].mlp.down_proj.register_forward_pre_hook(
        lambda module, args: seen.append(args[0].dtype)
    )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        prune(model, batches_of("llama"), 0.5)
        inside = run(model, batches_of("llama")[0])
    assert set(seen) == {torch.bfloat16}
    with torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=False):
        assert torch.equal(inside, run(model, batches_of("llama")[0]))


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
def test_weights_without_a_shape_can_be_left_out():
    model = nn.Sequential(nn.Linear(8, 8), nn.LazyLinear(4))
    with refuses(r"skip must name 2 matrices .* 1\.weight first: has no shape yet"):
        prune(model, criterion="magnitude")
    report = prune(model, criterion="magnitude", skip=["1"])
    assert [layer.name for layer in report.layers] == ["0"]
    assert {matrix.name: matrix.shape for matrix in report.skipped} == {
        "1.weight": (),
        "1.bias": (),
    }
    assert report.parameters == 8 * 8 + 8


# ---- solvers on whole models


class Parallel(nn.Module):
    """Three layers with one input, and one with another."""

    def __init__(self):
        super().__init__()
        self.q = nn.Linear(16, 8)
        self.out = nn.Linear(8, 16)
        self.k = nn.Linear(16, 8)
        self.v = nn.Linear(16, 8)

    def forward(self, x):
        return self.out(self.q(x) * self.k(x) + self.v(x))


@pytest.mark.parametrize("method", ["sparsegpt", "admm", "wanda"])
def test_the_error_of_each_layer_is_that_of_its_outputs(method):
    model = Parallel()
    batches = torch.randn(4, 20, 16)
    dense = deepcopy(model)
    report = prune(model, list(batches), 0.5, method=method, sequential="none")
    inner = (dense.q(batches) * dense.k(batches) + dense.v(batches)).detach()
    inputs = dict.fromkeys(("q", "k", "v"), batches) | {"out": inner}
    for layer in report.layers:
        x = inputs[layer.name]
        before = dense.get_submodule(layer.name)
        after = model.get_submodule(layer.name)
        with torch.no_grad():  # a solver may have fitted the bias, too
            expected = float(
                (before(x) - after(x)).square().sum() / (x @ before.weight.t()).square().sum()
            )
        assert layer.error == (None if method == "wanda" else pytest.approx(expected, rel=1e-4))


def test_not_all_layers_with_one_input_are_held_at_once(monkeypatch):
    sizes = []
    results = []
    together = SparseGPT.solve_together
    monkeypatch.setattr(
        SparseGPT,
        "solve_together",
        lambda self, w, *more: sizes.append(len(w)) or together(self, w, *more),
    )
    for limit in (prune_weights._MAX_GROUP, 1):
        monkeypatch.setattr(prune_weights, "_MAX_GROUP", limit)
        torch.manual_seed(0)
        blocks = nn.Sequential(Parallel())
        prune(blocks, [torch.randn(40, 16)], solver="sparsegpt", sequential="none")
        results.append(blocks.state_dict())
    assert sizes == [3, 1, 1, 1, 1, 1]
    assert_close(*results)


def test_the_report_says_where_tokens_are_few():
    model = relu_mlp(32, 8, 8)
    dense = deepcopy(model)
    report = prune(model, [torch.randn(16, 32)], solver="refit")
    assert (
        "1 layer received fewer tokens than inputs, 0 fewest: 16 tokens for 32 inputs"
        in "".join(report.notes)
    )
    assert not prune(dense, [torch.randn(16, 32)]).notes


# ---- biases that are fitted together with the weights

RANDOM = rng()
# Means are not zero.
CORRELATED = torch.randn(200, 16, generator=RANDOM) @ torch.randn(16, 16, generator=RANDOM) + 3


def layer(d_in=16):
    torch.manual_seed(1)
    return nn.Linear(d_in, 8)


def grouped():
    torch.manual_seed(1)
    return nn.Sequential(nn.Unflatten(1, (16, 1)), nn.Conv1d(16, 8, 1, groups=2), nn.Flatten())


@pytest.mark.parametrize("solver", [ADMM, Refit])
@pytest.mark.parametrize(
    ("make", "offset", "most"), [(layer, 0, 0.9), (grouped, 0, 0.9), (layer, 3000, 1.5)]
)
def test_the_outputs_are_nearer_with_a_fitted_bias_which_large_means_do_not_ruin(
    make, offset, most, solver
):
    """The centered Gram matrix may be a small difference of large numbers in float32."""
    inputs = torch.randn(4096, 16) + offset * torch.randn(16) if offset else CORRELATED
    dense = make()
    errors = []
    for intercept in (False, True):
        model = deepcopy(dense)
        report = prune(model, [inputs], 0.75, solver=solver(intercept=intercept))
        errors.append((dense(inputs) - model(inputs)).square().mean().item())
        assert report.sparsity == 0.75
    assert errors[1] < most * errors[0]


def test_columns_and_bias_are_the_least_squares_solution():
    dense = nn.Sequential(nn.Linear(16, 24), nn.ReLU(), layer(24))
    model = deepcopy(dense)
    pattern = Structured(multiple_of=4)
    config = PruningConfig(0.5, pattern=pattern, solver=Refit(dampening=1e-7))
    remove_units(begin(make_plan(config, model), [CORRELATED], progress=False))
    hidden = dense[:2](CORRELATED)
    kept = (model[2].weight != 0).any(0)
    assert kept.sum() == 12
    inputs = torch.cat([hidden[:, kept], torch.ones(len(hidden), 1)], dim=1).double()
    expected = torch.linalg.lstsq(inputs, dense(CORRELATED).double(), driver="gelsd").solution
    assert_close(model(CORRELATED).double(), inputs @ expected, rtol=1e-3, atol=1e-3)


def test_a_bias_that_other_layers_use_stays():
    model = relu_mlp(16, 16, 16)
    model[2].bias = model[0].bias
    before = model[0].bias.clone()
    prune(model, [CORRELATED], 0.5, solver=ADMM())
    assert torch.equal(model[0].bias, before)


@pytest.mark.parametrize("method", ["admm", "refit"])
@pytest.mark.parametrize("value", [0.0, 1.0])
def test_a_layer_whose_inputs_never_change_is_pruned(method, value):
    model = relu_mlp(8, 16, 8, 4)
    tokens = torch.full((64, 8), value)
    expected = model(tokens)
    prune(model, [tokens], 0.5, method=method)
    assert (model[2].weight == 0).sum() == 64
    assert torch.allclose(model(tokens), expected, atol=1e-5)


def test_autocast_of_the_caller_does_not_round_what_the_solver_computes():
    models = [layer(), layer()]
    with torch.autocast("cpu", torch.bfloat16):
        prune(models[0], [CORRELATED], 0.5, solver=ADMM())
    prune(models[1], [CORRELATED], 0.5, solver=ADMM())
    assert_same(*models)


# ---- experts that are one parameter


def mixture(skip=(), **choices):
    """A pruned mixture, and the report."""
    model = model_of("mixtral")
    return model, prune(model, batches_of("mixtral") * 2, skip=skip, **choices)


def test_reconstruct_trains_experts_but_those_left_dense():
    skip = ["*.0.mlp.experts.down_proj.1"]
    dense = model_of("mixtral")
    (model, report), (masks_alone, _) = mixture(skip, recovery=Reconstruct()), mixture(skip)
    experts, other, dense = (
        each.model.layers[0].mlp.experts for each in (model, masks_alone, dense)
    )
    assert torch.equal(experts.gate_up_proj == 0, other.gate_up_proj == 0)
    assert not torch.equal(experts.gate_up_proj, other.gate_up_proj)
    same = (experts.down_proj == dense.down_proj).flatten(1).all(dim=1)
    assert same.tolist() == [False, True, False, False]
    parts = {layer.name: layer.part for layer in report.layers}
    part = parts["model.layers.0.mlp.experts.gate_up_proj.0"]
    assert part.after < 0.7 * part.before


def test_experts_with_the_same_statistics_factorize_them_once(monkeypatch):
    factorized = []
    compute = statistics.inverse_factor
    monkeypatch.setattr(
        statistics, "inverse_factor", lambda *args: factorized.append(1) or compute(*args)
    )
    monkeypatch.setattr("wanda_lightning.calibration.observer.MIN_EXPERT_TOKENS", 10**9)
    _, report = mixture(method="sparsegpt")
    # blocks, matrices, experts.
    assert sum("few tokens" in layer.note for layer in report.layers) == 2 * 2 * 4
    # In each block, queries, keys and values share a factor; the rest is one for o_proj, gate_up_proj and down_proj.
    assert len(factorized) == 2 * 4


def test_zeros_of_some_experts_are_held_in_training():
    model, report = mixture(["*.down_proj.1"])
    names = [layer.name for layer in report.layers]
    model.set_experts_implementation("eager")
    with torch.no_grad():
        # By chance, in an expert that is not pruned.
        model.model.layers[0].mlp.experts.down_proj[1, 0, :5] = 0
    held = HeldZeros()
    zero = {name: p == 0 for name, p in model.named_parameters() if "experts" in name}
    held.hold([layer for layer in find_layers(model).layers if layer.name in names])
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    run(model, batches_of("mixtral")[0]).square().mean().backward()
    optimizer.step()
    zero["model.layers.0.mlp.experts.down_proj"][1] = False

    for name, expected in zero.items():
        assert torch.equal(model.get_parameter(name) == 0, expected), name
    held.release()
