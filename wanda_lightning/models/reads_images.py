"""Recognize image models."""

from __future__ import annotations

from torch import nn


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
