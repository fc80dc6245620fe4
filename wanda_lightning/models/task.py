"""Find out whether a model reads images or tokens, and what it predicts."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Module

from wanda_lightning.common.errors import UserError


def reads_images(model: Module) -> bool:
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
    """Return the logits of an output, or else its vectors, such as embeddings; the output itself if it is a tensor.

    In a mapping, the logits are named `logits`, or `out` as by torchvision's segmentation models. The vectors are named
    `sentence_embedding` as by sentence-transformers, or are the first floating-point tensor, such as
    `last_hidden_state`.

    The classes, or the entries of a vector, are in the last dimension of the result. If the output has four or more
    dimensions, as in (samples, classes, height, width), they are in its dimension 1, as for torch's `cross_entropy`.
    The result is None if there are no predictions.
    """
    predictions = _logits_of(output)
    if predictions is None and isinstance(output, Mapping):
        vectors = [output.get("sentence_embedding"), *output.values()]
        predictions = next(filter(_is_prediction, vectors), None)

    if not isinstance(predictions, Tensor) or not _is_prediction(predictions):
        return None
    if predictions.ndim > 3:
        return predictions.movedim(1, -1)
    return predictions


def _logits_of(output: object) -> object:
    if isinstance(output, Mapping):
        logits = output.get("logits", output.get("out"))
    else:
        logits = getattr(output, "logits", output)
    return logits[0] if isinstance(logits, tuple | list) and logits else logits


def _is_prediction(value: object) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and value.ndim >= 2


def has_classes(output: object) -> bool:
    """Return whether an output holds logits of classes: a matrix of at least two columns, or whatever has their name.

    Other tensors, such as images and embeddings, hold numbers.
    """
    predictions = find_predictions(output)
    if predictions is None or has_vectors(output):
        return False
    return isinstance(output, Mapping) or hasattr(output, "logits") or predictions.ndim == 2


def has_vectors(output: object) -> bool:
    """Return whether predictions are certainly no logits of classes.

    They have another name than logits, or a single column, or all their rows have length 1, as embeddings often do.
    """
    predictions = find_predictions(output)
    if predictions is None:
        return False
    if isinstance(output, Mapping) or hasattr(output, "logits"):
        return predictions.shape[-1] < 2 or _logits_of(output) is None
    tolerance = 8 * torch.finfo(predictions.dtype).eps
    lengths = predictions.detach().float().norm(dim=-1)
    return predictions.shape[-1] < 2 or bool(((lengths - 1).abs() < tolerance).all())


def causal_config(model: Module) -> Any | None:
    """Return the config of the causal language model of transformers that a model is or contains.

    The result is None if there is none, or if it has an encoder.
    """
    for module in model.modules():
        can_generate = getattr(module, "can_generate", None)
        if callable(can_generate) and can_generate():
            has_encoder = getattr(module.config, "is_encoder_decoder", False)
            return None if has_encoder else module.config
    return None


def own_head(module: Module) -> Module | None:
    """Return the output head of a language model of transformers; None for any other module."""
    find_head = getattr(module, "get_output_embeddings", None)
    if find_head is None:
        return None
    try:
        head = find_head()
    except NotImplementedError:
        return None
    return head if isinstance(head, Module) else None


def head_within(model: Module) -> Module | None:
    """Return the output head of the first language model within a model, which may wrap it; None if there is none."""
    return next(filter(None, map(own_head, model.modules())), None)


def check_tokens(model: Any, input_ids: object) -> None:
    """Raise a ValueError for token ids without an embedding in the model.

    On a CUDA device, such an id would end the process.
    """
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
