r"""Take experts out of a trained mixture that is quantized, and let llama.cpp read what is written.

    pip install accelerate compressed-tensors gguf
    python recipes/llm/small_mixture.py --output out/small_mixture
    python benchmarks/quantized_mixtures.py --model out/small_mixture --llama_cpp llama.cpp --folder out/quantized \
        --calibration out/small_mixture_text/training.txt --eval out/small_mixture_text/heldout.txt \
        --nsamples 64 --seqlen 256 --limit 128 --save benchmarks/results

The libraries that define the formats quantize the mixture; for MXFP4, which only GPT-OSS has, a small GPT-OSS with
random weights is written. Then experts are taken out, from disk, and the quantized folder is read twice: by
transformers, and by convert_hf_to_gguf.py and llama-perplexity (in `build/bin`). Both compute the perplexity of the
second half of each window.
"""

import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig
from measuring import MIB, Text, in_batches, run_from_shell
from mixtures import MXFP4, build
from result import Result, Runs, Samples
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    FineGrainedFP8Config,
    GptOssConfig,
)
from transformers.integrations.finegrained_fp8 import Fp8Quantize

from wanda_lightning import TextDataModule, prune_from_disk

GOALS = (0.25, 0.5)
TRIES = 5  # llama.cpp sometimes ends before it has printed its last line
GROUP = 32  # columns with one scale, in int4
INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": GROUP}
FP8_ROWS = {"num_bits": 8, "type": "float", "strategy": "channel"}
# The tokenizer is that of the small mixture, which the script of llama.cpp does not know by its hash.
CONVERT = """
import runpy, sys
sys.path.insert(0, sys.argv[1])
from conversion.base import TextModel
TextModel.get_vocab_base_pre = lambda self, tokenizer: "gpt-2"
script = sys.argv.pop(1) + "/convert_hf_to_gguf.py"
sys.argv[0] = script
runpy.run_path(script, run_name="__main__")
"""


def fp8_blocks():
    """Return how a weight is stored in FP8 with a scale for each block, and the settings."""
    settings = FineGrainedFP8Config(weight_block_size=(128, 128))
    operation = Fp8Quantize(SimpleNamespace(quantization_config=settings))

    def quantize(weight):
        quantized = operation.convert({"x.weight": weight})
        return {name.removeprefix("x."): tensor for name, tensor in quantized.items()}

    return quantize, json.loads(json.dumps(settings.to_dict()))


def compressed(kind, arguments, levels):
    """Return the same for a format of compressed-tensors; the largest magnitude of a group is the last level."""
    settings = {
        "quant_method": "compressed-tensors",
        "format": kind,
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": arguments}},
        "ignore": ["lm_head", "re:.*gate$"],
    }
    scheme = QuantizationConfig.model_validate(settings).config_groups["group_0"]
    compressor = BaseCompressor.get_value_from_registry(kind)

    def quantize(weight):
        width = arguments.get("group_size", weight.shape[1])
        scale = weight.unflatten(1, (-1, width)).abs().amax(-1) / levels
        return compressor.compress({"weight": weight, "weight_scale": scale}, scheme)

    return quantize, settings


FORMATS = {
    "bfloat16": None,
    "FP8 in blocks": fp8_blocks,
    "int4, packed": partial(compressed, "pack-quantized", INT4, 7),
    "FP8 by rows": partial(compressed, "float-quantized", FP8_ROWS, 448),
}


def write_quantized(source, folder, form):
    """Write a mixture in a format: all matrices of its layers except the routers."""
    shutil.rmtree(folder, ignore_errors=True)
    AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    if form is None:
        return
    quantize, settings = form()
    tensors = {}
    for key, weight in load_file(folder / "model.safetensors").items():
        if "_proj" not in key:
            tensors[key] = weight
            continue
        stem = key.removesuffix("weight")
        for name, tensor in quantize(weight).items():
            tensors[stem + name] = tensor.contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))


