"""Write the generated parts of README.md and of the documentation: tables of runs, options, and cards of methods.

    make results                     (runs this script and benchmarks/figures.py)

A part stands between `<!-- generated: NAME ARGUMENTS -->` and `<!-- /generated -->`; the function `PARTS[NAME]` returns
its text. Runs come from benchmarks/results, and everything else from the package itself, so nothing is copied by hand.
"""

import inspect
import re
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from statistics import mean
from typing import Any

import tables
from larger import larger
from result import Result, read_table
from tables import ROOT, Lookup, lookup, markdown, number, percent, perplexity, seconds

import wanda_lightning
from wanda_lightning import methods
from wanda_lightning.cli.options import OPTIONS
from wanda_lightning.cli.parser import default_of, default_text, flags_of
from wanda_lightning.common.write_whole import whole_file

FILES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
PART = re.compile(r"(<!-- generated: ([^>]+?) -->\n).*?(<!-- /generated -->)", re.DOTALL)
GOALS = ("50 %", "60 %", "2:4")
CHOICES = ("criterion", "solver", "allocation", "recovery", "permutation")
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
    pairs = {
        key: f"{perplexity(ours[key])}, theirs {perplexity(theirs[(*key, reference)])}"
        for key in (("magnitude", "50 %"), ("sparsegpt", "2:4"))
    }
    photos = lookup(read_table("photos"))
    top1 = {key: percent(run, "top1", 1) for key, run in photos.items()}
    lines = (
        "**Wanda gives the same masks as [the reference](https://github.com/locuslab/wanda)**, the code of the paper's "
        "authors, bit for bit, on the tiny random models of the tests. On WikiText-2, "
        f"Wanda at 50 % has perplexity {same} in both codes (dense: {perplexity(dense)}). SparseGPT at 2:4 "
        f"({pairs['sparsegpt', '2:4']}) and magnitude at 50 % ({pairs['magnitude', '50 %']}) differ, by the order of "
        "sums and by ties. [Why](docs/measured.md#the-reference-code-and-alps)",
        f"**Better models for the time.** At 50 %, `best` has perplexity {perplexity(best)} after {seconds(best)} s; "
        f"[ALPS](https://arxiv.org/abs/2406.07831), with one sparsity for all layers, has {perplexity(alps)} after "
        f"{seconds(alps)} s with its authors' code on another machine of the same kind, one run each. The reference's "
        "SparseGPT has "
        f"{perplexity(theirs['sparsegpt', '50 %', reference])}. [All methods](docs/measured.md#all-methods)",
        f"**Images, too.** With half of its weights, EfficientNet-Lite0 classifies {top1['best', '50 %']} of 650 "
        f"images of ImageNet correctly after `best`, and {top1['sparsegpt', '50 %']} after SparseGPT (dense: "
        f"{top1['dense', 'dense']}); with 70 % zeros, {top1['best', '70 %']} and {top1['sparsegpt', '70 %']}. The "
        "standard error is 1.5 to 2 points. At 2:4, `thorough` has "
        f"{top1['thorough', '2:4']} and SparseGPT {top1['sparsegpt', '2:4']}. "
        "[Real images](docs/measured.md#real-images)",
        f"**No code for single families.** {families()}. [All of them](docs/models.md)",
        "**Zeros that stay zero.** 200 steps of LoRA on the Wanda model lower its perplexity from "
        f"{number(tuned, 'perplexity_before')} to {perplexity(tuned)}, and after the merge the same weights are zero. "
        "[Training](docs/train.md)",
    )
    return "\n".join(f"- {line}" for line in lines)


def families(page: Path = ROOT / "docs" / "models.md") -> str:
    """Return how many models were checked, and how many pass, from the page that tests/support/families.py writes."""
    text = page.read_text(encoding="utf-8")
    (passed,) = re.findall(r"^(\d+ of \d+) models that can be built pass", text, re.M)
    causal, others, images = re.findall(r"^\| [^|]+ \| (\d+) \| \d+ \| \d+ \| \d+ \| \d+% \|", text, re.M)
    return (
        f"A small model, with random weights, of each of the {causal} families of causal language models in "
        f"transformers and the {images} modules of image models in timm, and of {others} other classes of "
        f"transformers, was pruned and checked: {passed} pass"
    )


def which() -> str:
    """The presets: what they do, when to choose them, what they give and cost."""
    ours = lookup(read_table("methods"))
    rows = []
    for preset, (does, when) in PRESETS.items():
        runs = [ours[preset, goal] for goal in GOALS]
        times = sorted(run.measured["seconds"] for run in runs)
        cells = [*map(perplexity, runs), f"{times[0]:.0f} to {times[-1]:.0f}"]
        rows.append([f"`{preset}`", does, when, *cells])
    return markdown(("preset", "what it does", "when", *GOALS, "seconds"), rows).replace("---: | ---:", "--- | ---", 1)


