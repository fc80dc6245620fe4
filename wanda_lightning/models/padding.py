"""Which tokens of a batch are padding, from its attention mask."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Module

from wanda_lightning.common.errors import UserError
from wanda_lightning.models.layers import named_modules, uncompiled_name

_NO_LABEL = -100  # transformers pads labels with this value


class TokenMask(NamedTuple):
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
    for mask in sorted(masks, key=lambda mask: mask.rank(name)):
        if mask.fits(x):
            return mask
    return None


def token_masks(model: Module, batch: Any) -> tuple[TokenMask, ...]:
    """Read the padding of a batch from its `attention_mask`, which is the encoder's, and its `decoder_attention_mask`.

    An attention mask is (samples, tokens). The result for any other mask, such as one with a row for each query, fits
    no input, so that the report notes for each layer that padding counts. A batch without padding has no masks.
    """
    if not isinstance(batch, Mapping) or batch.get("attention_mask") is None:
        return ()
    attention = batch["attention_mask"]
    keep = torch.zeros(0, 0, dtype=torch.bool)  # fits nothing
    if isinstance(attention, Tensor) and attention.ndim == 2:
        _check_shape(attention, batch)
        keep = attention.bool()

    masks = [TokenMask("", keep)]
    for name, module in named_modules(model).items():
        config = getattr(module, "config", None)
        if getattr(config, "is_encoder_decoder", False) and hasattr(module, "get_encoder"):
            encoder = module.get_encoder()  # type: ignore[operator]
            masks = [TokenMask(_name_of(encoder, model), keep), *_decoder_masks(name, batch)]
            break

    usable = tuple(mask for mask in masks if mask.keep.ndim == 2)
    shows_padding = any(not (mask.keep.numel() and mask.keep.all()) for mask in usable)
    return usable if shows_padding else ()


def _name_of(module: Module, model: Module) -> str:
    names = (name for name, other in model.named_modules() if other is module)
    return uncompiled_name(next(names))


def _check_shape(attention: Tensor, batch: Mapping[str, Any]) -> None:
    """Refuse a mask (samples, tokens) with another shape than the tokens, unless a cache adds keys before them."""
    # Transformers 5.24 renames `past_key_values` to `cache`.
    if "cache" in batch or "past_key_values" in batch:
        return
    for key in ("input_ids", "inputs_embeds"):
        tokens = batch.get(key)
        if not isinstance(tokens, Tensor):
            continue
        if attention.shape != tokens.shape[:2]:
            raise UserError(
                f"attention_mask must have the shape of the tokens, {tuple(tokens.shape[:2])}, but its shape is "
                f"{tuple(attention.shape)}. Give one entry for each token of each sample."
            )
        return


def _decoder_masks(name: str, batch: Mapping[str, Any]) -> list[TokenMask]:
    """Return the padding of a decoder's tokens, read from the first of its inputs that shows it; none if none does."""
    real_tokens: dict[str, Callable[[Tensor], Tensor]] = {
        "decoder_attention_mask": Tensor.bool,
        "decoder_input_ids": lambda ids: torch.ones_like(ids, dtype=torch.bool),
        "labels": lambda labels: labels != _NO_LABEL,
    }
    for key, real in real_tokens.items():
        if isinstance(batch.get(key), Tensor):
            return [TokenMask(name, real(batch[key]))]
    return []
