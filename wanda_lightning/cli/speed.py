"""`wanda-lightning speed`: time 2:4 weights on sparse tensor cores against dense ones."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import nullcontext
from statistics import median
from typing import Any, NamedTuple

from rich.markup import escape
from rich.table import Table

from wanda_lightning.acceleration import accelerate_2to4
from wanda_lightning.acceleration.semi_structured import refuse_devices
from wanda_lightning.cli.measure import refuse_long_windows
from wanda_lightning.cli.options import SpeedOptions
from wanda_lightning.cli.output import print_line, print_table
from wanda_lightning.common.progress import ProgressBar
from wanda_lightning.common.words import as_size
from wanda_lightning.modules import CausalLMModule

_ROUNDS = 5


class Speeds(NamedTuple):
    """Tokens per second in each round."""

    prefill: list[float]
    decoding: list[float]


def run(options: SpeedOptions) -> None:
    """Time a model with dense and with 2:4 weights in turn, and say which differences exceed the spread."""
    import torch

    source = options.source(options.model)
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    refuse_devices({device})
    refuse_long_windows(options.seqlen + options.tokens, source, "--seqlen plus --tokens")
    model: Any = CausalLMModule(options.model, dtype=options.dtype or "auto", **source.hub).model.eval().to(device)
    prompt = torch.randint(model.get_input_embeddings().num_embeddings, (1, options.seqlen), device=device)
    with torch.inference_mode(False), torch.no_grad():
        speeds, sizes, difference = measure_speeds(model, prompt, options.tokens)
    machine = torch.cuda.get_device_name() if device.type == "cuda" else "the CPU"
    title = f"{options.model}, {str(model.dtype).removeprefix('torch.')} on {machine}, {_ROUNDS} rounds"
    print_table(_table(title, speeds, sizes, difference))
    for what in Speeds._fields:
        print_line(verdict(what, getattr(speeds["dense"], what), getattr(speeds["2:4"], what)))


def measure_speeds(model: Any, prompt: Any, tokens: int) -> tuple[dict[str, Speeds], dict[str, int], float]:
    """Return the speeds, the bytes of the weights, and the largest difference of a logit.

    The executions take turns, so that another load on the machine affects both.
    """
    logits, sizes = {}, {}
    speeds = {name: Speeds([], []) for name in ("dense", "2:4")}
    with ProgressBar("Timing", _ROUNDS * len(speeds)) as progress:
        for _ in range(_ROUNDS):
            for name, found in speeds.items():
                progress.show(name)
                with accelerate_2to4(model) if name == "2:4" else nullcontext() as accelerated:
                    logits[name] = _logits(model, prompt)  # also warms up
                    sizes[name] = _bytes(model) + getattr(accelerated, "nbytes", 0)
                    prefill = _seconds(model, prompt, 1)
                    decoding = max(_seconds(model, prompt, tokens + 1) - prefill, 1e-9)
                found.prefill.append(prompt.shape[1] / prefill)
                found.decoding.append(tokens / decoding)
                progress.advance()
    return speeds, sizes, float((logits["2:4"] - logits["dense"]).abs().max())


def _logits(model: Any, prompt: Any) -> Any:
    """Return the logits of the prompt and, since few tokens may use another kernel, of its first two tokens alone."""
    import torch

    return torch.cat([model(prompt).logits, model(prompt[:, :2]).logits], 1).float()


def _bytes(model: Any) -> int:
    """Count the bytes of the weights in memory; accelerated layers hold placeholders."""
    storages = [tensor.untyped_storage() for tensor in (*model.parameters(), *model.buffers())]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def _seconds(model: Any, prompt: Any, tokens: int) -> float:
    import torch

    started = time.perf_counter()
    lengths = {"max_new_tokens": tokens, "min_new_tokens": tokens}
    model.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=False, pad_token_id=0, **lengths)
    if prompt.device.type != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter() - started


def _table(title: str, speeds: dict[str, Speeds], sizes: dict[str, int], difference: float) -> Table:
    table = Table(title=escape(title), title_justify="left")
    table.add_column("weights")
    for heading in ("prefill, tokens/s", "decoding, tokens/s", "bytes", "largest difference of a logit"):
        table.add_column(heading, justify="right")
    for name, found in speeds.items():
        table.add_row(name, *map(_spread, found), as_size(sizes[name]), "" if name == "dense" else f"{difference:.2g}")
    return table


def _spread(rounds: Sequence[float]) -> str:
    return f"{median(rounds):.1f} ({min(rounds):.1f} to {max(rounds):.1f})"


def verdict(what: str, dense: Sequence[float], sparse: Sequence[float]) -> str:
    """Compare the speeds of all rounds in one sentence.

    >>> verdict("prefill", [10, 11, 12], [20, 22, 23])
    'prefill: 2:4 weights run at 2.00 times the speed of dense ones.'
    >>> verdict("prefill", [10, 11, 12], [12, 13, 14])
    'prefill: the difference is within the spread of the rounds.'
    """
    if min(sparse) <= max(dense) and min(dense) <= max(sparse):
        return f"{what}: the difference is within the spread of the rounds."
    return f"{what}: 2:4 weights run at {median(sparse) / median(dense):.2f} times the speed of dense ones."
