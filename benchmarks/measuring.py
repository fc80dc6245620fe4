"""Clocks, memory, perplexity, fingerprints and random models for the benchmarks."""

import ctypes
import gc
import hashlib
import multiprocessing
import re
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig

from wanda_lightning.modules import WindowPerplexity

MIB = 2**20

Batches = list[dict[str, Tensor]]


def seconds(step: Callable[[], object]) -> float:
    """Return how long a step takes, with all kernels that it starts on an accelerator."""
    _wait_for_kernels()
    started = time.perf_counter()
    step()
    _wait_for_kernels()
    return time.perf_counter() - started


def _wait_for_kernels() -> None:
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


def medians(*clocks: Callable[[], float], runs: int, warm_up: bool = True) -> list[float]:
    """Return the median of each clock. The clocks run alternately, after one warm-up run each if `warm_up`."""
    rounds = [[clock() for clock in clocks] for _ in range(warm_up + runs)]
    return [statistics.median(times) for times in zip(*rounds[warm_up:], strict=True)]


def in_new_process(function: Callable[..., Any], *arguments: object) -> Any:
    """Call a function in a process of its own, whose memory nothing else has used."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


@torch.no_grad()
def perplexity(model: nn.Module, batches: Iterable[Mapping[str, Tensor]]) -> float:
    """Return the perplexity over the windows of all batches."""
    metric = WindowPerplexity()
    for batch in batches:
        metric.update(model(**batch, use_cache=False).logits, batch["input_ids"])
    return float(metric.compute())


def fingerprint(module: nn.Module) -> str:
    """Return a short hash of all weights, since another machine or number of threads trains another model."""
    digest = hashlib.sha256()
    for tensor in module.state_dict().values():
        digest.update(tensor.detach().numpy().tobytes())
    return digest.hexdigest()[:6]


def random_llama(shape: Mapping[str, int], length: int, dtype: str = "float32", device: str = "cpu") -> Any:
    """Build a random model for windows of up to `length` tokens.

    Args:
        shape: Numbers by name: `hidden` (width), `mlp` (its inner width), `layers`, `heads`, `vocabulary`.
        length: Number of tokens.
        dtype: Of the weights.
        device: Where the weights are drawn; devices draw different ones.
    """
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=shape["hidden"],
        intermediate_size=shape["mlp"],
        num_hidden_layers=shape["layers"],
        num_attention_heads=shape["heads"],
        num_key_value_heads=shape["heads"],
        vocab_size=shape["vocabulary"],
        max_position_embeddings=length,
    )
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype)).eval()


def random_windows(vocabulary: int, samples: int, length: int) -> Batches:
    """Return windows of random tokens, each a batch."""
    ids = torch.randint(vocabulary, (samples, 1, length), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": window} for window in ids]


class PeakMemory:
    """Measure the bytes of memory at the `start`, and their largest increase: `peak`.

    It is the memory that an accelerator has allocated for tensors, or the resident memory of this process as Linux
    records it. `start=` counts from an earlier start.
    """

    def __init__(self, device: str | torch.device = "cpu", start: int | None = None) -> None:
        self._on_accelerator, self._given = torch.device(device).type != "cpu", start

    def __enter__(self) -> "PeakMemory":
        gc.collect()
        if self._on_accelerator:
            torch.accelerator.synchronize()
            torch.accelerator.reset_peak_memory_stats()
            self.start = torch.accelerator.memory_allocated() if self._given is None else self._given
            return self
        if not Path("/proc/self/clear_refs").exists():
            raise RuntimeError("Peak memory needs Linux, which records it in /proc/self, but this system does not.")
        with suppress(OSError, AttributeError):  # glibc: return freed memory first, or the start would count it
            ctypes.CDLL("libc.so.6").malloc_trim(0)
        self.start = int(psutil.Process().memory_info().rss) if self._given is None else self._given
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        return self

    def __exit__(self, *_: object) -> None:
        if self._on_accelerator:
            self.peak = torch.accelerator.max_memory_allocated() - self.start
            return
        status = Path("/proc/self/status").read_text()
        self.peak = 1024 * int(re.findall(r"^VmHWM:\s+(\d+) kB$", status, re.MULTILINE)[0]) - self.start
