"""The models of the tests: tiny, random, built rather than downloaded, each with calibration batches.

`ZOO` has a row for each model on which many tests run. `family` returns a model of any family in transformers (by
`support.tiny`) or timm; docs/models.md lists them. Everything is seeded and leaves the global random state unchanged.

Names in a `Specimen` are those of `matrices`: the module's name for a parameter called `weight` (`lm_head`), otherwise
the parameter's own (`cls_token`), followed by the index of the expert where one parameter stacks several.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import suppress
from copy import deepcopy
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache, partial
from itertools import product

import timm
import torch
import torch.nn.functional as F
import transformers as hf
from support.layers import rng, seed
from support.mlps import Mlp, relu_mlp
from support.tiny import HEAD, ROPE, VOCABULARY, tiny
from timm.models.convnext import ConvNeXt
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from transformers.models.auto.configuration_auto import CONFIG_MAPPING, CONFIG_MAPPING_NAMES
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
)

TOKENS = 24
IMAGE = 32
PATCH = 8


@dataclass(frozen=True)
class Specimen:
    """A model for tests. In the globs, as in `fnmatch`, `*` crosses dots, so blocks are written with `[0-9]`."""

    build: Callable  # in eval mode and float32, with the same weights every time
    # Two or three; a mapping is passed as keywords, a tuple's first element alone.
    batches: Callable
    # Matrices that must be skipped by default; all others must be pruned.
    dense: tuple = ()
    blocks: tuple = ()  # modules at which sequential="block" stops
    # Layers outside `dense` that no batch calls, so that they keep their weights.
    uncalled: tuple = ()


@dataclass(frozen=True)
class Family(Specimen):
    """A model that represents its family."""

    kind: str = ""  # one of `KINDS`
    name: str = ""  # the model type of the configuration, the class, or the module in timm
    model: str = ""  # the class, or timm's name of the model
    # The arguments of `timm.create_model` beside the name and `num_classes`.
    arguments: Callable = dict


def outputs(model, batch):
    """Run the forward pass that `prune` runs for such a batch."""
    if isinstance(batch, Mapping):
        return model(**batch)
    if isinstance(batch, tuple | list):
        return model(batch[0])
    return model(batch)


def run(model, batch):
    """Return the main output of a model for a batch. The caller decides whether gradients are recorded."""
    if isinstance(batch, Mapping) and hasattr(getattr(model, "config", None), "use_cache"):
        batch = {**batch, "use_cache": False}
    output = outputs(model, batch)
    return output if isinstance(output, Tensor) else output[0]


@torch.no_grad()
def run_all(model, batches):
    return [run(model, batch) for batch in batches]


def matrices(model, experts=True):
    """Return every parameter with two or more dimensions by name: once per module that shares it, once per expert."""
    by_name = {}
    for module_name, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            label = module_name if name == "weight" else f"{module_name}.{name}".lstrip(".")
            if experts and is_experts(module) and parameter.ndim == 3:
                by_name |= {f"{label}.{expert}": parameter for expert in range(len(parameter))}
            elif parameter.ndim >= 2:
                by_name[label] = parameter
    return by_name


def is_experts(module):
    """Tell whether a module holds experts; in transformers 5.2, some have another name."""
    return type(module).__name__.endswith(("Experts", "NaiveMoe"))


def matching(names, globs):
    """Return the names that at least one glob matches."""
    globs = tuple(globs)
    return {name for name in names if any(fnmatchcase(name, glob) for glob in globs)}


def cast(batches, dtype=torch.float64):
    """Return batches with their floating-point tensors in a dtype."""
    return tree_map_only(Tensor, lambda x: x.to(dtype) if x.is_floating_point() else x, batches)


def seeded(make):
    with seed(0):
        model = make()
        _enliven(model)
    return model.float().eval()


@torch.no_grad()
def _enliven(model):
    """Move every parameter away from 0, 1 and its copies in other layers, so that the output depends on each."""
    for parameter in model.parameters():
        if parameter.ndim < 2:
            scale = 0.1
        elif parameter.ndim == 4:  # a convolution
            scale = 0.5 / math.sqrt(parameter[0].numel())
        else:
            scale = 0.5 / math.sqrt(parameter.shape[-1])
        parameter.add_(scale * torch.randn_like(parameter))

    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(2.0, 4.0)


def _batches(batch, config=lambda: None, sizes=(2, 3)):
    random = rng(1)
    built = config()
    return [batch(built, samples, random) for samples in sizes]


def _ids(samples, random, tokens=TOKENS):
    # 0 to 2 are padding, start, end and image tokens.
    return torch.randint(3, VOCABULARY, (samples, tokens), generator=random)


def _text(config, samples, random):
    return {"input_ids": _ids(samples, random)}


def _padded_text(config, samples, random, side="right"):
    lengths = {2: [TOKENS, 10], 3: [17, TOKENS, 5]}[samples]
    mask = (torch.arange(TOKENS) < torch.tensor(lengths)[:, None]).long()
    if side == "left":
        mask = mask.flip(1)
    return {"input_ids": _ids(samples, random) * mask, "attention_mask": mask}


def _text_pairs(config, samples, random):
    return _text(config, samples, random) | {"decoder_input_ids": _ids(samples, random, 16)}


def _padded_pairs(config, samples, random):
    return _padded_text(config, samples, random) | {"decoder_input_ids": _ids(samples, random, 16)}


def _codebooks(config, samples, random):
    return {"input_ids": _ids(samples * config.num_codebooks, random)}


def _from_a_target(config, samples, random):
    """Inputs of a draft model, which the target model would compute."""
    shape = (samples, config.text_config.num_key_value_heads, TOKENS, HEAD)
    states = {
        kind: [torch.randn(shape, generator=random) for _ in range(2)]
        for kind in config.text_config.layer_types
    }
    return {
        "inputs_embeds": torch.randn(samples, 1, 2 * config.backbone_hidden_size, generator=random),
        "position_ids": torch.full((samples, 1), TOKENS),
        "shared_kv_states": {kind: tuple(pair) for kind, pair in states.items()},
    }


def _pixels(config, samples, random):
    return {"pixel_values": torch.randn(samples, 3, IMAGE, IMAGE, generator=random)}


def _captions(config, samples, random):
    return _text(config, samples, random) | _pixels(config, samples, random)


def _images_in_text(config, samples, random):
    """The image tokens of one image, as many as the model needs, followed by text."""
    image = getattr(config, "image_token_id", None) or config.image_token_index
    image_tokens = int((IMAGE // PATCH * getattr(config, "downsample_ratio", 1)) ** 2)
    ids = torch.cat([torch.full((samples, image_tokens), image), _ids(samples, random)], 1)
    return _pixels(config, samples, random) | {"input_ids": ids}


def _patches_in_text(config, samples, random):
    """Qwen-VL: images are rows of patches, with the grids that they form."""
    vision = config.vision_config
    side = IMAGE // PATCH
    image = torch.full((samples, (side // vision.spatial_merge_size) ** 2), config.image_token_id)
    ids = torch.cat([image, _ids(samples, random)], 1)
    d_patch = 3 * vision.temporal_patch_size * vision.patch_size**2
    return {
        "input_ids": ids,
        "pixel_values": torch.randn(samples * side**2, d_patch, generator=random),
        "image_grid_thw": torch.tensor([[1, side, side]] * samples),
        "mm_token_type_ids": (ids == config.image_token_id).long(),
    }


def _spectra(config, samples, random):
    """Whisper: two frames per position of the encoder."""
    shape = (samples, config.num_mel_bins, 2 * config.max_source_positions)
    return {
        "input_features": torch.randn(shape, generator=random),
        "decoder_input_ids": _ids(samples, random, 16),
    }


def _waves(config, samples, random):
    return {"input_values": torch.randn(samples, 4000, generator=random)}


def _images(config, samples, random, size=IMAGE):
    return torch.randn(samples, 3, size, size, generator=random), torch.arange(samples)


def _vectors():
    return _batches(lambda _, n, random: torch.randn(n, 6, 32, generator=random), sizes=(2, 3, 2))


def _routed_vectors():
    return [x + sign for x, sign in zip(_vectors(), (1, -1, 1), strict=True)]


KINDS = {
    "causal": "Language models: transformers' `MODEL_FOR_CAUSAL_LM_MAPPING`",
    "other": "Encoders, encoder-decoders, vision and vision-language models of transformers",
    "timm": "Image models: the smallest model of each module in `timm.list_models()`",
}
_OTHERS = {
    _text_pairs: """
        T5ForConditionalGeneration MT5ForConditionalGeneration UMT5ForConditionalGeneration
        LongT5ForConditionalGeneration SwitchTransformersForConditionalGeneration BartForConditionalGeneration
        MBartForConditionalGeneration PegasusForConditionalGeneration MarianMTModel BlenderbotForConditionalGeneration
        M2M100ForConditionalGeneration LEDForConditionalGeneration ProphetNetForConditionalGeneration
    """,
    _spectra: "WhisperForConditionalGeneration",
    _text: """
        BertForMaskedLM BertForSequenceClassification RobertaForMaskedLM XLMRobertaForMaskedLM AlbertForMaskedLM
        DistilBertForMaskedLM ElectraForMaskedLM DebertaForMaskedLM DebertaV2ForMaskedLM ModernBertForMaskedLM
        MPNetForMaskedLM LongformerForMaskedLM FunnelForMaskedLM FNetForMaskedLM ConvBertForMaskedLM
        MobileBertForMaskedLM SqueezeBertForMaskedLM NystromformerForMaskedLM
    """,
    _pixels: """
        ViTForImageClassification DeiTForImageClassification BeitForImageClassification Dinov2ForImageClassification
        Dinov2WithRegistersForImageClassification DINOv3ViTModel SwinForImageClassification Swinv2ForImageClassification
        ConvNextForImageClassification ConvNextV2ForImageClassification ResNetForImageClassification
        RegNetForImageClassification MobileNetV2ForImageClassification MobileViTForImageClassification
        SegformerForImageClassification PvtForImageClassification PoolFormerForImageClassification CLIPVisionModel
        SiglipVisionModel IJepaForImageClassification
    """,
    _captions: "CLIPModel SiglipModel BlipForConditionalGeneration ViltModel",
    _images_in_text: """
        LlavaForConditionalGeneration PaliGemmaForConditionalGeneration InternVLForConditionalGeneration
    """,
    _patches_in_text: """
        Qwen2VLForConditionalGeneration Qwen2_5_VLForConditionalGeneration Qwen3VLForConditionalGeneration
        Qwen3VLMoeForConditionalGeneration
    """,
    _waves: "Wav2Vec2ForCTC HubertForCTC WavLMForCTC",
}
_BATCHES = {
    "musicgen": _codebooks,
    "musicgen_melody": _codebooks,
    "gemma4_assistant": _from_a_target,
    "gemma4_unified_assistant": _from_a_target,
}
for _batch, _names in _OTHERS.items():
    _BATCHES |= dict.fromkeys(_names.split(), _batch)
_EXPORTED = frozenset(dir(hf))  # `hasattr` would import the model


class CannotBuild(Exception):
    """The installed versions cannot build the model, or its plain forward pass fails."""


def names(kind):
    """Return the names of all families of a kind."""
    if kind == "timm":
        return sorted(_modules_of_timm())
    if kind == "causal":
        # By the class of the configuration: GPT-SW3 is a GPT-2. The classes of models are not imported.
        by_config = {CONFIG_MAPPING_NAMES[name]: name for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES}
        return list(by_config.values())
    return [name for name in _BATCHES if name in _EXPORTED]


def family(kind, name):
    """Return a model of a family. Nothing is built yet."""
    if kind == "timm":
        return of_timm(min(_modules_of_timm()[name], key=_size))
    if kind == "causal":
        return causal(name)
    return other(name)


def causal(name):
    """Return a language model that reads only text."""
    config_class = CONFIG_MAPPING[name]
    classes = MODEL_FOR_CAUSAL_LM_MAPPING[config_class]
    model_class = classes[0] if isinstance(classes, tuple) else classes

    def configure():
        config = tiny(config_class)
        # The mapping names only the language part of some models.
        if not isinstance(config, model_class.config_class):
            for inner in vars(config).values():
                if isinstance(inner, model_class.config_class):
                    config = inner
                    break
        if hasattr(config, "is_decoder"):
            config.is_decoder = True
        return config

    return _of_transformers("causal", name, model_class, configure)


def other(name):
    """Return a model of another class of transformers."""
    model_class = getattr(hf, name)
    return _of_transformers("other", name, model_class, partial(tiny, model_class.config_class))


def _of_transformers(kind, name, model_class, configure):
    def make():
        config = configure()
        with torch.device("meta"):
            size = number_of_weights(model_class._from_config(deepcopy(config)))
        if size > 10_000_000:
            raise CannotBuild(f"its smallest configuration has {size:,} parameters")
        return without_cache(model_class._from_config(config))

    batches = partial(_batches, _BATCHES.get(name, _text), configure)
    return Family(partial(seeded, make), batches, kind=kind, name=name, model=model_class.__name__)


def number_of_weights(model):
    return sum(parameter.numel() for parameter in model.parameters())


def without_cache(model):
    for module in model.modules():
        if hasattr(getattr(module, "config", None), "use_cache"):
            module.config.use_cache = False
    return model


@cache
def _modules_of_timm():
    """Return the names of timm's models by the module that builds them."""
    modules = {}
    for name in timm.list_models():
        modules.setdefault(timm.models._registry._model_to_module[name], []).append(name)
    return modules


