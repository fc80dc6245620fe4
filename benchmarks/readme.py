"""Write the numbers in README.md and in the prose of the documentation from the runs in benchmarks/results.

    make results                     (runs benchmarks/tables.py, this script and benchmarks/figures.py)

Each function in `PARTS` returns the text between `<!-- results: NAME -->` and `<!-- /results -->`.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import tables
from result import Result, read_table
from tables import ROOT, Lookup, lookup, markdown, number, perplexity, seconds, write

FILES = (ROOT / "README.md", ROOT / "docs" / "train.md", ROOT / "docs" / "lora.md")
PART = re.compile(r"(<!-- results: (\w+) -->\n).*?(<!-- /results -->)", re.DOTALL)
PRESETS = {
    "fast": ("Wanda in one pass", "a first look, or at most 50 %"),
    "balanced": ("mask and weights together, by ADMM", "most of the time"),
    "best": ("ADMM; layers and rows that matter more keep more weights", "more than 50 %, or 2:4"),
    "thorough": ("`best`, then distillation from the dense model", "the last bit of quality, with memory to spare"),
}
"""What each preset does, and when to choose it."""


def claims() -> str:
    """What the package is good for, each with its number."""
    theirs = {(r.method, r.goal, r.code): r for r in read_table("reference")}
    ours, reference, alps = lookup(read_table("methods")), "locuslab/wanda", theirs["alps", "50 %", "ALPS"]
    wanda, best, dense = ours["wanda", "50 %"], ours["best", "50 %"], ours["dense", "dense"]
    tuned = next(r for r in read_table("finetuning") if (r.method, r.goal) == ("keep-zeros-lora", "50 %"))
    same = perplexity(theirs["wanda", "50 %", reference])
    if perplexity(wanda) != same:
        raise ValueError(f"The claim that both codes have one perplexity must be changed: {perplexity(wanda)}, {same}.")
    lines = (
        "**The reference's masks, bit for bit**, in the tests, which compare with files that the reference code wrote. "
        f"On WikiText-2, Wanda at 50 % has perplexity {same} in both codes (dense: {perplexity(dense)}); where "
        "calibration rounds differently, other methods differ a little. [All comparisons](docs/results/reference.md)",
        f"**Better models for the time.** At 50 %, `best` has perplexity {perplexity(best)} after {seconds(best)} s; "
        f"ALPS, with one sparsity for all layers, has {perplexity(alps)} after {seconds(alps)} s with its authors' "
        "code on a machine of the same kind, and the reference's SparseGPT "
        f"{perplexity(theirs['sparsegpt', '50 %', reference])}. [All methods](docs/results/methods.md)",
        f"**Any family of models.** {families()} families of transformers and timm can be pruned, without code for any "
        "of them: a small model of each was pruned and checked. [All families](docs/models.md)",
        "**Zeros that stay zero.** 200 steps of LoRA on the Wanda model lower its perplexity from "
        f"{number(tuned, 'perplexity_before')} to {perplexity(tuned)}, and after the merge the same weights are zero. "
        "[Training](docs/train.md)",
    )
    return "\n".join(f"- {line}" for line in lines)


def families(page: Path = ROOT / "docs" / "models.md") -> str:
    """Return how many families pass, such as `359 of 359`, from the page that tests/support/families.py writes."""
    (passed,) = re.findall(r"^(\d+ of \d+) families that can be built pass", page.read_text(encoding="utf-8"), re.M)
    return passed


def which() -> str:
    """The presets: what they do, when to choose them, what they give and cost."""
    ours, goals = lookup(read_table("methods")), ("50 %", "60 %", "2:4")
    rows = []
    for preset, (does, when) in PRESETS.items():
        runs = [ours[preset, goal] for goal in goals]
        times = sorted(run.measured["seconds"] for run in runs)
        cells = [*map(perplexity, runs), f"{times[0]:.0f} to {times[-1]:.0f}"]
        rows.append([f"`{preset}`", does, when, *cells])
    return markdown(("preset", "what it does", "when", *goals, "seconds"), rows).replace("---: | ---:", "--- | ---", 1)


def zeros() -> str:
    """What zeros are not good for."""
    ours: Lookup = lookup(read_table("methods"))
    sizes = (r for r in read_table("file_size") if r.model == "efficientnet_lite0" and r.case["dtype"] == "bfloat16")
    small = {result.goal: result for result in sizes}
    lines = (
        "**Smaller files**: a safetensors file stores zeros like other numbers. `zstd -3` compresses "
        f"EfficientNet-Lite0 in bfloat16 to {number(small['50 %'], 'zstd_3', '.2f')} of its bytes with 50 % zeros, and "
        f"to {number(small['dense'], 'zstd_3', '.2f')} without; the file must be decompressed before it is loaded. "
        "8-bit quantization takes 0.50.",
        "**Speed**: dense kernels multiply by zeros, too. On a CPU, nothing is gained: dense 8-bit weights are as fast "
        "as a kernel for sparse ones was, and the better model ([tried](docs/tried.md)). For NVIDIA GPUs, 2:4 on "
        "sparse tensor cores is [built in](docs/speed.md), but not measured.",
        f"**Quality**: even `thorough` raises perplexity from {perplexity(ours['dense', 'dense'])} to "
        f"{perplexity(ours['thorough', '50 %'])} at 50 %. All these numbers are for one small model, one seed and "
        "8 thousand calibration tokens.",
    )
    return "\n".join(f"- {line}" for line in lines)


def demo() -> str:
    """The table of `make demo`, without its source."""
    return tables.demo().partition("\n\n")[0]


def training() -> str:
    """What keeping zeros costs, and what training a pruned model gains."""
    cost = _only(r for r in read_table("keeping_zeros") if r.method == "KeepZeros")
    if cost.measured["ratio"] > 1.02:
        raise ValueError(f"The claim that keeping zeros takes no time must be changed: {number(cost, 'ratio')}.")
    tuned = {r.method: r for r in read_table("finetuning") if r.goal == "50 %"}
    full, lora = tuned["full"], tuned["keep-zeros-lora"]
    (steps,) = {re.search(r"--steps (\d+)", r.command)[1] for r in tuned.values()}
    return (
        "Keeping zeros takes no measurable time in a training step, and one byte of memory per weight for the masks. "
        f"On SmolLM2-135M-Instruct at 50 %, {steps} steps lower the perplexity from "
        f"{number(full, 'perplexity_before')} to {perplexity(full)} with all weights, and to {perplexity(lora)} with "
        "[adapters](lora.md). "
        "[Measured](measured.md#fine-tuning) has the settings."
    )


def adapters() -> str:
    """What adapters that keep zeros cost in a training step."""
    runs = {r.case["adapters"]: r for r in read_table("keeping_zeros") if "adapters" in r.case}
    few, every = (
        _only(r for name, r in runs.items() if name.startswith(of)) for of in ("q_proj, v_proj", "all-linear")
    )
    return (
        f"A training step takes {number(few, 'ratio', '.2f')} times as long as with PEFT's LoRA on `q_proj` and "
        f"`v_proj`, and {number(every, 'ratio', '.2f')} times on all linear layers "
        "([measured](measured.md#keeping-zeros-in-training))."
    )


def _only(results: Iterable[Result]) -> Result:
    (result,) = results
    return result


PARTS: Mapping[str, Callable[[], str]] = {
    "demo": demo,
    "claims": claims,
    "which": which,
    "zeros": zeros,
    "training": training,
    "adapters": adapters,
}


def fill(text: str) -> str:
    """Return the text of a file with its parts written anew."""
    return PART.sub(lambda found: f"{found[1]}{PARTS[found[2]]()}\n{found[3]}", text)


if __name__ == "__main__":
    write({file: fill(file.read_text(encoding="utf-8")) for file in FILES})
