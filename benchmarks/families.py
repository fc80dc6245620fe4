"""Prune one small random model of every family in transformers and timm, check it, and write docs/models.md.

    PYTHONPATH=tests python benchmarks/families.py --only 'causal/qwen*' --resume families.json --write

`tests/support/families.py` says what is checked.
"""

import json
import logging
import re
import signal
import warnings
from collections import Counter
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch
import transformers as hf
from measuring import run_from_shell
from support.families import (
    ORDINARY,
    OWN_FILE,
    Result,
    check,
    check_units,
    first_line,
)
from support.zoo import KINDS, CannotBuild, family, matching, names
from tables import markdown

from wanda_lightning.report import versions

MINUTES = 10  # of processor time for a family
PAGE = Path(__file__).parents[1] / "docs" / "models.md"
SUMMARY = (
    "",
    "models",
    "pass",
    "fail",
    "cannot be built here",
    "median coverage",
    "coverage below 80 %",
    "hidden units found",
    "taken out",
    "folder loaded",
    "of these with a modeling file",
)
COLUMNS = (
    "family",
    "class",
    "coverage",
    "left dense",
    "slow",
    "units taken out",
    "parameters",
    "folder",
)


def table(*rows):
    """Return a table of Markdown; the first row is its head."""
    head, *others = [[str(cell).replace("<", "&lt;") for cell in row] for row in rows]
    return markdown(head, others, "---")


def document(results):
    """Return the text of docs/models.md, with the introduction that it has."""
    kinds = {}
    for kind in KINDS:
        members = [result for result in results if result.kind == kind]
        if members:
            kinds[kind] = sorted(members, key=lambda result: result.name)

    summary = table(SUMMARY, *((KINDS[kind], *_summary(kinds[kind])) for kind in kinds))
    lines = [_introduction(), summary, "", share(results)]
    for kind, members in kinds.items():
        passed = []
        others = []
        for result in members:
            if result.status == "passes":
                passed.append(_row(result))
            else:
                others.append((result.name, result.model, result.status, result.cause))

        lines += ["", f"## {KINDS[kind]}", ""]
        if others:
            lines += [table(("family", "class", "", "cause"), *others), ""]
        lines.append(table(COLUMNS, *passed))
    return "\n".join(lines) + "\n"


def _introduction():
    """Return the page above its first table, with the versions that are installed."""
    used = {name: version.partition("+")[0] for name, version in versions().items()}
    by = f"torch {used['torch']}, transformers {used['transformers']} and timm {used['timm']}"
    text = PAGE.read_text(encoding="utf-8").partition("\n|")[0]
    return re.sub("(?<=wrote this page with ).*(?=\\.$)", by, text, flags=re.MULTILINE)


def share(results):
    """Return the summary sentences."""
    total, passed, _, absent, *_, found, removed, loaded, _ = _summary(results)
    built = total - absent
    return (
        f"{passed} of {built} models that can be built pass: {passed / max(1, built):.1%}.\n"
        f"Of {total} models, hidden units are found for {found} ({found / total:.1%}), "
        f"taken out for {removed} ({removed / total:.1%}), loaded for {loaded} ({loaded / total:.1%})."
    )


def _summary(results):
    """Return the cells of `SUMMARY` after the first."""
    statuses = Counter(result.status for result in results)
    folders = Counter(result.folder for result in results)
    coverages = sorted(result.coverage for result in results if result.status == "passes")
    return [
        len(results),
        statuses["passes"],
        statuses["fails"],
        statuses["cannot be built here"],
        f"{coverages[len(coverages) // 2]:.0%}" if coverages else "",
        sum(coverage < 0.8 for coverage in coverages),
        sum(result.width > 0 for result in results),
        sum(0 < result.zero == result.removed for result in results),
        folders[ORDINARY] + folders[OWN_FILE],
        folders[OWN_FILE],
    ]


def _row(result):
    """Return the cells of `COLUMNS`."""
    reasons = [*result.left_out.items()][:2]
    return [
        result.name,
        result.model,
        f"{result.coverage:.0%}",
        "; ".join(f"{part:.0%} {reason}" for reason, part in reasons if part > 0.005),
        result.slow,
        f"{result.removed} of {result.width}" if result.width else "",
        f"-{result.smaller:.0%}" if result.removed else "",
        result.folder,
    ]


def examine(family):
    """Call both checks, and return errors as results."""
    result = Result(family.kind, family.name, family.model)
    try:
        result = check(family)
        with time_limit():
            check_units(family, result)
    except CannotBuild as error:
        result.cause = str(error)
        result.status = "cannot be built here"
    except Exception as error:
        if result.status == "passes":
            result.folder = first_line(error)
        else:
            result.cause = first_line(error)
    return result


@contextmanager
def time_limit():
    """Stop what takes too long."""

    def stop(*_):
        raise TimeoutError(f"not finished in {MINUTES} minutes of processor time")

    signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, 60 * MINUTES)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def main(
    *,
    only: Sequence[str] = ("*",),
    resume: Path | None = None,
    write: bool = False,
):
    """Examine the chosen families, in a process that continues after a crash, and print the summary.

    Args:
        only: Patterns of families, by kind/name.
        resume: JSON file of results: families in it are not examined again.
        write: Write docs/models.md.
    """
    warnings.simplefilter("ignore")
    hf.logging.set_verbosity_error()
    hf.logging.disable_progress_bar()
    logging.getLogger("wanda_lightning").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    results = {}
    if resume and resume.exists():
        results = json.loads(resume.read_text())

    def record(key, result):
        results[key] = asdict(result)
        if resume:
            resume.write_text(json.dumps(results, indent=1))

    families = {f"{kind}/{name}": (kind, name) for kind in KINDS for name in names(kind)}
    chosen = sorted(matching(families, only))
    for key in chosen:
        if key not in results:
            specimen = family(*families[key])
            # If the process crashes, this stays, and the next run continues with the next family.
            crashed = Result(specimen.kind, specimen.name, specimen.model, "the process crashed")
            record(key, crashed)
            result = examine(specimen)
            record(key, result)
            print(key, result, flush=True)

    done = [Result(**results[key]) for key in chosen]
    if write:
        PAGE.write_text(document(done), encoding="utf-8")
    print(share(done))


if __name__ == "__main__":
    run_from_shell(main)
