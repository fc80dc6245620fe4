"""Tiny random models, built rather than downloaded, each with calibration batches.

Everything is seeded and leaves the global random state unchanged. Names in a `Specimen` are those of `matrices`: the
module's name for a parameter called `weight` (`lm_head`), otherwise the parameter's own (`cls_token`), followed by the
index of the expert where one parameter stacks several.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
import transformers as hf
from timm.models.convnext import ConvNeXt
from timm.models.deit import VisionTransformerDistilled
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn

VOCABULARY, TOKENS, WINDOW = 128, 24, 8


@dataclass(frozen=True)
class Specimen:
    """A model for tests. In the globs, as in `fnmatch`, `*` crosses dots, so blocks are written with `[0-9]`."""

    build: Callable[[], nn.Module]  # in eval mode and float32, with the same weights every time
    batches: Callable[[], list[Any]]  # two or three; a mapping is passed as keywords, a tuple's first element alone
    dense: tuple[str, ...] = ()  # matrices that must be skipped by default; all others must be pruned
    blocks: tuple[str, ...] = ()  # modules at which sequential="block" stops
    uncalled: tuple[str, ...] = ()  # layers outside `dense` that no batch calls, so that they keep their weights


def run(model: nn.Module, batch: Any) -> Tensor:
    """Return the main output of a model for a batch. The caller decides whether gradients are recorded."""
    if isinstance(batch, Mapping):
        caches = hasattr(getattr(model, "config", None), "use_cache")
        output = model(**batch, use_cache=False) if caches else model(**batch)
    else:
        output = model(batch[0] if isinstance(batch, tuple | list) else batch)
    return output if isinstance(output, Tensor) else output[0]


def matrices(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return every parameter with two or more dimensions by name: once per module that shares it, once per expert."""
    found = {}
    for module_name, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            label = module_name if name == "weight" else f"{module_name}.{name}".lstrip(".")
            if type(module).__name__.endswith("Experts") and parameter.ndim == 3:
                found |= {f"{label}.{expert}": parameter for expert in range(len(parameter))}
            elif parameter.ndim >= 2:
                found[label] = parameter
    return found


def matching(names: Iterable[str], globs: Iterable[str]) -> set[str]:
    """Return the names that at least one glob matches."""
    globs = tuple(globs)
    return {name for name in names if any(fnmatchcase(name, glob) for glob in globs)}


def seeded(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)  # torch.manual_seed would reseed the accelerators too
        model = make()
        _enliven(model)
    return model.float().eval()


@torch.no_grad()
def _enliven(model: nn.Module) -> None:
    """Move every parameter away from 0, 1 and its copies in other layers, so that the output depends on each."""
    for parameter in model.parameters():
        d_in = parameter[0].numel() if parameter.ndim == 4 else parameter.shape[-1] if parameter.ndim else 1
        scale = 0.1 if parameter.ndim < 2 else 0.5 / math.sqrt(d_in)
        parameter.add_(scale * torch.randn_like(parameter))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(2.0, 4.0)


# ---- batches


def _random() -> torch.Generator:
    return torch.Generator().manual_seed(1)


def _ids(samples: int, tokens: int, random: torch.Generator) -> Tensor:
    return torch.randint(3, VOCABULARY, (samples, tokens), generator=random)  # 0 to 2: padding, start, end


def _text() -> list[dict[str, Tensor]]:
    random = _random()
    return [{"input_ids": _ids(samples, TOKENS, random)} for samples in (2, 3)]


def _padded_text(side: str = "right") -> list[dict[str, Tensor]]:
    random, batches = _random(), []
    for lengths in ((TOKENS, 10), (17, TOKENS, 5)):
        position = torch.arange(TOKENS) if side == "right" else torch.arange(TOKENS).flip(0)
        mask = (position < torch.tensor(lengths)[:, None]).long()
        batches.append({"input_ids": _ids(len(lengths), TOKENS, random) * mask, "attention_mask": mask})
    return batches