@torch.no_grad()
def by_transformers(folder, windows):
    """Return the perplexity of the second halves; the weights are dequantized to float32."""
    config = AutoConfig.from_pretrained(folder)
    if hasattr(config, "quantization_config"):
        config.quantization_config["dequantize"] = True
    model = AutoModelForCausalLM.from_pretrained(folder, config=config, dtype=torch.float32).eval()
    losses = []
    half = windows.shape[1] // 2
    for part in windows.split(4):
        logits = model(part, use_cache=False).logits[:, half:-1].flatten(0, 1)
        targets = part[:, half + 1 :].flatten()
        losses.append(torch.nn.functional.cross_entropy(logits, targets, reduction="none"))
    return float(torch.cat(losses).mean().exp())


def by_llama_cpp(folder, text, options, llama_cpp):
    """Return the same, by llama.cpp, from a .gguf file in float32."""
    file = folder.with_suffix(".gguf")
    convert = [sys.executable, "-c", CONVERT, llama_cpp, folder, "--outfile", file]
    subprocess.run([*convert, "--outtype", "f32"], check=True, capture_output=True)
    binary = llama_cpp / "build" / "bin" / "llama-perplexity"
    sizes = ["-c", str(options.seqlen), "--chunks", str(options.limit)]
    for _ in range(TRIES):
        done = subprocess.run(
            [binary, "-m", file, "-f", text, *sizes], check=True, capture_output=True, text=True
        )
        found = re.search(r"Final estimate: PPL = (\S+)", done.stdout + done.stderr)
        if found:
            file.unlink()
            return float(found[1])
    raise RuntimeError(f"llama-perplexity did not print its last line:\n{done.stdout}{done.stderr}")


def gpt_oss(tokenizer):
    """Return the configuration of a GPT-OSS as small as the mixture."""
    return GptOssConfig(
        hidden_size=256,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        num_local_experts=16,
        num_experts_per_tok=2,
        vocab_size=len(tokenizer),
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=None,
    )


def main(options: Text, *, llama_cpp: Path, folder: Path, save: str = ""):
    """Measure each format, dense and with fewer experts."""
    runs = Runs(save, "quantized_mixtures")
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    data = TextDataModule(
        tokenizer,
        options.calibration,
        options.eval,
        seqlen=options.seqlen,
        num_samples=options.nsamples,
        limit=options.limit,
    )
    batches = in_batches(data.calibration_windows)

    def measure(written):
        """Return the perplexities and the size of a folder."""
        size = sum(file.stat().st_size for file in written.glob("*.safetensors"))
        return {
            "weights_mib": size / MIB,
            "perplexity": by_transformers(written, data.evaluation_windows),
            "llama_cpp_perplexity": by_llama_cpp(written, options.eval, options, llama_cpp),
        }

    def pruned(source, goal):
        """Take experts out, and measure the result."""
        output = folder / "pruned"
        shutil.rmtree(output, ignore_errors=True)
        choices = {"pattern": "experts", "tokenizer": tokenizer, "progress": False}
        prune_from_disk(source, output, batches, goal, **choices)
        return measure(output)

    def rows(source, model, name):
        """Measure all rows of a model in a format."""
        planned = Result(
            model=model,
            method="dense",
            case={"format": name},
            calibration=Samples(Path(options.calibration).name, options.nsamples, options.seqlen),
            evaluation=Samples(Path(options.eval).name, options.limit, options.seqlen),
        )
        runs(planned, partial(measure, source))
        for goal in GOALS:
            row = replace(planned, method="REAP, sum", pattern="experts", sparsity=goal)
            runs(row, partial(pruned, source, goal))

    source = folder / "source"
    for name, form in FORMATS.items():
        write_quantized(options.model, source, form)
        rows(source, Path(options.model).name, name)
    shutil.rmtree(source)
    build(source, gpt_oss(tokenizer), MXFP4)
    tokenizer.save_pretrained(source)
    rows(source, "gpt_oss_random", "MXFP4")


if __name__ == "__main__":
    run_from_shell(main)