def other_windows() -> str:
    """How the number of calibration windows, their draw, and the text that is measured on change the perplexity."""
    runs = lookup(run for run in read_table("windows") if run.case.get("windows") == 64)
    more = [f"{perplexity(runs['thorough', goal])} at {goal}" for goal in GOALS]
    draws, usual = read_table("draws"), lookup(read_table("methods"))
    best = {
        goal: [r.measured["perplexity"] for r in (usual["best", goal], *draws) if (r.method, r.goal) == ("best", goal)]
        for goal in GOALS
    }
    ranges = [f"{min(values):.1f} to {max(values):.1f} at {goal}" for goal, values in best.items()]
    at_half = [run for run in draws if run.goal in ("50 %", "dense")]
    docs = {
        name: f"{mean(run.measured['perplexity_second'] for run in at_half if run.method == name):#.4g}"
        for name in ("dense", "sparsegpt", *PRESETS)
    }
    three = "{}, {} and {}"
    return (
        f"With 64 windows instead of 16, `thorough` has a perplexity of {three.format(*more)}. Over "
        f"{len(best['50 %'])} draws of 16 windows, the perplexity of `best` ranges from {three.format(*ranges)}. On "
        "Python's documentation, which is unlike the calibration text, updating weights can do harm: at 50 %, "
        f"SparseGPT has a perplexity of {docs['sparsegpt']} and `balanced` {docs['balanced']}, but `fast`, which "
        f"updates none, {docs['fast']}. `best` ({docs['best']}) and `thorough` ({docs['thorough']}) are still better "
        f"(dense: {docs['dense']}; means of two draws). "
        "[Draws and texts](docs/measured.md#other-calibration-windows-and-another-text)"
    )


def zeros() -> str:
    """What zeros are not good for."""
    ours: Lookup = lookup(read_table("methods"))
    sizes = (r for r in read_table("file_size") if r.model == "efficientnet_lite0" and r.case["dtype"] == "bfloat16")
    small = {result.goal: result for result in sizes}
    lines = (
        "**Smaller files**: a safetensors file stores zeros like other numbers. `zstd -3` compresses "
        f"EfficientNet-Lite0 in bfloat16 to {number(small['50 %'], 'zstd_3', '.2f')} of its bytes with 50 % zeros by "
        f"magnitude, and to {number(small['dense'], 'zstd_3', '.2f')} without; the file must be decompressed before "
        "it is loaded.",
        "**Speed**: dense kernels multiply by zeros, too. On a CPU, nothing is gained: dense 8-bit weights are as fast "
        "as a kernel for sparse ones was, and give the better model ([tried](docs/tried.md)). For NVIDIA GPUs, 2:4 on "
        "sparse tensor cores has [a recipe](docs/speed.md), but is not measured.",
        f"**Quality**: even `thorough` raises perplexity from {perplexity(ours['dense', 'dense'])} to "
        f"{perplexity(ours['thorough', '50 %'])} at 50 %. These perplexities are for one small model and one draw "
        "of 8 thousand calibration tokens; [other draws](docs/measured.md#other-calibration-windows-and-another-text) "
        "change those at 50 % by 1 to 3 %.",
    )
    return "\n".join(f"- {line}" for line in lines)


def worth_short() -> str:
    """The rows of the comparison of size and speed that a reader of the front page needs."""
    units = dict.fromkeys(("structured", "structured, fisher", "structured, distilled"), "25 % of units")
    chosen = {"dense": "dense", "int8": "dense", **units}
    runs = [r for r in read_table("worth") if "perplexity" in r.measured and chosen.get(r.method) == r.goal]
    if len(runs) < len(chosen):
        raise ValueError(f"The table needs the runs {list(chosen)}, but there are {[run.method for run in runs]}.")
    return tables.worth_table(runs, ("perplexity", "weights_mib", "zstd_mib", "prefill_32", "decode_1", "seconds"))


def demo_table() -> str:
    """The table of `make demo`, without its source."""
    return tables.demo().partition("\n\n")[0]


def training_costs() -> str:
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


def measured(*names: str) -> str:
    """Perplexity and seconds of methods."""
    ours = lookup(read_table("methods"))
    rows = []
    for name in names:
        cells = []
        for goal in GOALS:
            run = ours.get((name, goal))
            taken = seconds(run)
            cells.append(f"{perplexity(run)}, {taken} s" if taken else perplexity(run))
        if not any(cells):
            raise ValueError(f"benchmarks/results/methods has no run of {name!r}.")
        chosen = name in methods.METHODS or name in methods.PRESETS
        rows.append([f"`{name}`" if chosen else tables.LABELS[name], *cells])
    return markdown(("perplexity, seconds", *GOALS), rows)


