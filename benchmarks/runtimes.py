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
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import gguf
import llama_cpp
import nncf
import numpy as np
import onnx
import onnxruntime
import openvino
import pandas as pd
import torch
import worth
from measuring import MIB, LanguageModel, Photos, run_from_shell, seconds
from onnxruntime.quantization import (
    QuantType,
    matmul_nbits_quantizer,
    quantize_dynamic,
    quantize_static,
)
from result import Result, Runs
from torch import Tensor, nn
from transformers import DynamicCache
from worth import BATCHES, NEW, PROMPT, Change, Measured, Rows, narrower, rows_of_units

from wanda_lightning import Fisher
from wanda_lightning.modules import WindowPerplexity

FILES = Path("out/runtimes")
THREADS = 2
# Outputs and the cache for images, or for tokens, their cache, and the positions with logits.
Run = Callable[..., Any]


class WithCache(nn.Sequential):
    """A causal language model whose cache is a list of tensors: keys and values of each layer."""

    def forward(self, ids: Tensor, kept: Tensor, past: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Return the logits at the positions `kept`, and the cache with the new tokens."""
        positions = torch.arange(ids.shape[1]) + past[0].shape[2]
        mask = torch.arange(past[0].shape[2] + ids.shape[1])[None] <= positions[:, None]
        output = self[0](
            input_ids=ids,
            cache=DynamicCache(list(zip(past[::2], past[1::2], strict=True))),
            position_ids=positions[None],
            attention_mask=mask[None, None].expand(ids.shape[0], 1, -1, -1),
            logits_to_keep=kept,
        )
        return output.logits, [
            each for layer in output.cache.layers for each in (layer.keys, layer.values)
        ]


def to_onnx(model: Any, file: Path) -> None:
    """Write float32 for any number of images, or of sequences, tokens and cached tokens."""
    if hasattr(model, "pretrained_cfg"):
        example = (torch.zeros(2, *model.pretrained_cfg["input_size"]),)
        sizes = ({0: "batch"},)
    else:
        shape = 2, model.config.num_key_value_heads, 5, model.config.head_dim
        past = [torch.zeros(shape) for _ in range(2 * model.config.num_hidden_layers)]
        example = torch.ones(2, 7, dtype=torch.long), torch.tensor([3, 5, 6]), past
        sizes = {0: "batch", 1: "new"}, {0: "kept"}, [{0: "batch", 2: "past"}] * len(past)
        model = WithCache(model).eval()
    torch.onnx.export(model, example, file, dynamo=True, dynamic_shapes=sizes)


def to_gguf(template: Path, model: Any, file: Path) -> None:
    """Write a Llama in float32 with the tokenizer of a .gguf file; as `deci` if layers differ in width."""
    widths = [layer.mlp.gate_proj.out_features for layer in model.model.layers]
    family = "llama" if len(set(widths)) == 1 else "deci"
    writer = gguf.GGUFWriter(file, family)
    for name, field in gguf.GGUFReader(template).fields.items():
        if name.endswith(".feed_forward_length"):
            writer.add_feed_forward_length(widths if family == "deci" else widths[0])
        elif not name.startswith("GGUF.") and name not in (
            "general.architecture",
            "general.file_type",
        ):
            writer.add_key_value(
                name.replace("llama.", f"{family}."), field.contents(), *field.types[:2]
            )
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, len(widths))
    heads = {"q_proj": model.config.num_attention_heads, "k_proj": model.config.num_key_value_heads}
    for name, weight in model.named_parameters():  # a tied one once
        array = weight.detach().numpy()
        if count := heads.get(name.split(".")[-2]):  # llama.cpp rotates pairs of neighbors
            array = array.reshape(count, 2, -1, array.shape[-1]).swapaxes(1, 2).reshape(array.shape)
        writer.add_tensor(names.get_name(name, (".weight",)), np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def convert_gguf(numbers: str, dense: Path, file: Path, _: Sequence[Tensor]) -> None:
    """Write a .gguf file; llama.cpp takes other blocks for rows that do not fit those of `numbers`."""
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{numbers}")
    assert not llama_cpp.llama_model_quantize(
        str(dense).encode(), str(file).encode(), ctypes.byref(parameters)
    )


def convert_onnx(numbers: str, dense: Path, file: Path, images: Sequence[Tensor]) -> None:
    """Write an .onnx file in int8."""
    model = onnx.load(dense)
    weights = {each.name: onnx.numpy_helper.to_array(each) for each in model.graph.initializer}
    for node in list(model.graph.node):  # the head of a language model is its embedding, transposed
        if node.op_type == "Transpose" and node.input[0] in weights:
            head = np.ascontiguousarray(weights[node.input[0]].T)
            model.graph.initializer.append(onnx.numpy_helper.from_array(head, node.output[0]))
            model.graph.node.remove(node)
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
    else:  # signed weights have 7 bits: without VNNI, sums of larger products saturate
        data = ({model.graph.input[0].name: pixels.numpy()} for pixels in images)
        reader = SimpleNamespace(get_next=partial(next, data, None))
        quantize_static(model, file, reader, per_channel=True, reduce_range=True)


def convert_openvino(numbers: str, dense: Path, file: Path, images: Sequence[Tensor]) -> None:
    """Write an .xml file, and a .bin file with its weights."""
    model = openvino.Core().read_model(dense)
    if numbers == "int8, static":
        model = nncf.quantize(
            model, nncf.Dataset([image.numpy() for batch in images for image in batch.split(1)])
        )
    elif numbers == "int8, weights only":
        model = nncf.compress_weights(model, mode=nncf.CompressWeightsMode.INT8_ASYM)
    openvino.save_model(model, file, compress_to_fp16=False)


def open_onnx(file: Path) -> Run:
    """Load an .onnx file."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = THREADS
    session = onnxruntime.InferenceSession(file, options)
    (inputs, shapes), outputs = (
        zip(*[(each.name, each.shape) for each in session.get_inputs()], strict=True),
        None,
    )
    value = onnxruntime.OrtValue.ortvalue_from_numpy

    def run(batch: Any, past: Any = None, *kept: Any) -> Any:
        none = np.zeros((len(batch), shapes[-1][1], 0, shapes[-1][3]), np.float32)
        given = [*map(value, (batch, *kept)), *(past or [value(none) for _ in inputs[2:]])]
        found = session.run_with_ort_values(outputs, dict(zip(inputs, given, strict=True)))
        return found[0].numpy(), found[1:]

    return run


def open_openvino(file: Path) -> Run:
    """Load an .xml file."""
    choices = {"INFERENCE_NUM_THREADS": THREADS, "INFERENCE_PRECISION_HINT": "f32"}
    compiled = openvino.Core().compile_model(file, "CPU", choices)
    heads, width = (compiled.inputs[-1].partial_shape[axis].get_length() for axis in (1, 3))

    def run(batch: Any, past: Any = None, *kept: Any) -> Any:
        none = np.zeros((len(batch), heads, 0, width), np.float32)
        given = [batch, *kept, *(past or [openvino.Tensor(none) for _ in compiled.inputs[2:]])]
        request = compiled.create_infer_request()  # its outputs are inputs of the next one
        request.infer(dict(enumerate(given)), share_inputs=True)
        return request.output_tensors[0].data, request.output_tensors[1:]

    return run


def open_gguf(file: Path) -> Run:
    """Load a .gguf file. The cache is in the context; what `Run` returns is the number of its tokens."""
    model = llama_cpp.llama_model_load_from_file(
        str(file).encode(), llama_cpp.llama_model_default_params()
    )
    choices = llama_cpp.llama_context_default_params()
    choices.n_ctx = max(BATCHES) * 512
    choices.n_seq_max = max(BATCHES)
    choices.n_batch = max(BATCHES) * PROMPT
    choices.n_threads = choices.n_threads_batch = THREADS
    context = llama_cpp.llama_init_from_model(model, choices)
    words = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))

    def run(ids: Any, past: int | None, kept: Any) -> Any:
        start, (size, new) = past or 0, ids.shape
        llama_cpp.llama_memory_seq_rm(llama_cpp.llama_get_memory(context), -1, start, -1)
        batch = llama_cpp.llama_batch_init(ids.size, 0, 1)
        batch.n_tokens = ids.size
        columns = {
            "token": ids.ravel(),
            "pos": np.tile(np.arange(start, start + new), size),
            "n_seq_id": 1,
        }
        for name, column in (
            columns | {"logits": np.tile(np.isin(np.arange(new), kept), size)}
        ).items():
            np.ctypeslib.as_array(getattr(batch, name), (ids.size,))[:] = column
        for index in range(ids.size):
            batch.seq_id[index][0] = index // new
        assert not llama_cpp.llama_decode(context, batch)
        llama_cpp.llama_batch_free(batch)
        return np.ctypeslib.as_array(
            llama_cpp.llama_get_logits(context), (size, len(kept), words)
        ), start + new

    return run


