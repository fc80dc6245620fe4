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

import real_sizes
import tables
from result import OURS, read_drawn, read_table
from tables import REFERENCE, ROOT, lookup, markdown, number, percent, perplexity

from wanda_lightning import core, methods, training
from wanda_lightning.common.atomic_write import atomic_write

FILES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
PART = re.compile(r"(<!-- generated: ([^>]+?) -->\n).*?(<!-- /generated -->)", re.DOTALL)
GOALS = ("50 %", "60 %", "2:4")
IMAGE_MODEL = "efficientnet_lite0"
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


def claims():
    """What the package is good for, each with its number."""
    theirs = {(run.method, run.goal, run.code): run for run in read_table("reference")}
    single = lookup(read_table("methods"))
    ours = lookup(read_drawn("methods"))
    alps = theirs["alps", "50 %", "ALPS"]
    best = ours["best", "50 %"]
    same = perplexity(theirs["wanda", "50 %", REFERENCE])
    assert perplexity(single["wanda", "50 %"]) == same, "The first claim must be changed."

    differences = []
    for (method, goal, code), run in theirs.items():
        if code == REFERENCE:
            # Some of our runs repeat the exact setting of the reference; the usual table has the others.
            beside = theirs.get((method, goal, OURS)) or single[method, goal]
            differences.append(abs(run.measured["perplexity"] / beside.measured["perplexity"] - 1))

    photos = read_drawn("photos")
    (count,) = {run.calibration.windows for run in photos if run.calibration}
    top1 = {key: percent(run, "top1", 1) for key, run in lookup(photos).items()}

    lines = (
        "**Wanda gives the same masks as [the reference](https://github.com/locuslab/wanda)**, bit for bit, on the "
        f"tiny random models of the tests, and the same perplexity, {same} at 50 %. At 2:4 and with other methods, "
        f"[perplexities differ by up to {100 * max(differences):.0f} %](docs/measured.md#the-reference-code-and-alps). "
        "The two implementations break ties differently and sum in another order, which may explain it.",
        f"**Better models.** At 50 %, `best` has perplexity {perplexity(best)}, and "
        f"[ALPS](https://arxiv.org/abs/2406.07831), by its authors' code on the same texts, {perplexity(alps)} "
        "(one run).",
        f"**Images, too.** Calibrated on {count} images, EfficientNet-Lite0 without 60 % of its weights classifies "
        f"{top1['best', '60 %']} of 650 images of ImageNet correctly after `best`, and {top1['sparsegpt', '60 %']} "
        f"after SparseGPT (dense: {top1['dense', 'dense']}; standard error: 1.5 to 2 points). "
        "[Real images](docs/measured.md#real-images)",
        f"**No code for single families.** {families()}. [All of them](docs/models.md)",
    )
    return "\n".join(f"- {line}" for line in lines)


def families(page=ROOT / "docs" / "models.md"):
    """Return how many models were checked, and how many pass, from the page that benchmarks/families.py writes."""
    text = page.read_text(encoding="utf-8")
    (passed,) = re.findall(r"^(\d+ of \d+) models that can be built pass", text, re.M)
    causal, others, images = re.findall(
        r"^\| [^|]+ \| (\d+) \| \d+ \| \d+ \| \d+ \| \d+% \|", text, re.M
    )
    return (
        f"A small model, with random weights, of each of the {causal} families of causal language models in "
        f"transformers and the {images} modules of image models in timm, and of {others} other classes of "
        f"transformers, was pruned and checked: {passed} pass"
    )


def which():
    """The presets: what they do, when to choose them, what they give and cost."""
    ours = lookup(read_drawn("methods"))
    rows = []
    for preset, (does, when) in PRESETS.items():
        runs = [ours[preset, goal] for goal in GOALS]
        times = sorted(run.measured["seconds"] for run in runs)
        cells = [*map(perplexity, runs), f"{times[0]:.0f} to {times[-1]:.0f}"]
        rows.append([f"`{preset}`", does, when, *cells])
    table = markdown(("preset", "what it does", "when", *GOALS, "seconds"), rows)
    return table.replace("---: | ---:", "--- | ---", 1)  # two columns of text


