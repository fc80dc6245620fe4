r"""Take whole blocks out of a language model, beside hidden units by the loss, and distill both.

    python benchmarks/tried_blocks.py --model M.gguf --calibration c4_sample.txt --eval wikitext2_test.raw.txt \
        --blocks 5 9 --units 25 50

Blocks leave one at a time: the one whose absence raises the perplexity least on four windows after the calibration
windows, among the twelve that cost least alone. Then the last `down_proj` before each gap is fitted by least squares to
give the dense output after the gap. `Distil` trains for two passes over 128 windows.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from measuring import Batches, LanguageModel, Text, in_batches, perplexity, run_from_shell
from torch import Tensor, nn

from wanda_lightning import Distil, Fisher, prune
from wanda_lightning.training import distil
from wanda_lightning.training.recovery import DenseModel, ModelRecovery

DISTIL = {"passes": 2, "learning_rate": 1e-3}
WINDOWS, HELD_OUT, TRIES = 128, 4, 12


@dataclass(frozen=True, kw_only=True)
class Options(Text):
    """Options of this program."""

    blocks: Sequence[int] = (5, 9)
    """Numbers of blocks to take out."""
    units: Sequence[float] = (25, 50)
    """Percentages of hidden units to take out."""


@dataclass(frozen=True)
class FromDense(Distil):
    """Distillation from another model than the one that is pruned."""

    dense: Any = None

    def start_model(self, dense: DenseModel) -> ModelRecovery:
        """Store the predictions of the dense model, and train the smaller one."""
        recovery: Any = distil._Distillation(self, replace(dense, model=self.dense, blocks=self.dense.model.layers))
        recovery._dense = dense
        recovery._parameters = distil._trainable(dense, distil.output_head(dense.model, dense.layers))
        sample, _ = next(filter(None, recovery._trained))
        recovery._loss = distil.DistilLoss(dense.model, self.loss, self.next_token, sample, dense.processes)
        return recovery


def without(dense: Any, gone: Sequence[int]) -> Any:
    """Return a copy without some blocks."""
    model, kept = copy.deepcopy(dense), [index for index in range(len(dense.model.layers)) if index not in gone]
    model.model.layers = nn.ModuleList(model.model.layers[index] for index in kept)
    for index, block in enumerate(model.model.layers):
        block.self_attn.layer_idx = index
    model.config.num_hidden_layers = len(kept)
    return model


def order_of_blocks(model: Any, windows: Batches, count: int) -> list[int]:
    """Return blocks in the order in which they leave."""
    blocks, gone, alone = list(model.model.layers), list[int](), dict[int, float]()
    for _ in range(count):
        tried = sorted(set(range(len(blocks))) - {*gone}, key=lambda index: alone.get(index, 0))
        losses = {}
        for index in tried[: TRIES if alone else None]:
            model.model.layers = nn.ModuleList(block for k, block in enumerate(blocks) if k not in (*gone, index))
            losses[index] = perplexity(model, windows)
        alone = alone or losses
        gone.append(min(losses, key=losses.__getitem__))
        print(f"without {gone}: {losses[gone[-1]]:.2f} on windows that calibration does not use", flush=True)
    model.model.layers = nn.ModuleList(blocks)
    return gone


@torch.no_grad()
def refit(dense: Any, model: Any, gone: Sequence[int], batches: Batches) -> None:
    """Fit the last `down_proj` before each gap, from the first to the last."""
    kept = [index for index in range(len(dense.model.layers)) if index not in gone]
    for block, index, following in zip(model.model.layers, kept, [*kept[1:], len(dense.model.layers)], strict=True):
        if following - 1 == index:
            continue
        weight, seen = block.mlp.down_proj.weight, dict[str, Tensor]()
        gram, cross = (torch.zeros(rows, weight.shape[1], dtype=torch.float64) for rows in weight.shape[::-1])
        hooks = [
            dense.model.layers[following - 1].register_forward_hook(lambda _, x, y, seen=seen: seen.update(goal=y)),
            block.mlp.down_proj.register_forward_pre_hook(lambda _, x, seen=seen: seen.update(x=x[0])),
            block.post_attention_layernorm.register_forward_pre_hook(lambda _, x, seen=seen: seen.update(past=x[0])),
        ]
        for batch in batches:
            for each in (dense, model):
                each(**batch, use_cache=False, logits_to_keep=1)
            x, goal = seen["x"].flatten(0, 1).double(), (seen["goal"] - seen["past"]).flatten(0, 1).double()
            gram += x.T @ x
            cross += (goal - x @ weight.double().T).T @ x
        for hook in hooks:
            hook.remove()
        gram.diagonal().add_(0.01 * gram.diagonal().mean())
        weight += torch.linalg.solve(gram, cross.T).T.to(weight.dtype)


def main(options: Options) -> None:
    """Print the perplexity of each model, before and after distillation."""
    language = LanguageModel(options, more=WINDOWS)
    dense, windows = language.model, language.data.train_windows
    held_out = in_batches(windows[options.nsamples : options.nsamples + HELD_OUT])
    gone = order_of_blocks(dense, held_out, max(options.blocks, default=0))

    def show(name: str, model: nn.Module) -> None:
        print(f"{name}: {perplexity(model.eval(), language.evaluation):.2f}", flush=True)

    for count in options.blocks:
        model = without(dense, gone[:count])
        show(f"without {count} blocks", model)
        refit(dense, model, gone[:count], language.calibration)
        show(f"without {count} blocks, with a refit", model)
        recovery = FromDense(**DISTIL, dense=dense)
        prune(model, in_batches(windows), 1e-7, method="magnitude", sequential="none", recovery=recovery)
        show(f"without {count} blocks, distilled", model)
    for share in options.units:
        chosen = {"pattern": "structured", "allocation": Fisher(num_samples=8, num_predictions=4096)}
        model = copy.deepcopy(dense)
        prune(model, language.calibration, share / 100, **chosen)
        show(f"without {share:g} % of the units", model)
        model = copy.deepcopy(dense)
        prune(model, in_batches(windows), share / 100, **chosen, recovery=Distil(**DISTIL))
        show(f"without {share:g} % of the units, distilled", model)


if __name__ == "__main__":
    run_from_shell(main)
