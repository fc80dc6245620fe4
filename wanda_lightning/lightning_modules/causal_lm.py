"""A causal language model as a LightningModule."""

import os
import tempfile
from collections.abc import Mapping
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_layers import GradientCheckpointingLayer

from wanda_lightning.common.aliases import Kwargs, StrPath
from wanda_lightning.common.atomic_write import atomic_folder
from wanda_lightning.common.checks import check_flags, require_extra
from wanda_lightning.common.dtypes import DTYPES, dtype_name
from wanda_lightning.common.model_source import ModelSource, load_tokenizer
from wanda_lightning.evaluation.perplexity import WindowPerplexity, predicted_tokens, window_losses
from wanda_lightning.lightning_modules.model_loading import (
    check_causal,
    check_source,
    load_causal_lm,
)
from wanda_lightning.lightning_modules.optimizers import adamw
from wanda_lightning.models import check_tokens
from wanda_lightning.parallel import (
    SINGLE_PROCESS,
    gathered_state_dict,
    is_sharded,
    shard_processes,
)
from wanda_lightning.units.fit_configuration import refuse_unloadable


class CausalLMModule(L.LightningModule):
    """A decoder-only language model, trained on its next-token loss and evaluated by `WindowPerplexity`.

    A batch is a mapping with `input_ids` and optionally `attention_mask` and `labels`, the ids alone, or a tuple that
    starts with them. All have the shape (batch, tokens). The module logs `train_loss`, `val_perplexity` and
    `test_perplexity`, with several dataloaders those of the first, and `val_ppl/TEXT` or `test_ppl/TEXT` for each other
    one. `predict` returns the mean loss of each window. The model is in training mode, as Lightning expects before
    `fit`; call `.eval()` to use it without a Trainer.

    With `ModelParallelStrategy`, `configure_model` shards its blocks.

    Args:
        model: Hub id, local folder, `.gguf` file, or a loaded model.
        tokenizer: For `save_pretrained`; by default the one that belongs to a model that is given by name, if any.
        dtype: Data type of the weights: "auto" (as they are stored; a GGUF file becomes float32), "float32", "bfloat16"
            or "float16", or the same as a `torch.dtype`.
        lr: Learning rate of AdamW.
        weight_decay: Weight decay of AdamW.
        lr_decay: Decay the learning rate linearly to 0 during training.
        lora: Train low-rank adapters (Hu et al. 2021) instead of the weights: arguments of
            `wanda_lightning.lora.KeepZerosLoraConfig`, such as `{"r": 8, "target_modules": ["q_proj", "v_proj"]}`; with
            `"keep_zeros": False`, of `peft.LoraConfig`, whose adapters fill the zeros when they are merged.
        revision: Branch, tag or commit on the hub.
        cache_dir: Folder for downloads.
        trust_remote_code: Run the model code that comes with the checkpoint.

    Raises:
        ValueError: For a wrong option, an encoder or encoder-decoder, or weights that cannot be used.
        OSError: If neither a local folder nor the hub has the model in safetensors.
        ImportError: If a package that reads GGUF files or trains adapters is missing.
    """

    def __init__(
        self,
        model: StrPath | PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None = None,
        dtype: str | torch.dtype = "auto",
        lr: float = 1e-4,
        weight_decay: float = 0.0,
        lr_decay: bool = False,
        lora: Kwargs | None = None,
        revision: str = "main",
        cache_dir: str | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        super().__init__()
        # Before the hyperparameters are saved, which hold the name: configurations are text.
        dtype = dtype_name(dtype)
        check_flags(lr_decay=lr_decay)
        if isinstance(model, (str, os.PathLike)):
            model = os.fspath(model)
            self.save_hyperparameters(ignore=["tokenizer"])
            source = ModelSource(model, revision, cache_dir, trust_remote_code)
            check_source(source)
            self.tokenizer = load_tokenizer(source) if tokenizer is None else tokenizer
            loaded = load_causal_lm(source, dtype)
        else:
            # A model among the hyperparameters would be copied, and written into each checkpoint.
            self.save_hyperparameters(ignore=["model", "tokenizer"])
            check_causal(model)
            self.tokenizer = tokenizer
            loaded = model if dtype == "auto" else model.to(DTYPES[dtype])
        self.model = loaded if lora is None else _with_adapters(loaded, **lora)
        self.model.train()
        self.lr = lr
        self.weight_decay = weight_decay
        self.lr_decay = lr_decay
        self.val_perplexity = WindowPerplexity()
        self.test_perplexity = WindowPerplexity()
        # The metrics of dataloaders after the first one, by their numbers.
        self._others: dict[int, WindowPerplexity] = {}
        self._logged: dict[str, WindowPerplexity] = {}  # by the name in a log

    def configure_model(self) -> None:
        """Shard the model if the Trainer's strategy asks for it (FSDP2). A second call does nothing."""
        if self.device_mesh is None or isinstance(self.model, FSDPModule):
            return
        # Blocks are the modules for which transformers can checkpoint gradients.
        mesh = self.device_mesh["data_parallel"]
        for module in [*self.model.modules()]:
            if isinstance(module, GradientCheckpointingLayer):
                fully_shard(module, mesh=mesh)
        fully_shard(self.model, mesh=mesh)

    @property
    def pruning_target(self) -> nn.Module:
        """The module that the pruning callbacks prune: the transformers model, without the wrapper of peft."""
        if hasattr(self.model, "get_base_model"):
            return self.model.get_base_model()
        return self.model

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Return the output of the model, with `logits`, and with `loss` if `labels` are given."""
        return self.model(
            input_ids=input_ids, attention_mask=attention_mask, labels=labels, **kwargs
        )

    def calibration_predictions(self, batch: Any) -> Any:
        """Run the batch through the model and return its output, with `logits`."""
        return self.model(**self._read(batch), use_cache=False)

    def calibration_step(self, batch: Any) -> None:
        """Run the batch through all blocks; the logits are not computed."""
        base: Any = self.pruning_target.base_model
        base(**self._read(batch), use_cache=False)

    def check_tokens(self, input_ids: Tensor) -> None:
        """Raise a ValueError for token ids without an embedding. On a CUDA device they would end the process."""
        check_tokens(self.model, input_ids)

    def _read(self, batch: Any) -> Kwargs:
        """Return the `input_ids` and the `attention_mask`, perhaps None, of a batch."""
        if isinstance(batch, (tuple, list)):
            batch = {"input_ids": batch[0]}
        elif not isinstance(batch, Mapping):
            batch = {"input_ids": batch}
        input_ids = batch["input_ids"]
        # The check would wait for a GPU, so its batches are checked by TextDataModule.setup only.
        if not isinstance(input_ids, Tensor) or input_ids.device.type == "cpu":
            self.check_tokens(input_ids)
        return {"input_ids": input_ids, "attention_mask": batch.get("attention_mask")}

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the mean next-token loss. Without `labels` in the batch, all tokens except padding are predicted."""
        windows = self._read(batch)
        input_ids = windows["input_ids"]
        labels = batch.get("labels") if isinstance(batch, Mapping) else None
        if labels is None:
            # The loss ignores -100.
            labels = input_ids.masked_fill(~predicted_tokens(**windows), -100)
        loss = self(**windows, labels=labels, use_cache=False).loss
        self.log("train_loss", loss, prog_bar=True, batch_size=len(input_ids))
        return loss

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Add the windows to `val_perplexity` or, for a dataloader after the first, to its `val_ppl/TEXT`."""
        self._measure("val", self.val_perplexity, batch, batch_idx, dataloader_idx)

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Add the windows to `test_perplexity` or, for a dataloader after the first, to its `test_ppl/TEXT`."""
        self._measure("test", self.test_perplexity, batch, batch_idx, dataloader_idx)

    def _measure(
        self, loop: str, metric: WindowPerplexity, batch: Any, batch_idx: int, dataloader_idx: int
    ) -> None:
        windows = self._read(batch)
        if batch_idx == dataloader_idx == 0:
            self._logged.clear()
        name = f"{loop}_perplexity"
        logged = name
        if dataloader_idx > 0:
            if batch_idx == 0:
                self._others[dataloader_idx] = WindowPerplexity().to(self.device)
            metric = self._others[dataloader_idx]
            texts = getattr(getattr(self.trainer, "datamodule", None), "evaluations", ())
            text = texts[dataloader_idx] if dataloader_idx < len(texts) else dataloader_idx
            # Lightning's table cuts names of more than 23 characters in a terminal of 80 columns.
            logged = f"{loop}_ppl/{text}"
        elif batch_idx == 0:  # an earlier loop may have been interrupted
            metric.reset()
        metric.update(self(**windows, use_cache=False).logits, **windows)

        self._logged[logged] = metric
        self.log(
            logged,
            metric,
            prog_bar=dataloader_idx == 0,
            metric_attribute=name,
            batch_size=len(windows["input_ids"]),
            add_dataloader_idx=False,
        )

    def standard_errors(self) -> dict[str, float]:
        """Return the standard errors of the perplexities of the latest loop, by their logged names, while it ends."""
        return {name: metric.standard_error() for name, metric in self._logged.items()}

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        """Return the mean next-token loss of each window, of shape (batch,); NaN for a window of padding."""
        windows = self._read(batch)
        return window_losses(self(**windows, use_cache=False).logits, **windows)

    def configure_optimizers(self) -> Any:
        """Return AdamW over the parameters that require a gradient."""
        return adamw(self, self.lr, self.weight_decay, self.lr_decay)

    def load_dense_model(self, name: StrPath) -> nn.Module:
        """Load another model (hub id, folder or `.gguf` file) in the dtype of this one and from the same cache."""
        options = {key: self.hparams[key] for key in ("cache_dir", "trust_remote_code")}
        source = ModelSource(os.fspath(name), **options)
        dtype: Any = self.pruning_target.dtype
        dtype = dtype_name(dtype) if dtype in DTYPES.values() else "auto"
        return load_causal_lm(source, dtype)

    def merge(self, reprune: bool = False) -> None:
        """Merge the adapters, if there are any, into the weights; `reprune` restores zeros that plain ones fill."""
        if hasattr(self.model, "peft_config"):
            from wanda_lightning.lora import merge

            self.model = merge(self.model, reprune)

    def check_saving(self) -> None:
        """Raise the errors of `save_pretrained`, by writing everything but the weights into a temporary folder."""
        with tempfile.TemporaryDirectory() as folder:
            model: Any = self.pruning_target
            model.save_pretrained(folder, state_dict={})
            if self.tokenizer is not None:
                self.tokenizer.save_pretrained(folder)

    def save_pretrained(self, folder: StrPath, overwrite: bool = False) -> None:
        """Write a Hugging Face folder with model and tokenizer atomically.

        Call it in one process only. If FSDP2 shards the model, call it in every process; the first one writes. If the
        model has adapters that are not merged, peft writes only the adapters.

        Args:
            folder: Path to write; `AutoModelForCausalLM.from_pretrained(folder)` loads it.
            overwrite: Replace a folder that is not empty, with everything in it.

        Raises:
            FileExistsError: If the folder is not empty and `overwrite` is false.
        """
        processes = SINGLE_PROCESS
        options = {}
        if is_sharded(self.model):
            processes = shard_processes(self.model)
            options["state_dict"] = gathered_state_dict(self.model)  # in every process

        with processes.fail_together():
            if processes.rank == 0:
                with atomic_folder(folder, overwrite) as new:
                    refuse_unloadable(self.pruning_target)
                    self.model.save_pretrained(new, **options)
                    if self.tokenizer is not None:
                        self.tokenizer.save_pretrained(new)


def _with_adapters(model: Any, keep_zeros: bool = True, **arguments: Any) -> Any:
    require_extra("lora", "peft", purpose="Adapters")
    import peft

    from wanda_lightning.lora import KeepZerosLoraConfig

    config = KeepZerosLoraConfig if keep_zeros else peft.LoraConfig
    return peft.get_peft_model(model, config(task_type="CAUSAL_LM", **arguments))
