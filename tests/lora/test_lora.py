"""Adapters that keep zeros, against dense autograd, and PEFT's own operations on them."""

import copy
import json
import re
import subprocess
import sys

import lightning as L
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import LoraLayer
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

from wanda_lightning import CausalLMModule, SavePretrained, WandaPrune, prune
from wanda_lightning.lora import KeepZerosLinear, KeepZerosLoraConfig, merge

TOKENS = torch.randint(0, 64, (2, 12), generator=torch.Generator().manual_seed(1))
TARGETS = ["q_proj", "v_proj", "down_proj"]


def llama(dtype=torch.float32, sparsity=0.5):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=56,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        use_cache=False,
    )
    return pruned(LlamaForCausalLM(config), sparsity).to(dtype)


def gpt2(sparsity=0.5):
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64, use_cache=False)
    config.resid_pdrop = config.embd_pdrop = config.attn_pdrop = 0.0
    return pruned(GPT2LMHeadModel(config), sparsity)


def pruned(model, sparsity):
    if sparsity:
        prune(model, None, sparsity, criterion="magnitude", progress=False)
    return model


def config(**options):
    options = {"r": 4, "lora_alpha": 8, "target_modules": TARGETS, **options}
    return KeepZerosLoraConfig(**options)


def zeros_of(model):
    """Where the matrices of a model without adapters are zero, by name."""
    return {n: p.detach() == 0 for n, p in model.named_parameters() if p.dim() == 2}


