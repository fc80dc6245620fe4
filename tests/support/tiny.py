"""Shrink any configuration of transformers until its model has some ten thousand parameters.

The code does not know families. It recognizes sizes by the names that configurations share, and keeps one layer of each
kind. `MORE` holds the exceptions.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers as hf
from transformers import PreTrainedConfig

HIDDEN, HEADS, HEAD, INNER, VOCABULARY, LAYERS, EXPERTS = 32, 4, 8, 64, 128, 2, 4

_SIZES: list[tuple[int, str]] = [
    (
        HIDDEN,
        """hidden_size d_model n_embd dim embed_dim embedding_dim emb_dim word_embed_proj_dim embedding_size
        input_embedding_size output_embedding_size attention_hidden_size hidden_size_global hidden_sizes lru_width
        out_hidden_size vision_output_dim output_dim projection_dim projector_input_dim projector_output_dim
        adapter_out_dim adapter_in_dim pronunciation_embed_dim shape_embed_dim backbone_hidden_size ple_embed_dim
        linear_attn_dim router_hidden_size text_embed_dim vector_quantization_hidden_dimension codebook_dim
        downsample_hidden_size output_channels output_hidden_size decoder_hidden_size encoder_hidden_size
        audio_embed_dim visual_embed_dim bottleneck_size adapter_input_size""",
    ),
    (
        INNER,
        """intermediate_size ffn_dim n_inner inner_dim d_ff dff dim_ff d_inner encoder_ffn_dim decoder_ffn_dim
        ffn_hidden_size mlp_dim feed_forward_size moe_intermediate_size shared_expert_intermediate_size
        shared_intermediate_size shared_experts_intermediate_size expert_ffn_hidden_size intermediate_size_mlp
        dense_intermediate_size moe_shared_expert_intermediate_size prompt_mid_dim mamba_d_ssm block_multiple_of
        moe_shared_intermediate_size dense_ffn_hidden_size moe_ffn_hidden_size ffn_intermediate_size""",
    ),
    (
        HEADS,
        """num_attention_heads n_head num_heads n_heads encoder_attention_heads decoder_attention_heads
        attention_heads num_encoder_attention_heads num_decoder_attention_heads linear_num_heads
        swa_num_attention_heads conf_num_attention_heads cross_attention_heads linear_num_value_heads mamba_n_heads
        mamba_num_heads n_mamba_heads num_query_groups""",
    ),
    (
        2,
        """num_key_value_heads num_kv_heads kv_n_heads swa_num_key_value_heads num_global_key_value_heads
        linear_num_key_heads num_experts_per_tok num_experts_per_token moe_topk moe_k moe_top_k index_n_heads
        num_random_blocks hc_mult hc_count zero_expert_num n_group num_expert_group cross_attn_k
        num_kv_shared_layers""",
    ),
    (
        LAYERS,
        """num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers depth num_blocks
        num_encoder_layers num_decoder_layers num_layers_per_stack conf_num_hidden_layers num_global_layers
        n_input_layers n_recurrent_layers n_output_layers num_lstm_layers""",
    ),
    (EXPERTS, """num_experts n_routed_experts num_local_experts moe_num_experts"""),
    (
        HEAD,
        """head_dim kv_channels d_kv d_head dim_head linear_key_head_dim linear_value_head_dim linear_head_dim
        qk_rope_head_dim qk_nope_head_dim v_head_dim swa_head_dim global_head_dim attention_head_size rotary_dim
        mamba_d_state state_size ssm_state_size time_step_rank mamba_dt_rank laurel_rank hidden_size_per_layer_input
        gated_norm_rank loop_gate_rank hc_lowrank d_rel adapter_rank sliding_window chunk_size mamba_chunk_size
        sliding_window_size attention_window_size window_size attention_chunk_size local_attention index_topk
        local_attn_chunk_length lsh_attn_chunk_length prompt_length patch_size block_size index_block_size
        decoder_num_attention_heads local_attention_window_len rel_extent keep_window_size""",
    ),
    (
        16,
        """q_lora_rank kv_lora_rank o_lora_rank qk_head_dim index_head_dim attention_head_dim mamba_d_head
        mamba_headdim mamba_head_dim rank conv_dim num_filters num_feature_channels""",
    ),
    (
        64,
        """max_position_embeddings n_positions max_seq_len model_max_length context_length n_ctx
        original_max_position_embeddings max_target_positions max_source_positions num_position_embeddings
        seq_length max_2d_position_embeddings image_seq_length mem_len max_inference_chunksize chroma_length""",
    ),
    (
        32,
        """image_size crop_size prompt_types segment_types position_bias_num_buckets
        relative_attention_num_buckets num_centroids num_buckets""",
    ),
    (
        1,
        """topk_group num_nextn_predict_layers num_hash_functions encoder_hash_byte_group_nb_functions
        first_k_dense_replace num_dense_layers moe_layer_start_index""",
    ),
    (
        VOCABULARY,
        """vocab_size vocab_size_per_layer_input decoder_vocab_size audio_vocab_size unpadded_vocab_size
        codebook_size shape_vocab_size pronunciation_vocab_size encoder_hash_byte_group_vocab ngram_vocab_size_base
        max_text_length""",
    ),
]
SIZES = {name: size for size, names in _SIZES for name in names.split()}
_LAYERS = {"num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers"}
_AS_MANY_AS_HEADS = {"num_key_value_heads", "num_kv_heads", "kv_n_heads", "swa_num_key_value_heads"}
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "sep_token_id": 2, "cls_token_id": 1}

# By model type: the exceptions.
_ROPE = {"rope_type": "default", "rope_theta": 10_000.0}
_MLA = {"num_attention_heads": HEADS, "num_key_value_heads": HEADS, "q_lora_rank": 16, "kv_lora_rank": 16} | {
    "head_dim": 16,
    "qk_nope_head_dim": HEAD,
    "v_head_dim": HEAD,
}
_SHARING = {
    **{"model_type": "gemma4_text", "hidden_size": HIDDEN, "intermediate_size": INNER, "vocab_size": VOCABULARY},
    **{"num_attention_heads": HEADS, "num_key_value_heads": 2, "head_dim": HEAD, "global_head_dim": HEAD},
    **{"num_hidden_layers": 2, "num_kv_shared_layers": 2, "layer_types": ["sliding_attention", "full_attention"]},
    **{"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0, "use_double_wide_mlp": False},
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "sliding_window": 8},
}
_SWIN = {"embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4, "image_size": 32, "patch_size": 4}
MORE: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1], "mamba_n_heads": 4, "mamba_d_head": 16},
    "cohere_compass_text": {"rope_parameters": {"full_attention": _ROPE}},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10_000.0}},
    "deepseek_v2": {"num_key_value_heads": HEADS, "num_experts_per_tok": 2},
    "dory": {"num_hidden_layers": 6, "n_input_layers": 2, "n_recurrent_layers": 2, "n_output_layers": 2}
    | {"layer_types": ["sliding_attention", "full_attention"] * 3},
    "dots1": {"n_routed_experts": EXPERTS, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "dots3_note_text": {"swa_" + name: value for name, value in _MLA.items()},
    "exaone_moe": {"num_key_value_heads": 2},
    "gemma3n_vision": {"architecture": "resnet10t", "hidden_size": 512},
    "gemma3n_text": {"intermediate_size": [INNER] * 4, "activation_sparsity_pattern": [0.95, 0.0, 0.95, 0.0]}
    | {"num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2},
    "gemma4_assistant": {"_first": {"text_config": _SHARING}, "text_config": _SHARING, "backbone_hidden_size": HIDDEN},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "num_layers": 2},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"], "mamba_n_heads": 4, "mamba_d_head": 16},
    "hrm_text": {"num_hidden_layers": 2, "num_layers_per_stack": None},
    "hunyuan_v1_dense": {"head_dim": HEAD},
    "hunyuan_v1_moe": {"head_dim": HEAD},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "num_hidden_layers": 4},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv", "full_attention"], "num_hidden_layers": 4},
    "llama": {"num_key_value_heads": 2},
    "mamba2": {"num_heads": 4, "head_dim": 16, "n_groups": 2},
    "ministral": {"head_dim": HEAD, "num_key_value_heads": 2},
    "nemotron": {"head_dim": HEAD, "num_key_value_heads": 2},
    "nemotron_h": {"n_groups": 2, "mamba_num_heads": 4},
    "qwen2_5_vl_vision": {"window_size": 32},
    "qwen2_vl_text": {"rope_parameters": {**_ROPE, "mrope_section": [2, 1, 1]}},
    "qwen2_5_vl_text": {"rope_parameters": {**_ROPE, "mrope_section": [2, 1, 1]}},
    "qwen4_exp_text": {"num_experts_per_tok": 2, "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 16}
    | {"indexer_budget": 8, "indexer_compress_ratio": 2},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {"is_decoder": True, "axial_pos_shape": (8, 8), "axial_pos_embds_dim": (16, 16), "hash_seed": 0},
    "swin": _SWIN,
    "swinv2": _SWIN,
    "xmod": {"default_language": "en_XX"},
    "zamba": {"layers_block_type": ["linear_attention", "linear_attention", "hybrid", "linear_attention", "hybrid"]}
    | {"num_hidden_layers": 5, "attention_hidden_size": INNER, "attention_head_dim": 16},
}


def tiny(config_class: type[PreTrainedConfig], **more: Any) -> PreTrainedConfig:
    """Return the smallest configuration of a class with at least two layers and with every kind of its layers."""
    more = {**MORE.get(config_class.model_type, {}), **more}
    return config_class(**{**_shrunk(config_class(**more.pop("_first", {}))), **more})


def on_meta(name: str) -> Any:
    """Return the smallest model of a class of transformers, without weights."""
    model_class = getattr(hf, name)
    with torch.device("meta"):
        return model_class(tiny(model_class.config_class))


def _shrunk(config: PreTrainedConfig) -> dict[str, Any]:
    stored = {name: config.attribute_map.get(name, name) for name in type(config).__dataclass_fields__}
    fields = {name: vars(config)[key] for name, key in stored.items() if key in vars(config)}
    layers = next((fields[name] for name in ("num_hidden_layers", "n_layer", "num_layers") if name in fields), 0)
    kept, of_layers = _one_of_each(fields, layers)
    small: dict[str, Any] = {}
    for name, value in fields.items():
        if isinstance(value, PreTrainedConfig):
            small[name] = tiny(type(value)) if type(value) is not PreTrainedConfig else value
        elif name in TOKENS and value is not None:
            small[name] = TOKENS[name]
        elif name in of_layers:
            small[name] = type(value)(value[index] for index in kept)
        elif name.endswith(("_token_id", "_token_index")) and isinstance(value, int):
            small[name] = min(value, 3)
        elif isinstance(value, int) and not isinstance(value, bool) and name in SIZES:
            heads = fields.get("num_attention_heads", fields.get("num_heads"))
            size = HEADS if name in _AS_MANY_AS_HEADS and value == heads else SIZES[name]
            small[name] = min(value, len(kept) if value == layers and name in _LAYERS else size)
        elif isinstance(value, list | tuple) and name in SIZES and all(type(inner) is int for inner in value):
            small[name] = type(value)(min(inner, SIZES[name]) for inner in value)
    return {name: value for name, value in small.items() if value is not fields[name]}


def _one_of_each(fields: dict[str, Any], layers: Any) -> tuple[list[int], set[str]]:
    """Return the indices of the layers to keep, one per kind, and the names of the lists with one entry per layer."""
    if not isinstance(layers, int):
        return [0, 1], set()
    lists = {n: v for n, v in fields.items() if isinstance(v, list | tuple) and len(v) == layers > 0 and n not in SIZES}
    first: dict[str, int] = {}
    for index in range(layers):
        first.setdefault(str([values[index] for values in lists.values()]), index)
    kept = list(first.values())[:6]
    kept += [index for index in range(layers) if index not in kept][: max(0, LAYERS - len(kept))]
    return sorted(kept), set(lists)
