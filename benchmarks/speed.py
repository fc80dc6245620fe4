"""Time packed weights on a CPU beside dense weights of the same dtype, and beside dense int8.

    python benchmarks/speed.py matrices --save benchmarks/results    (products of one token, with cold caches; 6 GB)
    python benchmarks/speed.py matrices --cold 0.1 --runs 5 --shapes 576x1536    (a small run, to try it out)
    python benchmarks/speed.py decoding --model MODEL --dtype bfloat16 --save benchmarks/results    (MODEL is dense)

`matrices` cycles through so many copies of each matrix that they exceed the caches (`--cold` GB of dense weights), and
runs the executions alternately. `decoding` sets the smallest weights of each row to zero and generates tokens greedily;
the output head stays dense. `int8` multiplies by dense int8 weights with one scale for each row (`_weight_int8pack_mm`
of PyTorch for bfloat16, dynamic quantization for float32). All numbers are medians.
"""

import argparse
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from result import Result, Runs, sparsity_of
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from wanda_lightning import CausalLMModule, accelerate_cpu
from wanda_lightning.acceleration.packed import PackedMatrix

SHAPES = ("576x1536", "1536x576", "2048x2048", "4096x4096", "4096x11008")
SPARSITIES = ("0.5", "0.6", "0.7", "2:4")
Product = Callable[[Tensor], Tensor]


def sparse(weight: Tensor, sparsity: str) -> Tensor:
    """Set the smallest weights of each row, or of each group of N:M, to zero."""
    group = int(sparsity.partition(":")[2] or weight.shape[1])
    keep = int(sparsity.partition(":")[0]) if ":" in sparsity else round((1 - float(sparsity)) * group)
    grouped = weight.reshape(-1, group)
    smallest = grouped.abs().topk(group - keep, largest=False).indices
    return grouped.scatter(1, smallest, 0.0).reshape(weight.shape)


def int8_product(weight: Tensor) -> Product:
    """Return a product with the weight in int8, one scale for each row."""
    if weight.dtype == torch.float32:
        layer = nn.Linear(*reversed(weight.shape), bias=False)
        layer.weight.data = weight
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # deprecated, but still the int8 of float32 in PyTorch
            return torch.ao.quantization.quantize_dynamic(nn.Sequential(layer), {nn.Linear})
    scales = weight.abs().amax(1).clamp(min=1e-12) / 127
    values = (weight / scales[:, None]).round().clamp(-127, 127).to(torch.int8)
    return lambda x: torch._weight_int8pack_mm(x.flatten(0, -2), values, scales).view(*x.shape[:-1], -1)


def time_matrices(options: argparse.Namespace) -> Table:
    """Time products with one token."""
    table = Table("matrix", "dtype", "zeros", "dense ms", "packed ms", "int8 ms", "dense / packed", "dense / int8")
    for shape in options.shapes:
        for dtype in (torch.float32, torch.bfloat16):
            for sparsity in options.sparsities:
                rows, columns = map(int, shape.split("x"))
                weight = sparse(torch.randn(rows, columns), sparsity).to(dtype)
                seconds = _time_products(weight, options)
                save_product(options, shape, str(dtype).removeprefix("torch."), sparsity, seconds)
                cells = [f"{1000 * each:.3f}" for each in seconds]
                ratios = [f"{seconds[0] / each:.2f}" for each in seconds[1:]]
                table.add_row(shape, str(dtype).removeprefix("torch."), sparsity, *cells, *ratios)
    return table


def save_product(options: argparse.Namespace, shape: str, dtype: str, sparsity: str, seconds: list[float]) -> None:
    """Save one row: the seconds with dense, packed and int8 weights."""
    dense, packed, int8 = seconds
    planned = Result(model=shape, method="packed", **sparsity_of(goal_of(sparsity)), case={"dtype": dtype})
    numbers = {"seconds": packed, "plain_seconds": dense, "ratio": packed / dense, "int8_seconds": int8}
    Runs(options.save, "products").save(planned, numbers)