def _text_pairs() -> list[dict[str, Tensor]]:
    random = _random()
    return [{**source, "decoder_input_ids": _ids(len(source["input_ids"]), 16, random)} for source in _padded_text()]


def _images() -> list[tuple[Tensor, Tensor]]:
    random = _random()
    return [(torch.randn(n, 3, 32, 32, generator=random), torch.arange(n)) for n in (2, 3)]


def _vectors() -> list[Tensor]:
    random = _random()
    return [torch.randn(samples, 6, 32, generator=random) for samples in (2, 3, 2)]


def _routed_vectors() -> list[Tensor]:
    return [x + sign for x, sign in zip(_vectors(), (1, -1, 1), strict=True)]


# ---- language models

_SIZES = {
    **{"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "max_position_embeddings": 64, "initializer_range": 0.1},
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
}
_GROUPED = {**_SIZES, "num_key_value_heads": 2}
_EXPERTS = {**_GROUPED, "tie_word_embeddings": False}
_FEW = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
_GEMMA = {**_GROUPED, "num_hidden_layers": 3, "head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": WINDOW}
_DEEPSEEK = {
    **_FEW,
    **{"num_key_value_heads": 4, "kv_lora_rank": 16, "q_lora_rank": 24},
    **{"qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8},
    **{"n_routed_experts": 4, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1, "n_shared_experts": 1},
}
# Stores its experts as (d_in, d_out), with biases.
_GPT_OSS = {
    **{"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16, "sliding_window": WINDOW},
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}
# Passes all tokens to each expert, as zeros where they are routed to another.
_LLAMA4 = {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size_mlp": 64, "head_dim": 16}
_OPT = {**_SIZES, "word_embed_proj_dim": 32, "ffn_dim": 64, "init_std": 0.1}
_T5 = {**_SIZES, "d_kv": 8, "d_ff": 64, "bos_token_id": None, "decoder_start_token_id": 0, "is_decoder": False}


def save_llama_of_bytes(folder: Any) -> None:
    """Save a tiny Llama and a tokenizer whose tokens are bytes as a Hugging Face folder."""
    alphabet = {char: i for i, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    hf.PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    special = dict.fromkeys(["pad_token_id", "bos_token_id", "eos_token_id"])
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        config = hf.LlamaConfig(**{**_SIZES, "vocab_size": 256, "initializer_range": 0.3, **special})
        hf.LlamaForCausalLM(config).save_pretrained(folder)


# ---- image classifiers

_IMAGES = {"num_classes": 16}
_VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4, "mlp_ratio": 2.0, **_IMAGES}
_CONVNEXT = {"depths": (2, 2, 2, 2), "dims": (8, 16, 24, 32), "ls_init_value": 0.75, **_IMAGES}
_SWIN = {"img_size": 32, "patch_size": 4, "window_size": 4, "embed_dim": 16, "depths": (2, 2), "num_heads": (2, 4)}


def _resnet(block: type[nn.Module], channels: tuple[int, ...]) -> nn.Module:
    return ResNet(block, layers=(2, 2, 2, 2), channels=channels, zero_init_last=False, **_IMAGES)


# ---- unusual models


class _Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(32, 64)
        self.down = nn.Linear(64, 32)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.relu(self.up(x)))


class _Blocks(nn.Module):
    """Blocks that run one after another."""

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.head = nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class _KeywordMlp(_Mlp):
    def forward(self, *, hidden: Tensor, extra: Tensor) -> tuple[Tensor, Tensor]:
        hidden = super().forward(hidden + extra)
        return hidden, hidden.mean(dim=1, keepdim=True)


class _KeywordsOnly(_Blocks):
    def forward(self, *, x: Tensor) -> Tensor:
        extra = torch.zeros_like(x[:, :1])
        for block in self.blocks:
            x, extra = block(hidden=x, extra=extra)
        return self.head(x + extra)


def _block_twice() -> nn.Module:
    shared = _Mlp()
    return _Blocks(_Mlp(), shared, _Mlp(), shared)


def _plain_mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 16))


class _Unreached(_Blocks):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks[2](self.blocks[0](x)))