def randomise(model, seed=0):
    """Adapters that do something: B starts at zero."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator).to(parameter) * 0.2
    return model


def train(model, steps=4, lr=1e-2):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=0.1)
    model.train()
    losses = []
    for _ in range(steps):
        loss = model(input_ids=TOKENS, labels=TOKENS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@torch.no_grad()
def logits(model):
    return model.eval()(input_ids=TOKENS).logits.float()


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


def assert_zeros(model, zeros):
    now = zeros_of(model)
    assert now.keys() == zeros.keys()
    for name in zeros:
        assert torch.equal(now[name], zeros[name]), name


# Training and merging


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("build", [llama, gpt2])
def test_trained_adapters_merge_to_what_was_trained_with_every_zero(build, dropout):
    base = build()
    zeros = zeros_of(base)
    model = get_peft_model(base, config(target_modules="all-linear", lora_dropout=dropout))
    losses = train(model)
    assert losses[-1] < losses[0]
    adapted = logits(model)
    with model.disable_adapter():
        assert relative(logits(model), adapted) > 1e-3
    merged = merge(model)
    assert type(merged) is type(base)
    assert not any(isinstance(module, LoraLayer) for module in merged.modules())
    assert relative(logits(merged), adapted) < 1e-5
    assert_zeros(merged, zeros)


def test_peft_itself_merges_the_same():
    base = llama()
    zeros = zeros_of(base)
    model = randomise(get_peft_model(base, config()))
    adapted = logits(model)
    merged = model.merge_and_unload(safe_merge=True)
    assert relative(logits(merged), adapted) < 1e-5
    assert_zeros(merged, zeros)


def test_nm_zeros_survive():
    base = llama(sparsity=0)
    prune(base, None, 0.5, criterion="magnitude", pattern="2:4", progress=False)
    merged = merge(randomise(get_peft_model(base, config(target_modules="all-linear"))))
    for name, module in merged.model.named_modules():
        if isinstance(module, nn.Linear):
            assert bool(((module.weight.view(-1, 4) != 0).sum(1) <= 2).all()), name


def test_bfloat16_merges_within_its_rounding():
    base = llama(torch.bfloat16)
    zeros = zeros_of(base)
    model = get_peft_model(base, config(target_modules="all-linear"))
    assert all(p.dtype == torch.float32 for p in model.parameters() if p.requires_grad)
    losses = train(model)
    assert losses[-1] < losses[0]
    adapted = logits(model)
    merged = merge(model)
    assert merged.dtype == torch.bfloat16
    assert relative(logits(merged), adapted) < 0.02  # two layers of bfloat16, 2^-8 each for weights and activations
    assert_zeros(merged, zeros)


def test_updates_below_the_last_digit_of_bfloat16_count_in_training():
    layer = nn.Linear(16, 16, bias=False, dtype=torch.bfloat16)
    layer.weight.data = torch.eye(16, dtype=torch.bfloat16)
    model = get_peft_model(nn.Sequential(layer), config(target_modules=["0"], r=16, lora_alpha=16))
    model.base_model.model[0].lora_A["default"].weight.data = torch.eye(16)
    model.base_model.model[0].lora_B["default"].weight.data = torch.eye(16) * 2**-12
    x = torch.randn(3, 16, dtype=torch.bfloat16)
    with torch.no_grad():
        (weight, delta) = (torch.eye(16), torch.eye(16) * 2**-12)
        assert torch.equal((weight + delta).bfloat16(), layer.weight)  # lost in a sum
        seen = []
        original = torch.addmm

        def watch(addend, rows, matrix):
            seen.append(matrix.float().clone())
            return original(addend, rows, matrix)

        torch.addmm = watch
        try:
            model(x)
        finally:
            torch.addmm = original
    assert torch.equal(seen[0], delta)


# The layer against dense autograd


def reference(layer, x, *, dropout_seed=None, names=("default",)):
    """Plain autograd over dense W + s (B A) * keep; with dropout on what enters the adapter."""
    base = layer.base_layer
    weight = base.weight.t() if isinstance(base, Conv1D) else base.weight
    out = F.linear(x, weight, base.bias)
    for name in names:
        a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
        delta = layer.scaling[name] * (b @ a) * (weight != 0)
        if dropout_seed is not None:
            torch.manual_seed(dropout_seed)
        out = out + F.linear(x if dropout_seed is None else F.dropout(x, layer.lora_dropout[name].p), delta)
    return out


def single(layer, **options):
    model = get_peft_model(nn.Sequential(layer), config(target_modules=["0"], **options))
    return model, randomise(model).base_model.model[0]


def sparse_layer(kind, d_in=24, d_out=40, bias=True):
    torch.manual_seed(0)
    layer = Conv1D(d_out, d_in) if kind == "conv1d" else nn.Linear(d_in, d_out, bias=bias)
    layer.weight.data = torch.randn_like(layer.weight) * (torch.rand_like(layer.weight) > 0.5)
    return layer.double()


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("kind", ["linear", "no bias", "conv1d"])
def test_output_and_gradients_are_those_of_dense_autograd(kind, dropout):
    model, layer = single(sparse_layer(kind, bias=kind != "no bias"), lora_dropout=dropout)
    model.double()
    x = torch.randn(3, 5, 24, dtype=torch.float64, requires_grad=True)
    towards = torch.randn(3, 5, 40, dtype=torch.float64)
    wanted_for = [x, layer.lora_A["default"].weight, layer.lora_B["default"].weight]

    torch.manual_seed(7)
    out = model(x)
    got = torch.autograd.grad((out * towards).sum(), wanted_for)
    expected = reference(layer, x, dropout_seed=7 if dropout else None)
    want = torch.autograd.grad((expected * towards).sum(), wanted_for)

    torch.testing.assert_close(out, expected)
    for mine, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_gradients_of_an_unfrozen_base_are_those_of_dense_autograd():
    _, layer = single(sparse_layer("linear"))
    layer.double()
    base = layer.base_layer.requires_grad_(True)
    x = torch.randn(6, 24, dtype=torch.float64)
    got = torch.autograd.grad(layer(x).square().sum(), [base.weight, base.bias])
    want = torch.autograd.grad(reference(layer, x).square().sum(), [base.weight, base.bias])
    for mine, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_backward_keeps_nothing_of_the_size_of_the_weight(dropout):
    model, layer = single(sparse_layer("linear").float(), lora_dropout=dropout)
    x = torch.randn(7, 24, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        model(x)
    dense = [t for t in saved if t.numel() == 24 * 40]
    assert dense  # the hooks see the product
    assert all(t.data_ptr() == layer.base_layer.weight.data_ptr() for t in dense)


def test_hooks_on_the_base_layer_fire_and_change_nothing():
    model, layer = single(sparse_layer("linear").float())
    x, calls = torch.randn(7, 24), []
    fused = model(x)
    layer.base_layer.register_forward_hook(lambda *_: calls.append(1))
    torch.testing.assert_close(model(x), fused)
    assert calls == [1]


def test_options_of_lora_work_as_in_plain_lora_on_a_dense_layer():
    options = {"r": 4, "lora_alpha": 8, "use_rslora": True, "lora_bias": True, "target_modules": ["0"]}
    torch.manual_seed(0)
    dense = nn.Linear(24, 40)
    plain = randomise(get_peft_model(nn.Sequential(dense), LoraConfig(**options)))
    x = torch.randn(7, 24)
    expected = plain(x)
    plain.unload()
    with pytest.warns(UserWarning, match="plain LoRA"):
        model = randomise(get_peft_model(nn.Sequential(dense), KeepZerosLoraConfig(**options)))
    torch.testing.assert_close(model(x), expected)
    torch.testing.assert_close(merge(model)(x), expected)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_autocast_computes_in_its_dtype_and_gives_float32_gradients(dropout):
    model, layer = single(sparse_layer("linear").float(), lora_dropout=dropout)
    x = torch.randn(7, 24, requires_grad=True)
    wanted_for = [x, layer.lora_A["default"].weight, layer.lora_B["default"].weight]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.manual_seed(7)
        out = model(x)
        got = torch.autograd.grad(out.float().square().sum(), wanted_for)  # backward inside, as some loops do
    assert out.dtype == torch.bfloat16
    expected = reference(layer, x, dropout_seed=7 if dropout else None)
    want = torch.autograd.grad(expected.square().sum(), wanted_for)
    assert relative(out.float(), expected) < 0.01
    for mine, theirs in zip(got, want, strict=True):
        assert mine.dtype == torch.float32
        assert relative(mine, theirs) < 0.02


# The old name of transformers before 5.24; the new one is not in all versions that we support.
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable.* is deprecated:FutureWarning")
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_gradients(reentrant):
    def gradients(checkpointing):
        model = randomise(get_peft_model(llama(), config(lora_dropout=0.2))).train()
        if checkpointing:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        torch.manual_seed(3)
        model(input_ids=TOKENS, labels=TOKENS).loss.backward()
        return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}

    plain, checkpointed = gradients(False), gradients(True)
    assert plain
    for name in plain:
        torch.testing.assert_close(checkpointed[name], plain[name])


# torch 2.13 instantiates the autograd function itself while it traces.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compiled_model_gives_the_same_gradients():
    model, layer = single(sparse_layer("linear").float())
    x = torch.randn(7, 24)
    wanted_for = [layer.lora_A["default"].weight, layer.lora_B["default"].weight]
    want = torch.autograd.grad(model(x).square().sum(), wanted_for)
    compiled = torch.compile(model, backend="aot_eager")
    got = torch.autograd.grad(compiled(x).square().sum(), wanted_for)
    for mine, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(mine, theirs)


# PEFT's operations


def test_saved_adapter_says_what_it_is_and_comes_back(tmp_path):
    model = randomise(get_peft_model(llama(), config(target_modules="all-linear", lora_dropout=0.1)))
    expected = logits(model)
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert saved["peft_type"] == "WANDA_LIGHTNING_KEEP_ZEROS_LORA"

    base = llama()
    zeros = zeros_of(base)
    loaded = PeftModel.from_pretrained(base, tmp_path)
    assert isinstance(loaded.peft_config["default"], KeepZerosLoraConfig)
    assert isinstance(KeepZerosLoraConfig.from_pretrained(tmp_path), KeepZerosLoraConfig)
    assert torch.equal(logits(loaded), expected)
    assert_zeros(merge(loaded), zeros)

    further = get_peft_model(llama(), config(target_modules=["q_proj"]))
    further.load_adapter(tmp_path, "other", is_trainable=True)
    further.set_adapter("other")
    assert torch.equal(logits(further), expected)
    assert any(p.requires_grad for n, p in further.named_parameters() if ".other." in n)


def test_a_fresh_process_loads_it_or_stops_but_never_as_plain_lora(tmp_path):
    base = llama()
    base.save_pretrained(tmp_path / "base")
    model = randomise(get_peft_model(base, config()))
    model.save_pretrained(tmp_path / "adapter")
    expected = logits(model)

    def run(imports):
        code = f"""
