"""Compare fewer hidden units, fewer bits, and both in the programs that run models on a CPU.

    pip install onnx onnxscript onnxruntime openvino nncf gguf llama-cpp-python
    python benchmarks/runtimes.py --model M.gguf --calibration c4_sample.txt --eval wikitext2_test.raw.txt --limit 10 \
        --save benchmarks/results
    python benchmarks/runtimes.py --images .cache/efficientnet_lite0 --data imagenet_sample --save benchmarks/results

Speeds are ratios to dense float32 in the same program, whose models take turns. Files in out/runtimes are used again.
"""

import copy
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import worth
from exporting import write
from measuring import MIB, run_from_shell, speeds
from programs import THREADS, open_gguf, open_onnx, open_openvino
from result import Runs

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


MODELS = {  # what is taken out, and kinds of numbers for each program, the first of which is float32
    "text": (
        ("structured", "structured, fisher"),
        {
            "onnxruntime": ("float32", "int8, dynamic", "int8, weights only"),
            "openvino": ("float32", "int8, weights only"),
            "llama.cpp": ("float32", "F16", "Q8_0", "Q4_K_M"),
        },
    ),
    "images": (
        ("structured, fisher seconds",),
        {
            "onnxruntime": ("float32", "int8, dynamic", "int8, static"),
            "openvino": ("float32", "int8, static"),
        },
    ),
}
GOALS = ("dense", "25 % of units", "35 % of units")


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


def measure(kind, numbers, options, table="runtimes", threads=THREADS):
    """Measure all models in each program; the first is the dense one in float32."""
    FILES.mkdir(parents=True, exist_ok=True)
    for program, names in numbers.items():
        rows = []
        files = []
        for (planned, change), name in product(kind.rows, names):
            row = replace(planned, case={"program": program, "numbers": name})
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
    kind = worth.photos(options) if options.images else worth.text(options)
    methods, numbers = MODELS["images" if options.images else "text"]
    rows = []
    for planned, change in kind.rows:
        if planned.method in ("dense", *methods) and planned.goal in GOALS:
            rows.append((planned, change))
    measure(kind._replace(rows=rows), numbers, options)


if __name__ == "__main__":
    run_from_shell(main)
