"""The model card of a pruned model: method, results, and code that loads the model."""

from __future__ import annotations

import json
import os
import re
from dataclasses import asdict, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from wanda_lightning.common import wording
from wanda_lightning.common.atomic_write import atomic_write
from wanda_lightning.report import Circumstances, PruningReport, descriptions
from wanda_lightning.report.descriptions import METRICS, TOP1
from wanda_lightning.report.records import as_json, from_parsed

PICTURE_NAME = "pruning_report.png"
_MARK = (
    "<!-- Written by wanda_lightning, which may replace this file as long as it has this line. -->"
)
_FOLDERS = re.compile(r"(?<![\w./~-])~?/(?:[^\s,'\"/]+/)*(?=[^\s,'\"/])")  # of absolute paths


def write_card(
    folder: str | os.PathLike[str],
    report: PruningReport,
    *,
    name: str | os.PathLike[str],
    on_hub: bool = False,
    trained_steps: int = 0,
) -> None:
    """Write the model card, and a picture if matplotlib is installed, into the folder of a saved model.

    A README.md that this function did not write is not replaced. Folders of this machine are left out. The model is
    loaded by `name`, a path or an id on the hub. `trained_steps` is the number of optimizer steps of the run that
    pruned the model.
    """
    from huggingface_hub import ModelCard, ModelCardData

    folder = Path(folder).expanduser()
    name = os.fspath(name)
    path = folder / "README.md"
    config = folder / "config.json"
    if path.exists() and _MARK not in path.read_text(encoding="utf-8", errors="replace"):
        return
    given = report.run or Circumstances()
    base = given.model.removeprefix("timm:").removeprefix("hf-hub:")
    # No id on the hub, or a file.
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", base) or Path(base).exists():
        base = ""
    # Without folders of this machine, and without results that are not finite, which become None.
    run = from_parsed(Circumstances, json.loads(_FOLDERS.sub("", as_json(asdict(given)))))
    run = replace(run, samples=given.samples)
    report = replace(report, run=run)
    has_picture = find_spec("matplotlib") is not None and not report.shrunk
    if has_picture:
        report.save(folder / PICTURE_NAME)
    library, task, code = _loading(
        json.loads(config.read_bytes()) if config.exists() else {}, name, on_hub
    )
    rows, results = _results(run)
    method = descriptions.choices_of(report.config).partition(",")[0].lower()
    data = ModelCardData(
        base_model=base or None,
        library_name=library,
        pipeline_tag=task,
        tags=[
            "pruned",
            *([] if report.shrunk else ["sparse"]),
            "wanda_lightning",
            *filter(None, [method]),
        ],
        model_name=Path(name).name if results else None,
        eval_results=results or None,
    )
    settings = {
        "Method": descriptions.method_in_words(report.config),
        "Calibration data": run.calibration,
        "Time": wording.duration(report.total_seconds),
        "Versions": ", ".join(
            f"{name} {found}" for name, found in report.versions.items() if found[0].isdigit()
        ),
    }
    values: dict[str, Any] = {
        **{
            "mark": _MARK,
            "title": Path(name).name,
            "base": base,
            "rows": rows,
            "code": code,
            "settings": settings,
        },
        **{"report": report, "run": run, "trained_steps": trained_steps, "escaped": _escaped},
        **{
            "picture": PICTURE_NAME if has_picture else "",
            "wording": wording,
            "descriptions": descriptions,
        },
    }
    card = ModelCard.from_template(
        data, template_path=str(Path(__file__).with_name("card.md")), **values
    )
    with atomic_write(path) as temporary:
        temporary.write_text(f"{card}\n", encoding="utf-8")


def _results(run: Circumstances) -> tuple[list[tuple[str, ...]], list[Any]]:
    """Return the measured results as rows of a table, and as metadata of the hub."""
    from huggingface_hub import EvalResult

    rows: list[tuple[str, ...]] = []
    results = []
    for each in run.results:
        metric = METRICS[run.metric]
        rows.append(
            (
                ", ".join(filter(None, (metric.title, each.data))),
                *map(metric.text, (each.before, each.after)),
            )
        )
        if each.after is not None:
            data = each.data or "unknown"
            kind = data.partition(", ")[0]
            results.append(
                EvalResult(
                    metric.task, kind, data, metric.on_hub, each.after, metric_name=metric.name
                )
            )
    for name, found in run.zero_shot.items():
        rows.append((f"{name}, accuracy", "", TOP1.text(found["acc"])))
        if name != "mean":
            results.append(EvalResult("text-generation", name, name, "accuracy", found["acc"]))
    return rows, results


def _loading(config: dict[str, Any], name: str, on_hub: bool) -> tuple[str | None, str | None, str]:
    """Return the library and the task of a saved model, and the code that loads it, by its config.json."""
    if "architecture" in config:
        place = json.dumps(f"{'hf-hub' if on_hub else 'local-dir'}:{name}")
        imports = "import timm\n"
        register = ""
        # A file beside this configuration registers it.
        if config["architecture"] == "shrunk_model":
            folder = f"snapshot_download({json.dumps(name)})" if on_hub else json.dumps(name)
            imports += "from huggingface_hub import snapshot_download\n" * on_hub
            imports = f"import sys\n\n{imports}"
            register = f"\nsys.path.append({folder})\nimport modeling_shrunk\n"
        code = f"{imports}{register}\nmodel = timm.create_model({place}, pretrained=True)"
        return "timm", "image-classification", code
    if "model_type" not in config:
        return None, None, ""
    (kind, *_) = config.get("architectures") or ["AutoModel"]
    kind = "AutoModelForCausalLM" if kind.endswith(("ForCausalLM", "LMHeadModel")) else kind
    own = ", trust_remote_code=True" * ("auto_map" in config)
    code = f"from transformers import {kind}\n\nmodel = {kind}.from_pretrained({json.dumps(name)}{own})"
    return "transformers", "text-generation" if kind == "AutoModelForCausalLM" else None, code


def _escaped(text: str) -> str:
    """Return a text on one line in which Markdown finds no markup."""
    return re.sub(r"([\\`*_{}\[\]<>#|&])", r"\\\1", " ".join(text.splitlines()))
