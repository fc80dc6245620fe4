"""`prune` on every model of the zoo: nothing left out, and what a slow, independent procedure gives."""

import copy
from itertools import cycle, product

import pytest
import torch
from support.families import slow_prune
from support.pairwise import with_nightly
from support.refusals import state_of
from support.zoo import ZOO, double, matching, matrices, run
from torch import nn
from torch.utils._pytree import tree_map_only

from wanda_lightning import SparseGPT, prune
from wanda_lightning.engine import write
from wanda_lightning.methods import SEQUENTIAL_CHOICES
from wanda_lightning.models import find_layers


def assert_complete(report, model, specimen, dense):
    """Every matrix is pruned to one half of each row, or skipped for a reason; the kept weights are those of before."""
    everything = matrices(model)
    skipped = matching(everything, specimen.dense) | matching(everything, specimen.uncalled)
    assert {layer.name for layer in report.layers} == everything.keys() - skipped - tied(everything)
    assert {matrix.name for matrix in report.skipped} >= skipped
    assert all(matrix.detail for matrix in report.skipped)
    found = {layer.name: layer.read() for layer in find_layers(model).layers}
    for layer in report.layers:
        weight = found[layer.name]
        assert (weight == 0).sum(dim=1).eq(int(weight.shape[1] * 0.5)).all(), layer.name
        assert layer.sparsity == pytest.approx(0.5, abs=0.5 / weight.shape[1])
        assert layer.tokens > 0 or layer.note.startswith("few tokens")
    for key, value in model.named_parameters():
        kept = value != 0
        assert torch.equal(value[kept], dense[key][kept]), key


def tied(everything):
    first = {}
    part = {name: name.rpartition(".")[2] if weight.ndim == 3 else "" for name, weight in everything.items()}
    return {name for name, weight in everything.items() if first.setdefault((id(weight), part[name]), name) != name}


# Blocks in bfloat16; layers that nothing calls; experts with padding, which test_expert_tokens.py compares.
NOT_SLOWLY = "autocast_inside", "torch_transformer", "mixtral_padded"


LIKE_OTHERS = {  # specimens that differ from another in nothing that pruning sees
    *("llama_left_padded", "mistral", "qwen3", "qwen3_moe", "deit", "resnet50"),
    "convnext_conv_mlp",
}


@pytest.mark.parametrize(
    ("name", "sequential"),
    with_nightly(
        zip([name for name in ZOO if name not in LIKE_OTHERS], cycle(SEQUENTIAL_CHOICES)),
        product(ZOO, SEQUENTIAL_CHOICES),
    ),
)
def test_equals_the_slow_procedure(name, sequential):
    specimen = ZOO[name]
    model, batches = specimen.build(), specimen.batches()
    if name not in NOT_SLOWLY:
        model, batches = model.double(), tree_map_only(torch.Tensor, double, batches)
    slow = copy.deepcopy(model)
    if hasattr(slow, "set_experts_implementation"):
        slow.set_experts_implementation("eager")  # grouped products are not intercepted, and have no float64

    report = prune(model, batches, 0.5, sequential=sequential, keep_batch_norm=True, progress=False)
    assert_complete(report, model, specimen, dense=dict(slow.named_parameters()))
    if name not in NOT_SLOWLY:
        slow_prune(slow, batches, sequential)
        expected = slow.state_dict()
        for key, value in model.state_dict().items():
            assert torch.equal(value, expected[key]), key


# ---- laws


@pytest.mark.parametrize("sequential", ["block", "none"])
@pytest.mark.parametrize(("pattern", "sparsity"), [("unstructured", 0.7), ("2:4", 0.5)])
def test_pruning_twice_changes_nothing_where_inputs_become_inactive(pattern, sparsity, sequential):
    """After ReLU, few tokens leave some columns without input, and after pruning they are other ones."""
    model, inactive = ZOO["block_twice"].build(), []
    model.blocks[0].down.register_forward_pre_hook(lambda _, args: inactive.append((args[0] == 0).all(dim=(0, 1))))
    for _ in range(2):
        before = copy.deepcopy(model.state_dict())
        few = [torch.randn(1, 2, 32, generator=torch.Generator().manual_seed(0))]
        prune(model, few, sparsity, pattern=pattern, sequential=sequential, progress=False)
    assert (inactive[-1] & ~inactive[0]).any()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("sequential", SEQUENTIAL_CHOICES)
@pytest.mark.parametrize("allocation", ["uniform", "fisher"])
def test_the_model_is_left_as_it_was(allocation, sequential):
    model = ZOO["llama"].build().train()
    model.model.layers[0].eval()
    model.model.layers[1].requires_grad_(False)
    before = state_of(model)
    dense = copy.deepcopy(model.state_dict())
    prune(model, ZOO["llama"].batches(), 0.0, allocation=allocation, sequential=sequential, progress=False)
    assert state_of(model) == before
    assert model.config.use_cache
    assert torch.is_grad_enabled()
    assert all(torch.equal(value, dense[key]) for key, value in model.state_dict().items())


