"""Find out whether a model reads images or tokens, and what it predicts."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from wanda_lightning.common.errors import UserError


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
        logits = output.get("logits", output.get("out"))
    else:
        logits = getattr(output, "logits", output)
    if isinstance(logits, tuple | list) and logits:
        logits = logits[0]

    if not isinstance(logits, Tensor) or not logits.is_floating_point() or logits.ndim < 2:
        return None
    if logits.ndim > 3:
        return logits.movedim(1, -1)
    return logits


def has_classes(output: object) -> bool:
    """Return whether an output holds logits of classes: a matrix of at least two columns, or whatever has their name.

    Other tensors, such as images, may hold numbers.
    """
    predictions = find_predictions(output)
    if predictions is None or predictions.shape[-1] < 2:
        return False
    return isinstance(output, Mapping) or hasattr(output, "logits") or predictions.ndim == 2


def causal_config(model: nn.Module) -> Any | None:
    """Return the config of the causal language model of transformers that a model is or contains.

    The result is None if there is none, or if it has an encoder.
    """
    for module in model.modules():
        can_generate = getattr(module, "can_generate", None)
        if callable(can_generate) and can_generate():
            has_encoder = getattr(module.config, "is_encoder_decoder", False)
            return None if has_encoder else module.config
    return None


def own_head(module: nn.Module) -> nn.Module | None:
    """Return the output head of a language model of transformers; None for any other module."""
    find_head = getattr(module, "get_output_embeddings", None)
    if find_head is None:
        return None
    try:
        head = find_head()
    except NotImplementedError:
        return None
    return head if isinstance(head, nn.Module) else None


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