def of_timm(name):
    """Return a model of timm with as few blocks and with images as small as it accepts."""
    usual = timm.get_pretrained_cfg(name).input_size[-1]

    @cache
    def choice():
        sizes = [size for size in (64, 96, 128, 160, 192, 224) if size < usual] + [usual]
        for blocks, size in product([_fewer_blocks(name), {}], sizes):
            for arguments in ({**blocks, "img_size": size}, blocks):
                # If it fails, another size is tried.
                with suppress(Exception), torch.device("meta"), torch.no_grad():
                    model = timm.create_model(name, num_classes=16, **arguments).eval()
                    model(torch.zeros(1, 3, size, size))
                    return arguments, size
        return {}, usual

    return Family(
        partial(seeded, lambda: timm.create_model(name, num_classes=16, **choice()[0])),
        lambda: _batches(partial(_images, size=choice()[1]), sizes=(2, 1)),
        kind="timm",
        name=timm.models._registry._model_to_module[name],
        model=name,
        arguments=lambda: choice()[0],
    )


def _size(name, **arguments):
    with torch.device("meta"):
        return number_of_weights(timm.create_model(name, num_classes=16, **arguments))


def _fewer_blocks(name):
    whole = _size(name)
    if whole <= 2_000_000:
        return {}
    for fewer in ({"depth": 2}, {"depths": (2,) * 4}, {"depths": (2,) * 3}, {"layers": (1,) * 4}):
        with suppress(Exception):  # it has no such argument, or another number of stages
            if _size(name, **fewer) < whole:
                return fewer
    return {}