import torch
from peft import PeftModel
from transformers import LlamaForCausalLM
{imports}
base = LlamaForCausalLM.from_pretrained({str(tmp_path / "base")!r})
zeros = {{n: p == 0 for n, p in base.named_parameters()}}
model = PeftModel.from_pretrained(base, {str(tmp_path / "adapter")!r})
tokens = torch.tensor({TOKENS.tolist()})
with torch.no_grad():
    torch.save(model.eval()(input_ids=tokens).logits, {str(tmp_path / "logits.pt")!r})
merged = model.merge_and_unload()
assert all(bool((p[zeros[n]] == 0).all()) for n, p in merged.named_parameters())
"""
        return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)

    with_import = run("import wanda_lightning.lora")
    assert with_import.returncode == 0, with_import.stderr
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), expected)
    without = run("")
    assert without.returncode != 0
    assert "WANDA_LIGHTNING_KEEP_ZEROS_LORA" in without.stderr


def test_the_package_does_not_import_peft():
    code = "import sys, wanda_lightning; assert 'peft' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], timeout=300).returncode == 0


def two_adapters():
    model = get_peft_model(llama(), config())
    model.add_adapter("other", config(r=2, target_modules=["v_proj", "up_proj"]))
    return randomise(model)


def test_adapters_switch_add_up_and_disable():
    base = logits(llama())
    model = two_adapters()
    first = logits(model)
    model.set_adapter("other")
    other = logits(model)
    model.base_model.set_adapter(["default", "other"])
    both = logits(model)
    assert relative(first, other) > 1e-3
    assert relative(both, first) > 1e-3
    layer = model.base_model.model.model.layers[0].self_attn.v_proj
    x = torch.randn(5, 32)
    torch.testing.assert_close(layer(x), reference(layer, x, names=("default", "other")))
    with model.disable_adapter():
        torch.testing.assert_close(logits(model), base)
    assert torch.equal(logits(model), both)
    zeros = zeros_of(llama())
    merged = merge(model)
    assert relative(logits(merged), both) < 1e-5
    assert_zeros(merged, zeros)


def test_each_sample_may_have_its_own_adapter():
    model = two_adapters()
    first = logits(model)
    model.set_adapter("other")
    other = logits(model)
    with torch.no_grad():
        mixed = model(input_ids=TOKENS, adapter_names=["other", "default"]).logits
    torch.testing.assert_close(mixed[0], other[0])
    torch.testing.assert_close(mixed[1], first[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merge_adapter_and_back_restores_every_bit(dtype):
    model = randomise(get_peft_model(llama(dtype), config(target_modules="all-linear")))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    adapted = logits(model)
    model.merge_adapter()
    layer = model.base_model.model.model.layers[0].mlp.down_proj
    assert layer.merged
    assert not torch.equal(layer.weight, before["base_model.model.model.layers.0.mlp.down_proj.base_layer.weight"])
    assert bool((layer.weight[layer.unmerged_weight() == 0] == 0).all())
    assert relative(logits(model), adapted) < (1e-5 if dtype == torch.float32 else 0.02)
    model.unmerge_adapter()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]), name
    assert torch.equal(logits(model), adapted)


def test_a_weight_that_a_merge_swallows_comes_back():
    layer = nn.Linear(2, 1, bias=False)
    layer.weight.data = torch.tensor([[1e-12, 0.0]])
    model = get_peft_model(nn.Sequential(layer), config(target_modules=["0"], r=1, lora_alpha=1))
    adapted = model.base_model.model[0]
    adapted.lora_A["default"].weight.data, adapted.lora_B["default"].weight.data = torch.ones(1, 2), torch.ones(1, 1)
    model.merge_adapter()
    assert torch.equal(layer.weight, torch.tensor([[1.0, 0.0]]))
    model.unmerge_adapter()
    assert torch.equal(layer.weight, torch.tensor([[1e-12, 0.0]]))


def test_adapters_merge_one_after_the_other():
    model = two_adapters()
    model.base_model.set_adapter(["default", "other"])
    both = logits(model)
    model.merge_adapter(["default"])
    with pytest.warns(UserWarning, match="additionally merging other"):
        model.base_model.model.model.layers[0].self_attn.v_proj.merge(adapter_names=["other"])
    layer = model.base_model.model.model.layers[0].self_attn.v_proj
    weight = layer.unmerged_weight()
    expected = weight + (layer.get_delta_weight("default") + layer.get_delta_weight("other"))
    torch.testing.assert_close(layer.weight, expected)
    merged = merge(model)  # takes apart what is merged, then merges all that is active
    assert relative(logits(merged), both) < 1e-5


def test_deleting_an_adapter_leaves_the_other():
    model = two_adapters()
    first = logits(model)
    model.delete_adapter("other")
    assert torch.equal(logits(model), first)


@pytest.mark.parametrize(("kind", "options"), [("cat", {}), ("svd", {"svd_rank": 6})])
def test_weighted_adapters_are_the_weighted_sum(kind, options):
    model = get_peft_model(llama(), config())
    model.add_adapter("other", config(r=2))
    randomise(model)
    model.add_weighted_adapter(["default", "other"], [0.5, 2.0], "sum", combination_type=kind, **options)
    layer = model.base_model.model.model.layers[0].self_attn.v_proj
    expected = 0.5 * layer.get_delta_weight("default") + 2.0 * layer.get_delta_weight("other")
    torch.testing.assert_close(layer.get_delta_weight("sum"), expected, rtol=1e-4, atol=1e-5)
    model.set_adapter("sum")
    x = torch.randn(5, 32)
    torch.testing.assert_close(layer(x), F.linear(x, layer.weight + expected), rtol=1e-4, atol=1e-5)


def test_all_linear_leaves_out_the_head_as_in_peft():
    model = get_peft_model(llama(), config(target_modules="all-linear"))
    layers = [name for name, module in model.named_modules() if isinstance(module, KeepZerosLinear)]
    assert len(layers) == 2 * 7
    assert not any("lm_head" in name for name in layers)


# merge() on plain adapters


def sparsity_in(message):
    return [float(number) for number in re.findall(r"([\d.]+)%", message)]


def test_merging_plain_lora_warns_with_the_sparsity_before_and_after():
    model = randomise(get_peft_model(llama(), LoraConfig(r=4, target_modules=TARGETS)))
    adapted = logits(model)
    with pytest.warns(UserWarning, match="targeted matrices") as caught:
        merged = merge(model)
    assert relative(logits(merged), adapted) < 1e-5
    before, after = sparsity_in(str(caught[0].message))
    assert before == pytest.approx(50, abs=1)
    assert after == 0


def test_reprune_puts_the_zeros_back():
    base = llama()
    zeros = zeros_of(base)
    model = randomise(get_peft_model(base, LoraConfig(r=4, target_modules=TARGETS)))
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    expected = (layer.weight + layer.get_delta_weight("default")) * (layer.weight != 0)
    merged = merge(model, reprune=True)
    assert_zeros(merged, zeros)
    torch.testing.assert_close(merged.model.layers[0].self_attn.q_proj.weight, expected)


def test_reprune_after_merge_adapter_knows_the_zeros_from_before():
    base = llama()
    zeros = zeros_of(base)
    model = randomise(get_peft_model(base, LoraConfig(r=4, target_modules=TARGETS)))
    model.merge_adapter()
    assert_zeros(merge(model, reprune=True), zeros)


def test_a_pruned_matrix_trained_whole_counts_too():
    model = randomise(get_peft_model(llama(), config(target_modules=["q_proj"], modules_to_save=["o_proj"])))
    train(model, steps=1)
    with pytest.warns(UserWarning, match=r"first: model\.layers\.0\.self_attn\.o_proj\.weight"):
        merge(model)


# Bad input


def test_no_zero_warns():
    with pytest.warns(UserWarning, match=r"Prune first, or use peft\.LoraConfig"):
        get_peft_model(llama(sparsity=0), config())


@pytest.mark.parametrize(
    "options",
    [
        {"use_dora": True},
        {"init_lora_weights": "pissa"},
        {"init_lora_weights": "olora"},
        {"target_parameters": ["experts.down_proj"]},
        {"layer_replication": [(0, 2), (1, 2)]},
    ],
)
def test_options_that_cannot_keep_zeros_are_refused_by_name(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        config(**options)


class CodesParameter(nn.Parameter):
    """Like bitsandbytes' Params4bit: a class of its own."""


