"""Take experts out of quantized mixtures at their real shapes, from disk: memory and seconds.

    pip install accelerate compressed-tensors
    python benchmarks/mixtures.py FOLDER --shapes glm-4.5-air gpt-oss-120b  (10 GB of disk)

Each model has two blocks with random weights, in the format in which it is published, and a small vocabulary. One block
follows the other, so memory does not depend on their number, and everything else is proportional to it. Pruning and a
plain forward pass over the same windows, also from disk, run in a new process each.
"""

import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import psutil
import torch
from measuring import MIB, cost_of, in_new_process, random_windows, run_from_shell
from result import Result, Runs, Samples
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, Glm4MoeConfig, GptOssConfig
from transformers.core_model_loading import revert_weight_conversion

from wanda_lightning import prune_from_disk
from wanda_lightning.streaming import perplexity_from_disk

BLOCKS = 2
VOCABULARY = 1024
FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
MXFP4 = {"quant_method": "mxfp4"}
MODELS = {
    "glm-4.5-air": (
        Glm4MoeConfig(
            attention_bias=True,
            first_k_dense_replace=0,
            head_dim=128,
            hidden_size=4096,
            intermediate_size=10944,
            moe_intermediate_size=1408,
            n_group=1,
            n_routed_experts=128,
            n_shared_experts=1,
            num_attention_heads=96,
            num_experts_per_tok=8,
            num_hidden_layers=BLOCKS,
            num_key_value_heads=8,
            topk_group=1,
            vocab_size=VOCABULARY,
        ),
        FP8,
    ),
    "gpt-oss-120b": (
        GptOssConfig(
            num_hidden_layers=BLOCKS,
            num_local_experts=128,
            vocab_size=VOCABULARY,
        ),
        MXFP4,
    ),
}


def build(folder, config, quantization):
    """Write a random model in a quantized format, one file for each block."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    parts = {}
    for name, tensor in revert_weight_conversion(model, model.state_dict()).items():
        block = ".".join(name.split(".")[:3]) if ".layers." in name else ""
        parts.setdefault(block, {})[name] = tensor

    generator = torch.Generator().manual_seed(0)
    folder.mkdir(parents=True)
    index = {}
    for number, shapes in enumerate(parts.values(), 1):
        weights = {}
        for name, tensor in shapes.items():
            weights |= random_tensors(name, tensor, quantization, generator)
        file = f"model-{number:05d}-of-{len(parts):05d}.safetensors"
        save_file(weights, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(weights, file)

    config.architectures = [type(model).__name__]
    config.dtype = torch.bfloat16
    config.save_pretrained(folder)
    described = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps(described | {"quantization_config": quantization})
    )
    text = json.dumps({"metadata": {}, "weight_map": index})
    (folder / "model.safetensors.index.json").write_text(text)


def random_tensors(name, tensor, quantization, generator):
    """Return random tensors to store for a weight, by name: quantized where the published model is."""
    shape = tuple(tensor.shape)
    if quantization is FP8 and len(shape) == 2 and "_proj.weight" in name:
        octets = random_bytes(shape, 256, generator)
        octets[(octets & 0x7F) == 0x7F] = 0  # NaN
        grid = [-(-size // 128) for size in shape]
        # Bits drawn at random give values up to 448.
        scales = torch.full(grid, 2e-4)
        return {name: octets.view(torch.float8_e4m3fn), f"{name}_scale_inv": scales}

    if quantization is MXFP4 and name.endswith(("gate_up_proj", "down_proj")):
        experts, inputs, outputs = shape
        scales = torch.full((experts, outputs, inputs // 32), 120, dtype=torch.uint8)
        blocks = random_bytes((*scales.shape, 16), 256, generator)
        return {f"{name}_blocks": blocks, f"{name}_scales": scales}

    weight = torch.empty(shape, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)
    return {name: torch.ones_like(weight) if "norm" in name else weight}


def random_bytes(shape, end, generator):
    """Return random bytes below a number."""
    return torch.randint(end, shape, dtype=torch.uint8, generator=generator)


def costs(step):
    """Return the seconds of a step, the peak memory, and the bytes written."""
    torch.set_num_threads(1)
    started = time.process_time()
    cost = cost_of(step)
    return {
        "seconds": cost.seconds,
        "processor_seconds": time.process_time() - started,
        "peak_rss_mib": cost.start_mib + cost.peak_mib,
        "written_gb": psutil.Process().io_counters().write_chars / 1e9,
    }


def forward(source, batches):
    """Run a plain forward pass."""
    return costs(lambda: perplexity_from_disk(source, batches, progress=False))


def drop(source, output, batches, sparsity):
    """Take experts out."""
    shutil.rmtree(output, ignore_errors=True)
    choices = {"pattern": "experts_reap", "progress": False}
    return costs(lambda: prune_from_disk(source, output, batches, sparsity, **choices))


def main(
    folder: Path,
    /,
    *,
    shapes: Sequence[str] = tuple(MODELS),
    samples: int = 4,
    length: int = 512,
    sparsity: float = 0.25,
    save: str = "",
):
    """Measure a plain forward pass and pruning for each model, which is written to a folder unless it is there."""
    runs = Runs(save, "mixtures")
    batches = random_windows(VOCABULARY, samples, length)
    for shape in shapes:
        source = folder / shape
        if not source.exists():
            build(source, *MODELS[shape])
        size = sum(file.stat().st_size for file in source.glob("*.safetensors"))
        planned = Result(
            model=shape,
            method="forward",
            case={"blocks": BLOCKS, "weights_mib": round(size / MIB)},
            calibration=Samples("random tokens", samples, length),
        )
        runs.save(planned, in_new_process(forward, source, batches))
        numbers = in_new_process(drop, source, folder / "pruned", batches, sparsity)
        row = replace(planned, method="REAP", pattern="experts", sparsity=sparsity)
        runs.save(row, numbers)


if __name__ == "__main__":
    run_from_shell(main)
