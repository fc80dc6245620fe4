"""Experts that are one parameter: against routing by hand, and against the same experts as layers of their own."""

import copy
from functools import partial

import pytest
import torch
import transformers as hf
from support import reference
from support.zoo import ZOO, run
from torch import nn
from torch.nn import functional as F

from wanda_lightning import PruningCallback, PruningReport, Reconstruct, SparseGPTPrune, WandaPrune, prune
from wanda_lightning.calibration.lockstep import whole_model_stop
from wanda_lightning.calibration.mode import calibration_mode
from wanda_lightning.calibration.observer import Observer
from wanda_lightning.callbacks.held_zeros import HeldZeros, zeros_of
from wanda_lightning.config import PruningConfig
from wanda_lightning.core.statistics import SUMS
from wanda_lightning.evaluation import sparsity_of
from wanda_lightning.methods import SEQUENTIAL_CHOICES
from wanda_lightning.models import find_layers, token_masks

SPECIMENS = ["mixtral", "mixtral_padded", "qwen3_moe", "olmoe", "deepseek_v3", "gpt_oss", "llama4"]
BY_COLUMNS = ("gpt_oss", "llama4")
_SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
_HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}


def experts_of(model):
    """Modules that hold experts, by name."""
    return {name: module for name, module in model.named_modules() if type(module).__name__.endswith("Experts")}


def reasons(model, **choices):
    return {matrix.name: matrix.detail for matrix in find_layers(model, **choices).skipped}


# ---- what is found


