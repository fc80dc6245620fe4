"""Shrink any configuration of transformers until its model has some ten thousand parameters.

The code does not know families. It recognizes sizes by the names that configurations share, and keeps one layer of each
kind. `MORE` holds the exceptions.
"""

from __future__ import annotations

import inspect
import re
from functools import cache

import torch
import transformers as hf
from transformers import PreTrainedConfig

HIDDEN = 32
HEADS = 4
HEAD = 8
INNER = 64
VOCABULARY = 128
LAYERS = 2
EXPERTS = 4

_SIZES = [  # the first pattern that a name matches as a whole counts
    (
        2,
        r".*(key_value|kv|kv_n|key)_heads|num_experts_per_tok(en)?|moe_(topk|k|top_k)|index_n_heads|hc_(mult|count)|"
        r"zero_expert_num|(num_expert|n)_group|cross_attn_k|num_kv_shared_layers|num_random_blocks",
    ),
    (HEAD, r"decoder_num_attention_heads"),
    (HEADS, r".*heads|n_head|num_query_groups"),
    (
        1,
        r"topk_group|num_nextn_predict_layers|num_hash_functions|.*hash_byte_group_nb_functions|"
        r"first_k_dense_replace|num_dense_layers|moe_layer_start_index",
    ),
    (
        LAYERS,
        r"(conf_)?num_((hidden|encoder|decoder|global|lstm)_)?layers(_per_stack)?|n_(\w+_)?layers?|"
        r"(en|de)coder_layers|depth|num_blocks",
    ),
    (EXPERTS, r"(moe_)?num_(local_)?experts|n_routed_experts"),
    (VOCABULARY, r".*vocab(_size.*)?|codebook_size|max_text_length"),
    (
        INNER,
        r".*(intermediate_size(_mlp)?|ffn_dim|ffn_hidden_size|shared_experts?_\w*size)|d(im)?_?ff|d_inner|n_inner|"
        r"(inner|mlp)_dim|feed_forward_size|prompt_mid_dim|mamba_d_ssm|block_multiple_of",
    ),
    (
        64,
        r".*(position_embeddings|max_(target|source)_positions)|n_positions|max_seq_len|model_max_length|n_ctx|"
        r"context_length|(image_)?seq_length|mem_len|max_inference_chunksize|chroma_length",
    ),
    (
        16,
        r"[qkvo]+_lora_rank|(qk|index|attention)_head_dim|mamba_(d_head|headdim|head_dim)|rank|conv_dim|num_filters",
    ),
    (32, r"image_size|crop_size|(prompt|segment)_types|.*num_buckets|num_centroids"),
    (
        HEAD,
        r".*(head_dim|_rank|lowrank|window(_size|_len)?|chunk_size|chunk_length|state_size|d_state)|kv_channels|"
        r"d_kv|d_head|dim_head|attention_head_size|rotary_dim|hidden_size_per_layer_input|d_rel|local_attention|"
        r"index_topk|prompt_length|patch_size|(index_)?block_size|rel_extent",
    ),
    (
        HIDDEN,
        r".*(hidden_sizes?|hidden_size_global|embd?_dim|embed_dim|embedding_(dim|size)|embed_proj_dim|put_dim)|"
        r".*(_(in|out)_dim|hidden_dimension|bottleneck_size|input_size)|d_model|n_embd|dim|lru_width|"
        r"projection_dim|linear_attn_dim|codebook_dim|output_channels",
    ),
]
_LAYERS = {
    "num_hidden_layers",
    "n_layer",
    "n_layers",
    "num_layers",
    "encoder_layers",
    "decoder_layers",
}
_AS_MANY_AS_HEADS = {"num_key_value_heads", "num_kv_heads", "kv_n_heads", "swa_num_key_value_heads"}
TOKENS = {
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "sep_token_id": 2,
    "cls_token_id": 1,
}

