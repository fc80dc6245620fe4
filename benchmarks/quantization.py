"""Zeros that quantizers keep, and the perplexity of the quantized model.

    pip install torchao bitsandbytes compressed-tensors loguru  (each is optional)
    python benchmarks/quantization.py --model .cache/SmolLM2-135M-Instruct.Q4_1.gguf --save benchmarks/results
    python benchmarks/quantization.py --model MODEL --calibration web.txt --eval web.txt --limit 32

Prunes a language model to 50 % with Wanda. Each scheme quantizes and dequantizes every pruned matrix of a copy in
float32. `zeros kept` is the share of the pruned weights that are still exactly zero, `new zeros` the share of the kept
weights that became zero. Quantizers that are not installed, or do not run on this machine, are named.
"""

import copy
from dataclasses import dataclass, replace
from functools import partial
from types import SimpleNamespace

import torch
from measuring import LanguageModel, Text, perplexity, run_from_shell
from result import Runs
from torch import nn

from wanda_lightning import prune
from wanda_lightning.models import find_layers

GROUP = 32


def torchao(config, weight):
    """Quantize the weight of a linear layer by a configuration of torchao."""
    import torchao.quantization as quantization

    d_out, d_in = weight.shape
    layer = nn.Linear(d_in, d_out, bias=False, device=weight.device, dtype=weight.dtype)
    layer.weight.data = weight.clone()
    quantization.quantize_(layer, config(quantization))
    return layer.weight.dequantize()


def int4(mapping, quantization):
    """Return torchao's configuration for groups of inputs, with an integer zero point if the mapping is asymmetric."""
    groups = quantization.PerGroup(GROUP)
    return quantization.IntxWeightOnlyConfig(torch.int4, groups, quantization.MappingType[mapping])


def bitsandbytes_4bit(kind, weight):
    """Quantize to NF4 or FP4, in blocks of 64 weights."""
    from bitsandbytes import functional

    quantized, state = functional.quantize_4bit(weight, quant_type=kind, blocksize=64)
    return functional.dequantize_4bit(quantized, state)


def bitsandbytes_8bit(weight):
    """Quantize as `Linear8bitLt` does: each row by its largest weight."""
    from bitsandbytes.nn import Int8Params
    from transformers.integrations.bitsandbytes import dequantize_bnb_weight

    quantized = Int8Params(weight.half(), requires_grad=False, has_fp16_weights=False)
    quantized = quantized.to(weight.device)
    return dequantize_bnb_weight(quantized, state=SimpleNamespace(SCB=quantized.SCB))


def gguf_type(name, weight):
    """Quantize to a type of GGUF files."""
    import gguf

    qtype = gguf.GGMLQuantizationType[name]
    return torch.from_numpy(gguf.dequantize(gguf.quantize(weight.numpy(), qtype), qtype))


def compressed_tensors(bits, symmetric, weight):
    """Round to nearest as llm-compressor does by default: int8 per row, int4 in groups of inputs."""
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize
    from compressed_tensors.quantization.utils import calculate_qparams

    group = GROUP if bits == 4 else weight.shape[1]
    strategy = {"strategy": "group", "group_size": GROUP} if bits == 4 else {"strategy": "channel"}
    args = QuantizationArgs(num_bits=bits, symmetric=symmetric, **strategy)
    groups = weight.unflatten(1, (-1, group))
    scale, zero_point = calculate_qparams(groups.amin(dim=2), groups.amax(dim=2), args)
    return fake_quantize(weight, scale, zero_point, args)


SCHEMES = {
    ("none", "none"): lambda weight: weight,
    ("torchao", "int8 weight-only"): partial(torchao, lambda q: q.Int8WeightOnlyConfig()),
    ("torchao", "int4 symmetric"): partial(torchao, partial(int4, "SYMMETRIC")),
    ("torchao", "int4 asymmetric"): partial(torchao, partial(int4, "ASYMMETRIC")),
    ("torchao", "float8 weight-only"): partial(torchao, lambda q: q.Float8WeightOnlyConfig()),
    ("bitsandbytes", "int8"): bitsandbytes_8bit,
    ("bitsandbytes", "nf4"): partial(bitsandbytes_4bit, "nf4"),
    ("bitsandbytes", "fp4"): partial(bitsandbytes_4bit, "fp4"),
    ("compressed_tensors", "int8"): partial(compressed_tensors, 8, True),
    ("compressed_tensors", "int4 symmetric"): partial(compressed_tensors, 4, True),
    ("compressed_tensors", "int4 asymmetric"): partial(compressed_tensors, 4, False),
}
for name in ("Q8_0", "Q5_0", "Q5_1", "Q4_0", "Q4_1"):
    SCHEMES["gguf", name] = partial(gguf_type, name)


@torch.no_grad()
def measure(pruned, scheme, batches):
    """Return what quantization does to zeros and perplexity."""
    model = copy.deepcopy(pruned)
    before = []
    after = []
    for layer in find_layers(model).layers:
        weight = layer.read().float()
        quantized = scheme(weight).float()
        before.append(weight.flatten())
        after.append(quantized.flatten())
        layer.write(quantized)

    was_zero = torch.cat(before) == 0
    is_zero = (torch.cat(after) == 0).double()
    return {
        "zeros_kept": float(is_zero[was_zero].mean()),
        "new_zeros": float(is_zero[~was_zero].mean()),
        "perplexity": perplexity(model, batches),
    }


@dataclass(frozen=True, kw_only=True)
class Options(Text):
    """Options of this program."""

    nsamples: int = 8
    seqlen: int = 256
    limit: int = 32
    save: str = ""


def main(options: Options):
    """Prune once, then quantize copies."""
    language = LanguageModel(options)
    runs = Runs(options.save, "quantization")
    model = language.model
    runs(replace(language.planned, calibration=None), language.measure)
    prune(model, language.calibration, 0.5, method="wanda", progress=False)
    pruned = replace(language.planned, method="wanda", sparsity=0.5, arguments={"method": "wanda"})

    for (package, name), scheme in SCHEMES.items():
        planned = replace(pruned, case={"quantizer": package, "scheme": name})
        try:
            runs(planned, partial(measure, model, scheme, language.evaluation))
        except Exception as error:
            print(f"Not measured: {package} {name}: {error!r}")


if __name__ == "__main__":
    run_from_shell(main)