@pytest.mark.parametrize("name", SPECIMENS)
def test_each_expert_is_a_layer_that_lies_in_its_parameter(name):
    model = ZOO[name].build()
    layers = [layer for layer in find_layers(model).layers if layer.expert is not None]
    assert len(layers) == 2 * 4 * len(experts_of(model))
    for layer in layers:
        whole = layer.parameter[layer.expert].detach()
        assert layer.name == f"{layer.siblings[:-2]}.{layer.expert}"
        assert dict(model.named_parameters())[layer.siblings[:-2]] is layer.parameter
        assert torch.equal(layer.read(), whole.T if name in BY_COLUMNS else whole)
        width = model.config.hidden_size if "gate_up" in layer.name else layer.module.down_proj[0].numel() // 32
        assert layer.read().shape == layer.shape == (layer.size // width, width)
        assert layer.read().data_ptr() == whole.data_ptr()
        others = copy.deepcopy(layer.parameter.detach())
        with torch.no_grad():
            layer.write(torch.zeros(layer.shape))
        assert not layer.read().any()
        others[layer.expert] = 0
        assert torch.equal(layer.parameter, others)


def on_meta(make):
    with torch.device("meta"):
        return make()


def jetmoe():
    config = hf.JetMoeConfig(**_SIZES, num_key_value_heads=2, kv_channels=16, num_local_experts=4)
    return hf.JetMoeForCausalLM(config)


def qwen2_moe():
    sizes = {"num_experts": 4, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 24}
    return hf.Qwen2MoeForCausalLM(hf.Qwen2MoeConfig(**_SIZES, **_HEADS, **sizes))


def dbrx():
    config = hf.DbrxConfig(d_model=32, n_heads=4, n_layers=1, vocab_size=64, attn_config={"rope_theta": 1e4})
    config.ffn_config.ffn_hidden_size, config.ffn_config.moe_num_experts, config.ffn_config.hidden_size = 48, 4, 32
    return hf.DbrxForCausalLM(config)


def test_square_experts_are_read_as_those_of_their_class():
    """JetMoE's attention has experts of 32 x 32, which do not say which side is the input; those of its MLP do."""
    found = {layer.name: layer for layer in find_layers(on_meta(jetmoe)).layers}
    assert found["model.layers.0.mlp.input_linear.3"].shape == (96, 32)
    square = found["model.layers.0.self_attention.experts.output_linear.0"]
    assert square.kind is found["model.layers.0.mlp.input_linear.3"].kind
    assert square.kind.rows_first


def test_routers_are_left_dense():
    found = reasons(on_meta(qwen2_moe))
    routers = {name for name, reason in found.items() if reason == "router"}
    assert routers == {f"model.layers.{i}.mlp.{gate}" for i in range(2) for gate in ("gate", "shared_expert_gate")}
    found = reasons(on_meta(jetmoe))
    assert {name.removeprefix("model.layers.1.") for name, reason in found.items() if reason == "router"} >= {
        "mlp.router.layer",
        "self_attention.experts.router.layer",
    }
    found = reasons(on_meta(dbrx))
    assert found["transformer.blocks.0.ffn.router.layer"] == "router"
    assert found["transformer.blocks.0.ffn.experts.mlp.w1"].startswith("w1 of DbrxExpertGLU is not")


class Stack(nn.Module):
    """Experts of remote code: what says what they are is up to the test."""

    def __init__(self, first=(4, 48, 32), second=(4, 32, 48), **declared):
        super().__init__()
        self.up_proj = nn.Parameter(torch.randn(first) / 6)
        self.down_proj = nn.Parameter(torch.randn(second) / 6)
        for name, value in declared.items():
            setattr(self, name, value)


UNSAID = "does not say which side of its experts' matrices is the input"


@pytest.mark.parametrize(
    ("stack", "expected"),
    [
        (Stack(num_experts=4, hidden_size=32), [(48, 32), (32, 48)]),
        (Stack((4, 32, 48), (4, 48, 32), num_experts=4, hidden_size=32), [(48, 32), (32, 48)]),
        (Stack((4, 32, 32), (4, 32, 32), num_experts=4, hidden_size=32, is_transposed=True), [(32, 32), (32, 32)]),
        (Stack((4, 32, 32), (4, 32, 32), num_experts=4, hidden_size=32), UNSAID),
        (Stack(num_experts=4), UNSAID),
        (Stack(num_experts=4, hidden_size=16), UNSAID),
        (Stack(num_experts=3, hidden_size=32), "is not the weight of a supported layer"),
        (Stack(num_experts_per_tok=4, hidden_size=32), "is not the weight of a supported layer"),
        (Stack(num_groups=4, hidden_size=32), "is not the weight of a supported layer"),
    ],
)
def test_only_what_declares_itself_is_taken_for_experts(stack, expected):
    found = find_layers(nn.ModuleDict({"experts": stack, "other": nn.Linear(8, 8)}))
    if isinstance(expected, str):
        assert [layer.name for layer in found.layers] == ["other"]
        assert all(expected in matrix.detail for matrix in found.skipped)
        assert [matrix.name for matrix in found.skipped] == ["experts.up_proj", "experts.down_proj"]
    else:
        assert [layer.shape for layer in found.layers[::4]][:2] == expected


def test_skip_names_experts_one_by_one_or_together():
    model = ZOO["mixtral"].build()
    whole, one = "*.experts.gate_up_proj", "model.layers.1.mlp.experts.down_proj.2"
    found = reasons(model, skip=[whole, one])
    named = {name for name, reason in found.items() if reason == f"skip={whole!r}"}
    assert named == {f"model.layers.{i}.mlp.experts.gate_up_proj.{e}" for i in range(2) for e in range(4)}
    assert found[one] == f"skip={one!r}"


def test_experts_tied_to_others_are_pruned_once():
    model = nn.ModuleDict(
        {"first": Stack(num_experts=4, hidden_size=32), "second": Stack(num_experts=4, hidden_size=32)}
    )
    model["second"].up_proj = model["first"].up_proj
    assert reasons(model) == {"second.up_proj": "tied to first.up_proj"}
    assert reasons(model, skip=["second.up_proj"])["first.up_proj.1"] == "skip='second.up_proj'"


# ---- what the statistics are


def by_hand(model, batches):
    """The tokens routed to each expert's matrix by the model's own router, without padding, one by one."""
    found = {}
    for batch in batches:
        mask = batch.get("attention_mask")
        real = None if mask is None else mask.flatten().bool().numpy()

        def route(module, args, name, real=real):
            for (parameter, expert), (tokens, rows) in reference.routed_tokens(module, *args).items():
                kept = tokens if real is None else tokens[real[rows]]
                found.setdefault(f"{name}.{parameter}.{expert}", []).extend(kept)

        hooks = [
            module.register_forward_pre_hook(lambda module, args, name=name: route(module, args, name))
            for name, module in experts_of(model).items()
        ]
        with torch.no_grad():
            run(model, batch)
        for hook in hooks:
            hook.remove()
    return {name: torch.tensor([list(token) for token in tokens]) for name, tokens in found.items() if tokens}


def observed(model, batches, needs=frozenset(SUMS), minimum=0):
    unit = find_layers(model, "none").units[0]
    masks = [token_masks(model, batch) for batch in batches]
    observer = Observer(needs, masks, min_expert_tokens=minimum)
    with calibration_mode(model), torch.no_grad():
        statistics = observer(
            unit, whole_model_stop([lambda batch=batch: run(model, batch) for batch in batches]).calls
        )
    return {name: value for name, value in statistics.items() if ".experts." in name}, observer


def double(name, implementation="batched_mm"):
    model = ZOO[name].build().double()
    model.config._experts_implementation = implementation  # grouped_mm takes no float64
    return model


@pytest.mark.parametrize("name", SPECIMENS)
def test_statistics_are_of_the_tokens_routed_to_each_expert(name):
    model, batches = double(name), ZOO[name].batches()
    expected = by_hand(model, batches)
    found, observer = observed(model, batches)
    assert found.keys() >= expected.keys()
    for expert, tokens in expected.items():
        assert found[expert].count == len(tokens), expert
        torch.testing.assert_close(found[expert].sums["square_sum"], tokens.square().sum(0))
        torch.testing.assert_close(found[expert].sums["gram"], tokens.T @ tokens)
    assert all(not found[expert].count for expert in found.keys() - expected.keys())
    assert not any(".experts." in expert for expert in observer.padding_counted | observer.not_routed)


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "llama4"])
def test_padding_does_not_count(name):
    """Right padding under a causal mask cannot reach the tokens: the masks are those of the cut sequences."""
    model, cut, batches = double(name), double(name), ZOO["llama_padded"].batches()
    report = prune(model, batches, progress=False)
    sequences = [
        {"input_ids": ids[mask.bool()][None]}
        for batch in batches
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    ]
    expected = prune(cut, sequences, progress=False)
    assert [layer.tokens for layer in report.layers] == [layer.tokens for layer in expected.layers]
    for (key, value), other in zip(model.named_parameters(), cut.parameters(), strict=True):
        assert torch.equal(value, other), key


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
@pytest.mark.parametrize("sequential", SEQUENTIAL_CHOICES)
def test_whatever_the_model_multiplies_by(sequential, implementation):
    reports, weights = [], []
    for chosen in ("eager", implementation):
        model = ZOO["mixtral"].build()
        model.set_experts_implementation(chosen)
        reports.append(prune(model, ZOO["mixtral"].batches(), sequential=sequential, progress=False))
        weights.append(model.state_dict())
        assert model.config._experts_implementation == chosen
        assert all(module.config._experts_implementation == chosen for module in experts_of(model).values())
    assert reports[0].layers == reports[1].layers
    assert all(torch.equal(value, weights[1][key]) for key, value in weights[0].items())


