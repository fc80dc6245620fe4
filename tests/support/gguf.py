"""A tiny GGUF file."""

import gguf
import numpy as np

HIDDEN = 32
INNER = 48
WORDS = 64
TOKENS = ["<s>", "</s>", *"abcdefghijklmnopqrstuvwxyz", "th", "the"]
TOKENS += [f"<{i}>" for i in range(WORDS - len(TOKENS))]
SETTINGS = {
    "name": "tiny",
    "vocab_size": WORDS,
    "context_length": 64,
    "embedding_length": HIDDEN,
    "block_count": 2,
    "feed_forward_length": INNER,
    "head_count": 2,
    "head_count_kv": 2,
    "layer_norm_rms_eps": 1e-5,
    "rope_dimension_count": HIDDEN // 2,
    "tokenizer_model": "gpt2",
    "tokenizer_pre": "default",
    "token_list": TOKENS,
    "bos_token_id": 0,
    "token_types": [1] * WORDS,
    "token_merges": ["t h", "th e"],
    "eos_token_id": 1,
}


def _shapes():
    shapes = {"token_embd": (WORDS, HIDDEN), "output_norm": (HIDDEN,)}
    for block in ("blk.0", "blk.1"):
        shapes |= {f"{block}.attn_{name}": (HIDDEN, HIDDEN) for name in ("q", "k", "v", "output")}
        shapes |= {f"{block}.{name}": (HIDDEN,) for name in ("attn_norm", "ffn_norm")}
        shapes |= {f"{block}.{name}": (INNER, HIDDEN) for name in ("ffn_gate", "ffn_up")}
        shapes[f"{block}.ffn_down"] = (HIDDEN, INNER)
    return shapes


def write_gguf(path):
    """Write a random two-layer Llama with a byte-pair tokenizer of 64 entries, in float32; return the weights."""
    writer = gguf.GGUFWriter(path, "llama")
    for name, value in SETTINGS.items():
        getattr(writer, f"add_{name}")(value)

    rng = np.random.default_rng()
    tensors = {
        name: rng.standard_normal(shape, dtype=np.float32) for name, shape in _shapes().items()
    }
    for name, tensor in tensors.items():
        writer.add_tensor(f"{name}.weight", tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tensors