class FakeQuantLinear(nn.Module):
    """Like the layers of GPTQ and AWQ: no weight at all."""

    def __init__(self):
        super().__init__()
        self.register_buffer("qweight", torch.zeros(4, 4, dtype=torch.int32))


def bits_in_a_parameter():
    layer = nn.Linear(8, 8)
    layer.weight = CodesParameter(torch.zeros(8, 8, dtype=torch.uint8), requires_grad=False)
    return layer


def float8():
    return nn.Linear(8, 8).to(torch.float8_e4m3fn)


@pytest.mark.parametrize("layer", [bits_in_a_parameter, FakeQuantLinear, float8])
def test_quantised_layers_are_refused_before_anything_changes(layer):
    model = nn.Sequential(sparse_layer("linear"), layer())
    with pytest.raises(ValueError, match=r"1 is a quantised layer .* load the model unquantised"):
        get_peft_model(model, config(target_modules=["0", "1"]))
    assert type(model[0]) is nn.Linear


def test_merge_refuses_a_quantised_base():
    model = get_peft_model(nn.Sequential(nn.Linear(8, 8)), LoraConfig(target_modules=["0"]))
    model.base_model.model[0].base_layer.weight = CodesParameter(torch.zeros(8, 8), requires_grad=False)
    with pytest.raises(ValueError, match="load the model unquantised"):
        merge(model)


