"""Open files in ONNX Runtime, OpenVINO and llama.cpp.

Each function returns `run`, which returns an array and a cache. For images, `run(pixels)` returns logits, and for
sentences, `run(ids, None, mask)` returns embeddings; both have no cache. For tokens, `run(ids, cache, positions)`
returns the logits at these positions and the new cache; the first cache is None.

Each function imports its program itself, since an environment may have only one of them.
"""

import numpy as np

THREADS = 2
SEQUENCES = 32  # in a .gguf file's context, of up to 512 tokens, 128 of them in one call


def open_onnx(file, threads=THREADS):
    """Load an .onnx file."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(file, options)
    names = [entry.name for entry in session.get_inputs()]
    shapes = [entry.shape for entry in session.get_inputs()[2:]]
    to_value = onnxruntime.OrtValue.ortvalue_from_numpy

    def run(batch, past=None, *others):
        past = past or [to_value(empty(batch, shape)) for shape in shapes]
        values = [*map(to_value, (batch, *others)), *past]
        first, *cache = session.run_with_ort_values(None, dict(zip(names, values, strict=True)))
        return first.numpy(), cache

    return run


def empty(batch, shape):
    """Return keys or values of no token."""
    _, heads, _, width = shape
    return np.zeros((len(batch), heads, 0, width), np.float32)


def open_openvino(file, threads=THREADS):
    """Load an .xml or .onnx file."""
    import openvino

    choices = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32"}
    compiled = openvino.Core().compile_model(file, "CPU", choices)
    shapes = [entry.partial_shape.get_max_shape() for entry in compiled.inputs[2:]]

    def run(batch, past=None, *others):
        past = past or [openvino.Tensor(empty(batch, shape)) for shape in shapes]
        request = compiled.create_infer_request()  # its outputs are inputs of the next one
        request.infer(dict(enumerate([batch, *others, *past])), share_inputs=True)
        return request.output_tensors[0].data, request.output_tensors[1:]

    return run


def open_gguf(file, threads=THREADS):
    """Load a .gguf file. The cache is in the context; what `run` returns is the number of its tokens."""
    import llama_cpp

    parameters = llama_cpp.llama_model_default_params()
    model = llama_cpp.llama_model_load_from_file(str(file).encode(), parameters)
    if not model:
        raise RuntimeError("llama.cpp does not load the file")
    choices = llama_cpp.llama_context_default_params()
    choices.n_ctx = SEQUENCES * 512
    choices.n_seq_max = SEQUENCES
    choices.n_batch = SEQUENCES * 128
    choices.n_threads = choices.n_threads_batch = threads
    context = llama_cpp.llama_init_from_model(model, choices)
    words = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))

    def run(ids, past, kept):
        size, new = ids.shape
        start = past or 0
        llama_cpp.llama_memory_seq_rm(llama_cpp.llama_get_memory(context), -1, start, -1)

        batch = llama_cpp.llama_batch_init(ids.size, 0, 1)
        batch.n_tokens = ids.size
        positions = np.arange(new)
        columns = {
            "token": ids.ravel(),
            "pos": np.tile(start + positions, size),
            "n_seq_id": 1,
            "logits": np.tile(np.isin(positions, kept), size),
        }
        for name, column in columns.items():
            np.ctypeslib.as_array(getattr(batch, name), (ids.size,))[:] = column
        for index in range(ids.size):
            batch.seq_id[index][0] = index // new

        assert not llama_cpp.llama_decode(context, batch)
        llama_cpp.llama_batch_free(batch)
        logits = llama_cpp.llama_get_logits(context)
        return np.ctypeslib.as_array(logits, (size, len(kept), words)), start + new

    return run
