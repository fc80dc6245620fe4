"""Guard rails: what is not as a user might think is said, or refused, by name and with what to do."""

import copy
import socket

import lightning as L
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from support.zoo import ZOO
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.utils import parametrizations, parametrize

from wanda_lightning import NM, OWL, PerLayer, WandaPrune, prune
from wanda_lightning.cli import main
from wanda_lightning.methods import SEQUENTIAL_CHOICES
from wanda_lightning.models import SkipReason, find_layers
from wanda_lightning.notes import low_coverage


class Block(nn.Module):
    """A linear layer, and a matrix of no layer, which holds `share` of the weights."""

    def __init__(self, share):
        super().__init__()
        self.up, self.down = nn.Linear(10, 10), nn.Linear(10, 10)
        self.mix = nn.Parameter(torch.randn(round(200 * share / (1 - share)) // 10, 10))

    def forward(self, x):
        return x + self.down(F.relu(self.up(x))) + F.linear(x, self.mix).sum()


class Net(nn.Module):
    def __init__(self, share):
        super().__init__()
        self.embed = nn.Embedding(500, 10)
        self.blocks = nn.ModuleList([Block(share), Block(share)])
        self.head = nn.Linear(10, 400, bias=False)

    def get_output_embeddings(self):
        return self.head

    def forward(self, ids):
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def build(share=0.0):
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        return Net(share)


IDS = torch.arange(60).reshape(3, 20)


def coverage_notes(report):
    return [note for note in report.notes if note.startswith("only ")]


# ---- coverage


@pytest.mark.parametrize(("share", "percent"), [(0.1, None), (0.2, None), (1 / 3, 67), (0.9, 10)])
def test_low_coverage_is_said(share, percent, caplog):
    report = prune(build(share), [IDS], progress=False)
    mix = build(share).blocks[0].mix.numel()
    if percent is None:
        assert coverage_notes(report) == []
        return
    (note,) = coverage_notes(report)
    assert note == (
        f"only {percent}% of the weights besides embeddings, stem and head are in pruned layers; the largest parts "
        f"left out are blocks.0.mix and 1 more, {2 * mix:,} weights: mix of Block is not the weight of a supported layer "
        "(Linear, Conv1D, Conv1d, Conv2d, Conv2dSame)"
    )
    assert note in caplog.text
    assert f"Note: {note[:40]}" in str(report)


def test_what_the_user_left_out_is_no_surprise():
    for choices in ({"skip": ["blocks.1", "*.mix"]}, {"only": ["*.up"]}, {"only": ["blocks.0"], "skip": ["*.mix"]}):
        assert coverage_notes(prune(build(0.9), [IDS], **choices, progress=False)) == []
    (note,) = coverage_notes(prune(build(0.9), [IDS], only=["blocks.0"], progress=False))
    assert "the largest parts left out are blocks.0.mix, 1,800 weights" in note


def test_what_no_batch_reached_is_left_out_too():
    class Half(Net):
        def forward(self, ids):
            return self.head(self.blocks[0](self.embed(ids)))

    (note,) = coverage_notes(prune(Half(0.0), [IDS], progress=False))
    assert note.startswith("only 50% ")
    assert "blocks.1.up and 1 more, 200 weights: no calibration batch called it" in note


@pytest.mark.parametrize("name", [name for name in ZOO if name != "torch_transformer"])
def test_models_that_are_covered_have_no_note(name):
    assert low_coverage(find_layers(ZOO[name].build())) is None


def test_inspect_says_it(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")
    assert main(["inspect", "--model", "timm:nfnet_f0"]) == 0
    out = capsys.readouterr().out
    assert "Note: only 32% of the weights" in out
    assert "standardizes its weight in each forward" in out
    assert main(["inspect", "--model", "timm:test_vit"]) == 0
    assert "Note:" not in capsys.readouterr().out


# ---- a pattern that does not fit every layer


class Uneven(nn.Module):
    """Blocks of a width that 4 does not divide, though it divides what is inside them."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Linear(6, 16), nn.Linear(16, 6)

        def forward(self, x):
            return x + self.down(F.relu(self.up(x)))

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(self.Block() for _ in range(3))
        self.last = nn.Linear(6, 40)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.last(x)


MISFITS = ["blocks.0.up", "blocks.1.up", "blocks.2.up", "last"]
SAID = "the pattern does not fit 4 layers, last largest (input width 6 is not a multiple of 4): left dense"


def uneven():
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        return Uneven()


def rows():
    return list(torch.randn(2, 8, 6, generator=torch.Generator().manual_seed(1)))


@pytest.mark.parametrize("sequential", SEQUENTIAL_CHOICES)
@pytest.mark.parametrize("solver", ["zero_out", "sparsegpt"])
def test_what_the_pattern_does_not_fit_stays_dense(sequential, solver, caplog):
    model, other = uneven(), uneven()
    choices = {"solver": solver, "sequential": sequential, "progress": False}
    report = prune(model, rows(), pattern="2:4", **choices)
    assert [layer.name for layer in report.layers] == ["blocks.0.down", "blocks.1.down", "blocks.2.down"]
    assert all(layer.sparsity == 0.5 for layer in report.layers)
    assert [(matrix.name, matrix.shape) for matrix in report.skipped] == [(name, (16, 6)) for name in MISFITS[:3]] + [
        ("last", (40, 6))
    ]
    assert {matrix.detail for matrix in report.skipped} == {"input width 6 is not a multiple of 4"}
    assert report.notes == [SAID, *coverage_notes(report)]
    assert coverage_notes(report)[0].startswith("only 35% of the weights")  # 3 x 96 of 3 x 192 + 240
    assert [record.getMessage() for record in caplog.records] == report.notes
    prune(other, rows(), pattern="2:4", skip=MISFITS, **choices)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, other.get_parameter(name)), name
        if name.removesuffix(".weight") in MISFITS:
            assert torch.equal(parameter, uneven().get_parameter(name)), name


def test_few_misfits_are_said_without_low_coverage():
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 80))
    report = prune(model, rows(), pattern="2:4", progress=False)
    note = "the pattern does not fit 1 layer, 0 largest (input width 6 is not a multiple of 4): left dense"
    assert report.notes == [note]


def test_what_the_user_left_out_is_no_misfit():
    report = prune(uneven(), rows(), pattern="2:4", skip=MISFITS, progress=False)
    assert report.notes == []
    assert {matrix.detail for matrix in report.skipped} == {f"skip={name!r}" for name in MISFITS}
    report = prune(uneven(), rows(), pattern="2:4", only=["blocks.1"], progress=False)
    assert [matrix.name for matrix in report.skipped if matrix.detail.startswith("input width")] == ["blocks.1.up"]


@pytest.mark.parametrize("name", [name for name in ZOO if name != "torch_transformer"])
@pytest.mark.parametrize("m", [16, 48])
def test_units_do_not_depend_on_what_fits(name, m):
    model = ZOO[name].build()
    for sequential in SEQUENTIAL_CHOICES:
        every = find_layers(model, sequential, include_grouped=True)
        found = find_layers(model, sequential, include_grouped=True, pattern=NM(1, m))
        fitting = [[layer.name for layer in unit.layers if layer.shape[1] % m == 0] for unit in every.units]
        assert [[layer.name for layer in unit.layers] for unit in found.units] == [names for names in fitting if names]
        assert {unit.name for unit in found.units} <= {unit.name for unit in every.units}
        misfits = [layer.name for layer in every.layers if layer.shape[1] % m]
        assert [matrix.name for matrix in found.skipped if matrix.reason is SkipReason.PATTERN] == misfits
        assert found.skipped[: len(every.skipped)] == every.skipped


@pytest.mark.parametrize("sequential", SEQUENTIAL_CHOICES)
@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_experts_that_the_pattern_does_not_fit(name, sequential):
    """Their hidden size is 32; only what is between the two matrices of an expert has a width of 64."""
    model, dense = ZOO[name].build(), dict(ZOO[name].build().named_parameters())
    choices = {"pattern": "32:64", "only": ["*.experts"], "sequential": sequential}
    report = prune(model, ZOO[name].batches(), **choices, progress=False)
    reasons = {matrix.name: matrix.detail for matrix in report.skipped}
    count = 0
    for parameter_name, parameter in model.named_parameters():
        if parameter_name.endswith("experts.gate_up_proj"):
            assert torch.equal(parameter, dense[parameter_name])
            for expert in range(len(parameter)):
                assert reasons[f"{parameter_name}.{expert}"] == "input width 32 is not a multiple of 64"
        elif parameter_name.endswith("experts.down_proj"):
            assert (parameter == 0).sum((1, 2)).eq(parameter[0].numel() // 2).all()
            count += len(parameter)
    assert len(report.layers) == count
    misfits = [reason for reason in reasons.values() if reason.startswith("input width")]
    said = f"the pattern does not fit {len(misfits)} layers, model.layers.0.mlp.experts.gate_up_proj.0 largest (input"
    assert any(note.startswith(said) for note in report.notes)
    assert report.zeros == sum(int((parameter == 0).sum()) for parameter in model.parameters())


def test_groups_that_the_pattern_does_not_fit():
    model = nn.Sequential(nn.Conv2d(8, 6, 1), nn.Conv2d(6, 6, 3, groups=2), nn.Conv2d(6, 4, 2))
    batch = torch.randn(2, 8, 6, 6, generator=torch.Generator().manual_seed(0))
    report = prune(model, [batch], pattern="2:4", include_grouped=True, progress=False)
    assert [layer.name for layer in report.layers] == ["0", "2"]  # 8 channels; 6 channels at 4 places
    assert [(matrix.name, matrix.detail) for matrix in report.skipped] == [
        (f"1.group{group}", "input width 27 is not a multiple of 4") for group in (0, 1)
    ]


@pytest.mark.parametrize("allocation", [OWL(per="layer"), PerLayer({"blocks.0": 0.25}), PerLayer({"blocks.1": 0.0})])
def test_an_allocation_spreads_over_what_fits(allocation):
    report = prune(uneven(), rows(), pattern="4:8", allocation=allocation, progress=False)
    assert [layer.name for layer in report.layers] == ["blocks.0.down", "blocks.1.down", "blocks.2.down"]
    assert report.sparsity == pytest.approx(0.5, abs=1 / 16)
    with pytest.raises(ValueError, match=r"matches no pruned layer"):
        prune(uneven(), rows(), pattern="4:8", allocation=PerLayer({"last": 0.25}), progress=False)


class Trained(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.model = uneven()

    def forward(self, x):
        return self.model(x)

    def training_step(self, batch, index):
        return self(batch).square().mean()

    def validation_step(self, batch, index):
        self(batch)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.01, weight_decay=0.1)


@pytest.mark.parametrize(
    "when", [{}, {"at_step": 1}, {"sequential": "none"}, {"sequential": "none", "calibrate_on": "validation"}]
)
def test_a_callback_leaves_dense_what_does_not_fit(when, tmp_path):
    callback, module = WandaPrune(pattern="2:4", num_samples=16, **when), Trained()
    loader = torch.utils.data.DataLoader(torch.cat(rows()), batch_size=4)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    trainer = L.Trainer(callbacks=[callback], max_epochs=2, default_root_dir=tmp_path, **quiet)
    trainer.fit(module, loader, loader)
    assert [f"model.{name}" for name in MISFITS] == [matrix.name for matrix in callback.report.skipped]
    assert SAID.replace("last", "model.last") in callback.report.notes
    for block in module.model.blocks:
        assert (block.down.weight == 0).unflatten(1, (-1, 4)).sum(2).eq(2).all()
        assert block.up.weight.count_nonzero() == block.up.weight.numel()


# ---- a model that is sparse already


def test_a_model_that_is_sparse_already_says_so():
    model = build()
    with torch.no_grad():
        model.blocks[0].up.weight[:, :3] = 0
        model.blocks[1].up.weight[:, :1] = 0
        model.blocks[1].down.weight[0, :5] = 0  # 5 of 100
    report = prune(model, [IDS], progress=False)
    assert [layer.before for layer in report.layers] == [0.3, 0.0, 0.1, 0.05]
    said = "2 layers were sparse already, blocks.0.up most: 30.0% zeros, which count toward the target"
    assert said in report.notes
    assert {layer.sparsity for layer in report.layers} == {0.5}
    again = prune(model, [IDS], progress=False)
    assert "4 layers were sparse already, blocks.0.up most: 50.0% zeros, which count toward the target" in again.notes
    assert not any("already" in note for note in prune(build(), [IDS], progress=False).notes)


def test_tied_weights_count_once():
    model = ZOO["tied"].build()
    report = prune(model, ZOO["tied"].batches(), progress=False)
    assert report.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert report.zeros == sum(int((parameter == 0).sum()) for parameter in model.parameters())
    assert {matrix.name: matrix.detail for matrix in report.skipped} == {"second": "tied to first"}


# ---- weights that are recomputed in each forward

OLD = pytest.mark.filterwarnings("ignore:.*torch.nn.utils.weight_norm.* is deprecated:FutureWarning")


def masked(layer):
    torch.nn.utils.prune.l1_unstructured(layer, "weight", 0.5)
    return layer


MADE_ANEW = {
    "old weight norm": (torch.nn.utils.weight_norm, torch.nn.utils.remove_weight_norm, "WeightNorm"),
    "old spectral norm": (torch.nn.utils.spectral_norm, torch.nn.utils.remove_spectral_norm, "SpectralNorm"),
    "mask": (masked, lambda layer: torch.nn.utils.prune.remove(layer, "weight"), "L1Unstructured"),
    "weight norm": (
        parametrizations.weight_norm,
        lambda layer: parametrize.remove_parametrizations(layer, "weight"),
        "_WeightNorm",
    ),
    "spectral norm": (
        parametrizations.spectral_norm,
        lambda layer: parametrize.remove_parametrizations(layer, "weight"),
        "_SpectralNorm",
    ),
}


@OLD
@pytest.mark.parametrize("make", [lambda: nn.Linear(6, 8), lambda: nn.Conv2d(6, 8, 3)], ids=["linear", "convolution"])
@pytest.mark.parametrize("name", MADE_ANEW)
def test_weights_that_are_made_anew_say_how_to_go_on(name, make):
    wrap, unwrap, kind = MADE_ANEW[name]
    model = nn.Sequential(nn.Conv2d(1, 1, 1), wrap(make()))
    found = find_layers(model)
    assert not [layer for layer in found.layers if layer.name.startswith("1")]
    reasons = {matrix.detail for matrix in found.skipped if matrix.name.startswith("1")}
    assert len(reasons) == 1
    assert f"by {kind}: make it an ordinary weight" in reasons.pop()
    assert all(not matrix.reason.is_expected for matrix in found.skipped if matrix.name.startswith("1"))
    unwrap(model[1])
    assert "1" in [layer.name for layer in find_layers(model).layers]


@OLD
@pytest.mark.parametrize("name", MADE_ANEW)
def test_what_the_reasons_say_is_how_it_is_done(name):
    """The remover that is named exists and does what is promised."""
    wrap, _, _ = MADE_ANEW[name]
    model = nn.Sequential(wrap(nn.Linear(6, 8)))
    reason = find_layers(model).skipped[0].detail
    if "remove_parametrizations" in reason:
        parametrize.remove_parametrizations(model[0], "weight")
    else:
        eval(reason.rpartition(" with ")[2], {"torch": torch, "layer": model[0]})
    assert [layer.name for layer in find_layers(model).layers] == ["0"]


# ---- quantised layers: classes as the libraries name them


class Linear8bitLt(nn.Linear):
    """Of bitsandbytes, before it is moved to a GPU: its weight is still in float16."""

    __module__ = "bitsandbytes.nn.modules"


class Params4bit(nn.Parameter):
    __module__ = "bitsandbytes.nn.modules"


class Linear4bit(nn.Linear):
    __module__ = "bitsandbytes.nn.modules"

    def __init__(self, d_in, d_out):
        super().__init__(d_in, d_out)
        packed = torch.zeros(d_in * d_out // 2, 1, dtype=torch.uint8)
        self.weight = torch.Tensor._make_subclass(Params4bit, packed, False)


class PackedLinear(nn.Module):
    """GPTQ and AWQ: integers in buffers, no parameter that is a matrix."""

    def __init__(self, d_in, d_out):
        super().__init__()
        self.register_buffer("qweight", torch.zeros(d_in // 8, d_out, dtype=torch.int32))
        self.register_buffer("qzeros", torch.zeros(1, d_out // 8, dtype=torch.int32))
        self.register_buffer("scales", torch.ones(1, d_out, dtype=torch.float16))


class QuantLinear(PackedLinear):
    __module__ = "auto_gptq.nn_modules.qlinear.qlinear_cuda"


class TorchQuantLinear(PackedLinear):
    __module__ = "gptqmodel.nn_modules.qlinear.torch"


class WQLinear_GEMM(PackedLinear):
    __module__ = "awq.modules.linear.gemm"


class HQQLinear(nn.Module):
    __module__ = "hqq.core.quantize"

    def __init__(self, d_in, d_out):
        super().__init__()
        self.W_q = nn.Parameter(torch.zeros(d_in, d_out // 2, dtype=torch.uint8), requires_grad=False)


class Wrapper(torch.Tensor):
    """A tensor that says it is bfloat16 and holds integers, as torchao's do."""

    @staticmethod
    def __new__(cls, data):
        return torch.Tensor._make_wrapper_subclass(cls, data.shape, dtype=torch.bfloat16, requires_grad=False)

    def __init__(self, data):
        self.data_in_int8 = data

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            return cls(args[0].data_in_int8)
        raise NotImplementedError(function)


class Int8Tensor(Wrapper):
    __module__ = "torchao.quantization.quantize_.workflows.int8.int8_tensor"


def wrapped(kind):
    def make(d_in, d_out):
        layer = nn.Linear(d_in, d_out)
        layer.weight = nn.Parameter(kind(torch.zeros(d_out, d_in, dtype=torch.int8)), requires_grad=False)
        return layer

    return make


QUANTISED = {
    "bitsandbytes 8 bits": (Linear8bitLt, "q", "quantized by bitsandbytes (Linear8bitLt, Parameter)"),
    "bitsandbytes 4 bits": (Linear4bit, "q", "quantized by bitsandbytes (Linear4bit, Params4bit)"),
    "auto_gptq": (QuantLinear, "q.qweight", "quantized by auto_gptq (QuantLinear, Tensor)"),
    "gptqmodel": (TorchQuantLinear, "q.qweight", "quantized by gptqmodel (TorchQuantLinear, Tensor)"),
    "awq": (WQLinear_GEMM, "q.qweight", "quantized by awq (WQLinear_GEMM, Tensor)"),
    "hqq": (HQQLinear, "q.W_q", "quantized by hqq (HQQLinear, Parameter)"),
    "torchao": (wrapped(Int8Tensor), "q", "quantized by torchao (Linear, Int8Tensor)"),
    "another": (wrapped(Wrapper), "q", "weights of type Wrapper cannot be pruned in place"),
}


@pytest.mark.parametrize("name", QUANTISED)
def test_quantized_layers_are_refused_by_name(name):
    make, matrix, reason = QUANTISED[name]
    model = nn.ModuleDict({"plain": nn.Linear(16, 16), "q": make(16, 16)})
    before = model["plain"].weight.clone()
    with pytest.raises(ValueError, match="1 matrix that cannot be pruned in place") as caught:
        prune(model, [torch.randn(2, 16)], progress=False)
    assert f"{matrix} first: {reason}" in str(caught.value)
    assert (
        f"Load the model unquantized (float32, bfloat16 or float16), or leave what cannot be pruned dense with skip=['{matrix}']"
        in str(caught.value)
    )
    assert torch.equal(model["plain"].weight, before)
    for choice in ({"skip": ["q"]}, {"only": ["plain"]}):
        report = prune(model, None, criterion="magnitude", **choice, progress=False)
        assert [layer.name for layer in report.layers] == ["plain"]
        assert matrix in [matrix.name for matrix in report.skipped]
        assert report.parameters == sum(parameter.numel() for parameter in model.parameters())


# ---- adapters


def test_of_a_layer_with_adapters_the_base_is_pruned():
    model = ZOO["llama"].build()
    plain = copy.deepcopy(model)
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "up_proj"]))
    adapters = {name: p.detach().clone() for name, p in adapted.named_parameters() if "lora_" in name}
    report = prune(adapted, ZOO["llama"].batches(), progress=False)
    expected = prune(plain, ZOO["llama"].batches(), progress=False)

    names = [layer.name.removeprefix("base_model.model.") for layer in report.layers]
    assert [name.removesuffix(".base_layer") for name in names] == [layer.name for layer in expected.layers]
    assert [name for name in names if name.endswith(".base_layer")] == [
        f"model.layers.{i}.{part}.base_layer" for i in range(2) for part in ("self_attn.q_proj", "mlp.up_proj")
    ]
    reasons = {matrix.name: matrix.detail for matrix in report.skipped}
    assert len(adapters) == 2 * 2 * 2
    for name, before in adapters.items():
        assert reasons[name.removesuffix(".weight")] == "adapter: trained, not pruned"
        assert torch.equal(adapted.get_parameter(name), before)
    merged = adapted.merge_and_unload()  # B is zero still
    for name, weight in plain.named_parameters():
        assert torch.equal(merged.get_parameter(name), weight)


# ---- tensor parallelism


@pytest.fixture
def one_process():
    """A group of one process, in which tensors can be spread all the same."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    dist.init_process_group("gloo", init_method=f"tcp://localhost:{port}", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def test_tensor_parallelism_is_refused_by_name(one_process):
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))
    parallelize_module(model, one_process, {"0": ColwiseParallel(), "2": RowwiseParallel()})
    with pytest.raises(ValueError, match=r"the weight of 0 is spread over processes by .*Shard\(dim=0\)") as caught:
        prune(model, [torch.randn(2, 8)], progress=False)
    for part in ("tensor parallelism is not supported", "before parallelize_module", "without tp_plan="):
        assert part in str(caught.value)