@pytest.mark.parametrize("layer", [nn.Embedding(8, 8), nn.Conv2d(3, 8, 3), nn.MultiheadAttention(8, 2)])
def test_other_layers_are_refused_by_name(layer):
    model = nn.Sequential(sparse_layer("linear"), layer)
    with pytest.raises(ValueError, match=rf"but 1 is {type(layer).__name__}\. Leave it out of target_modules"):
        get_peft_model(model, config(target_modules=["0", "1"]))
    assert type(model[0]) is nn.Linear


def test_the_projection_inside_attention_is_refused():
    with pytest.raises(ValueError, match=r"inside nn\.MultiheadAttention"):
        get_peft_model(nn.Sequential(nn.MultiheadAttention(8, 2)), config(target_modules=["out_proj"]))


def test_two_targets_with_one_weight_are_refused():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model[1].weight = model[0].weight
    with pytest.raises(ValueError, match="0 and 1 share one weight"):
        get_peft_model(model, config(target_modules=["0", "1"]))


# PEFT itself only warns of two adapters in one model.
@pytest.mark.filterwarnings("ignore:You are trying to modify a model:UserWarning")
@pytest.mark.filterwarnings("ignore:Already found a `peft_config`:UserWarning")
def test_plain_and_keep_zeros_adapters_do_not_mix():
    model = get_peft_model(llama(), config())
    with pytest.raises(ValueError, match="different peft types"):
        model.add_adapter("plain", LoraConfig(target_modules=TARGETS))
    plain = get_peft_model(llama(), LoraConfig(target_modules=TARGETS))
    with pytest.raises(ValueError, match="adapters of another kind already"):
        get_peft_model(plain.base_model.model, config())


