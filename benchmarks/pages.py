"""Write the generated parts of README.md and of the documentation: tables of runs, and cards of methods.

    make results                     (runs this script and benchmarks/figures.py)

A part stands between `<!-- generated: NAME ARGUMENTS -->` and `<!-- /generated -->`; the function `PARTS[NAME]` returns
its text. Runs come from benchmarks/results, and everything else from the package itself, so nothing is copied by hand.
"""

import importlib
import inspect
import re
import textwrap
from dataclasses import fields
from functools import partial

from real_sizes import WINDOWS, extrapolated
from result import OURS, read_drawn, read_table
from tables import (
    GOALS,
    IMAGE_MODEL,
    LANGUAGE_MODEL,
    REFERENCE,
    ROOT,
    TABLES,
    lookup,
    markdown,
    measured,
    number,
    read_reference,
    read_worth,
    text,
)

from wanda_lightning import core, methods, training
from wanda_lightning.common.atomic_write import atomic_write

FILES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
PART = re.compile(r"(<!-- generated: ([^>]+?) -->\n).*?(<!-- /generated -->)", re.DOTALL)
CHOICES = ("criterion", "solver", "allocation", "recovery")
PRESETS = {
    "fast": ("Wanda in one pass", "a first look, or at most 50 %"),
    "balanced": ("mask and weights together, by ADMM", "most of the time"),
    "best": (
        "ADMM; layers and rows that matter more keep more weights",
        "50 % and more; at 2:4 hardly better than `balanced`",
    ),
    "thorough": (
        "`best`, then distillation from the dense model",
        "the last bit of quality, with memory to spare",
    ),
}
"""What each preset does, and when to choose it."""


def perplexity(method, goal="50 %"):
    """Return the perplexity of a method."""
    return number(lookup(read_drawn("methods"))[method, goal], "perplexity")


def claims():
    """What the package is good for, each with its number."""
    by_code = {OURS: {}, REFERENCE: {}}
    for run in read_reference():
        by_code[run.code][run.method, run.goal] = run
    differences = []
    for key, theirs in by_code[REFERENCE].items():
        ours = by_code[OURS][key]
        differences.append(abs(theirs.measured["perplexity"] / ours.measured["perplexity"] - 1))
    same, other = (number(runs["wanda", "50 %"], "perplexity") for runs in by_code.values())
    assert same == other, "The first claim must be changed."

    alps = lookup(run for run in read_table("reference") if run.code == "ALPS")["alps", "50 %"]
    photos = lookup(read_drawn("photos"))
    best = photos["best", "60 %"]
    top1 = {key: number(run, "top1") for key, run in photos.items()}
    lines = (
        "**Wanda gives the same masks as [the reference](https://github.com/locuslab/wanda)**, bit for bit, on the "
        f"tiny random models of the tests, and the same perplexity, {same} at 50 %. At 2:4 and with other methods, "
        f"[perplexities differ by up to {100 * max(differences):.0f} %](docs/measured.md#the-reference-code-and-alps). "
        "The two implementations break ties differently and sum in another order, which may explain it.",
        f"**Better models.** At 50 %, `best` has perplexity {perplexity('best')}, and "
        f"[ALPS](https://arxiv.org/abs/2406.07831), by its authors' code on the same texts, "
        f"{number(alps, 'perplexity')} (one run).",
        f"**Images, too.** Calibrated on {best.calibration.windows} images, EfficientNet-Lite0 without 60 % of its "
        f"weights classifies {top1['best', '60 %']} of 650 images of ImageNet correctly after `best`, and "
        f"{top1['sparsegpt', '60 %']} after SparseGPT (dense: {top1['dense', 'dense']}; standard error: 1.5 to 2 "
        "points). [Real images](docs/measured.md#real-images)",
        f"**No code for single families.** {families()} [All of them](docs/models.md)",
    )
    return "\n".join(f"- {line}" for line in lines)


def families(page=ROOT / "docs" / "models.md"):
    """Return how many models were checked, and how many pass, from the page that benchmarks/families.py writes."""
    rows = page.read_text(encoding="utf-8")
    (passed,) = re.findall(r"^(\d+ of \d+) models that can be built pass", rows, re.M)
    causal, others, images = re.findall(r"^\| [^|]+ \| (\d+) \| \d+ \| \d+ \|", rows, re.M)
    return (
        f"A small model, with random weights, of each of the {causal} families of causal language models in "
        f"transformers and the {images} modules of image models in timm, and of {others} other classes of "
        f"transformers, was pruned and checked: {passed} pass."
    )


def which():
    """The presets: what they do, when to choose them, what they give and cost."""
    ours = lookup(read_drawn("methods"))
    rows = []
    for preset, (does, when) in PRESETS.items():
        times = sorted(ours[preset, goal].measured["seconds"] for goal in GOALS)
        cells = [perplexity(preset, goal) for goal in GOALS]
        rows.append([f"`{preset}`", does, when, *cells, f"{times[0]:.0f} to {times[-1]:.0f}"])
    table = markdown(("preset", "what it does", "when", *GOALS, "seconds"), rows)
    return table.replace("---: | ---:", "--- | ---", 1)  # two columns of text