@pytest.mark.parametrize("sequential", SEQUENTIAL_CHOICES)
def test_the_implementation_is_put_back_after_an_error(sequential):
    model, seen = ZOO["qwen3_moe"].build(), []

    def forward(batch):
        seen.append(model.config._experts_implementation)
        model(**batch)
        raise OSError("no more disk")

    model.set_experts_implementation("batched_mm")
    granularities = {"sequential": sequential, "progress": False}
    with pytest.raises(OSError, match="no more disk"):
        prune(model, ZOO["qwen3_moe"].batches(), forward=forward, allocation="owl", **granularities)
    assert set(seen) == {"eager"}
    assert model.config._experts_implementation == "batched_mm"


# ---- the same experts as layers of their own


class Unstacked(nn.Module):
    """What a module of experts computes, each matrix in a layer of its own; inside nothing is shared with it."""

    def __init__(self, experts):
        super().__init__()
        self.experts = nn.ModuleList(nn.Module() for _ in range(4))
        self.act, self.gate = getattr(experts, "act_fn", None), experts._apply_gate
        for index, expert in enumerate(self.experts):
            for name in ("gate_up_proj", "down_proj"):
                weight = getattr(experts, name)[index].detach().clone()
                bias = getattr(experts, f"{name}_bias", None)
                weight = weight if bias is None else weight.T.contiguous()
                layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, dtype=weight.dtype)
                layer.weight = nn.Parameter(weight)
                if bias is not None:
                    layer.bias = nn.Parameter(bias[index].detach().clone())
                setattr(expert, name, layer)

    def forward(self, x, chosen, weights):
        result = torch.zeros_like(x)
        for index, expert in enumerate(self.experts):
            rows, places = (chosen == index).nonzero(as_tuple=True)
            if len(rows):
                output = expert.down_proj(self.gate(expert.gate_up_proj(x[rows])))
                result = result.index_add(0, rows, output * weights[rows, places, None])
        return result