def test_a_broken_adapter_is_not_merged_safely():
    model, layer = single(sparse_layer("linear"))
    layer.lora_B["default"].weight.data.fill_(float("nan"))
    before = layer.weight.clone()
    with pytest.raises(ValueError, match="NaNs"):
        model.merge_adapter(safe_merge=True)
    assert torch.equal(layer.weight, before)
    assert not layer.merged


def test_conversion_to_plain_lora_is_refused():
    assert not get_peft_model(llama(), config()).supports_lora_conversion()


@pytest.mark.parametrize("model", [nn.Linear(4, 4), None])
def test_merge_of_something_else(model):
    with pytest.raises(ValueError, match="merge needs a PeftModel"):
        merge(model)


# CausalLMModule with adapters, in a Trainer


in_a_trainer = pytest.mark.filterwarnings(
    "ignore:.*does not have many workers", "ignore:.*but have no `val_dataloader`", "ignore:.*log_every_n_steps"
)
QUIET = dict.fromkeys(["logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"], False)
ADAPTERS = {"r": 4, "lora_alpha": 8, "target_modules": TARGETS}


def fit(module, *callbacks, **options):
    trainer = L.Trainer(accelerator="cpu", callbacks=list(callbacks), **{**QUIET, "max_epochs": 3, **options})
    trainer.fit(module, DataLoader(TOKENS.repeat(4, 1), batch_size=2))


