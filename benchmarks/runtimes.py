"""Compare fewer hidden units, fewer bits, and both in the programs that run models on a CPU.

    pip install onnx onnxscript onnxruntime openvino nncf gguf llama-cpp-python
    python benchmarks/runtimes.py --model M.gguf --calibration c4_sample.txt --eval wikitext2_test.raw.txt --limit 10 \
        --save benchmarks/results
    python benchmarks/runtimes.py --images .cache/efficientnet_lite0 --data imagenet_sample --save benchmarks/results

Speeds are ratios to dense float32 in the same program, whose models take turns. Files in out/runtimes are used again.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import worth
from exporting import write
from measuring import MIB, LanguageModel, Photos, run_from_shell, speeds
from programs import THREADS, open_gguf, open_onnx, open_openvino
from result import Result, Runs
from torch import from_numpy, nn
from worth import narrower, rows_of_units

from wanda_lightning import Fisher
from wanda_lightning.modules import WindowPerplexity

FILES = Path("out/runtimes")


def convert_gguf(numbers, dense, file, _):
    """Write a .gguf file; llama.cpp takes other blocks for rows that do not fit those of `numbers`."""
    import llama_cpp

    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{numbers}")
    names = (str(dense).encode(), str(file).encode())
    assert not llama_cpp.llama_model_quantize(*names, parameters)


def convert_onnx(numbers, dense, file, samples):
    """Write an .onnx file in int8."""
    import onnx
    from onnxruntime.quantization import (
        QuantType,
        matmul_nbits_quantizer,
        quantize_dynamic,
        quantize_static,
    )

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
    elif numbers == "int8, static":
        # Signed weights have 7 bits: without VNNI, sums of larger products saturate.
        names = [entry.name for entry in graph.input]
        data = (dict(zip(names, sample, strict=True)) for sample in samples)
        reader = SimpleNamespace(get_next=partial(next, data, None))
        quantize_static(model, file, reader, per_channel=True, reduce_range=True)
    else:
        kind = QuantType.QUInt8 if numbers == "int8, dynamic" else QuantType.QInt8
        quantize_dynamic(
            model, file, per_channel=True, weight_type=kind, use_external_data_format=True
        )


def convert_openvino(numbers, dense, file, samples):
    """Write an .xml file, and a .bin file with its weights."""
    import nncf
    import openvino

    model = openvino.Core().read_model(dense)
    if numbers == "int8, weights only":
        model = nncf.compress_weights(model, mode=nncf.CompressWeightsMode.INT8_ASYM)
    elif numbers != "float32":
        kind = nncf.ModelType.TRANSFORMER if numbers == "int8" else None
        model = nncf.quantize(model, nncf.Dataset(samples), model_type=kind)
    openvino.save_model(model, file, compress_to_fp16=False)


PROGRAMS = {
    "onnxruntime": (".onnx", convert_onnx, open_onnx),
    "openvino": (".xml", convert_openvino, open_openvino),
    "llama.cpp": (".gguf", convert_gguf, open_gguf),
}


class Kind(NamedTuple):
    """What differs between language models, classifiers and sentence encoders.

    Attributes:
        dense: The model.
        planned: The run of the dense model.
        units: Rows with fewer hidden units: each a run, and what changes a copy of the model.
        numbers: Kinds of numbers for each program, the first of which is float32.
        quality: Measures an open file: returns numbers by their names.
        timed: What `clock` times.
        clock: Returns the seconds of each, for a batch size and an open file.
        samples: Lists of inputs for static quantization.
    """

    dense: nn.Module
    planned: Result
    units: list
    numbers: dict
    quality: Callable
    timed: Sequence
    clock: Callable
    samples: Sequence = ()


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
            metric.update(from_numpy(logits), window)
        return {"perplexity": float(metric.compute())}

    clock = partial(worth.time_text, language.model.config.vocab_size)
    numbers = {
        "onnxruntime": ("float32", "int8, dynamic", "int8, weights only"),
        "openvino": ("float32", "int8, weights only"),
        "llama.cpp": ("float32", "F16", "Q8_0", "Q4_K_M"),
    }
    return Kind(language.model, base, units, numbers, quality, ("prefill", "decode"), clock)


def photos(options):
    """Prepare an image classifier."""
    images = Photos(options.images, options.data, options.nsamples or 128)
    narrow = partial(narrower, images.calibration, allocation=Fisher(cost="seconds"))
    units = rows_of_units(images.planned, "structured, fisher seconds", narrow, ["25", "35"])
    samples = [[image.numpy()] for batch in images.calibration for image in batch.split(1)]

    def quality(run):
        predicted = [run(pixels.numpy())[0].argmax(axis=1) for pixels, _ in images.evaluation]
        correct = np.concatenate(predicted) == images.labels.numpy()
        return {"top1": float(correct.mean())}

    clock = partial(worth.time_images, images.calibration[0].shape[1:])
    numbers = {
        "onnxruntime": ("float32", "int8, dynamic", "int8, static"),
        "openvino": ("float32", "int8, static"),
    }
    return Kind(images.model, images.planned, units, numbers, quality, ["images"], clock, samples)


def file_of(planned, change, kind, template):
    """Return the file that a program reads, after writing it if there is none."""
    program, numbers = planned.case.values()
    ending, convert, _ = PROGRAMS[program]
    file = FILES / f"{planned.name}{ending}"
    if file.exists():
        return file

    # OpenVINO reads the .onnx file.
    source = "onnxruntime" if program == "openvino" else program
    first = replace(planned, case={"program": source, "numbers": "float32"})
    if planned == first:
        write(change(copy.deepcopy(kind.dense)).eval(), file, template)
    else:
        convert(numbers, file_of(first, change, kind, template), file, kind.samples)
    return file


def measure(kind, options, table="runtimes", threads=THREADS):
    """Measure all models in each program."""
    FILES.mkdir(parents=True, exist_ok=True)
    for program in kind.numbers:
        measure_program(program, kind, options, table, threads)


def measure_program(program, kind, options, table, threads):
    """Measure all models in one program; the first is the dense one in float32."""
    rows = []
    files = []
    models = [(kind.planned, lambda model: model), *kind.units]
    for (planned, change), numbers in product(models, kind.numbers[program]):
        row = replace(planned, case={"program": program, "numbers": numbers})
        rows.append(row)
        files.append(file_of(row, change, kind, options.model))
    _, _, load = PROGRAMS[program]
    loaded = [load(file, threads) for file in files]

    rounds = {1: 5 * options.runs, 32: options.runs}
    ratios = speeds(kind.clock, kind.timed, loaded, rounds)
    runs = Runs(options.save, table)
    for row, file, run, speed in zip(rows, files, loaded, ratios, strict=True):
        size = sum(part.stat().st_size for part in FILES.glob(f"{file.stem}.*")) / MIB
        runs.save(row, {**kind.quality(run), "weights_mib": size, **speed})


def main(options: worth.Options = worth.Options()):
    """Measure the rows in each program."""
    measure(photos(options) if options.images else text(options), options)


if __name__ == "__main__":
    run_from_shell(main)