def unstacked(model):
    model = copy.deepcopy(model)
    for name, module in experts_of(model).items():
        model.set_submodule(name, Unstacked(module))
    return model


CHOICES = {
    "sparsegpt": {"solver": "sparsegpt"},
    "admm": {"solver": "admm"},
    "ria": {"criterion": "ria"},
    "two_of_four": {"pattern": "2:4"},
    "layer": {"pattern": "unstructured_layer"},
    "owl": {"allocation": "owl"},
    "alpha": {"allocation": "alpha"},
    "fisher": {"allocation": "fisher"},
    "model": {"sequential": "none"},
}


@pytest.mark.parametrize("choices", CHOICES.values(), ids=CHOICES)
@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_pruned_like_layers_of_their_own(name, choices):
    model = double(name)
    layers, batches = unstacked(model), ZOO[name].batches()
    torch.testing.assert_close(run(model, batches[0]), run(layers, batches[0]))
    report = prune(model, batches, min_expert_tokens=0, progress=False, **choices)
    expected = prune(layers, batches, min_expert_tokens=0, progress=False, **choices)
    assert report.sparsity == pytest.approx(expected.sparsity)
    assert len(report.layers) == len(expected.layers)
    others = {layer.name: layer for layer in find_layers(layers).layers}
    for layer in find_layers(model).layers:
        module, _, expert = layer.name.rpartition(".experts.")
        parameter, _, number = expert.rpartition(".")
        other = others[f"{module}.experts.experts.{number}.{parameter}" if layer.expert is not None else layer.name]
        assert torch.equal(layer.read() == 0, other.read() == 0), layer.name
        torch.testing.assert_close(layer.read(), other.read(), rtol=1e-8, atol=1e-10)


def test_reconstruct_trains_experts_but_those_left_dense():
    model, masks_alone = ZOO["mixtral"].build(), ZOO["mixtral"].build()
    dense, batches = copy.deepcopy(model), ZOO["mixtral"].batches() * 2
    skipped = "model.layers.0.mlp.experts.down_proj.1"
    report = prune(model, batches, solver=Reconstruct(), skip=[skipped], progress=False)
    prune(masks_alone, batches, skip=[skipped], progress=False)
    first, others = experts_of(model), experts_of(masks_alone)
    experts, other = first["model.layers.0.mlp.experts"], others["model.layers.0.mlp.experts"]
    assert torch.equal(experts.gate_up_proj == 0, other.gate_up_proj == 0)
    assert not torch.equal(experts.gate_up_proj, other.gate_up_proj)
    kept = dict(dense.named_modules())["model.layers.0.mlp.experts"].down_proj
    assert [torch.equal(experts.down_proj[e], kept[e]) for e in range(4)] == [False, True, False, False]
    notes = {layer.name: layer.note for layer in report.layers}
    before, after = notes["model.layers.0.mlp.experts.gate_up_proj.0"].split("%")[:2]
    assert float(after.split()[-1]) < 0.7 * float(before.split()[-1])


def test_two_of_four_runs_along_the_inputs():
    model = ZOO["gpt_oss"].build()
    prune(model, ZOO["gpt_oss"].batches(), pattern="2:4", progress=False)
    for experts in experts_of(model).values():
        for name in ("gate_up_proj", "down_proj"):
            stack = getattr(experts, name).detach()  # (experts, d_in, d_out)
            for expert in range(4):
                for column in range(0, stack.shape[2], 5):
                    for row in range(0, stack.shape[1], 4):
                        assert (stack[expert, row : row + 4, column] == 0).sum() == 2


# ---- few tokens


