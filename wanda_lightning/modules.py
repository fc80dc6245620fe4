"""Language models and image classifiers as LightningModules: load, train, measure, save.

Both save an ordinary folder of their own library (`AutoModelForCausalLM.from_pretrained`,
`timm.create_model("local-dir:...")`), and both read weights from safetensors only.
"""

from __future__ import annotations

import difflib
import inspect
import math
import os
import sys
import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import lightning as L
import timm
import timm.optim
import torch
import transformers
from lightning.fabric.utilities.exceptions import MisconfigurationException
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.models import save_for_hf
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn import functional as F
from torchmetrics import Metric
from torchmetrics.classification import MulticlassAccuracy
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from wanda_lightning.files import whole_folder

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_CHUNK = 2**22  # logits per step of the loss: 16 MiB in float32, whatever the vocabulary and the window


# --------------------------------------------------------------------------------------------------- perplexity


def _predicted(input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Which tokens count as predictions: real ones after a real one, so neither padding nor the first token."""
    predicted = torch.ones_like(input_ids, dtype=torch.bool)
    if attention_mask is not None:
        real = attention_mask != 0
        predicted = real & real.roll(1, dims=1)
    predicted[:, 0] = False
    return predicted


def _window_losses(logits: Tensor, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Mean next-token loss of each window, `logsumexp(logits) - logits[target]`; NaN where nothing is predicted.

    Args:
        logits: Of shape (batch, tokens, vocabulary); the loss is computed in float32, or in float64 for float64.
        input_ids: Of shape (batch, tokens).
        attention_mask: Of shape (batch, tokens), zero at padding.
    """
    if logits.shape[:-1] != input_ids.shape:
        raise ValueError(
            f"logits should have the shape (batch, tokens, vocabulary) for input_ids of shape (batch, tokens), "
            f"but they have {tuple(logits.shape)} for {tuple(input_ids.shape)}."
        )
    predicted = _predicted(input_ids, attention_mask)
    dtype = torch.promote_types(logits.dtype, torch.float32)
    size = max(1, _CHUNK // logits.shape[-1])
    losses = []
    for window, ids, counts in zip(logits, input_ids, predicted, strict=True):
        chunks = zip(window[:-1].split(size), ids[1:].split(size), counts[1:].split(size), strict=True)
        total = torch.zeros((), dtype=dtype, device=logits.device)
        for chunk, targets, count in chunks:
            chunk = chunk.to(dtype)
            loss = chunk.logsumexp(-1) - chunk.gather(-1, targets[:, None])[:, 0]
            total = total + loss.where(count, 0).sum()
        losses.append(total / counts.sum())
    return torch.stack(losses)


class WindowPerplexity(Metric):
    r"""Perplexity as pruning papers report it: `exp` of the mean over windows of each window's mean next-token loss.

    It equals the perplexity over all tokens only where all windows are equally long. A window that predicts nothing
    (only padding, or one token) is ignored; with no other window the result is NaN.

    >>> logits = torch.zeros(1, 5, 50)  # a model that knows nothing hesitates between all 50 words
    >>> metric = WindowPerplexity()
    >>> metric.update(logits, torch.randint(50, (1, 5)))
    >>> round(metric.compute().item(), 4)
    50.0
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False

    loss_sum: Tensor
    windows: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        # MPS has no float64, and Lightning moves metrics to the model's device.
        dtype = torch.float32 if torch.backends.mps.is_available() else torch.float64
        self.add_state("loss_sum", torch.zeros((), dtype=dtype), dist_reduce_fx="sum")
        self.add_state("windows", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    def update(self, logits: Tensor, input_ids: Tensor, attention_mask: Tensor | None = None) -> None:
        """Add windows. The logits are read in chunks; no second tensor of their size is made.

        Args:
            logits: What the model predicts after each token, of shape (batch, tokens, vocabulary).
            input_ids: The windows themselves, of shape (batch, tokens).
            attention_mask: Of shape (batch, tokens), zero at padding.
        """
        losses = _window_losses(logits, input_ids, attention_mask)
        counts = _predicted(input_ids, attention_mask).any(dim=1)
        # Not in place: a state that was reset in inference mode cannot be written outside it.
        self.loss_sum = self.loss_sum + losses.to(self.loss_sum.dtype).where(counts, 0).sum()
        self.windows = self.windows + counts.sum()

    def compute(self) -> Tensor:
        """`exp(loss_sum / windows)`."""
        return torch.exp(self.loss_sum / self.windows)


# ----------------------------------------------------------------------------------------------- language models


class CausalLMModule(L.LightningModule):
    """A decoder-only language model: trains on next-token loss, is measured by `WindowPerplexity`.

    A batch is a mapping with `input_ids`, perhaps `attention_mask` and `labels`; or the ids alone, perhaps as the first
    element of a tuple. Logged are `train_loss`, `val_perplexity`, `test_perplexity`; `predict` gives each window's
    mean loss. The model is in training mode, as Lightning wants it before `fit`; call `.eval()` to use it without a
    trainer.

    Args:
        model: Hub id, local folder, `.gguf` file, or a ready model.
        tokenizer: For `save_pretrained`; loaded with the model where `model` is a string.
        dtype: Of the weights: "auto" (as they are stored; a GGUF file becomes float32), "float32", "bfloat16" or
            "float16".
        lr: Learning rate of AdamW.
        weight_decay: Weight decay of AdamW.
        lr_decay: Let the learning rate fall linearly to 0 over the training.
        lora: Train adapters instead of the weights: arguments of `wanda_lightning.lora.KeepZerosLoraConfig`, such as
            `{"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"]}`; see `add_adapters`.
        revision: Branch, tag or commit on the hub.
        cache_dir: Where downloads are kept.
        trust_remote_code: Run the model code that comes with the checkpoint.

    Raises:
        ValueError: For an unknown `dtype` or an encoder-decoder model.
        OSError: If neither a local folder nor the hub has the model, in safetensors.
    """

    def __init__(
        self,
        model: str | PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None = None,
        dtype: str = "auto",
        lr: float = 1e-4,
        weight_decay: float = 0.0,
        lr_decay: bool = False,
        lora: dict[str, Any] | None = None,
        revision: str = "main",
        cache_dir: str | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        super().__init__()
        if dtype != "auto" and dtype not in _DTYPES:
            raise ValueError(f"dtype should be one of auto, {', '.join(_DTYPES)}, but it is {dtype!r}.")
        if isinstance(model, str):
            self.save_hyperparameters(ignore=["tokenizer"])
            hub = {"revision": revision, "cache_dir": cache_dir, "trust_remote_code": trust_remote_code}
            self.model, loaded = _load_causal_lm(model, dtype, hub, with_tokenizer=tokenizer is None)
            self.tokenizer = tokenizer if tokenizer is not None else loaded
        else:
            self.save_hyperparameters(ignore=["model", "tokenizer"])
            _check_decoder_only(model.config)
            self.model = model if dtype == "auto" else model.to(_DTYPES[dtype])
            self.tokenizer = tokenizer
        if lora is not None:
            self.add_adapters(**lora)
        self.model.train()
        self.lr = lr
        self.weight_decay = weight_decay
        self.lr_decay = lr_decay
        self.val_perplexity = WindowPerplexity()
        self.test_perplexity = WindowPerplexity()

    @property
    def pruning_target(self) -> nn.Module:
        """What the pruning callbacks prune: the model under its own names, without peft around it."""
        return self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """The model's own output, with `logits`, and `loss` where `labels` are given."""
        return self.model(input_ids=input_ids, attention_mask=attention_mask, labels=labels, **kwargs)

    def calibration_predictions(self, batch: Any) -> Any:
        """Run the batch through the model, for its logits."""
        input_ids, attention_mask, _ = _read_text(batch)
        return self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)

    def calibration_step(self, batch: Any) -> None:
        """Run the batch through all blocks; the logits are not computed."""
        input_ids, attention_mask, _ = _read_text(batch)
        inputs: dict[str, Any] = {"input_ids": input_ids, "attention_mask": attention_mask, "use_cache": False}
        model: Any = self.model
        if not isinstance(model, FSDPModule):
            model = self.pruning_target.base_model
        elif "logits_to_keep" in inspect.signature(self.model.forward).parameters:
            inputs["logits_to_keep"] = 1  # only the call of the whole gathers what belongs to no block
        model(**inputs)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Mean next-token loss over the tokens of the batch; padding does not count."""
        input_ids, attention_mask, labels = _read_text(batch)
        if labels is None:
            labels = input_ids.masked_fill(~_predicted(input_ids, attention_mask), -100)
        loss: Tensor = self(input_ids, attention_mask, labels, use_cache=False).loss
        self.log("train_loss", loss, prog_bar=True, batch_size=len(input_ids))
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Add the windows to `val_perplexity`."""
        self._measure("val_perplexity", self.val_perplexity, batch)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Add the windows to `test_perplexity`."""
        self._measure("test_perplexity", self.test_perplexity, batch)

    def _measure(self, name: str, metric: WindowPerplexity, batch: Any) -> None:
        input_ids, attention_mask, _ = _read_text(batch)
        metric.update(self(input_ids, attention_mask, use_cache=False).logits, input_ids, attention_mask)
        self.log(name, metric, prog_bar=True, batch_size=len(input_ids))

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Mean next-token loss of each window, of shape (batch,); NaN for a window of padding."""
        input_ids, attention_mask, _ = _read_text(batch)
        return _window_losses(self(input_ids, attention_mask, use_cache=False).logits, input_ids, attention_mask)

    def configure_optimizers(self) -> Any:
        """AdamW over the parameters that require a gradient.

        Raises:
            MisconfigurationException: For `lr_decay` in a training without a known end.
        """
        parameters = [p for p in self.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=self.lr, weight_decay=self.weight_decay)
        if not self.lr_decay:
            return optimizer
        steps = self.trainer.estimated_stepping_batches
        if math.isinf(steps):
            raise MisconfigurationException(
                "lr_decay=True lets the learning rate fall to 0 over the training, but this one has no known end: give "
                "the Trainer max_steps (or max_epochs, and a train dataloader with a length), or lr_decay=False"
            )
        decay = transformers.get_linear_schedule_with_warmup(optimizer, 0, int(steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": decay, "interval": "step"}}

    def add_adapters(self, keep_zeros: bool = True, **arguments: Any) -> None:
        """Freeze the model and give it low-rank adapters to train (Hu et al. 2021).

        Args:
            keep_zeros: Adapters that merge without filling a zero; else those of plain `peft.LoraConfig`.
            **arguments: Of `wanda_lightning.lora.KeepZerosLoraConfig`, which has those of `peft.LoraConfig`.

        Raises:
            ImportError: Without peft.
        """
        try:
            import peft

            from wanda_lightning.lora import KeepZerosLoraConfig
        except ImportError as error:
            raise ImportError("Adapters need peft: pip install 'wanda_lightning[lora]'") from error
        config = KeepZerosLoraConfig if keep_zeros else peft.LoraConfig
        with warnings.catch_warnings():
            # A callback may prune later, when training starts.
            warnings.filterwarnings("ignore", message="None of the .* layers that adapter .* holds a zero")
            self.model = peft.get_peft_model(self.model, config(task_type="CAUSAL_LM", **arguments))

    def merge(self, reprune: bool = False) -> None:
        """Merge the adapters into the weights, if there are any (see `wanda_lightning.lora.merge`).

        Args:
            reprune: Put back the zeros that plain LoRA adapters fill.
        """
        if hasattr(self.model, "peft_config"):
            from wanda_lightning.lora import merge

            self.model = merge(self.model, reprune)

    def save_pretrained(self, folder: str | os.PathLike[str], overwrite: bool = False) -> None:
        """Write a Hugging Face folder with model and tokenizer, whole or not at all. Call it in one process only.

        With adapters that are not merged, it is a folder of peft, which holds them alone.

        Args:
            folder: Loads with `AutoModelForCausalLM.from_pretrained(folder)`.
            overwrite: Replace a folder that is not empty, with everything in it.

        Raises:
            FileExistsError: If the folder is not empty and `overwrite` is false.
        """
        with whole_folder(folder, overwrite) as new, _bars_on_terminals_only():
            self.model.save_pretrained(new)
            if self.tokenizer is not None:
                self.tokenizer.save_pretrained(new)


def _read_text(batch: Any) -> tuple[Tensor, Tensor | None, Tensor | None]:
    if isinstance(batch, Mapping):
        if "input_ids" not in batch:
            raise ValueError(f"A batch of text should have 'input_ids', but it has {', '.join(map(repr, batch))}.")
        return batch["input_ids"], batch.get("attention_mask"), batch.get("labels")
    input_ids = batch[0] if isinstance(batch, (tuple, list)) else batch
    return input_ids, None, None


def _check_decoder_only(config: Any) -> None:
    if config.is_encoder_decoder:
        raise ValueError(
            f"CausalLMModule holds decoder-only language models, but {config.model_type} is an encoder-decoder. "
            "Load it with transformers and call wanda_lightning.prune(model, batches) on it directly."
        )


def _load_causal_lm(name: str, dtype: str, hub: dict[str, Any], with_tokenizer: bool) -> tuple[Any, Any]:
    path = Path(name).expanduser()
    source: dict[str, Any] = {"pretrained_model_name_or_path": name, **hub}
    options: dict[str, Any] = {"dtype": dtype, "use_safetensors": True}
    if path.suffix == ".gguf":
        if not path.is_file():
            raise FileNotFoundError(f"The GGUF file {name} does not exist. Download it and give its local path.")
        source.update(pretrained_model_name_or_path=str(path.parent), gguf_file=path.name)
        # Since transformers 5.24 weights of some families stay packed unless told otherwise; before, all were unpacked.
        if hasattr(transformers, "GgufConfig"):
            options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    elif path.exists():
        _check_folder(path)
        source["pretrained_model_name_or_path"] = str(path)
    try:
        with _bars_on_terminals_only():
            if path.suffix != ".gguf":
                _check_decoder_only(AutoConfig.from_pretrained(**source))
            model, loaded = AutoModelForCausalLM.from_pretrained(**source, **options, output_loading_info=True)
            if missing := sorted(loaded["missing_keys"]):
                raise ValueError(
                    f"The model {name!r} has no weights for {len(missing)} parameters that its configuration asks for, "
                    f"{missing[0]} first; they would be random. Check the folder and its config.json."
                )
            has_tokenizer = not path.is_dir() or any(path.glob("*token*")) or any(path.glob("vocab*"))
            tokenizer = AutoTokenizer.from_pretrained(**source) if with_tokenizer and has_tokenizer else None
    except OSError as error:
        raise OSError(
            f"The model {name!r} was asked for, but neither a local folder nor the Hugging Face hub (revision "
            f"{hub['revision']!r}, or its cache) has it with safetensors weights. Check the name and the connection, "
            f"or give a local folder or a .gguf file. The cause: {error}"
        ) from error
    except (SafetensorError, RuntimeError) as error:
        raise ValueError(
            f"The weights of {name!r} cannot be read, or do not fit its configuration. Download or save them again. "
            f"The cause: {error}"
        ) from error
    return model, tokenizer


def _check_folder(folder: Path) -> None:
    if not folder.is_dir():
        raise OSError(
            f"The model {folder} is a file, and of single files only .gguf is read. Give the folder that holds "
            "config.json and the safetensors weights."
        )
    if not (folder / "config.json").is_file():
        raise OSError(f"The folder {folder} is no Hugging Face model: it has no config.json.")
    if not any(folder.glob("*.safetensors")):
        found = ", ".join(sorted(file.name for file in folder.iterdir()))
        raise OSError(
            f"The folder {folder} has no weights in safetensors, the only format that is read; it has {found}. "
            "Convert a checkpoint that you trust with AutoModelForCausalLM.from_pretrained(...).save_pretrained(...)."
        )


@contextmanager
def _bars_on_terminals_only() -> Iterator[None]:
    """Keep the progress bars of transformers out of log files."""
    logging = transformers.utils.logging
    silence = logging.is_progress_bar_enabled() and not (sys.stderr is not None and sys.stderr.isatty())
    if silence:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        if silence:
            logging.enable_progress_bar()


# --------------------------------------------------------------------------------------------- image classifiers


class ImageClassifierModule(L.LightningModule):
    """An image classifier: trains on cross entropy, is measured by accuracy.

    A batch is `(images, labels)`, or a mapping with `image` or `pixel_values` and `label` or `labels`. Logged are
    `train_loss`, `val_loss`, `val_accuracy`, with more than 5 classes `val_accuracy_top5`, and the same for `test`;
    `predict` gives the logits.

    Args:
        model: A name that timm knows, with or without the prefix `timm:`; `hf-hub:OWNER/NAME`; `local-dir:FOLDER`; or
            a ready model.
        pretrained: Load the weights that timm has for the name. Not used where there is a `checkpoint` or the model is
            ready.
        num_classes: Another number of classes than the pretrained weights have. For a ready model that has no
            `num_classes`: how many logits it gives.
        checkpoint: A `.safetensors` file with all the weights of the model.
        model_kwargs: More arguments of `timm.create_model`, such as `img_size`.
        lr: Learning rate of AdamW.
        weight_decay: Weight decay of AdamW; biases and norms are spared.

    Raises:
        ValueError: For a name that timm does not know, a checkpoint that does not fit or is not in safetensors, or a
            model that is no classifier.
        OSError: If weights can neither be downloaded nor found in the cache.
    """

    _TOP: ClassVar = {"accuracy": 1, "accuracy_top5": 5}

    def __init__(
        self,
        model: str | nn.Module,
        pretrained: bool = True,
        num_classes: int | None = None,
        checkpoint: str | None = None,
        model_kwargs: dict[str, Any] | None = None,
        lr: float = 1e-3,
        weight_decay: float = 0.05,
    ) -> None:
        super().__init__()
        self._model_kwargs = dict(model_kwargs or {})
        if isinstance(model, str):
            self.save_hyperparameters()
            if num_classes is not None:
                self._model_kwargs["num_classes"] = num_classes
            self.model = _create_classifier(model, pretrained and checkpoint is None, self._model_kwargs)
        else:
            self.save_hyperparameters(ignore=["model"])
            if model_kwargs:
                raise ValueError(
                    f"model_kwargs are for a model given by name, but a ready {type(model).__name__} came."
                )
            self.model = model
        if checkpoint is not None:
            _load_checkpoint(self.model, checkpoint)
        self.model.train()
        self._num_classes = getattr(self.model, "num_classes", num_classes) or 0
        if self._num_classes < 2:
            raise ValueError(
                f"A classifier with at least 2 classes is needed, but {type(self.model).__name__} has "
                f"{self._num_classes or 'no'} classes. Set num_classes."
            )
        self.lr = lr
        self.weight_decay = weight_decay
        self.metrics = nn.ModuleDict(
            {
                f"{stage}_{name}": MulticlassAccuracy(self._num_classes, top_k=k, average="micro")
                for stage in ("val", "test")
                for name, k in self._TOP.items()
                if k < self._num_classes
            }
        )

    @property
    def pruning_target(self) -> nn.Module:
        """What the pruning callbacks prune: the model under its own names."""
        return self.model

    @property
    def num_classes(self) -> int:
        """How many logits the model gives for an image."""
        return self._num_classes

    def forward(self, images: Tensor) -> Any:
        """The logits, of shape (batch, num_classes)."""
        return self.model(images)

    def calibration_predictions(self, batch: Any) -> Any:
        """Run the images of the batch through the model, for its logits."""
        return self(_read_images(batch)[0])

    def calibration_step(self, batch: Any) -> None:
        """Run the images of the batch through the model."""
        self(_read_images(batch)[0])

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Mean cross entropy; of a distilled DeiT with two heads, the mean over the heads."""
        images, labels = _read_labelled(batch)
        outputs = self(images)
        heads = outputs if isinstance(outputs, (tuple, list)) else (outputs,)
        loss = torch.stack([F.cross_entropy(logits, labels) for logits in heads]).mean()
        self.log("train_loss", loss, prog_bar=True, batch_size=len(images))
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Add the images to the accuracies and the loss of validation."""
        self._measure("val", batch)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Add the images to the accuracies and the loss of the test."""
        self._measure("test", batch)

    def _measure(self, stage: str, batch: Any) -> None:
        images, labels = _read_labelled(batch)
        logits = self(images)
        self.log(f"{stage}_loss", F.cross_entropy(logits.float(), labels), batch_size=len(images))
        for name, metric in self.metrics.items():
            if name.startswith(f"{stage}_"):
                assert isinstance(metric, Metric)
                metric.update(logits, labels)
                self.log(name, metric, prog_bar=True, batch_size=len(images))

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        """The logits of the batch; labels are not needed."""
        return self(_read_images(batch)[0])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW over the parameters that require a gradient; biases, norms and what the model exempts do not decay."""
        exempt: Collection[str] = getattr(self.model, "no_weight_decay", tuple)()
        groups = timm.optim.param_groups_weight_decay(self.model, self.weight_decay, no_weight_decay_list=exempt)
        return torch.optim.AdamW(groups, lr=self.lr)

    def save_pretrained(self, folder: str | os.PathLike[str], overwrite: bool = False) -> None:
        """Write a timm folder with weights and configuration, whole or not at all. Call it in one process only.

        Args:
            folder: Loads with `timm.create_model("local-dir:FOLDER", pretrained=True)`.
            overwrite: Replace a folder that is not empty, with everything in it.

        Raises:
            FileExistsError: If the folder is not empty and `overwrite` is false.
            ValueError: If the model is not one of timm's, so that no name could rebuild it.
        """
        if not hasattr(self.model, "pretrained_cfg"):
            raise ValueError(
                f"A timm folder was to be written, but {type(self.model).__name__} does not come from "
                "timm.create_model. Save its weights with safetensors.torch.save_file(model.state_dict(), ...)."
            )
        with whole_folder(folder, overwrite) as new:
            save_for_hf(self.model, str(new), model_args=self._model_kwargs, safe_serialization=True)


def _read_images(batch: Any) -> tuple[Tensor, Tensor | None]:
    if not isinstance(batch, Mapping):
        batch = batch if isinstance(batch, (tuple, list)) else (batch,)
        return batch[0], batch[1] if len(batch) > 1 else None
    images = next((batch[key] for key in ("image", "pixel_values") if key in batch), None)
    if images is None:
        raise ValueError(f"A batch should have 'image' or 'pixel_values', but it has {', '.join(map(repr, batch))}.")
    return images, next((batch[key] for key in ("label", "labels") if key in batch), None)


def _read_labelled(batch: Any) -> tuple[Tensor, Tensor]:
    images, labels = _read_images(batch)
    if labels is None:
        raise ValueError("A loss needs labels: a batch (images, labels), or a mapping with 'label' or 'labels'.")
    return images, labels


def _create_classifier(name: str, pretrained: bool, kwargs: dict[str, Any]) -> nn.Module:
    name = name.removeprefix("timm:")
    known = ":" in name or timm.is_model(name.partition(".")[0])  # a source such as hf-hub: is timm's to judge
    if not known:
        nearest = difflib.get_close_matches(name.partition(".")[0], timm.list_models(), n=5)
        raise ValueError(
            f"timm {timm.__version__} knows no model {name!r}"
            + (f"; the nearest names are {', '.join(nearest)}" if nearest else "")
            + ". A model on the hub is hf-hub:OWNER/NAME, one in a folder local-dir:FOLDER."
        )
    try:
        return timm.create_model(name, pretrained=pretrained, **kwargs)
    except OSError as error:
        raise OSError(
            f"The model {name!r} was asked for, but what it needs is neither in the cache nor can it be downloaded. "
            "Check the connection, name a local file with checkpoint=..., or start from random weights with "
            f"pretrained=False. The cause: {error}"
        ) from error


def _load_checkpoint(model: nn.Module, checkpoint: str) -> None:
    path = Path(checkpoint).expanduser()
    if path.suffix != ".safetensors":
        raise ValueError(
            f"A checkpoint should be a .safetensors file, but it is {checkpoint}. Convert one that you trust: "
            "safetensors.torch.save_file(torch.load(path, weights_only=True), 'model.safetensors')."
        )
    if not path.is_file():
        raise FileNotFoundError(f"The checkpoint {checkpoint} does not exist. Check the path.")
    weights, expected = load_file(path), model.state_dict()
    faults = [f"{key} is missing" for key in expected if key not in weights]
    faults += [f"{key} is unknown to the model" for key in weights if key not in expected]
    faults += [
        f"{key} has the shape {tuple(weights[key].shape)} instead of {tuple(expected[key].shape)}"
        for key in expected
        if key in weights and weights[key].shape != expected[key].shape
    ]
    if faults:
        more = f"; and {len(faults) - 5} more" if len(faults) > 5 else ""
        raise ValueError(
            f"The checkpoint {checkpoint} does not fit {type(model).__name__}: {'; '.join(faults[:5])}{more}. "
            "Check the name of the model; for other classes or image sizes give num_classes and model_kwargs, "
            "or a folder that holds the whole model as timm:local-dir:FOLDER."
        )
    model.load_state_dict(weights)