@in_a_trainer
def test_prune_then_train_adapters_then_save(tmp_path):
    dense = llama(sparsity=0)
    module = CausalLMModule(copy.deepcopy(dense), lr=1e-2, lora=ADAPTERS)
    pruning = WandaPrune(0.5, num_samples=8, skip=["model.layers.0.mlp", "*.1.mlp.up_proj"])
    fit(module, pruning, SavePretrained(tmp_path / "out"))
    by_hand = copy.deepcopy(dense)
    batches = list(DataLoader(TOKENS.repeat(4, 1), batch_size=2))
    report = prune(
        by_hand,
        [{"input_ids": batch} for batch in batches],
        skip=["model.layers.0.mlp", "model.layers.1.mlp.up_proj"],
        progress=False,
    )
    saved = LlamaForCausalLM.from_pretrained(tmp_path / "out")
    assert_zeros(saved, zeros_of(by_hand))
    assert pruning.report.sparsity == report.sparsity
    assert [layer.name.removesuffix(".base_layer") for layer in pruning.report.layers] == [
        layer.name for layer in report.layers
    ]
    moved = [
        name
        for name, weight in saved.named_parameters()
        if not torch.equal(weight, by_hand.state_dict()[name]) and name.endswith("proj.weight")
    ]
    assert moved == [name for name in zeros_of(by_hand) if name.split(".")[-2] in TARGETS]


@in_a_trainer
def test_a_module_gives_plain_adapters_too():
    module = CausalLMModule(llama(), lr=1e-2)
    zeros = zeros_of(module.model)
    module.add_adapters(keep_zeros=False, **ADAPTERS)
    assert not any(isinstance(layer, KeepZerosLinear) for layer in module.modules())
    fit(module)
    module.merge(reprune=True)
    assert_zeros(module.model, zeros)
    module.merge()  # there is nothing to merge any more


@in_a_trainer
def test_the_learning_rate_falls_to_zero():
    module = CausalLMModule(llama(), lr=1e-2, lr_decay=True)
    rates = []
    module.on_train_batch_start = lambda *_: rates.append(module.optimizers().param_groups[0]["lr"])
    fit(module, max_epochs=1)
    assert rates == pytest.approx([0.01, 0.0075, 0.005, 0.0025])


@in_a_trainer
def test_a_learning_rate_cannot_fall_to_zero_without_an_end():
    module = CausalLMModule(llama(), lr_decay=True)
    with pytest.raises(MisconfigurationException, match="has no known end: give the Trainer max_steps"):
        fit(module, max_epochs=-1)
