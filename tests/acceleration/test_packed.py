"""The kernel for packed weights equals a product in float64, on every instruction set that this processor has."""

import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from wanda_lightning import accelerate_cpu
from wanda_lightning.acceleration import packed
from wanda_lightning.acceleration.packed import PackedMatrix, compile_kernel, dense_reason


def _flags():
    cpuinfo = Path("/proc/cpuinfo")
    return set(cpuinfo.read_text().split()) if cpuinfo.exists() else set()


HAS_AVX512 = {"avx512f", "avx512bw", "avx512vl", "avx512_vbmi2"} <= _flags()


@pytest.fixture(scope="session")
def libraries():
    try:
        found = {"native": compile_kernel("native"), "haswell": compile_kernel("haswell")}  # haswell has only AVX2
    except ImportError as error:
        pytest.skip(str(error))
    return found | ({"icelake-server": compile_kernel("icelake-server")} if HAS_AVX512 else {})


@pytest.fixture(params=["native", "haswell", "icelake-server"])
def instructions(request, libraries, monkeypatch):
    """Run with the instructions of one processor; icelake-server has AVX-512, but not for bfloat16."""
    if request.param not in libraries:
        pytest.skip("needs AVX-512")
    monkeypatch.setattr(packed, "kernel", lambda: libraries[request.param])


def sparse(rows, columns, dtype, sparsity=0.6):
    weight = torch.randn(rows, columns)
    return (weight * (torch.rand(rows, columns) >= sparsity)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (5, 63), (8, 64), (9, 65), (33, 200), (576, 1536), (130, 1000)])
@pytest.mark.parametrize("tokens", [1, 3, 9])
def test_products(instructions, dtype, shape, tokens):
    weight, bias = sparse(*shape, dtype), torch.randn(shape[0]).to(dtype)
    weight[0] = 0  # an empty row
    weight[-1] = torch.randn(shape[1]).abs() + 1  # a full one
    inputs = torch.randn(1, tokens, shape[1]).to(dtype)
    matrix = PackedMatrix(weight)
    for each in (None, bias):
        exact = F.linear(inputs.double(), weight.double(), None if each is None else each.double())
        # Each sum may round in another order: at most a few units of the largest term, then to the dtype.
        terms = F.linear(inputs.double().abs(), weight.double().abs(), bias.double().abs())
        bound = 1e-6 * terms + torch.finfo(dtype).eps * exact.abs()
        assert ((matrix.linear(inputs, each).double() - exact).abs() <= bound).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1), (7, 64), (5, 130)])
def test_the_dense_weight_comes_back_bit_for_bit(instructions, dtype, shape):
    bits = {torch.float32: torch.int32, torch.bfloat16: torch.int16}[dtype]
    weight = sparse(*shape, dtype)
    weight.flatten()[0] = -0.0
    weight[-1] = torch.randint(torch.iinfo(bits).min, torch.iinfo(bits).max, shape[1:], dtype=bits).view(dtype)
    weight.flatten()[-1] = torch.nan
    assert torch.equal(PackedMatrix(weight).dense().view(bits), weight.view(bits))


def test_values_that_are_not_finite_spread_as_in_a_dense_product(instructions):
    weight = sparse(6, 70, torch.float32)
    inputs = torch.randn(1, 70)
    inputs[0, 3], inputs[0, 68] = torch.inf, torch.nan
    expected = F.linear(inputs, weight)
    assert torch.equal(PackedMatrix(weight).linear(inputs, None).isnan(), expected.isnan())


def test_bytes(instructions):
    weight = torch.zeros(64, 640, dtype=torch.bfloat16)
    weight[:, :256] = 1  # 60 % zeros
    assert PackedMatrix(weight).nbytes == 64 * 640 / 8 + 2 * (64 * 256 + 8) + 8 * 65


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(64, 128), nn.Linear(128, 64, bias=False)
        self.head.weight = self.embed.weight
        self.up, self.down = nn.Linear(128, 200), nn.Linear(200, 128)
        self.full, self.fp16 = nn.Linear(128, 128), nn.Linear(128, 128).half()
        self.convolution = nn.Conv1d(128, 128, 1)
        for weight in (self.up.weight, self.down.weight, self.head.weight, self.fp16.weight):
            weight.data *= torch.rand(weight.shape) >= 0.6

    def forward(self, ids):
        return self.head(self.full(self.down(self.up(self.embed(ids)).relu())))


def test_a_model_accelerates_and_returns(libraries):
    model, ids = Tied().eval(), torch.tensor([[3]])
    state = copy.deepcopy(model.state_dict())
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        expected = model(ids)
        with accelerate_cpu(model) as accelerated:
            assert list(accelerated.layers) == ["up", "down"]
            assert accelerated.dense == {
                "embed.weight": "its module is of class Embedding, not Linear",
                "head": "another module uses its weight",
                "full": "fewer than 40% of its weights are zero",
                "fp16": "its dtype is float16, not float32 or bfloat16",
                "convolution.weight": "its module is of class Conv1d, not Linear",
            }
            assert torch.allclose(model(ids), expected, atol=1e-5)
            assert torch.allclose(copy.deepcopy(model)(ids), expected, atol=1e-5)
            inside = model.state_dict()
            assert list(inside) == list(state)
            assert all(torch.equal(inside[name], state[name]) for name in state)
            assert model.up.weight.isnan().all()  # the dense weight is not in memory
            with pytest.raises(ValueError, match="load_state_dict needs dense weights to replace"):
                model.load_state_dict(state)
        accelerated.undo()  # again, which does nothing
        assert torch.equal(model(ids), expected)
    assert {name: id(parameter) for name, parameter in model.named_parameters()} == {
        name: id(parameter) for name, parameter in parameters.items()
    }
    model.load_state_dict(state)
    assert all(torch.equal(model.state_dict()[name], state[name]) for name in state)


def test_gradients_and_autocast_use_the_dense_weight(libraries):
    model, inputs = nn.Sequential(nn.Linear(64, 32)), torch.randn(1, 64, requires_grad=True)
    model[0].weight.data *= torch.rand(32, 64) >= 0.6
    (expected,) = torch.autograd.grad(model(inputs).sum(), inputs)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        cast = model(inputs)
    with accelerate_cpu(model):
        (gradient,) = torch.autograd.grad(model(inputs).sum(), inputs)
        assert torch.equal(gradient, expected)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(model(inputs), cast)


def test_a_saved_model_of_transformers_is_dense(libraries, tmp_path):
    from support.zoo import save_llama_of_bytes
    from transformers import AutoModelForCausalLM

    save_llama_of_bytes(tmp_path / "dense")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    for name, module in model.named_modules():
        if name.endswith("_proj"):
            module.weight.data *= torch.rand(module.weight.shape) >= 0.6
    expected = copy.deepcopy(model.state_dict())
    with accelerate_cpu(model):
        model.save_pretrained(tmp_path / "saved")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved").state_dict()
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[name], expected[name]) for name in expected)


def test_refusals(libraries, monkeypatch):
    with pytest.raises(ValueError, match=r"all stay dense: fewer than 40% of its weights are zero \(1\)\."):
        accelerate_cpu(nn.Linear(64, 64))
    assert dense_reason(torch.zeros(2, 2, device="meta")) == "it is on meta, not on the CPU"
    packed.kernel.cache_clear()
    with pytest.raises(ImportError, match=r"processor with AVX2, but .* says: .*AVX2"):
        compile_kernel("x86-64")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ImportError, match=r"neither g\+\+ nor c\+\+ is in PATH"):
        accelerate_cpu(nn.Linear(64, 64))
