"""Compare fewer hidden units, fewer bits, and both in the programs that run models on a CPU.

    pip install onnx onnxscript onnxruntime openvino nncf gguf llama-cpp-python
    python benchmarks/runtimes.py --model M.gguf --calibration c4_sample.txt --eval wikitext2_test.raw.txt --limit 10 \
        --save benchmarks/results
    python benchmarks/runtimes.py --images .cache/efficientnet_lite0 --data imagenet_sample --save benchmarks/results

Speeds are ratios to dense float32 in the same program, whose models take turns. Files in out/runtimes are used again.
"""

import copy
import ctypes
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import llama_cpp
import nncf
import numpy as np
import onnx
import openvino
import pandas as pd
import torch
import worth
from exporting import to_gguf, to_onnx
from measuring import MIB, LanguageModel, Photos, run_from_shell, seconds
from onnxruntime.quantization import (
    QuantType,
    matmul_nbits_quantizer,
    quantize_dynamic,
    quantize_static,
)
from programs import open_gguf, open_onnx, open_openvino
from result import Result, Runs
from torch import Tensor, nn
from worth import NEW, PROMPT, Measured, Rows, narrower, rows_of_units

from wanda_lightning import Fisher
from wanda_lightning.modules import WindowPerplexity

FILES = Path("out/runtimes")
# Outputs and the cache for images, or for tokens, their cache, and the positions with logits.
Run = Callable[..., Any]


def convert_gguf(numbers, dense, file, _):
    """Write a .gguf file; llama.cpp takes other blocks for rows that do not fit those of `numbers`."""
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{numbers}")
    assert not llama_cpp.llama_model_quantize(
        str(dense).encode(), str(file).encode(), ctypes.byref(parameters)
    )


def convert_onnx(numbers, dense, file, images):
    """Write an .onnx file in int8."""
    model = onnx.load(dense)
    graph = model.graph
    weights = {weight.name: onnx.numpy_helper.to_array(weight) for weight in graph.initializer}
    # The head of a language model is its embedding, transposed: quantizers see only stored weights.
    for node in list(graph.node):
        if node.op_type == "Transpose" and node.input[0] in weights:
            head = np.ascontiguousarray(weights[node.input[0]].T)
            graph.initializer.append(onnx.numpy_helper.from_array(head, node.output[0]))
            graph.node.remove(node)

    if numbers == "int8, weights only":
        writer = matmul_nbits_quantizer.MatMulNBitsQuantizer(
            model, 8, 32, is_symmetric=True, accuracy_level=4
        )
        writer.process()
        writer.model.save_model_to_file(str(file), use_external_data_format=True)
    elif numbers == "int8, dynamic":
        quantize_dynamic(
            model,
            file,
            per_channel=True,
            weight_type=QuantType.QUInt8,
            use_external_data_format=True,
        )
    else:
        # Signed weights have 7 bits: without VNNI, sums of larger products saturate.
        data = ({graph.input[0].name: pixels.numpy()} for pixels in images)
        reader = SimpleNamespace(get_next=partial(next, data, None))
        quantize_static(model, file, reader, per_channel=True, reduce_range=True)


def convert_openvino(numbers, dense, file, images):
    """Write an .xml file, and a .bin file with its weights."""
    model = openvino.Core().read_model(dense)
    if numbers == "int8, static":
        data = nncf.Dataset([image.numpy() for image in torch.cat([*images]).split(1)])
        model = nncf.quantize(model, data)
    elif numbers == "int8, weights only":
        model = nncf.compress_weights(model, mode=nncf.CompressWeightsMode.INT8_ASYM)
    openvino.save_model(model, file, compress_to_fp16=False)


PROGRAMS = {
    "onnxruntime": (".onnx", convert_onnx, open_onnx),
    "openvino": (".xml", convert_openvino, open_openvino),
    "llama.cpp": (".gguf", convert_gguf, open_gguf),
}


class Kind(NamedTuple):
    """What differs between language models and classifiers; `clock` takes the batch size."""

    dense: nn.Module
    planned: Result
    units: Rows
    numbers: Mapping[str, Sequence[str]]
    quality: Callable[[Run], Measured]
    clock: Callable[[int, Run], Measured]
    images: Sequence[Tensor] = ()