def starved():
    """To one expert of the first block, number 2, no token is routed."""
    model = ZOO["mixtral"].build()
    gate = model.model.layers[0].mlp.gate
    gate.register_forward_pre_hook(lambda _, args: (args[0].abs(),))
    with torch.no_grad():
        gate.weight[2] = -10
    return model


@pytest.mark.parametrize("sequential", SEQUENTIAL_CHOICES)
@pytest.mark.parametrize("minimum", [0, 40, 10_000])
def test_experts_with_few_tokens_are_pruned_by_what_all_saw(sequential, minimum):
    model = starved()
    dense, batches = copy.deepcopy(model), ZOO["mixtral"].batches()
    report = prune(model, batches, sequential=sequential, min_expert_tokens=minimum, progress=False)
    layers = [layer for layer in report.layers if layer.siblings]
    assert len(layers) == 16
    assert report.sparsity == 0.5
    assert not any("no calibration" in matrix.detail for matrix in report.skipped)
    counts = {layer.name: layer.tokens for layer in layers}
    assert counts["model.layers.0.mlp.experts.gate_up_proj.2"] == 0
    few = {name for name, count in counts.items() if count < max(minimum, 1)}
    assert {layer.name for layer in layers if "few tokens" in layer.note} == few
    note = next(note for note in report.notes if "experts saw fewer" in note)
    assert note.startswith(f"{len(few)} experts saw fewer than {max(minimum, 1)} tokens")
    if sequential == "none":
        own, _ = observed(dense, batches)
        for layer in find_layers(dense).layers:
            if layer.expert is None:
                continue
            family = [own[name] for name in own if name.rpartition(".")[0] == layer.siblings[:-2] and own[name].count]
            total = sum(part.sums["square_sum"] for part in family)
            sums = total if layer.name in few else own[layer.name].sums["square_sum"]
            keep = reference.keep_by_row(reference.array(layer.read().abs() * sums.sqrt()), 0.5)
            pruned = next(item for item in find_layers(model).layers if item.name == layer.name)
            assert ((pruned.read() != 0).numpy() == keep).all(), layer.name


def test_the_minimum_has_one_name_everywhere():
    for make in (PruningCallback, WandaPrune, SparseGPTPrune, PruningConfig, partial(PruningCallback.preset, "fast")):
        made = make(min_expert_tokens=7)
        assert getattr(made, "config", made).min_expert_tokens == 7


@pytest.mark.parametrize("value", [-1, 2.5, "32"])
def test_a_minimum_that_is_no_number_of_tokens(value):
    with pytest.raises(ValueError, match=r"min_expert_tokens is a number of tokens, 0 or more"):
        prune(nn.Linear(4, 4), [torch.ones(1, 4)], min_expert_tokens=value, progress=False)


def test_experts_in_a_list_help_each_other():
    model = ZOO["expert_list"].build()
    with torch.no_grad():
        model.blocks[0].gate.bias[1] = -100
    dense = copy.deepcopy(model)
    report = prune(model, ZOO["expert_list"].batches(), min_expert_tokens=0, progress=False)
    few = "few tokens: pruned with those of all experts"
    helped = {layer.name: layer.tokens for layer in report.layers if few in layer.note}
    assert helped == {"blocks.0.experts.1.up": 0, "blocks.0.experts.1.down": 0}
    seen = []
    for index in (0, 2, 3):
        dense.blocks[0].experts[index].up.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        for batch in ZOO["expert_list"].batches():
            run(dense, batch)
    weight = dense.blocks[0].experts[1].up.weight.detach()
    keep = reference.keep_by_row(reference.array(weight.abs() * torch.cat(seen).square().sum(0).sqrt()), 0.5)
    assert ((model.blocks[0].experts[1].up.weight != 0).numpy() == keep).all()


def test_experts_in_a_list_are_no_blocks():
    units = find_layers(ZOO["expert_list"].build()).units
    assert [unit.name for unit in units] == ["blocks.0", "blocks.1", "head"]


def test_alone_at_a_unit_an_expert_keeps_what_it_saw():
    """At sequential "layer" each layer of a list of experts is a unit, and its siblings are not known."""
    options = {"sequential": "layer", "progress": False}
    report = prune(ZOO["expert_list"].build(), ZOO["expert_list"].batches(), min_expert_tokens=10_000, **options)
    assert not any("few tokens" in layer.note for layer in report.layers)