def choices(table: str) -> str:
    """What the names in a table of methods stand for."""
    rows = []
    for name, method in getattr(methods, table).items():
        made = {part: make() for part in CHOICES if (make := getattr(method, part))}
        shown = {part: _short(made[part]) if part in made else "its own" for part in CHOICES}
        also = ", ".join(filter(None, (shown.pop("permutation"), shown.pop("recovery"))))
        group = method.group or made["solver"].group(made.get("criterion", made["solver"].own_criterion))
        rows.append([f"`{name}`", *shown.values(), also, group.replace("_", ", rows "), f"`{method.sequential}`"])
    return _text_table(("name", "criterion", "solver", "allocation", "also", "within", "sequential"), rows)


def _short(choice: Any) -> str:
    """Return a choice with the hyperparameters that are not the defaults of its class; nothing if it does nothing."""
    name = type(choice).__name__
    if name.startswith("No"):
        return ""
    usual = type(choice)()
    given = {each.name: getattr(choice, each.name) for each in fields(choice)}
    shown = [f"{key}={value!r}" for key, value in given.items() if value != getattr(usual, key)]
    return f"`{name}({', '.join(shown)})`" if shown else f"`{name}`"


def options(command: str) -> str:
    """The options of a command."""
    rows = []
    for each in fields(OPTIONS[command]):
        default = default_text(each)
        shown = "required" if default_of(each) is MISSING else f"`{default}`" if default else ""
        flags = ", ".join(f"`{flag}`" for flag in flags_of(each))
        rows.append([flags, shown, each.metadata["help"].replace("*", "\\*")])
    return _text_table(("option", "default", "meaning"), rows)


def _text_table(headings: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Return a table with all columns aligned to the left."""
    lines = [list(headings), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def card(name: str) -> str:
    """How an object of a class is made, what it does, and what its attributes mean."""
    cls = getattr(wanda_lightning, name)
    arguments = [
        each.name if each.default is each.empty else f"{each.name}={each.default!r}"
        for each in inspect.signature(cls).parameters.values()
    ]
    text, _, attributes = (inspect.getdoc(cls) or "").partition("\n\nAttributes:\n")
    text = re.split(r"\n\n(?:Args|Raises|Example|Yields|Returns):\n", text)[0]
    attributes = re.split(r"\n\n\w+:\n", attributes)[0]
    items = re.findall(r"^    (\w+): (.*?)(?=^    \w+: |\Z)", attributes, re.DOTALL | re.MULTILINE)
    listed = [f"- `{attribute}`: {' '.join(meaning.split())}" for attribute, meaning in items]
    made = f"`{name}({', '.join(arguments)})`"
    return "\n\n".join(filter(None, [made, *map(_filled, text.split("\n\n")), "\n".join(map(_filled, listed))]))


def _filled(paragraph: str) -> str:
    """Wrap a paragraph as the pages are wrapped; code blocks and lists stay."""
    if paragraph.startswith((" ", "-")) and "\n" in paragraph:
        return paragraph
    indent = "  " if paragraph.startswith("- ") else ""
    return textwrap.fill(" ".join(paragraph.split()), 132, subsequent_indent=indent, break_long_words=False)


PARTS: Mapping[str, Callable[..., str]] = {
    "claims": claims,
    "which": which,
    "other_windows": other_windows,
    "zeros": zeros,
    "worth_short": worth_short,
    "demo_table": demo_table,
    "training_costs": training_costs,
    "adapters": adapters,
    "measured": measured,
    "choices": choices,
    "options": options,
    "card": card,
    "larger": larger,
    **tables.FRAGMENTS,
}


def parts(text: str) -> Iterator[str]:
    """Yield the name and the arguments of each generated part of a page."""
    yield from (name for _, name, _ in PART.findall(text))


def fill(text: str) -> str:
    """Return a page with its parts written anew."""

    def part(found: re.Match[str]) -> str:
        name, *arguments = found[2].split()
        return f"{found[1]}{PARTS[name](*arguments)}\n{found[3]}"

    return PART.sub(part, text)


def main() -> None:
    """Write all pages."""
    for file in FILES:
        text = file.read_text(encoding="utf-8")
        if (new := fill(text)) != text:
            with whole_file(file) as temporary:
                temporary.write_text(new, encoding="utf-8")


if __name__ == "__main__":
    main()