def text(options):
    """Prepare a language model."""
    language = LanguageModel(replace(options, nsamples=options.nsamples or 16))
    base = language.planned
    narrow = partial(narrower, language.calibration)
    by_loss = partial(narrow, allocation=worth.BY_LOSS)
    units = rows_of_units(base, "structured", narrow, ["25"])
    units += rows_of_units(base, "structured, fisher", by_loss, ["25"])

    def quality(run):
        metric = WindowPerplexity()
        for window in language.data.evaluation_windows.split(1):
            logits, _ = run(window.numpy(), None, np.arange(window.shape[1]))
            metric.update(torch.tensor(logits), window)
        return {"perplexity": float(metric.compute())}

    def clock(size, run):
        vocabulary = language.model.config.vocab_size
        ids = np.random.default_rng(0).integers(vocabulary, size=(size, PROMPT))
        cache = None

        def add(ids):
            nonlocal cache
            _, cache = run(ids, cache, np.array([ids.shape[1] - 1]))

        prefill = seconds(lambda: add(ids))
        decode = sum(seconds(lambda: add(ids[:, :1])) for _ in range(NEW))
        return {f"prefill_{size}": prefill, f"decode_{size}": decode}

    numbers = {
        "onnxruntime": ("float32", "int8, dynamic", "int8, weights only"),
        "openvino": ("float32", "int8, weights only"),
        "llama.cpp": ("float32", "F16", "Q8_0", "Q4_K_M"),
    }
    return Kind(language.model, base, units, numbers, quality, clock)


def photos(options):
    """Prepare an image classifier."""
    images = Photos(options.images, options.data, options.nsamples or 128)
    narrow = partial(narrower, images.calibration, allocation=Fisher(cost="seconds"))
    units = rows_of_units(images.planned, "structured, fisher seconds", narrow, ["25", "35"])

    def quality(run):
        predicted = [run(pixels.numpy())[0].argmax(axis=1) for pixels, _ in images.evaluation]
        correct = np.concatenate(predicted) == images.labels.numpy()
        return {"top1": float(correct.mean())}

    def clock(size, run):
        shape = (size, *images.calibration[0].shape[1:])
        pixels = np.random.default_rng(0).normal(size=shape).astype(np.float32)
        return {f"images_{size}": seconds(lambda: run(pixels))}

    numbers = {
        "onnxruntime": ("float32", "int8, dynamic", "int8, static"),
        "openvino": ("float32", "int8, static"),
    }
    return Kind(images.model, images.planned, units, numbers, quality, clock, images.calibration)


def file_of(planned, change, kind, options):
    """Return the file that a program reads, after writing it if there is none."""
    program, numbers = planned.case.values()
    ending, convert, _ = PROGRAMS[program]
    file = FILES / f"{planned.name}{ending}"
    if file.exists():
        return file

    # OpenVINO reads the .onnx file.
    first = {
        "program": "llama.cpp" if program == "llama.cpp" else "onnxruntime",
        "numbers": "float32",
    }
    if planned.case != first:
        source = file_of(replace(planned, case=first), change, kind, options)
        convert(numbers, source, file, kind.images)
        return file
    model = change(copy.deepcopy(kind.dense)).eval()
    if ending == ".onnx":
        to_onnx(model, file)
    else:
        to_gguf(Path(options.model), model, file)
    return file


def measure(program, kind, options):
    """Measure all models in one program; the first is the dense one in float32."""
    models = [(kind.planned, lambda model: model), *kind.units]
    planned = []
    files = []
    for (model, change), numbers in product(models, kind.numbers[program]):
        row = replace(model, case={"program": program, "numbers": numbers})
        planned.append(row)
        files.append(file_of(row, change, kind, options))
    _, _, load = PROGRAMS[program]
    loaded = [load(file) for file in files]

    # The models take turns, so that another program on the machine slows all of them.
    times = [[] for _ in loaded]
    for size, rounds in ((1, 5 * options.runs), (32, options.runs)):
        for _, (own, run) in product(range(rounds), zip(times, loaded, strict=True)):
            own.append(kind.clock(size, run))
    medians = [pd.DataFrame(own).median() for own in times]

    runs = Runs(options.save, "runtimes")
    for row, file, run, median in zip(planned, files, loaded, medians, strict=True):
        size = sum(part.stat().st_size for part in FILES.glob(f"{file.stem}.*")) / MIB
        speeds = medians[0] / median
        runs.save(row, {**kind.quality(run), "weights_mib": size, **speeds})


def main(options: worth.Options = worth.Options()) -> None:
    """Measure the rows in each program."""
    kind = photos(options) if options.images else text(options)
    FILES.mkdir(parents=True, exist_ok=True)
    for program in kind.numbers:
        measure(program, kind, options)


if __name__ == "__main__":
    run_from_shell(main)
