"""A tiny GGUF file."""

import gguf
import numpy as np


def write_gguf(path, sparsity=0.0, qtype=None):
    """A random two-layer Llama with a byte-pair tokenizer of 64 entries, in float32 or quantized where rows fit.

    The smallest weights of each matrix in a block are zero. The weights are returned as they are before quantization.
    """
    rng = np.random.default_rng(0)
    hidden = 32
    inner = 48
    words = 64
    tokens = ["<s>", "</s>", *"abcdefghijklmnopqrstuvwxyz", "th", "the"]
    sizes = {
        "context_length": 64,
        "embedding_length": hidden,
        "block_count": 2,
        "feed_forward_length": inner,
    }
    sizes |= {
        "head_count": 2,
        "head_count_kv": 2,
        "layer_norm_rms_eps": 1e-5,
        "rope_dimension_count": hidden // 2,
    }
    tokens += [f"<{i}>" for i in range(words - len(tokens))]
    tokenizer = {
        "tokenizer_model": "gpt2",
        "tokenizer_pre": "default",
        "token_list": tokens,
        "bos_token_id": 0,
    }
    tokenizer |= {"token_types": [1] * words, "token_merges": ["t h", "th e"], "eos_token_id": 1}
    writer = gguf.GGUFWriter(path, "llama")
    for name, value in {"name": "tiny", "vocab_size": words, **sizes, **tokenizer}.items():
        getattr(writer, f"add_{name}")(value)
    shapes = {"token_embd": (words, hidden), "output_norm": (hidden,)}
    for block in ("blk.0", "blk.1"):
        shapes |= {f"{block}.attn_{name}": (hidden, hidden) for name in ("q", "k", "v", "output")}
        shapes |= {f"{block}.{name}": (hidden,) for name in ("attn_norm", "ffn_norm")}
        shapes |= {f"{block}.{name}": (inner, hidden) for name in ("ffn_gate", "ffn_up")}
        shapes[f"{block}.ffn_down"] = (hidden, inner)
    tensors = {name: rng.standard_normal(shape, dtype=np.float32) for name, shape in shapes.items()}
    for name, tensor in tensors.items():
        if name.startswith("blk") and tensor.ndim == 2:
            tensor[np.abs(tensor) < np.quantile(np.abs(tensor), sparsity)] = 0
        if qtype is None or tensor.ndim == 1 or tensor.shape[1] % 32:
            writer.add_tensor(f"{name}.weight", tensor)
        else:
            writer.add_tensor(f"{name}.weight", gguf.quantize(tensor, qtype), raw_dtype=qtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tensors