def zeros():
    """What zeros are not good for."""
    language = lookup(read_worth(LANGUAGE_MODEL))
    images = lookup(read_worth(IMAGE_MODEL))
    dense = ("dense", "dense")
    best = ("best", "50 %")
    lines = (
        "**Smaller files**: a safetensors file stores zeros like other numbers. `zstd -3` shrinks EfficientNet-Lite0 "
        f"from {number(images[dense], 'weights_mib')} to {number(images[best], 'zstd_mib')} MiB after `best` at 50 %, "
        f"and to {number(images[dense], 'zstd_mib')} MiB without zeros. But SmolLM2, whose weights come from a 4-bit "
        "file, is larger under `zstd -3` after `best` than the dense model: "
        f"{number(language[best], 'zstd_mib')} and {number(language[dense], 'zstd_mib')} MiB.",
        "**Speed**: dense kernels multiply by zeros, too, and no maintained runtime for x86 CPUs skips scattered "
        "zeros. On ARM and in WebAssembly, XNNPACK skips those of 1x1 convolutions from two thirds of zeros on ([which "
        "runtimes do](docs/questions.md#the-pruned-model-is-not-faster)). On NVIDIA GPUs, 2:4 on sparse tensor cores "
        "has [a recipe](docs/speed.md). Neither is measured.",
        f"**Quality**: even `thorough` raises perplexity from {perplexity(*dense)} to {perplexity('thorough')} at "
        "50 %. Text unlike the calibration text [can lose "
        "more](docs/measured.md#other-calibration-windows-and-another-text).",
    )
    return "\n".join(f"- {line}" for line in lines)


def larger_models():
    """What pruning Llama 2 7B takes, in one paragraph."""
    plain, *runs = (run for run in extrapolated() if run.model == "Llama 2 7B")
    times = []
    memory = []
    disk = []
    for run in runs:
        passes = f"{number(run, 'total')} forward passes with `{run.method}`"
        times.append(f"{passes} ({number(run, 'hours')} hours of one CPU core)")
        memory.append(f"{number(run, 'beside_gib')} with `{run.method}`")
        if "disk_gib" in run.measured:
            disk.append(f"{number(run, 'disk_gib')} with `{run.method}`")
    return (
        f"Pruning Llama 2 7B in bfloat16 with the default {WINDOWS} windows of 2,048 tokens takes as long as "
        f"{', '.join(times)}. It needs {number(plain, 'memory_gib')} GiB for the weights, and beside them, in GiB, "
        f"{', '.join(memory)}. With `--stream`, the whole process needs {', '.join(disk)} GiB; `best` needs the model "
        "in memory, unless the pattern is N:M."
    )


def choices(table):
    """What the names in a table of methods stand for."""
    rows = []
    for name, method in getattr(methods, table).items():
        made = {part: getattr(method, part)() for part in CHOICES if getattr(method, part)}
        shown = {part: _short(made[part]) if part in made else "its own" for part in CHOICES}
        group = method.group
        if not group:
            solver = made["solver"]
            group = solver.group(made.get("criterion", solver.own_criterion))
        cells = [shown["criterion"], shown["solver"], shown["allocation"], shown["recovery"]]
        within = group.replace("_", ", rows ")
        rows.append([f"`{name}`", *cells, within, f"`{method.sequential}`"])
    headings = ("name", "criterion", "solver", "allocation", "also", "within", "sequential")
    return markdown(headings, rows, "---")


def _short(choice):
    """Return a choice with the hyperparameters that are not the defaults of its class; nothing if it does nothing."""
    name = type(choice).__name__
    if name.startswith("No"):
        return ""
    usual = type(choice)()
    arguments = []
    for field in fields(choice):
        value = getattr(choice, field.name)
        if value != getattr(usual, field.name):
            arguments.append(f"{field.name}={value!r}")
    return f"`{name}({', '.join(arguments)})`" if arguments else f"`{name}`"


def card(name):
    """How an object of a class is made, and what it does."""
    arguments = []
    for parameter in inspect.signature(_class(name)).parameters.values():
        is_required = parameter.default is parameter.empty
        default = "" if is_required else f"={parameter.default!r}"
        arguments.append(f"{parameter.name}{default}")
    line = f"`{name}({', '.join(arguments)})`: {_first_paragraph(_class(name))}"
    return textwrap.fill(line, 132, break_long_words=False)


def names(*listed):
    """List public names with their members and summaries, which docs/conf.py replaces by whole docstrings."""
    rows = []
    for listed_name in listed:
        name, *members = listed_name.split(":")
        shown = " ".join(f"`{member}`" for member in members)
        rows.append([f"`wanda_lightning.{name}`", shown, _summary(name)])
    return markdown(("name", "members", "what it is"), rows, "---")


def _class(name):
    """Return a class that a user chooses, from the room that has it."""
    return getattr(core, name, None) or getattr(training, name)


def _summary(name):
    module, _, public = f"wanda_lightning.{name}".rpartition(".")
    return _first_paragraph(getattr(importlib.import_module(module), public))


def _first_paragraph(documented):
    """Return the first paragraph of a docstring, in one line."""
    docstring = inspect.getdoc(documented) or ""
    return " ".join(docstring.split("\n\n")[0].split())


FUNCTIONS = (claims, which, zeros, larger_models, measured, choices, card, names)
PARTS = {function.__name__: function for function in FUNCTIONS}
PARTS |= {name: partial(text, name) for name in TABLES}


def fill(page):
    """Return a page with its parts written anew."""

    def write(part):
        start, heading, end = part.groups()
        name, arguments = named(heading)
        return f"{start}{PARTS[name](*arguments)}\n{end}"

    return PART.sub(write, page)


def named(heading):
    """Return the name of a part, which may have a space, and its arguments."""
    name, *arguments = heading.split()
    return (heading, []) if heading in PARTS else (name, arguments)


def main():
    """Write all pages."""
    for file in FILES:
        page = file.read_text(encoding="utf-8")
        new = fill(page)
        if new != page:
            with atomic_write(file) as temporary:
                temporary.write_text(new, encoding="utf-8")


if __name__ == "__main__":
    main()
