"""Which matrices are skipped or refused, and what their reasons say."""

from copy import deepcopy

import pytest
import torch
import torch.distributed as dist
import torch.nn.utils.prune
from peft import LoraConfig, get_peft_model
from support.layers import assert_same
from support.mlps import relu_mlp
from support.quiet import prune
from support.refusals import refuses
from support.zoo import batches_of, model_of, number_of_weights
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.utils import parametrizations

from wanda_lightning.models import find_layers
from wanda_lightning.models.quantized import is_quantized


def masked(layer):
    torch.nn.utils.prune.l1_unstructured(layer, "weight", 0.5)
    return layer


RECOMPUTED = {
    "old weight norm": (torch.nn.utils.weight_norm, "WeightNorm"),
    "mask": (masked, "L1Unstructured"),
    "weight norm": (parametrizations.weight_norm, "_WeightNorm"),
}


@pytest.mark.filterwarnings("ignore:.*torch.nn.utils.weight_norm.* is deprecated:FutureWarning")
@pytest.mark.parametrize(("wrap", "kind"), RECOMPUTED.values(), ids=RECOMPUTED)
def test_a_weight_that_is_recomputed_is_skipped(wrap, kind):
    found = find_layers(nn.Sequential(nn.Conv2d(1, 1, 1), wrap(nn.Conv2d(6, 8, 3))))
    assert not found.layers
    skipped = [matrix for matrix in found.skipped if matrix.name.startswith("1")]
    assert skipped
    assert all(
        f"by {kind}: make it an ordinary weight first" in matrix.detail for matrix in skipped
    )
    assert not any(matrix.reason.is_expected for matrix in skipped)


class Linear8bitLt(nn.Linear):
    """Of bitsandbytes, before it is moved to a GPU: its weight is still in float16."""

    __module__ = "bitsandbytes.nn.modules"


class QuantLinear(nn.Module):
    """GPTQ, like AWQ: integers in buffers, no parameter that is a matrix."""

    __module__ = "auto_gptq.nn_modules.qlinear.qlinear_cuda"

    def __init__(self, d_in, d_out):
        super().__init__()
        self.register_buffer("qweight", torch.zeros(d_in // 8, d_out, dtype=torch.int32))
        self.register_buffer("scales", torch.ones(1, d_out, dtype=torch.float16))


class Wrapper(torch.Tensor):
    """A tensor that says it is bfloat16 and holds integers, as torchao's do."""

    @staticmethod
    def __new__(cls, data):
        return torch.Tensor._make_wrapper_subclass(
            cls, data.shape, dtype=torch.bfloat16, requires_grad=False
        )

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
        layer.weight = nn.Parameter(
            kind(torch.zeros(d_out, d_in, dtype=torch.int8)), requires_grad=False
        )
        return layer

    return make


def with_buffer(name, dtype):
    module = nn.Module()
    module.register_buffer(name, torch.zeros(4, 4, dtype=dtype))
    return module


QUANTIZED = {
    "bitsandbytes": (Linear8bitLt, "q", "quantized by bitsandbytes (Linear8bitLt, Parameter)"),
    "auto_gptq": (QuantLinear, "q.qweight", "quantized by auto_gptq (QuantLinear, Tensor)"),
    "float8": (
        lambda *_: with_buffer("weight", torch.float8_e4m3fn),
        "q.weight",
        "float8_e4m3fn weights of type Tensor",
    ),
    "torchao": (wrapped(Int8Tensor), "q", "quantized by torchao (Linear, Int8Tensor)"),
    "another": (wrapped(Wrapper), "q", "bfloat16 weights of type Wrapper cannot be pruned"),
}


@pytest.mark.parametrize("name", QUANTIZED)
def test_quantized_layers_are_refused_by_name(name):
    make, matrix, reason = QUANTIZED[name]
    model = nn.ModuleDict({"plain": nn.Linear(16, 16), "q": make(16, 16)})
    assert [is_quantized(module) for module in model.values()] == [False, True]
    before = model["plain"].weight.clone()
    with refuses("1 matrix that cannot be pruned in place") as caught:
        prune(model, [torch.randn(2, 16)])
    assert f"{matrix} first: {reason}" in str(caught.value)
    assert f"dense with skip=['{matrix}']" in str(caught.value)
    assert torch.equal(model["plain"].weight, before)
    for choice in ({"skip": ["q"]}, {"only": ["plain"]}):
        report = prune(model, None, criterion="magnitude", **choice)
        assert [layer.name for layer in report.layers] == ["plain"]
        assert matrix in [matrix.name for matrix in report.skipped]
        assert report.parameters == number_of_weights(model)


def test_of_a_layer_with_adapters_the_base_is_pruned():
    model = model_of("llama")
    plain = deepcopy(model)
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "up_proj"]))
    report = prune(adapted, batches_of("llama"))
    prune(plain, batches_of("llama"))
    assert sum(layer.name.endswith(".base_layer") for layer in report.layers) == 4
    reasons = {matrix.name: matrix.detail for matrix in report.skipped if "lora_" in matrix.name}
    assert list(reasons.values()) == ["adapter: trained, not pruned"] * 8
    merged = adapted.merge_and_unload()  # B is zero still
    assert_same(merged.state_dict(), plain.state_dict())


def test_tensor_parallelism_is_refused(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    try:
        model = relu_mlp(8, 16, 8)
        parallelize_module(
            model, init_device_mesh("cpu", (1,)), {"0": ColwiseParallel(), "2": RowwiseParallel()}
        )
        with refuses("FSDP or tensor parallelism shards it"):
            prune(model, [torch.randn(2, 8)])
    finally:
        dist.destroy_process_group()
