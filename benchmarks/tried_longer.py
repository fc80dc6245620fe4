"""Train a smaller language model on a text, and on what the dense model writes after pieces of it, all read once.

    python benchmarks/tried_longer.py --model M.gguf --calibration c4_sample.txt --eval wikitext2_test.raw.txt \
        --share 0.25 --pieces 16 --lr 2e-4

Needs bfloat16 instructions to be fast.
"""

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
import transformers
from measuring import Text, in_batches, perplexity, run_from_shell
from torch import Tensor
from torch.utils.data import DataLoader

from wanda_lightning import CausalLMModule, DistillFromDense, Fisher, TextDataModule, prune, shrink

TOGETHER, GIVEN, LENGTH, ALL = 128, 32, 256, 2048  # texts in a batch, tokens, tokens, texts in 16 batches


@dataclass(frozen=True, kw_only=True)
class Options(Text):
    """What is taken out and how it trains."""

    share: float = 0.25
    pieces: int = 16
    """Batches of text by the dense model, of 28,672 tokens each; 0 to 16."""
    lr: float = 2e-4


class Longer(CausalLMModule):
    """Trains with all of the loss from the dense model."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return a loss without a gradient, since its weight is 0."""
        return super().training_step(batch, batch_idx).detach()

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Clip the gradient, which Lightning does not for a fused optimizer."""
        torch.nn.utils.clip_grad_norm_(self.parameters(), 1.0)

    def configure_optimizers(self) -> Any:
        """Warm up for a twentieth of the steps, then decay."""
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.lr, weight_decay=0.0, fused=True)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = transformers.get_linear_schedule_with_warmup(optimizer, max(1, steps // 20), steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def continued(dense: Any, ids: Tensor, pieces: int) -> list[Tensor]:
    """Return what the model writes after pieces at equal distances, drawn from the 50 most likely tokens."""
    model, written = copy.deepcopy(dense).bfloat16(), []
    starts = torch.arange(ALL) * (len(ids) - GIVEN) // ALL
    order = torch.randperm(ALL, generator=torch.Generator().manual_seed(0))
    for number in range(pieces):
        torch.manual_seed(number)
        cache = transformers.StaticCache(config=model.config, max_cache_len=LENGTH + 1)
        chosen = starts[order[number * TOGETHER : (number + 1) * TOGETHER]].tolist()
        tokens = torch.stack([ids[start : start + GIVEN] for start in chosen])
        for _ in range(LENGTH - GIVEN):
            logits = model(input_ids=tokens, cache=cache, use_cache=True, logits_to_keep=1).logits[:, -1]
            best = logits.float().topk(50)
            tokens = best.indices.gather(1, torch.multinomial(best.values.softmax(-1), 1))
            written.append(tokens)
        print(f"{number + 1} of {pieces} batches are written", flush=True)
    steps = LENGTH - GIVEN
    return [torch.cat(written[start : start + steps], 1) for start in range(0, len(written), steps)]


def main(options: Options) -> None:
    """Prune, write, train and measure."""
    L.seed_everything(0)
    module = Longer(options.model, dtype="float32", lr=options.lr)
    model, tokenizer = module.model.eval(), module.tokenizer
    dense = copy.deepcopy(model)
    texts = [options.eval, "sklearn-docs", "python-docs"]
    data = TextDataModule(tokenizer, options.calibration, texts, seqlen=options.seqlen, num_samples=128, limit=40)
    by_loss = Fisher(num_samples=8, num_predictions=4096)
    prune(model, in_batches(data.calibration_windows), options.share, pattern="structured", allocation=by_loss)
    shrink(model)

    def measured() -> list[float]:
        return [round(perplexity(model.eval(), in_batches(data.windows_of(text))), 2) for text in texts]

    print("before training:", measured(), flush=True)
    read = [tokenizer(Path(options.calibration).read_text(encoding="utf-8"), verbose=False).input_ids]
    with torch.no_grad():
        batches = continued(dense, torch.tensor(read[0]), options.pieces)
    own = [tokenizer.decode(row, skip_special_tokens=True) for batch in batches for row in batch.tolist()]
    read.append(tokenizer("\n\n".join(own), verbose=False).input_ids)
    windows = [window for ids in read for window in torch.tensor(ids).split(options.seqlen)]
    full = [{"input_ids": window} for window in windows if len(window) == options.seqlen]
    loader = DataLoader(full, batch_size=4, shuffle=True, generator=torch.Generator().manual_seed(0))
    callbacks = [DistillFromDense(dense, weight=1.0)]
    how: dict[str, Any] = {"logger": False, "enable_checkpointing": False}
    L.Trainer(max_epochs=1, precision="bf16-mixed", accelerator="cpu", callbacks=callbacks, **how).fit(module, loader)
    print("after training:", measured(), flush=True)


if __name__ == "__main__":
    run_from_shell(main)