def zeros():
    """What zeros are not good for."""
    ours = lookup(read_drawn("methods"))
    language = {}
    images = {}
    for run in tables.read_worth():
        zipped = images if run.model == IMAGE_MODEL else language
        zipped[run.method, run.goal] = number(run, "zstd_mib", ".1f")
        if run.model == IMAGE_MODEL and run.method == "dense":
            whole = number(run, "weights_mib", ".1f")

    lines = (
        "**Smaller files**: a safetensors file stores zeros like other numbers. `zstd -3` shrinks EfficientNet-Lite0 "
        f"from {whole} to {images['best', '50 %']} MiB after `best` at 50 %, and to "
        f"{images['dense', 'dense']} MiB without zeros. But SmolLM2, whose weights come from a 4-bit file, "
        f"is larger under `zstd -3` after `best` than the dense model: {language['best', '50 %']} and "
        f"{language['dense', 'dense']} MiB.",
        "**Speed**: dense kernels multiply by zeros, too, and no maintained runtime for x86 CPUs skips scattered "
        "zeros. On ARM and in WebAssembly, XNNPACK skips those of 1x1 convolutions from two thirds of zeros on ([which "
        "runtimes do](docs/questions.md#the-pruned-model-is-not-faster)). On NVIDIA GPUs, 2:4 on sparse tensor cores "
        "has [a recipe](docs/speed.md). Neither is measured.",
        f"**Quality**: even `thorough` raises perplexity from {perplexity(ours['dense', 'dense'])} to "
        f"{perplexity(ours['thorough', '50 %'])} at 50 %. Text unlike the calibration text [can lose "
        "more](docs/measured.md#other-calibration-windows-and-another-text).",
    )
    return "\n".join(f"- {line}" for line in lines)


def worth_short():
    """The rows of the comparison of size and speed that a reader of the front page needs."""
    methods = ("dense", "int8", "structured", "structured, fisher", "structured, longer")
    runs = []
    for run in tables.read_worth():
        is_shown = run.method in methods and run.goal in ("dense", "25 % of units")
        if is_shown and "perplexity" in run.measured:
            runs.append(run)
    assert len(runs) == len(methods), runs
    columns = ("perplexity", "weights_mib", "zstd_mib", "prefill_32", "decode_1")
    return tables.worth_table(runs, columns)


def demo_table():
    """The table of `make demo`, without its source."""
    return tables.demo().partition("\n\n")[0]


def training_costs():
    """What keeping zeros costs, and what training a pruned model gains."""
    (cost,) = (run for run in read_table("keeping_zeros") if run.method == "KeepZeros")
    assert cost.measured["ratio"] < 1.02, "The claim that it takes no time must be changed."

    tuned = {run.method: run for run in read_table("finetuning") if run.goal == "50 %"}
    full = tuned["full"]
    lora = tuned["keep-zeros-lora"]
    (steps,) = {re.search(r"--steps (\d+)", run.command)[1] for run in tuned.values()}
    return (
        "Keeping zeros takes no measurable time in a training step, and one byte of memory per weight for the masks. "
        f"On SmolLM2-135M-Instruct at 50 %, {steps} steps lower the perplexity from "
        f"{number(full, 'perplexity_before')} to {perplexity(full)} with all weights, and to {perplexity(lora)} with "
        "[adapters](lora.md). "
        "[Measured](measured.md#fine-tuning) has the settings."
    )


def adapters():
    """What adapters that keep zeros cost in a training step."""
    runs = {run.case.get("adapters", ""): run for run in read_table("keeping_zeros")}
    few = runs["q_proj, v_proj, dropout 0.05"]
    every = runs["all-linear, no dropout"]
    return (
        f"A training step takes {number(few, 'ratio', '.2f')} times as long as with PEFT's LoRA on `q_proj` and "
        f"`v_proj`, and {number(every, 'ratio', '.2f')} times on all linear layers "
        "([measured](measured.md#keeping-zeros-in-training))."
    )


def measured(*names):
    """Perplexity and seconds of methods."""
    ours = lookup(read_drawn("methods"))
    rows = []
    for name in names:
        cells = [tables.with_seconds(ours.get((name, goal))) for goal in GOALS]
        assert any(cells), name
        is_name = name in methods.METHODS or name in methods.PRESETS
        rows.append([f"`{name}`" if is_name else tables.LABELS[name], *cells])
    return markdown(("perplexity, seconds", *GOALS), rows)


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
    text = f"`{name}({', '.join(arguments)})`: {_first_paragraph(_class(name))}"
    return textwrap.fill(text, 132, break_long_words=False)


def names(*listed):
    """List public names with their members and summaries, which docs/conf.py replaces by whole docstrings."""
    rows = []
    for text in listed:
        name, *members = text.split(":")
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


FUNCTIONS = (
    claims,
    which,
    zeros,
    worth_short,
    demo_table,
    training_costs,
    adapters,
    measured,
    choices,
    card,
    names,
    real_sizes.at_your_size,
    real_sizes.size_runs,
    real_sizes.larger_models,
)
PARTS = {function.__name__: function for function in FUNCTIONS} | tables.FRAGMENTS


def fill(text):
    """Return a page with its parts written anew."""

    def write(part):
        start, heading, end = part.groups()
        name, *arguments = heading.split()
        return f"{start}{PARTS[name](*arguments)}\n{end}"

    return PART.sub(write, text)


def main():
    """Write all pages."""
    for file in FILES:
        text = file.read_text(encoding="utf-8")
        new = fill(text)
        if new != text:
            with atomic_write(file) as temporary:
                temporary.write_text(new, encoding="utf-8")


if __name__ == "__main__":
    main()