# By model type: the exceptions.
ROPE = {"rope_type": "default", "rope_theta": 10_000.0}
_MLA = {
    "num_attention_heads": HEADS,
    "num_key_value_heads": HEADS,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "head_dim": 16,
    "qk_nope_head_dim": HEAD,
    "v_head_dim": HEAD,
}
_SHARING = {
    "model_type": "gemma4_text",
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "vocab_size": VOCABULARY,
    "num_attention_heads": HEADS,
    "num_key_value_heads": 2,
    "head_dim": HEAD,
    "global_head_dim": HEAD,
    "num_hidden_layers": 2,
    "num_kv_shared_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"],
    "hidden_size_per_layer_input": 0,
    "vocab_size_per_layer_input": 0,
    "use_double_wide_mlp": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "sliding_window": 8,
}
_SWIN = {
    "embed_dim": 16,
    "depths": [2, 2],
    "num_heads": [2, 4],
    "window_size": 4,
}
MORE = {
    "bamba": {"attn_layer_indices": [1]},
    "cohere_compass_text": {"rope_parameters": {"full_attention": ROPE}},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10_000.0}},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dory": {
        "num_hidden_layers": 6,
        "layer_types": ["sliding_attention", "full_attention"] * 3,
    },
    "dots1": {"n_routed_experts": EXPERTS, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "dots3_note_text": {"swa_" + name: value for name, value in _MLA.items()},
    "exaone_moe": {"num_key_value_heads": 2},
    "gemma3n_vision": {"architecture": "resnet10t", "hidden_size": 512},
    "gemma3n_text": {
        "intermediate_size": [INNER] * 4,
        "activation_sparsity_pattern": [0.95, 0.0, 0.95, 0.0],
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
    "gemma4_assistant": {
        "_first": {"text_config": _SHARING},
        "text_config": _SHARING,
    },
    "gemma4_unified_text": {"global_head_dim": HEAD},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {
        "layer_types": ["linear_attention", "full_attention"],
    },
    "hrm_text": {"num_layers_per_stack": None},
    "hunyuan_v1_dense": {"head_dim": HEAD},
    "hunyuan_v1_moe": {"head_dim": HEAD},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "num_hidden_layers": 4},
    "lfm2_moe": {
        "layer_types": ["conv", "full_attention", "conv", "full_attention"],
        "num_hidden_layers": 4,
    },
    "llama": {"num_key_value_heads": 2},
    "mamba2": {"head_dim": 16, "n_groups": 2},
    "ministral": {"head_dim": HEAD},
    "nemotron": {"num_key_value_heads": 2},
    "nemotron_h": {"n_groups": 2},
    "qwen2_5_vl_vision": {"window_size": 32},
    # Otherwise transformers 5.2 takes image tokens for the start of others.
    "qwen2_vl": {"vision_start_token_id": 1},
    "qwen2_vl_text": {"rope_parameters": {**ROPE, "mrope_section": [2, 1, 1]}},
    "qwen2_5_vl_text": {"rope_parameters": {**ROPE, "mrope_section": [2, 1, 1]}},
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 8,
        "indexer_compress_ratio": 2,
    },
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {
        "is_decoder": True,
        "axial_pos_shape": (8, 8),
        "axial_pos_embds_dim": (16, 16),
        "hash_seed": 0,
    },
    "swin": _SWIN,
    "swinv2": _SWIN,
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "layers_block_type": [
            "linear_attention",
            "linear_attention",
            "hybrid",
            "linear_attention",
            "hybrid",
        ],
        "num_hidden_layers": 5,
        "attention_hidden_size": INNER,
    },
    "zamba2": {"use_mem_rope": True},  # without it, transformers 5.2 fails
}


def tiny(config_class, **more):
    """Return the smallest configuration of a class with at least two layers and with every kind of its layers."""
    settings = {**MORE.get(config_class.model_type, {}), **more}
    # What the class needs to make a configuration that can be shrunk.
    first = settings.pop("_first", {})
    small = _shrunk(config_class(**first))
    small.update(settings)
    return config_class(**small)


def on_meta(name, **more):
    """Return the smallest model of a class of transformers, without weights."""
    model_class = getattr(hf, name)
    with torch.device("meta"):
        return model_class(tiny(model_class.config_class, **more))


@cache
def _size_of(name):
    for size, pattern in _SIZES:
        if re.fullmatch(pattern, name):
            return size
    return None


def _arguments(config):
    """Return the arguments of the class of a configuration, with their values in it."""
    arguments = {}
    for name in inspect.signature(type(config)).parameters:
        attribute = config.attribute_map.get(name, name)
        if attribute in vars(config):
            arguments[name] = vars(config)[attribute]
    return arguments


def _shrunk(config):
    """Return the arguments of a configuration that become smaller, with their new values."""
    fields = _arguments(config)
    layers = 0
    for name in ("num_layers", "n_layer", "num_hidden_layers"):
        layers = fields.get(name, layers)
    kept, of_layers = _one_of_each(fields, layers)

    small = {}
    for name, value in fields.items():
        usual = _size_of(name)
        if type(value) is PreTrainedConfig:
            continue
        if isinstance(value, PreTrainedConfig):
            small[name] = tiny(type(value)).to_diff_dict()
        elif name in TOKENS and value is not None:
            small[name] = TOKENS[name]
        elif name in of_layers:
            small[name] = type(value)(value[index] for index in kept)
        elif name.endswith(("_token_id", "_token_index")) and isinstance(value, int):
            small[name] = min(value, 2)
        elif isinstance(value, int) and not isinstance(value, bool) and usual:
            if name in _LAYERS and value == layers:
                usual = len(kept)
            elif name in _AS_MANY_AS_HEADS and value == fields.get(
                "num_attention_heads", fields.get("num_heads")
            ):
                usual = HEADS
            small[name] = min(value, usual)
        elif usual and isinstance(value, list | tuple) and all(type(n) is int for n in value):
            small[name] = type(value)(min(number, usual) for number in value)
    return {name: value for name, value in small.items() if value is not fields[name]}


def _one_of_each(fields, layers):
    """Return the indices of the layers to keep, one per kind, and the names of the lists with one entry per layer."""
    if not isinstance(layers, int):
        return [0, 1], set()
    lists = {
        name: values
        for name, values in fields.items()
        if isinstance(values, list | tuple) and len(values) == layers > 0 and not _size_of(name)
    }
    first = {}
    for index in range(layers):
        first.setdefault(str([values[index] for values in lists.values()]), index)
    kept = list(first.values())[:6]
    kept += [index for index in range(layers) if index not in kept][: max(0, LAYERS - len(kept))]
    return sorted(kept), set(lists)