class _Blocks(nn.Module):
    """Blocks that run one after another."""

    def __init__(self, *blocks):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.head = nn.Linear(32, 16)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class _KeywordMlp(Mlp):
    def forward(self, *, hidden, extra):
        hidden = super().forward(hidden + extra)
        return hidden, hidden.mean(dim=1, keepdim=True)


class _KeywordsOnly(_Blocks):
    def forward(self, *, x):
        extra = torch.zeros_like(x[:, :1])
        for block in self.blocks:
            x, extra = block(hidden=x, extra=extra)
        return self.head(x + extra)


def _block_twice():
    shared = Mlp()
    return _Blocks(Mlp(), shared, Mlp(), shared)


class _Unreached(_Blocks):
    def forward(self, x):
        return self.head(self.blocks[2](self.blocks[0](x)))


class _Routed(_Blocks):
    def forward(self, x):
        expert = self.blocks[1] if x.mean() > 0 else self.blocks[2]
        return self.head(self.blocks[3](expert(self.blocks[0](x))))


class _Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(32, 32)
        self.second = nn.Linear(32, 32)
        self.third = nn.Linear(32, 16)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.third(F.relu(self.second(F.relu(self.first(x)))))


class _InplaceMlp(Mlp):
    def forward(self, x):
        return super().forward(x.relu_()) - 0.5