# ---- other ways to multiply


class Formula(Stack):
    """Experts of remote code, by a formula of its own."""

    def __init__(self, formula):
        super().__init__(num_experts=4, hidden_size=32)
        self.formula = formula

    def forward(self, x):
        return self.formula(self, x)


def all_tokens(self, x):
    return torch.bmm(torch.bmm(x.expand(4, -1, -1), self.up_proj.mT).relu(), self.down_proj.mT).mean(0)


def broadcast(self, x):
    return ((x[None] @ self.up_proj.transpose(1, 2)).relu() @ self.down_proj.transpose(1, 2)).mean(0)


def by_halves(self, x):
    """The rows of an expert in two pieces."""
    parts = []
    for expert in range(4):
        first, second = self.up_proj[expert].chunk(2)
        hidden = torch.cat([F.linear(x[expert::4], first), x[expert::4].matmul(second.T)], dim=-1)
        parts.append(torch.mm(hidden.relu(), self.down_proj[expert].t()))
    return torch.cat(parts)


def by_copies(self, x):
    chosen = torch.arange(len(x)) % 4
    hidden = torch.bmm(self.up_proj[chosen], x[:, :, None]).relu()
    return torch.bmm(self.down_proj[chosen], hidden)[:, :, 0]


def some_vectors():
    return [torch.randn(40, 32, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]


@pytest.mark.parametrize(("formula", "tokens"), [(all_tokens, 120), (broadcast, 120), (by_halves, 30)])
@pytest.mark.parametrize("allocation", ["uniform", "fisher"])
def test_other_formulas(formula, tokens, allocation):
    torch.manual_seed(0)
    model = nn.Sequential(Formula(formula), nn.Linear(32, 8)).double()
    dense, batches = copy.deepcopy(model), [x.double() for x in some_vectors()]
    options = {"sequential": "none", "allocation": allocation, "min_expert_tokens": 0}
    report = prune(model, batches, progress=False, **options)
    layers = [layer for layer in report.layers if layer.siblings]
    assert [layer.tokens for layer in layers] == [tokens] * 8
    everything = formula is not by_halves
    assert all(("every token counted" in layer.note) == everything for layer in layers)
    for expert in range(4):
        x = torch.cat([x if everything else x[expert::4] for x in batches])
        weight = dense[0].up_proj[expert].detach()
        target = next(layer.target for layer in layers if layer.name == f"0.up_proj.{expert}")
        keep = reference.keep_by_row(reference.array(weight.abs() * x.square().sum(0).sqrt()), target)
        assert ((model[0].up_proj[expert] != 0).numpy() == keep).all()


def test_the_fisher_information_of_pieces_is_that_of_the_whole():
    torch.manual_seed(0)
    pieces = nn.Sequential(Formula(by_halves), nn.Linear(32, 8))
    experts = pieces[0]

    def whole(self, x):
        parts = [F.linear(F.linear(x[e::4], self.up_proj[e]).relu(), self.down_proj[e]) for e in range(4)]
        return torch.cat(parts)

    other = copy.deepcopy(pieces)
    other[0].formula = whole
    assert experts is not other[0]
    targets = [
        [layer.target for layer in prune(m, some_vectors(), 0.5, allocation="fisher", progress=False).layers]
        for m in (pieces, other)
    ]
    assert targets[0] == targets[1]
    assert len(set(targets[0])) > 1


@pytest.mark.parametrize("sequential", SEQUENTIAL_CHOICES)
def test_what_cannot_be_heard_stays_dense_with_a_reason(sequential):
    torch.manual_seed(0)
    model = nn.Sequential(Formula(by_copies), nn.Linear(32, 8))
    dense = copy.deepcopy(model)
    report = prune(model, some_vectors(), sequential=sequential, progress=False)
    assert [layer.name for layer in report.layers] == ["1"]
    reason = "no calibration token was seen to go through any expert of the module"
    assert [matrix.detail for matrix in report.skipped] == [reason] * 8
    assert [matrix.shape for matrix in report.skipped[::4]] == [(48, 32), (32, 48)]
    assert torch.equal(model[0].up_proj, dense[0].up_proj)
    assert any("no calibration token was seen in 8 layers" in note for note in report.notes)


def test_padding_that_counts_is_noted():
    """JetMoE sorts its tokens outside of its experts."""
    torch.manual_seed(0)
    batches = [{key: value % 64 for key, value in batch.items()} for batch in ZOO["llama_padded"].batches()]
    report = prune(jetmoe().eval(), batches, min_expert_tokens=0, progress=False)
    notes = {layer.note.partition(":")[0] for layer in report.layers if layer.siblings}
    assert notes == {"padding counted"}


# ---- the report, and what comes after


@pytest.mark.parametrize("name", SPECIMENS)
def test_the_state_dict_is_as_before(name):
    model = ZOO[name].build()
    before = {key: (value.shape, value.dtype, value.data_ptr()) for key, value in model.state_dict().items()}
    prune(model, ZOO[name].batches(), progress=False)
    assert {key: (v.shape, v.dtype, v.data_ptr()) for key, v in model.state_dict().items()} == before
    assert all(run(model, batch).isfinite().all() for batch in ZOO[name].batches())


def test_totals_count_each_parameter_once():
    model = ZOO["mixtral"].build()
    skip = ["model.layers.0.mlp.experts.down_proj.1"]
    report = prune(model, ZOO["mixtral"].batches(), skip=skip, progress=False)
    assert report.parameters == sum(p.numel() for p in model.parameters())
    assert report.zeros == sum(int((p == 0).sum()) for p in model.parameters())
    inside = sum(layer.size for layer in find_layers(model, skip=skip).layers)
    assert report.coverage == pytest.approx(inside / report.parameters)
    assert sparsity_of(model)["model"] == pytest.approx(report.zeros / report.parameters)
    everything = sum(layer.size for layer in find_layers(model).layers)
    assert sparsity_of(model)["layers"] == pytest.approx(report.zeros / everything)


def test_the_table_has_one_row_for_all_experts_of_a_module():
    report = prune(starved(), ZOO["mixtral"].batches(), min_expert_tokens=0, progress=False)
    assert PruningReport.from_json(report.to_json()) == report
    table = str(report).splitlines()
    rows = [index for index, line in enumerate(table) if "experts.gate_up_proj.*" in line]
    assert len(rows) == 2
    assert not any("gate_up_proj.0" in line for line in table)
    (first,) = (" ".join(table[rows[0] : rows[0] + 5]).split(),)
    assert "experts;" in first
    assert "2:" in first
    tokens = sorted(layer.tokens for layer in report.layers if layer.name.startswith("model.layers.0.mlp.experts.gate"))
    assert f"{tokens[0]} - {tokens[-1]}" in " ".join(first)


def test_zeros_of_some_experts_are_held_in_training():
    model = ZOO["mixtral"].build()
    report = prune(model, ZOO["mixtral"].batches(), skip=["*.down_proj.1"], progress=False)
    counts = zeros_of(model)
    assert counts["model.layers.0.mlp.experts.down_proj.1"] == 0
    assert all(counts[layer.name] == layer.zeros for layer in report.layers)
    model.set_experts_implementation("eager")
    with torch.no_grad():
        model.model.layers[0].mlp.experts.down_proj[1, 0, :5] = 0  # by chance, in an expert that is not pruned
    zero = {name: p == 0 for name, p in model.named_parameters()}
    held = HeldZeros()
    held.hold(model, [layer.name for layer in report.layers])
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    for batch in ZOO["mixtral"].batches():
        optimizer.zero_grad()
        run(model, batch).square().mean().backward()
        optimizer.step()
    for name, parameter in model.named_parameters():
        if "experts" in name:
            expected = zero[name].clone()
            if name == "model.layers.0.mlp.experts.down_proj":
                expected[1] = False
            assert torch.equal(parameter == 0, expected), name
    with torch.no_grad():  # a weight that passes zero: the state says that it is not held
        alive = (model.model.layers[1].mlp.experts.down_proj[2] != 0).nonzero()[0]
        model.model.layers[1].mlp.experts.down_proj[2, alive[0], alive[1]] = 0
    state = held.unheld_zeros()
    assert state.keys() == {"model.layers.1.mlp.experts.down_proj.2"}
    held.release()
    again = HeldZeros()
    again.load(state)
    again.hold(model, [layer.name for layer in report.layers])
    assert again.unheld_zeros().keys() == state.keys()
    again.release()