class _Routed(_Blocks):
    def forward(self, x: Tensor) -> Tensor:
        expert = self.blocks[1] if x.mean() > 0 else self.blocks[2]
        return self.head(self.blocks[3](expert(self.blocks[0](x))))


class _Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(32, 32)
        self.second = nn.Linear(32, 32)
        self.second.weight = self.first.weight
        self.third = nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.third(F.relu(self.second(F.relu(self.first(x)))))


class _InplaceMlp(_Mlp):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.relu_()) - 0.5


class _Inplace(_Blocks):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x - 0.1)  # a new tensor: the blocks write into their inputs, the model does not


class _AutocastInside(_Blocks):
    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks[0](x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            x = self.blocks[1](x)
            with torch.autocast("cpu", enabled=False):
                x = self.blocks[2](x)
            x = self.blocks[3](x)
        return self.head(x)


class _ExpertList(nn.Module):
    """Experts that are modules. Each token goes to one of them."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(32, 4)
        self.experts = nn.ModuleList(_Mlp() for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, -2)
        weight, chosen = self.gate(tokens).softmax(dim=-1).max(dim=-1)
        result = torch.zeros_like(tokens)
        for index, expert in enumerate(self.experts):
            rows = (chosen == index).nonzero().squeeze(1)
            if len(rows):
                result.index_add_(0, rows, weight[rows, None] * expert(tokens[rows]))
        return result.view_as(x)


class _TorchTransformer(nn.Module):
    """Transformer layers that PyTorch fuses in eval mode without gradients, so that it calls no submodule."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(32, nhead=4, dim_feedforward=64, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(x))


def _text_model(
    model_class: Any,
    sizes: Mapping[str, Any],
    batches: Callable[[], list[Any]] = _text,
    dense: tuple[str, ...] = ("model.embed_tokens", "lm_head"),
    *blocks: str,
) -> Specimen:
    def make() -> nn.Module:
        return model_class(model_class.config_class(**sizes))

    return Specimen(partial(seeded, make), batches, dense, blocks or ("model.layers.[0-9]",))


def _with_experts(
    model_class: Any, router: str, *dense: str, batches: Callable[[], list[Any]] = _text, **sizes: Any
) -> Specimen:
    return _text_model(model_class, {**_EXPERTS, **sizes}, batches, ("model.embed_tokens", "lm_head", router, *dense))


def _image_model(make: Callable[[], nn.Module], blocks: str, *dense: str) -> Specimen:
    return Specimen(partial(seeded, make), _images, dense, (blocks,))


def _odd(make: Callable[[], nn.Module], batches: Callable[[], list[Any]] = _vectors, **globs: Any) -> Specimen:
    return Specimen(partial(seeded, make), batches, **{"blocks": ("blocks.[0-9]",), **globs})


_OUTSIDE = ("pos_embed", "patch_embed.proj", "head")
_RIGHT, _LEFT = _padded_text, partial(_padded_text, "left")

ZOO: dict[str, Specimen] = {
    "llama": _text_model(hf.LlamaForCausalLM, _GROUPED),
    "llama_padded": _text_model(hf.LlamaForCausalLM, _GROUPED, _RIGHT),
    "llama_left_padded": _text_model(hf.LlamaForCausalLM, _GROUPED, _LEFT),
    "mistral": _text_model(hf.MistralForCausalLM, {**_GROUPED, "sliding_window": WINDOW}),
    "qwen3": _text_model(hf.Qwen3ForCausalLM, {**_GROUPED, "head_dim": 16}),
    # Eager, since sdpa ignores the soft cap of the attention.
    "gemma2": _text_model(hf.Gemma2ForCausalLM, {**_GEMMA, "attn_implementation": "eager"}),
    "mixtral": _with_experts(hf.MixtralForCausalLM, "*.gate", num_local_experts=4),
    "mixtral_padded": _with_experts(hf.MixtralForCausalLM, "*.gate", batches=_LEFT, num_local_experts=4),
    "qwen3_moe": _with_experts(hf.Qwen3MoeForCausalLM, "*.gate", **_FEW, num_experts=4, head_dim=16),
    "deepseek_v3": _with_experts(hf.DeepseekV3ForCausalLM, "*.gate", **_DEEPSEEK),
    "gpt_oss": _with_experts(hf.GptOssForCausalLM, "*.router", "*_bias", **_GPT_OSS),
    "llama4": _with_experts(hf.Llama4ForCausalLM, "*.router", **_LLAMA4),
    "opt": _text_model(
        hf.OPTForCausalLM, _OPT, _text, ("model.decoder.embed_*", "lm_head"), "model.decoder.layers.[0-9]"
    ),
    "gpt2": _text_model(hf.GPT2LMHeadModel, _SIZES, _text, ("transformer.w[tp]e", "lm_head"), "transformer.h.[0-9]"),
    "t5": _text_model(
        *(hf.T5ForConditionalGeneration, _T5, _text_pairs),
        ("shared", "*.embed_tokens", "*.relative_attention_bias", "lm_head"),
        *("encoder.block.[0-9]", "decoder.block.[0-9]"),
    ),
    "vit": _image_model(lambda: VisionTransformer(**_VIT), "blocks.[0-9]", *_OUTSIDE, "cls_token"),
    "deit": _image_model(
        lambda: VisionTransformerDistilled(**_VIT), "blocks.[0-9]", *_OUTSIDE, "cls_token", "dist_token", "head_dist"
    ),
    **{
        name: _image_model(
            partial(ConvNeXt, conv_mlp=conv_mlp, **_CONVNEXT),
            "stages.[0-9].blocks.[0-9]",
            *("stem.0", "*.conv_dw", "head.fc"),
        )
        for name, conv_mlp in (("convnext", False), ("convnext_conv_mlp", True))
    },
    "swin": _image_model(
        lambda: SwinTransformer(**_SWIN, **_IMAGES),
        "layers.[0-9].blocks.[0-9]",
        *("patch_embed.proj", "*.relative_position_bias_table", "head.fc"),
    ),
    "resnet18": _image_model(lambda: _resnet(BasicBlock, (16, 16, 32, 32)), "layer[1-4].[0-9]", "conv1", "fc"),
    "resnet50": _image_model(lambda: _resnet(Bottleneck, (8, 8, 16, 16)), "layer[1-4].[0-9]", "conv1", "fc"),
    "keywords_only": _odd(lambda: _KeywordsOnly(_KeywordMlp(), _KeywordMlp()), lambda: [{"x": x} for x in _vectors()]),
    "block_twice": _odd(_block_twice),
    "plain_mlp": _odd(_plain_mlp, blocks=()),
    "unreached": _odd(lambda: _Unreached(_Mlp(), _Mlp(), _Mlp()), uncalled=("blocks.1.*",)),
    "routed": _odd(lambda: _Routed(_Mlp(), _Mlp(), _Mlp(), _Mlp()), _routed_vectors),
    "expert_list": _odd(lambda: _Blocks(_ExpertList(), _ExpertList()), dense=("*.gate",)),
    "tied": _odd(_Tied, dense=("second",), blocks=()),
    "inplace": _odd(lambda: _Inplace(_InplaceMlp(), _InplaceMlp())),
    "autocast_inside": _odd(lambda: _AutocastInside(_Mlp(), _Mlp(), _Mlp(), _Mlp())),
    "torch_transformer": _odd(_TorchTransformer, dense=("*.in_proj_weight",), blocks=("encoder.layers.[0-9]",)),
}