IDS = torch.arange(16).repeat(2, 1)  # starts with T5's padding, which also starts a sentence
LABELS = IDS.where(torch.tensor([[16], [5]]) > IDS, -100)


@pytest.mark.parametrize(
    ("decoder", "tokens"),
    [
        ({"decoder_input_ids": None, "labels": LABELS}, 16 + 5),
        ({"decoder_input_ids": IDS}, 2 * 16),
        ({"decoder_input_ids": IDS, "decoder_attention_mask": None}, 2 * 16),
        ({"decoder_input_ids": IDS, "decoder_attention_mask": (LABELS != -100).long()}, 16 + 5),
    ],
)
def test_padding_of_a_decoder_does_not_count(decoder, tokens):
    report = prune(ZOO["t5"].build(), [ZOO["t5"].batches()[0] | decoder], progress=False)
    found = {layer.name: layer.tokens for layer in report.layers}
    assert found["encoder.block.0.layer.0.SelfAttention.q"] == 24 + 10
    assert found["decoder.block.0.layer.1.EncDecAttention.k"] == 24 + 10
    assert found["decoder.block.0.layer.0.SelfAttention.q"] == tokens


def test_autocast_of_the_caller_reaches_the_batches():
    """Scores come from bfloat16 activations, and the cast of a dense weight is not used after it was pruned."""
    seen = []
    model = ZOO["llama"].build()
    model.model.layers[1].mlp.down_proj.register_forward_pre_hook(lambda module, args: seen.append(args[0].dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        prune(model, ZOO["llama"].batches(), 0.5, progress=False)
        inside = run(model, ZOO["llama"].batches()[0])
    assert set(seen) == {torch.bfloat16}
    with torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=False):
        assert torch.equal(inside, run(model, ZOO["llama"].batches()[0]))


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
def test_weights_without_a_shape_can_be_left_out():
    model = nn.Sequential(nn.Linear(8, 8), nn.LazyLinear(4))
    with pytest.raises(ValueError, match=r"skip must name 2 matrices .* 1\.weight first: has no shape yet"):
        prune(model, criterion="magnitude", progress=False)
    report = prune(model, criterion="magnitude", skip=["1"], progress=False)
    assert [layer.name for layer in report.layers] == ["0"]
    assert {(matrix.name, matrix.shape) for matrix in report.skipped} == {("1.weight", ()), ("1.bias", ())}
    assert report.parameters == 8 * 8 + 8


# ---- solvers on whole models


class Parallel(torch.nn.Module):
    """Three layers with one input, and one with another."""

    def __init__(self):
        super().__init__()
        self.q, self.out, self.k, self.v = (torch.nn.Linear(*shape) for shape in ((16, 8), (8, 16), (16, 8), (16, 8)))

    def forward(self, x):
        return self.out(self.q(x) * self.k(x) + self.v(x))


@pytest.mark.parametrize("method", ["sparsegpt", "admm", "wanda"])
def test_the_error_of_each_layer_is_that_of_its_outputs(method):
    torch.manual_seed(0)
    model, batches = Parallel(), torch.randn(4, 20, 16)
    dense = copy.deepcopy(model)
    report = prune(model, list(batches), 0.5, method=method, sequential="none", progress=False)
    inner = (dense.q(batches) * dense.k(batches) + dense.v(batches)).detach()
    inputs = dict.fromkeys(("q", "k", "v"), batches) | {"out": inner}
    for layer in report.layers:
        x, before, after = inputs[layer.name], dense.get_submodule(layer.name), model.get_submodule(layer.name)
        with torch.no_grad():  # a solver may have fitted the bias, too
            expected = float((before(x) - after(x)).square().sum() / (x @ before.weight.t()).square().sum())
        assert layer.error == (None if method == "wanda" else pytest.approx(expected, rel=1e-4))


def test_not_all_layers_with_one_input_are_held_at_once(monkeypatch):
    sizes, results, together = [], [], SparseGPT.solve_together
    monkeypatch.setattr(
        SparseGPT, "solve_together", lambda self, w, *more: sizes.append(len(w)) or together(self, w, *more)
    )
    for limit in (write._MAX_GROUP, 2 * 8 * 16, 1):
        monkeypatch.setattr(write, "_MAX_GROUP", limit)
        torch.manual_seed(0)
        blocks = torch.nn.Sequential(Parallel())
        prune(blocks, [torch.randn(40, 16)], solver="sparsegpt", progress=False, sequential="none")
        results.append(blocks.state_dict())
    assert sizes == [3, 1, 2, 1, 1, 1, 1, 1, 1]
    torch.testing.assert_close(results[1:], results[:1] * 2)


def test_the_report_says_where_tokens_are_few():
    model = torch.nn.Sequential(torch.nn.Linear(32, 8), torch.nn.ReLU(), torch.nn.Linear(8, 8))
    dense = copy.deepcopy(model)
    report = prune(model, [torch.randn(16, 32)], solver="refit", progress=False)
    assert "1 layer received fewer tokens than inputs, 0 fewest: 16 tokens for 32 inputs" in "".join(report.notes)
    assert not prune(dense, [torch.randn(16, 32)], progress=False).notes
