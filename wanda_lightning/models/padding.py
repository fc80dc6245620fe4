"""Which tokens of a batch are real."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

_NO_LABEL = -100  # what transformers pads labels with


@dataclass(frozen=True)
class TokenMask:
    """Which tokens of a batch are real.

    Attributes:
        inside: Name of the module whose tokens these are; `""` for the whole model.
        keep: (batch, tokens); True is a token, False is padding.
    """

    inside: str
    keep: Tensor

    def rank(self, layer: str) -> int:
        """Lowest for the mask of the smallest part of the model that holds the layer."""
        holds = not self.inside or f"{layer}.".startswith(f"{self.inside}.")
        return -len(self.inside) if holds else 1

    def fits(self, x: Tensor) -> bool:
        """Whether a layer's input has one row for each token of this mask."""
        return x.shape[:-1] == self.keep.shape or (x.ndim == 2 and len(x) == self.keep.numel())


def fitting_mask(masks: Sequence[TokenMask], name: str, x: Tensor) -> TokenMask | None:
    """Of the masks that line up with a tensor, that of the smallest part of the model around `name`."""
    return next((mask for mask in sorted(masks, key=lambda mask: mask.rank(name)) if mask.fits(x)), None)


def token_masks(model: nn.Module, batch: Any) -> tuple[TokenMask, ...]:
    """The padding of a batch, from its `attention_mask` (an encoder's) and `decoder_attention_mask`.

    Empty where the batch has none, or no padding.
    """
    if not isinstance(batch, Mapping) or not isinstance(batch.get("attention_mask"), Tensor):
        return ()
    masks = [TokenMask("", batch["attention_mask"].bool())]
    for name, module in model.named_modules():
        if getattr(getattr(module, "config", None), "is_encoder_decoder", False) and hasattr(module, "get_encoder"):
            encoder = next(inner for inner, other in model.named_modules() if other is module.get_encoder())
            masks = [TokenMask(encoder, masks[0].keep)]
            real_tokens: dict[str, Callable[[Tensor], Tensor]] = {
                "decoder_attention_mask": Tensor.bool,
                "decoder_input_ids": lambda ids: torch.ones_like(ids, dtype=torch.bool),
                "labels": lambda labels: labels != _NO_LABEL,
            }
            for key, real in real_tokens.items():
                if isinstance(batch.get(key), Tensor):
                    masks.append(TokenMask(name, real(batch[key])))
                    break
            break
    usable = tuple(mask for mask in masks if mask.keep.ndim == 2)
    return usable if any(not mask.keep.all() for mask in usable) else ()
