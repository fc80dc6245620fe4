"""Prune one small random model of every family in transformers and timm, check it, and write docs/models.md.

    PYTHONPATH=tests python benchmarks/families.py --only 'causal/qwen*' --resume families.json --write

`tests/support/families.py` says what is checked.
"""

from __future__ import annotations

import argparse
import json
import logging
import re
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from support.families import ORDINARY, OWN_FILE, Result, examine
from support.zoo import KINDS, family, matching, names

from wanda_lightning.report import versions

PAGE = Path(__file__).parents[1] / "docs" / "models.md"


def table(*rows: Sequence[object]) -> list[str]:
    """Return the lines of a table of Markdown; the first row is its head."""
    texts = [[str(cell).replace("|", "\\|").replace("<", "&lt;") for cell in row] for row in rows]
    texts.insert(1, ["---"] * len(texts[0]))
    return [f"| {' | '.join(row)} |" for row in texts]


def document(results: Sequence[Result]) -> str:
    """Return the text of docs/models.md, with the introduction that it has."""
    used = {name: version.partition("+")[0] for name, version in versions().items()}
    kinds = {kind: [result for result in results if result.kind == kind] for kind in KINDS}
    kinds = {kind: own for kind, own in kinds.items() if own}
    head = (
        "",
        "models",
        "pass",
        "fail",
        "cannot be built here",
        "median coverage",
        "coverage below 80 %",
    )
    head += ("hidden units found", "taken out", "folder loaded", "of these with a modeling file")
    summary = table(head, *((KINDS[kind], *_summary(own)) for kind, own in kinds.items()))
    by = f"torch {used['torch']}, transformers {used['transformers']} and timm {used['timm']}"
    introduction = PAGE.read_text(encoding="utf-8").partition("\n|")[0]
    introduction = re.sub(
        "(?<=wrote this page with ).*(?=\\.$)", by, introduction, flags=re.MULTILINE
    )
    lines = [introduction, *summary, "", share(results)]
    for kind, own in kinds.items():
        own.sort(key=lambda result: result.name)
        lines += ["", f"## {KINDS[kind]}", ""]
        if bad := [(r.name, r.model, r.status, r.cause) for r in own if r.status != "passes"]:
            lines += [*table(("family", "class", "", "cause"), *bad), ""]
        columns = (
            "family",
            "class",
            "coverage",
            "left dense",
            "slow",
            "units taken out",
            "parameters",
            "folder",
        )
        lines += table(columns, *(_row(result) for result in own if result.status == "passes"))
    return "\n".join(lines) + "\n"


def share(results: Sequence[Result]) -> str:
    """Return the summary sentences."""
    total, passed, _, absent, *_, found, removed, loaded, _ = _summary(results)
    passes = f"{passed} of {total - absent} models that can be built pass: {passed / max(1, total - absent):.1%}."
    each = [
        f"{verb} for {n} ({n / total:.1%})"
        for verb, n in (("found", found), ("taken out", removed))
    ]
    share = f"{loaded} ({loaded / total:.1%})"
    return f"{passes}\nOf {total} models, hidden units are {', '.join(each)}, loaded for {share}."


def _summary(results: Sequence[Result]) -> list[Any]:
    counts = Counter(result.status for result in results)
    coverages = sorted(result.coverage for result in results if result.status == "passes")
    median = f"{coverages[len(coverages) // 2]:.0%}" if coverages else ""
    each = [counts[status] for status in ("passes", "fails", "cannot be built here")]
    folders = Counter(result.folder for result in results)
    units = [sum(r.width > 0 for r in results), sum(0 < r.zero == r.removed for r in results)]
    units += [folders[ORDINARY] + folders[OWN_FILE], folders[OWN_FILE]]
    return [len(results), *each, median, sum(coverage < 0.8 for coverage in coverages), *units]


def _row(result: Result) -> list[str]:
    left = "; ".join(
        f"{part:.0%} {reason}" for reason, part in [*result.left_out.items()][:2] if part > 0.005
    )
    units = f"{result.removed} of {result.width}" if result.width else ""
    shown = [
        f"{result.coverage:.0%}",
        left,
        result.slow,
        units,
        f"-{result.smaller:.0%}" if result.removed else "",
    ]
    return [result.name, result.model, *shown, result.folder]


def main() -> None:
    """Examine the chosen families, in a process that continues after a crash, and print the summary."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--only", nargs="+", default=["*"], metavar="GLOB", help="which families, by kind/name"
    )
    parser.add_argument(
        "--resume", type=Path, help="JSON file of results: families in it are not examined again"
    )
    parser.add_argument("--write", action="store_true", help="write docs/models.md")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    hf.logging.set_verbosity_error()
    hf.logging.disable_progress_bar()
    logging.getLogger("wanda_lightning").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    results: dict[str, Any] = (
        json.loads(args.resume.read_text()) if args.resume and args.resume.exists() else {}
    )
    every = {f"{kind}/{name}": (kind, name) for kind in KINDS for name in names(kind)}
    chosen = {key: every[key] for key in sorted(matching(every, args.only))}

    def record(key: str, result: Result) -> None:
        results[key] = asdict(result)
        if args.resume:
            args.resume.write_text(json.dumps(results, indent=1))

    for key in [key for key in chosen if key not in results]:
        of = family(*chosen[key])
        # If the process crashes, this stays, and the next run continues with the next family.
        record(key, Result(of.kind, of.name, of.model, "the process crashed"))
        record(key, result := examine(of))
        print(key, result, flush=True)
    done = [Result(**results[key]) for key in chosen]
    if args.write:
        PAGE.write_text(document(done), encoding="utf-8")
    print(share(done))


if __name__ == "__main__":
    main()
