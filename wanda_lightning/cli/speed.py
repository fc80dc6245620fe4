"""`wanda-lightning speed`: whether the zeros of a language model make it faster on this machine."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from statistics import median
from typing import Any

from rich.markup import escape
from rich.table import Table

from wanda_lightning.acceleration import accelerate_2to4, accelerate_cpu
from wanda_lightning.checks import one_line
from wanda_lightning.cli.options import SpeedOptions
from wanda_lightning.cli.output import print_line, print_table
from wanda_lightning.cli.parser import UsageError
from wanda_lightning.evaluation import sparsity_of
from wanda_lightning.model_sources import load_config
from wanda_lightning.modules import CausalLMModule
from wanda_lightning.progress import ProgressBar, as_size

_Execution = Callable[[Any], AbstractContextManager[Any]]  # prepares a model
_SPARSE: dict[str, _Execution] = {"2:4 (CUDA)": accelerate_2to4, "packed (CPU)": accelerate_cpu}
_ROUNDS = 5
_FASTER = 1.05  # smaller differences are noise


@dataclass(frozen=True)
class _Speed:
    """Tokens per second of one execution."""

    prefill: float
    decoding: float


def run(options: SpeedOptions) -> None:
    """Time a model with dense and with sparse weights, and say whether the zeros make it faster."""
    import torch

    hub: dict[str, Any] = {"cache_dir": options.cache_dir, "trust_remote_code": options.trust_remote_code}
    _refuse_long(options, load_config(options.model, **hub))
    model = CausalLMModule(options.model, dtype=options.dtype or "auto", **hub).model.eval()
    if not (sparsity := sparsity_of(model)["layers"]):
        raise ValueError(
            f"{options.model} has no zeros to make it faster. Prune it first: wanda-lightning prune --save_model DIR."
        )
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    prompt = torch.randint(model.get_input_embeddings().num_embeddings, (1, options.seqlen), device=model.device)
    with torch.inference_mode(False), torch.no_grad():
        executions, reasons = _executions(model)
        speeds, sizes, differences = _measure(model, prompt, options.tokens, executions)
    print_table(
        _table(
            f"{options.model}, {sparsity:.1%} of the layers are zeros, {_machine(model)}", speeds, sizes, differences
        )
    )
    for name, reason in reasons.items():
        print_line(f"Not possible here: {name}. {reason}")
    print_line(_verdict(speeds))


def _refuse_long(options: SpeedOptions, config: Any) -> None:
    """Refuse a text that is longer than the model's context, before the weights are loaded."""
    context = int(getattr(config.get_text_config(), "max_position_embeddings", 0) or 0)
    if context and options.seqlen + options.tokens > context:
        raise UsageError(
            f"--seqlen and --tokens must be at most {context} together, the model's context, but they are "
            f"{options.seqlen} and {options.tokens}."
        )


def _executions(model: Any) -> tuple[dict[str, _Execution], dict[str, str]]:
    """Return the executions that this machine and model allow, and why others are not possible."""
    executions: dict[str, _Execution] = {"dense": nullcontext}
    reasons = {}
    for name, accelerate in _SPARSE.items():
        try:
            with accelerate(model):
                executions[name] = accelerate
        except (ValueError, ImportError) as error:
            reasons[name] = one_line(error)
    return executions, reasons


def _measure(
    model: Any, prompt: Any, tokens: int, executions: dict[str, _Execution]
) -> tuple[dict[str, _Speed], dict[str, int], dict[str, float]]:
    """Return medians of tokens per second, bytes of the weights, and the largest differences of the logits.

    The executions take turns, so that another load on the machine affects all of them.
    """
    logits, sizes = {}, {}
    rounds: dict[str, list[_Speed]] = {name: [] for name in executions}
    with ProgressBar("Timing", _ROUNDS * len(executions)) as progress:
        for _ in range(_ROUNDS):
            for name, execution in executions.items():
                progress.show(name)
                with execution(model) as accelerated:
                    logits[name] = _logits(model, prompt)  # also warms up
                    sizes[name] = _bytes(model) + getattr(accelerated, "nbytes", 0)
                    rounds[name].append(_time(model, prompt, tokens))
                progress.advance()
    speeds = {
        name: _Speed(median(each.prefill for each in timed), median(each.decoding for each in timed))
        for name, timed in rounds.items()
    }
    differences = {name: float((found - logits["dense"]).abs().max()) for name, found in logits.items()}
    return speeds, sizes, differences


def _logits(model: Any, prompt: Any) -> Any:
    """Return the logits of the prompt and, since few tokens may use another kernel, of its first two tokens alone."""
    import torch

    return torch.cat([model(prompt).logits, model(prompt[:, :2]).logits], 1).float()


def _bytes(model: Any) -> int:
    """Count the bytes of the weights in memory; accelerated layers hold placeholders."""
    storages = [tensor.untyped_storage() for tensor in (*model.parameters(), *model.buffers())]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def _time(model: Any, prompt: Any, tokens: int) -> _Speed:
    """Time the prompt, and the tokens that are generated after it."""
    prefill = _seconds(model, prompt, 1)
    return _Speed(prompt.shape[1] / prefill, tokens / max(_seconds(model, prompt, tokens + 1) - prefill, 1e-9))


def _seconds(model: Any, prompt: Any, tokens: int) -> float:
    """Return the seconds to generate as many tokens greedily."""
    import torch

    started = time.perf_counter()
    lengths = {"max_new_tokens": tokens, "min_new_tokens": tokens}
    mask = torch.ones_like(prompt)
    model.generate(prompt, attention_mask=mask, do_sample=False, pad_token_id=0, **lengths)
    if prompt.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - started


def _machine(model: Any) -> str:
    import torch

    dtype = str(model.dtype).removeprefix("torch.")
    if model.device.type == "cuda":
        return f"{dtype} on {torch.cuda.get_device_name()}"
    return f"{dtype} on the CPU with {torch.get_num_threads()} threads"


def _table(title: str, speeds: dict[str, _Speed], sizes: dict[str, int], differences: dict[str, float]) -> Table:
    table = Table(title=escape(title), title_justify="left")
    table.add_column("weights")
    for heading in ("prefill, tokens/s", "decoding, tokens/s", "bytes", "largest difference of a logit"):
        table.add_column(heading, justify="right")
    for name, speed in speeds.items():
        difference = f"{differences[name]:.2g}" if name != "dense" else ""
        table.add_row(name, f"{speed.prefill:.1f}", f"{speed.decoding:.1f}", as_size(sizes[name]), difference)
    return table


def _verdict(speeds: dict[str, _Speed]) -> str:
    """Say in one sentence what is faster than dense weights."""
    dense = speeds["dense"]
    ratios = {name: (s.prefill / dense.prefill, s.decoding / dense.decoding) for name, s in speeds.items()}
    best = max(ratios, key=lambda name: max(ratios[name]))
    if max(ratios[best]) < _FASTER:
        return "Nothing is faster here than dense weights: the zeros save no time on this machine."
    prefill, decoding = ratios[best]
    return (
        f"{best} is faster here: decoding runs at {decoding:.2f} times the speed of dense weights, prefill at "
        f"{prefill:.2f}."
    )