class _Inplace(_Blocks):
    def forward(self, x):
        # A new tensor: the blocks write into their inputs, the model does not.
        return super().forward(x - 0.1)


class _AutocastInside(_Blocks):
    def forward(self, x):
        x = self.blocks[0](x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            x = self.blocks[1](x)
            with torch.autocast("cpu", enabled=False):
                x = self.blocks[2](x)
            x = self.blocks[3](x)
        return self.head(x)


class _ExpertList(nn.Module):
    """Experts that are modules. Each token goes to one of them."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(32, 4)
        self.experts = nn.ModuleList(Mlp() for _ in range(4))

    def forward(self, x):
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

    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(32, nhead=4, dim_feedforward=64, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(32, 16)

    def forward(self, x):
        return self.head(self.encoder(x))


def tokenizer_of_bytes(reverse=False, others=()):
    """One token for each byte, in the order of their characters or in reverse; and other tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet(), reverse=reverse)
    vocabulary = {character: index for index, character in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary | dict(others), merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return tokenizer


def save_llama_of_bytes(folder):
    """Save a tiny Llama and a tokenizer whose tokens are bytes as a Hugging Face folder."""
    hf.PreTrainedTokenizerFast(tokenizer_object=tokenizer_of_bytes()).save_pretrained(folder)
    special = dict.fromkeys(["pad_token_id", "bos_token_id", "eos_token_id"])
    with seed(0):
        config = tiny(
            hf.LlamaConfig, vocab_size=256, num_key_value_heads=4, initializer_range=0.3, **special
        )
        hf.LlamaForCausalLM(config).save_pretrained(folder)


def _text_model(
    model_class,
    dense=("model.embed_tokens", "lm_head"),
    blocks=("model.layers.[0-9]",),
    batch=_text,
    **sizes,
):
    sizes = {"initializer_range": 0.1, "pad_token_id": 0, **sizes}

    def make():
        return model_class(tiny(model_class.config_class, **sizes))

    return Specimen(partial(seeded, make), partial(_batches, batch), dense, blocks)


def _with_experts(model_class, *dense, **sizes):
    dense = ("model.embed_tokens", "lm_head", *dense)
    return _text_model(model_class, dense, tie_word_embeddings=False, **sizes)


def _image_model(make, sizes, blocks, *dense):
    build = partial(seeded, partial(make, num_classes=16, **sizes))
    return Specimen(build, partial(_batches, _images), dense, (blocks,))


def _resnet(block, channels):
    make = partial(ResNet, block, channels=channels, zero_init_last=False)
    return _image_model(make, {"layers": (2, 2, 2, 2)}, "layer[1-4].[0-9]", "conv1", "fc")


def _odd(
    make,
    batches=_vectors,
    blocks=("blocks.[0-9]",),
    **globs,
):
    return Specimen(partial(seeded, make), batches, blocks=blocks, **globs)


_LEFT = partial(_padded_text, side="left")
_VIT = {
    "img_size": 32,
    "patch_size": 8,
    "embed_dim": 32,
    "depth": 2,
    "num_heads": 4,
    "mlp_ratio": 2.0,
}
_CONVNEXT = {"depths": (2, 2, 2, 2), "dims": (8, 16, 24, 32), "ls_init_value": 0.75}
_STAGES = ("stages.[0-9].blocks.[0-9]", "stem.0", "*.conv_dw", "head.fc")
_SWIN = {
    "img_size": 32,
    "patch_size": 4,
    "window_size": 4,
    "embed_dim": 16,
    "depths": (2, 2),
    "num_heads": (2, 4),
}
_FEW = {"moe_intermediate_size": 16}

ZOO = {
    "llama": _text_model(hf.LlamaForCausalLM),
    "llama_padded": _text_model(hf.LlamaForCausalLM, batch=_padded_text),
    "llama_left_padded": _text_model(hf.LlamaForCausalLM, batch=_LEFT),
    "gemma2": _text_model(
        hf.Gemma2ForCausalLM,
        num_hidden_layers=3,
        layer_types=None,
        head_dim=16,
        query_pre_attn_scalar=16,
        attn_implementation="eager",  # sdpa ignores the soft cap of the attention
    ),
    "mixtral": _with_experts(hf.MixtralForCausalLM, "*.gate"),
    "mixtral_padded": _with_experts(hf.MixtralForCausalLM, "*.gate", batch=_LEFT),
    "qwen3_moe": _with_experts(hf.Qwen3MoeForCausalLM, "*.gate", head_dim=16, **_FEW),
    "deepseek_v3": _with_experts(hf.DeepseekV3ForCausalLM, "*.gate", q_lora_rank=24, **_FEW),
    # Stores its experts as (d_in, d_out), with biases.
    "gpt_oss": _with_experts(
        hf.GptOssForCausalLM, "*.router", "*_bias", head_dim=16, rope_parameters=ROPE
    ),
    # Passes all tokens to each expert, as zeros where they are routed to another.
    "llama4": _with_experts(
        hf.Llama4ForCausalLM,
        "*.router",
        num_hidden_layers=2,
        no_rope_layers=None,
        moe_layers=None,
        layer_types=None,
        num_experts_per_tok=2,
        head_dim=16,
        attention_chunk_size=8192,
    ),
    "opt": _text_model(
        hf.OPTForCausalLM,
        ("model.decoder.embed_*", "lm_head"),
        ("model.decoder.layers.[0-9]",),
        init_std=0.1,
    ),
    "gpt2": _text_model(
        hf.GPT2LMHeadModel, ("transformer.w[tp]e", "lm_head"), ("transformer.h.[0-9]",)
    ),
    "t5": _text_model(
        hf.T5ForConditionalGeneration,
        ("shared", "*.embed_tokens", "*.relative_attention_bias", "lm_head"),
        ("encoder.block.[0-9]", "decoder.block.[0-9]"),
        _padded_pairs,
        decoder_start_token_id=0,
    ),
    "vit": _image_model(
        VisionTransformer,
        _VIT,
        "blocks.[0-9]",
        "pos_embed",
        "patch_embed.proj",
        "head",
        "cls_token",
    ),
    "convnext": _image_model(ConvNeXt, _CONVNEXT, *_STAGES),
    "convnext_conv_mlp": _image_model(ConvNeXt, {**_CONVNEXT, "conv_mlp": True}, *_STAGES),
    "swin": _image_model(
        SwinTransformer,
        _SWIN,
        "layers.[0-9].blocks.[0-9]",
        "patch_embed.proj",
        "*.relative_position_bias_table",
        "head.fc",
    ),
    "resnet18": _resnet(BasicBlock, (16, 16, 32, 32)),
    "resnet50": _resnet(Bottleneck, (8, 8, 16, 16)),
    "keywords_only": _odd(
        lambda: _KeywordsOnly(_KeywordMlp(), _KeywordMlp()), lambda: [{"x": x} for x in _vectors()]
    ),
    "block_twice": _odd(_block_twice),
    "plain_mlp": _odd(lambda: relu_mlp(32, 64, 64, 16), blocks=()),
    "unreached": _odd(lambda: _Unreached(Mlp(), Mlp(), Mlp()), uncalled=("blocks.1.*",)),
    "routed": _odd(lambda: _Routed(Mlp(), Mlp(), Mlp(), Mlp()), _routed_vectors),
    "expert_list": _odd(lambda: _Blocks(_ExpertList(), _ExpertList()), dense=("*.gate",)),
    "tied": _odd(_Tied, dense=("second",), blocks=()),
    "inplace": _odd(lambda: _Inplace(_InplaceMlp(), _InplaceMlp())),
    "autocast_inside": _odd(lambda: _AutocastInside(Mlp(), Mlp(), Mlp(), Mlp())),
    "torch_transformer": _odd(
        _TorchTransformer, dense=("*.in_proj_weight",), blocks=("encoder.layers.[0-9]",)
    ),
}


def model_of(name):
    """Build a model of the zoo."""
    return ZOO[name].build()


def batches_of(name):
    """Return the calibration batches of a model of the zoo."""
    return ZOO[name].batches()
