"""Find out whether a model reads images or tokens, which tokens are padding, and what it predicts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from wanda_lightning.common.errors import UserError
from wanda_lightning.models.module_names import named_modules, uncompiled_name


def reads_images(model: nn.Module) -> bool:
    """Return whether a model takes images and no text, judging by its modules, so a wrapper makes no difference.

    If the model contains models of transformers, one of them must have `pixel_values` as its main input, and none may
    have `input_ids`, as the language model inside a vision-language model does. Any other model must contain a
    two-dimensional convolution and no embedding.
    """
    modules = list(model.modules())
    inputs = {getattr(type(module), "main_input_name", None) for module in modules} - {None}
    if inputs:
        return "pixel_values" in inputs and "input_ids" not in inputs
    has_embedding = any(isinstance(module, nn.Embedding) for module in modules)
    return any(isinstance(module, nn.Conv2d) for module in modules) and not has_embedding


def find_predictions(output: object) -> Tensor | None:
    """Return the logits of an output, or the output if it is a tensor, with the classes in the last dimension.

    In a mapping, the logits are named `logits`, or `out` as by torchvision's segmentation models. If there are four or
    more dimensions, as in (samples, classes, height, width), the classes are in dimension 1 of the output, as for
    torch's `cross_entropy`. The result is None if there are no predictions.
    """
    if isinstance(output, Mapping):
        found = output.get("logits", output.get("out"))
    else:
        found = getattr(output, "logits", output)
    if isinstance(found, tuple | list) and found:
        found = found[0]
    if not isinstance(found, Tensor) or not found.is_floating_point() or found.ndim < 2:
        return None
    return found.movedim(1, -1) if found.ndim > 3 else found


def has_classes(output: object) -> bool:
    """Return whether an output holds logits of classes: a matrix of at least two columns, or whatever has their name.

    Other tensors, such as images, may hold numbers.
    """
    predictions, is_named = find_predictions(output), isinstance(output, Mapping) or hasattr(output, "logits")
    return predictions is not None and predictions.shape[-1] > 1 and (is_named or predictions.ndim == 2)


def causal_config(model: nn.Module) -> Any | None:
    """Return the config of a causal language model of transformers without an encoder, which a model is or contains."""
    for module in model.modules():
        can_generate = getattr(module, "can_generate", None)
        if callable(can_generate) and can_generate():
            return None if getattr(module.config, "is_encoder_decoder", False) else module.config
    return None


def own_head(module: nn.Module) -> nn.Module | None:
    """Return the output head of a language model of transformers; None for any other module."""
    find: Callable[[], object] | None = getattr(module, "get_output_embeddings", None)
    try:
        head = find() if find is not None else None
    except NotImplementedError:
        return None
    return head if isinstance(head, nn.Module) else None


def check_tokens(model: Any, input_ids: object) -> None:
    """Raise a ValueError for token ids without an embedding in the model: on a CUDA device they end the process."""
    try:
        embeddings = int(model.get_input_embeddings().num_embeddings)
    except (AttributeError, NotImplementedError):
        return
    if not isinstance(input_ids, Tensor) or not input_ids.numel():
        return
    low, high = (int(bound) for bound in input_ids.aminmax())
    if low < 0 or high >= embeddings:
        raise UserError(
            f"input_ids must be from 0 to {embeddings - 1}, since the model has {embeddings} embeddings, but one is "
            f"{low if low < 0 else high}. Use the tokenizer that the model was trained with."
        )


# ---- padding

_NO_LABEL = -100  # transformers pads labels with this value


@dataclass(frozen=True)
class TokenMask:
    """The tokens of a batch that count, in contrast to padding."""

    inside: str  # name of the module that these tokens enter; "" for the whole model
    keep: Tensor  # (batch, tokens); True is a token, False is padding

    def rank(self, layer: str) -> int:
        """Sort key of the mask for a layer: lowest for the smallest module that contains the layer."""
        contains = not self.inside or f"{layer}.".startswith(f"{self.inside}.")
        return -len(self.inside) if contains else 1

    def fits(self, x: Tensor) -> bool:
        """Whether a layer's input has one row for each token of this mask."""
        return x.shape[:-1] == self.keep.shape or (x.ndim == 2 and len(x) == self.keep.numel())


def fitting_mask(masks: Sequence[TokenMask], name: str, x: Tensor) -> TokenMask | None:
    """Return the mask that fits a tensor; of several, the mask of the smallest module that contains `name`."""
    return next((mask for mask in sorted(masks, key=lambda mask: mask.rank(name)) if mask.fits(x)), None)


def token_masks(model: nn.Module, batch: Any) -> tuple[TokenMask, ...]:
    """Read the padding of a batch from its `attention_mask`, which is the encoder's, and its `decoder_attention_mask`.

    An attention mask is (samples, tokens). The result for any other mask, such as one with a row for each query, fits
    no input, so that the report notes for each layer that padding counts. A batch without padding has no masks.
    """
    if not isinstance(batch, Mapping) or (attention := batch.get("attention_mask")) is None:
        return ()
    keep = torch.zeros(0, 0, dtype=torch.bool)  # fits nothing
    if isinstance(attention, Tensor) and attention.ndim == 2:
        _check_shape(attention, batch)
        keep = attention.bool()
    masks = [TokenMask("", keep)]
    if found := _encoder_and_decoder(model):
        encoder, whole = found
        masks = [TokenMask(encoder, mask.keep) for mask in masks] + _decoder_masks(whole, batch)
    usable = tuple(mask for mask in masks if mask.keep.ndim == 2)
    return usable if any(not (mask.keep.numel() and mask.keep.all()) for mask in usable) else ()


def _encoder_and_decoder(model: nn.Module) -> tuple[str, str] | None:
    """Return the names of the encoder and of the module around it and the decoder; None for any other model."""
    for name, module in named_modules(model).items():
        if getattr(getattr(module, "config", None), "is_encoder_decoder", False) and hasattr(module, "get_encoder"):
            encoder = module.get_encoder()  # type: ignore[operator]
            return uncompiled_name(next(inner for inner, other in model.named_modules() if other is encoder)), name
    return None


def _check_shape(attention: Tensor, batch: Mapping[str, Any]) -> None:
    """Refuse a mask (samples, tokens) with another shape than the tokens, unless a cache adds keys before them."""
    tokens = next((batch[key] for key in ("input_ids", "inputs_embeds") if isinstance(batch.get(key), Tensor)), None)
    cached = "cache" in batch or "past_key_values" in batch  # transformers 5.24 renames the second to the first
    if tokens is not None and not cached and attention.shape != tokens.shape[:2]:
        raise UserError(
            f"attention_mask must have the shape of the tokens, {tuple(tokens.shape[:2])}, but its shape is "
            f"{tuple(attention.shape)}. Give one entry for each token of each sample."
        )


def _decoder_masks(name: str, batch: Mapping[str, Any]) -> list[TokenMask]:
    """Return the padding of a decoder's tokens, read from the first of its inputs that shows it."""
    real_tokens: dict[str, Callable[[Tensor], Tensor]] = {
        "decoder_attention_mask": Tensor.bool,
        "decoder_input_ids": lambda ids: torch.ones_like(ids, dtype=torch.bool),
        "labels": lambda labels: labels != _NO_LABEL,
    }
    for key, real in real_tokens.items():
        if isinstance(batch.get(key), Tensor):
            return [TokenMask(name, real(batch[key]))]
    return []