def goal_of(sparsity: str) -> str:
    """Return a percentage for a fraction. N:M stays as it is."""
    return sparsity if ":" in sparsity else f"{100 * float(sparsity):g}"


def _time_products(weight: Tensor, options: argparse.Namespace) -> list[float]:
    copies = max(2, int(options.cold * 1e9 / weight.nbytes))
    dense = [weight.clone() for _ in range(copies)]
    packed = [PackedMatrix(weight) for _ in range(copies)]
    int8 = [int8_product(weight) for _ in range(copies)]
    x = torch.randn(1, weight.shape[1]).to(weight.dtype)
    times: tuple[list[float], ...] = ([], [], [])
    for run in range(max(options.runs, copies)):
        at = run % copies
        products: tuple[Product, ...] = (
            lambda x, at=at: F.linear(x, dense[at]),
            lambda x, at=at: packed[at].linear(x, None),
            int8[at],
        )
        for product, found in zip(products, times, strict=True):
            started = time.perf_counter()
            product(x)
            found.append(time.perf_counter() - started)
    return [median(found) for found in times]


class Int8(nn.Module):
    """A linear layer with int8 weights."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.product, self.bias = int8_product(layer.weight.data), layer.bias

    def forward(self, x: Tensor) -> Tensor:
        """Multiply."""
        return self.product(x) if self.bias is None else self.product(x) + self.bias


def time_decoding(options: argparse.Namespace) -> Table:
    """Time the generation of tokens after a short prompt."""
    models = [CausalLMModule(options.model, dtype=options.dtype).model.eval() for _ in range(3)]
    for model in models:
        for name, module in model.named_modules():
            if type(module) is nn.Linear and name != "lm_head":
                module.weight.data = sparse(module.weight.data, options.sparsity)
    accelerate_cpu(models[1])
    for name, module in list(models[2].named_modules()):
        if type(module) is nn.Linear and name != "lm_head":
            models[2].set_submodule(name, Int8(module))
    prompt = torch.arange(100, 116)[None]
    times: tuple[list[float], ...] = ([], [], [])
    for run in range(options.runs + 1):
        for model, found in zip(models, times, strict=True):
            seconds = [_generate(model, prompt, count) for count in (1, options.tokens + 1)]
            if run > 0:
                found.append((seconds[1] - seconds[0]) / options.tokens)
    table = Table("weights", "ms for a token", "tokens/s", "times dense", title=f"{options.dtype}, {options.sparsity}")
    dense = median(times[0])
    for name, found in zip(("dense", "packed", "int8"), times, strict=True):
        each = median(found)
        described = {"method": name, **sparsity_of(goal_of(options.sparsity)), "case": {"dtype": options.dtype}}
        planned = Result(model=Path(options.model).name, **described)
        Runs(options.save, "speed").save(planned, {"seconds": each, "tokens_per_second": 1 / each})
        table.add_row(name, f"{1000 * each:.1f}", f"{1 / each:.1f}", f"{dense / each:.2f}")
    return table


def _generate(model: nn.Module, prompt: Tensor, tokens: int) -> float:
    started = time.perf_counter()
    lengths = {"max_new_tokens": tokens, "min_new_tokens": tokens}
    mask = torch.ones_like(prompt)
    model.generate(prompt, attention_mask=mask, do_sample=False, pad_token_id=0, **lengths)  # type: ignore[operator]
    return time.perf_counter() - started


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("matrices", "decoding"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--runs", type=int, default=9, help="of each matrix at least as many as there are copies")
    parser.add_argument("--cold", type=float, default=1.5, help="GB of dense copies of each matrix")
    parser.add_argument("--shapes", nargs="+", default=SHAPES)
    parser.add_argument("--sparsities", nargs="+", default=SPARSITIES)
    parser.add_argument("--model")
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16"))
    parser.add_argument("--sparsity", default="0.6")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--save", help="FOLDER in which each run becomes a file")
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(options.threads)
    with torch.no_grad():
        table = time_matrices(options) if options.what == "matrices" else time_decoding(options)
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