PROGRAMS: Mapping[str, tuple[str, Callable[..., None], Callable[[Path], Run]]] = {
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


def text(options: worth.Options) -> Kind:
    """Prepare a language model."""
    language = LanguageModel(replace(options, nsamples=options.nsamples or 16))
    base = language.planned
    narrow = partial(narrower, language.calibration)
    units = rows_of_units(base, "structured", narrow, ["25"])
    units += rows_of_units(
        base, "structured, fisher", partial(narrow, allocation=worth.BY_LOSS), ["25"]
    )

    def quality(run: Run) -> Measured:
        metric = WindowPerplexity()
        for window in language.data.evaluation_windows.split(1):
            metric.update(
                torch.tensor(run(window.numpy(), None, np.arange(window.shape[1]))[0]), window
            )
        return {"perplexity": float(metric.compute())}

    def clock(size: int, run: Run) -> Measured:
        ids = np.random.default_rng(0).integers(
            language.model.config.vocab_size, size=(size, PROMPT)
        )
        past = []
        prefill = seconds(lambda: past.append(run(ids, None, np.array([PROMPT - 1]))[1]))
        decode = [
            seconds(lambda: past.append(run(ids[:, :1], past.pop(), np.array([0]))[1]))
            for _ in range(NEW)
        ]
        return {f"prefill_{size}": prefill, f"decode_{size}": sum(decode)}

    few = ("float32", "int8, dynamic", "int8, weights only")
    numbers = {
        "onnxruntime": few,
        "openvino": few[::2],
        "llama.cpp": ("float32", "F16", "Q8_0", "Q4_K_M"),
    }
    return Kind(language.model, base, units, numbers, quality, clock)


def photos(options: worth.Options) -> Kind:
    """Prepare an image classifier."""
    images = Photos(options.images, options.data, options.nsamples or 128)
    narrow = partial(narrower, images.calibration, allocation=Fisher(cost="seconds"))
    units = rows_of_units(images.planned, "structured, fisher seconds", narrow, ["25", "35"])

    def quality(run: Run) -> Measured:
        found = np.concatenate(
            [run(pixels.numpy())[0].argmax(axis=1) for pixels, _ in images.evaluation]
        )
        return {"top1": float((found == images.labels.numpy()).mean())}

    def clock(size: int, run: Run) -> Measured:
        pixels = (
            np.random.default_rng(0)
            .normal(size=(size, *images.calibration[0].shape[1:]))
            .astype(np.float32)
        )
        return {f"images_{size}": seconds(lambda: run(pixels))}

    numbers = {
        "onnxruntime": ("float32", "int8, dynamic", "int8, static"),
        "openvino": ("float32", "int8, static"),
    }
    return Kind(images.model, images.planned, units, numbers, quality, clock, images.calibration)


def file_of(planned: Result, change: Change, kind: Kind, options: worth.Options) -> Path:
    """Return the file that a program reads, after writing it if there is none."""
    program, numbers = planned.case.values()
    ending, convert, _ = PROGRAMS[program]
    file = FILES / f"{planned.name}{ending}"
    first = {
        "program": "llama.cpp" if program == "llama.cpp" else "onnxruntime",
        "numbers": "float32",
    }
    if not file.exists() and planned.case == first:
        model = change(copy.deepcopy(kind.dense)).eval()
        to_onnx(model, file) if ending == ".onnx" else to_gguf(Path(options.model), model, file)
    elif not file.exists():
        convert(
            numbers, file_of(replace(planned, case=first), change, kind, options), file, kind.images
        )
    return file


def measure(program: str, kind: Kind, options: worth.Options) -> None:
    """Measure all models in one program; the first is the dense one in float32."""
    cases = [{"program": program, "numbers": numbers} for numbers in kind.numbers[program]]
    models: Rows = [(kind.planned, lambda model: model), *kind.units]
    rows = [(replace(planned, case=case), change) for planned, change in models for case in cases]
    files = [file_of(*row, kind, options) for row in rows]
    opened = [PROGRAMS[program][2](file) for file in files]
    runs = Runs(options.save, "runtimes")
    sizes = [size for size in BATCHES for _ in range(options.runs * (5 if size == 1 else 1))]
    turns = pd.DataFrame([[kind.clock(size, run) for run in opened] for size in sizes])
    medians = [pd.DataFrame(turns[index].tolist()).median() for index in turns]
    for (planned, _), file, run, median in zip(rows, files, opened, medians, strict=True):
        size = {
            "weights_mib": sum(each.stat().st_size for each in FILES.glob(f"{file.stem}.*")) / MIB
        }
        runs.save(planned, {**kind.quality(run), **size, **(medians[0] / median)})


def main(options: worth.Options = worth.Options()) -> None:
    """Measure the rows in each program."""
    kind = photos(options) if options.images else text(options)
    FILES.mkdir(parents=True, exist_ok=True)
    for program in kind.numbers:
        measure(program, kind, options)


if __name__ == "__main__":
    run_from_shell(main)
