"""Tiny mixtures of experts in files, quantized by the code of the libraries that define the formats."""

import json
from types import SimpleNamespace

import pytest
import torch
import transformers
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig
from safetensors.torch import save_file
from support.disk import weights
from support.experts import build
from support.reports import read_json
from transformers import FineGrainedFP8Config
from transformers.integrations.finegrained_fp8 import Fp8Quantize

CAN_DEQUANTIZE = pytest.mark.skipif(
    tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 24),
    reason="older transformers do not dequantize all formats",
)
BLOCK = 8  # rows and columns of a block of FP8 with one scale
GROUP = 16  # columns with one scale, in int4


def save_quantized(folder, name, quantize, settings, part="", **more):
    """Save a tiny mixture in bfloat16, with the matrices of its layers quantized; return its configuration.

    `quantize` gets a weight, and returns the tensors to store by what their names end with. Only weights with `part` in
    their names are quantized.
    """
    build(name, **more).bfloat16().save_pretrained(folder)
    tensors = {}
    for key, tensor in weights(folder).items():
        stem, _, ending = key.rpartition(".")
        if ending == "weight" and "_proj" in key and part in key:
            for suffix, stored in quantize(tensor).items():
                tensors[f"{stem}.{suffix}"] = stored.contiguous()
        else:
            tensors[key] = tensor
    return rewrite(folder, tensors, settings)


def rewrite(folder, tensors, settings=None):
    """Replace the weights of a folder, in two files, so that some scales are not beside their weights."""
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    index = {}
    for number in (0, 1):
        file = f"model-{number + 1:05d}-of-00002.safetensors"
        # Weights and their scales follow each other in the sorted names.
        part = {key: tensors[key] for key in sorted(tensors)[number::2]}
        save_file(part, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": index})
    )
    config = read_json(folder / "config.json")
    if settings:
        config["quantization_config"] = settings
    (folder / "config.json").write_text(json.dumps(config))
    return config


def fp8(folder, name="qwen3_moe", scale_fmt="float", **more):
    """Save a mixture in FP8, with one scale for each block."""
    settings = FineGrainedFP8Config(weight_block_size=(BLOCK, BLOCK), scale_fmt=scale_fmt)
    operation = Fp8Quantize(SimpleNamespace(quantization_config=settings))

    def quantize(weight):
        rows, columns = weight.shape
        # The last blocks may be smaller, as in DeepSeek-V3.
        padded = torch.nn.functional.pad(weight, (0, -columns % BLOCK, 0, -rows % BLOCK))
        quantized = operation.convert({"x.weight": padded})
        return {
            "weight": quantized["x.weight"][:rows, :columns],
            "weight_scale_inv": quantized["x.weight_scale_inv"],
        }

    described = json.loads(json.dumps(settings.to_dict()))
    return save_quantized(folder, name, quantize, described, **more)


def mxfp4(folder):
    """Save a GPT-OSS whose experts are MXFP4: random values and random scales of moderate size."""
    build("gpt_oss").bfloat16().save_pretrained(folder)
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for key, tensor in weights(folder).items():
        if not key.endswith(("gate_up_proj", "down_proj")):
            tensors[key] = tensor
            continue
        experts, columns, rows = tensor.shape  # stored as inputs x outputs
        shape = (experts, rows, columns // 32)
        tensors[f"{key}_blocks"] = random_bytes((*shape, 16), 0, 256, generator)
        tensors[f"{key}_scales"] = random_bytes(shape, 118, 124, generator)
    settings = {
        "quant_method": "mxfp4",
        "modules_to_not_convert": ["model.embed_tokens", "lm_head"],
    }
    return rewrite(folder, tensors, settings)


def random_bytes(shape, low, high, generator):
    return torch.randint(low, high, shape, generator=generator, dtype=torch.uint8)


def compressed(folder, kind, name="qwen3_moe", part="", ignored=()):
    """Save a mixture as compressed-tensors: `"pack-quantized"` has 4 bits, `"float-quantized"` has 8."""
    is_packed = kind == "pack-quantized"
    if is_packed:
        arguments = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": GROUP}
    else:
        arguments = {"num_bits": 8, "type": "float", "strategy": "channel"}
    settings = {
        "quant_method": "compressed-tensors",
        "format": kind,
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": arguments}},
        "ignore": ["lm_head", "re:.*gate$", *ignored],
    }
    scheme = QuantizationConfig.model_validate(settings).config_groups["group_0"]
    compressor = BaseCompressor.get_value_from_registry(kind)

    def quantize(weight):
        groups = weight.unflatten(1, (-1, GROUP if is_packed else weight.shape[1]))
        scale = groups.abs().amax(-1) / (7 if is_packed else 448)
        return compressor.compress({"weight": weight, "weight_scale": scale}, scheme)

    return save_quantized(folder, name, quantize, settings, part)


def kimi(folder):
    """Save a DeepSeek-V3 of which only the routed experts are quantized, to 4 bits, as in Kimi-K2-Thinking."""
    ignored = ["re:.*self_attn.*", "re:.*shared_experts.*", r"re:.*mlp\.(gate|up|down)_proj.*"]
    compressed(folder, "pack-quantized", "deepseek_v3", ".experts.", ignored)
