"""Examples for a report: text before and after pruning, and images that the pruned model classifies differently."""

from __future__ import annotations

import base64
import io
import warnings
from collections.abc import Mapping
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback

from wanda_lightning.common.progress import ProgressBar
from wanda_lightning.common.words import one_line
from wanda_lightning.data import ImageDataModule
from wanda_lightning.report import ChangedImage, Sample

PROMPTS = ("The capital of France is", "To make a good cup of tea, first", "def is_prime(n):")
_NEW_TOKENS = 40
_IMAGES, _SIDE, _COLORS = 12, 96, 128  # about 8 kB each as a PNG


class Examples(Callback):
    """Base class for collecting examples from one validation loop; it collects none itself."""

    @staticmethod
    def of(data: L.LightningDataModule) -> Examples:
        """Return what collects examples from a loop over this data."""
        return ImageExamples(data) if isinstance(data, ImageDataModule) else TextExamples()

    def since(self, dense: Any) -> Mapping[str, Any]:
        """Return fields of a `Run`: the examples of the pruned model beside those of the dense one."""
        return {}


class TextExamples(Examples):
    """Continues each prompt greedily at the end of a validation loop, while the model is on its device."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def on_validation_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Continue the prompts; warn if the model cannot generate text."""
        model, tokenizer = pl_module.model, pl_module.tokenizer
        try:
            with ProgressBar("Continuing prompts", len(PROMPTS)) as bar:
                for prompt in PROMPTS:
                    self.texts.append(continuation(model, tokenizer, prompt))
                    bar.advance()
        except Exception as error:  # code of the model, whose errors must not end a run that has pruned
            warnings.warn(
                f"{type(model).__name__} cannot continue a prompt, so the report has no text: {one_line(error)}",
                stacklevel=2,
            )

    def since(self, dense: TextExamples) -> Mapping[str, Any]:
        """Return the continuations by both models."""
        if not len(dense.texts) == len(self.texts) == len(PROMPTS):
            return {}
        return {"samples": tuple(map(Sample, PROMPTS, dense.texts, self.texts))}


def continuation(model: Any, tokenizer: Any, prompt: str) -> str:
    """Return the most likely tokens after a prompt, at most 40 and as many as fit into the model's context."""
    inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
    length = inputs.input_ids.shape[1]
    context = getattr(model.config.get_text_config(), "max_position_embeddings", 0) or length + _NEW_TOKENS
    if context <= length:
        return ""
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    tokens = model.generate(
        inputs.input_ids,
        attention_mask=inputs.attention_mask,
        max_new_tokens=min(_NEW_TOKENS, context - length),
        pad_token_id=padding or 0,
        **{"do_sample": False, "temperature": None, "top_p": None, "top_k": None},  # whatever the model's own are
    )
    return tokenizer.decode(tokens[0, length:], skip_special_tokens=True)


class ImageExamples(Examples):
    """Records the prediction for each image of a validation loop."""

    def __init__(self, data: ImageDataModule) -> None:
        self._data = data
        self.predictions: list[int] = []

    def on_validation_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, *_: Any) -> None:
        """Record the predictions of a batch."""
        self.predictions += outputs.tolist()

    def since(self, dense: ImageExamples) -> Mapping[str, Any]:
        """Return at most 12 images whose prediction has changed, spread evenly over all of them."""
        pairs = list(zip(dense.predictions, self.predictions, strict=True))
        changed = [index for index, (before, after) in enumerate(pairs) if before != after]
        count = min(_IMAGES, len(changed))
        chosen = [changed[i * len(changed) // count] for i in range(count)]
        return {"images": tuple(self._changed_image(index, *pairs[index]) for index in chosen)}

    def _changed_image(self, index: int, before: int, after: int) -> ChangedImage:
        (image, label), names = self._data.evaluation_image(index), dict(enumerate(self._data.class_names))
        return ChangedImage(thumbnail(image), *(names.get(each, f"output {each}") for each in (label, before, after)))


def thumbnail(image: Any) -> str:
    """Return a PIL image, scaled down to at most 96 pixels and 128 colors, as a PNG file in base64."""
    small = image.convert("L" if image.mode == "L" else "RGB")
    small.thumbnail((_SIDE, _SIDE))
    file = io.BytesIO()
    (small if small.mode == "L" else small.quantize(_COLORS)).save(file, "PNG", optimize=True)
    return base64.b64encode(file.getvalue()).decode("ascii")
