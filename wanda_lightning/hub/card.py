"""The model card of a pruned model: method, results, and code that loads the model."""

import json
import os
import re
import shlex
from collections.abc import Mapping
from dataclasses import asdict, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from wanda_lightning.common import wording
from wanda_lightning.common.aliases import StrPath
from wanda_lightning.common.atomic_write import write_text
from wanda_lightning.report import Circumstances, PruningReport, descriptions
from wanda_lightning.report.descriptions import METRICS
from wanda_lightning.report.records import as_json, from_parsed

PICTURE_NAME = "pruning_report.png"
_MARK = (
    "<!-- Written by wanda_lightning, which may replace this file as long as it has this line. -->"
)
_FOLDERS = re.compile(r"(?<![\w./~-])~?/(?:[^\s,'\"/]+/)*(?=[^\s,'\"/])")  # of absolute paths


def write_card(folder: StrPath, report: PruningReport, *, trained_steps: int = 0) -> None:
    """Write the model card, and a picture if matplotlib is installed, into the folder of a saved model.

    Beside a README.md that this function did not write, nothing is written. Folders of this machine are left out,
    except in its code, which loads the model from `folder`. `trained_steps` is the number of optimizer steps of the run
    that pruned the model.
    """
    from huggingface_hub import ModelCard, ModelCardData

    name = os.fspath(folder)
    folder = Path(folder).expanduser()
    path = folder / "README.md"
    if path.exists() and _MARK not in path.read_text(encoding="utf-8", errors="replace"):
        return

    title = Path(name).name
    full_run = report.run or Circumstances()
    run = _without_folders(full_run)
    report = replace(report, run=run)
    base = _id_on_hub(full_run.model.removeprefix("timm:").removeprefix("hf-hub:"))
    config_file = folder / "config.json"
    config = json.loads(config_file.read_bytes()) if config_file.exists() else {}
    library, task, loader = _loading(config, (folder / "modules.json").exists())
    rows, results = _results(run)

    picture = ""
    # The picture shows zeros, which are gone from a smaller model.
    if find_spec("matplotlib") is not None and not report.shrunk:
        picture = PICTURE_NAME
        report.save(folder / picture)

    method = descriptions.choices_of(report.config).partition(",")[0].lower()
    tags = ["pruned", "" if report.shrunk else "sparse", "wanda_lightning", method]
    card = ModelCard.from_template(
        ModelCardData(
            base_model=base,
            library_name=library,
            pipeline_tag=task,
            tags=list(filter(None, tags)),
            model_name=title if results else None,
            eval_results=results or None,
        ),
        template_path=str(Path(__file__).with_name("card.md")),
        mark=_MARK,
        title=title,
        base=base,
        rows=rows,
        picture=picture,
        library=library,
        task=task,
        loader=loader,
        has_own_code="auto_map" in config,
        name=name,
        report=report,
        run=run,
        trained_steps=trained_steps,
        escaped=_escaped,
        quoted=json.dumps,
        shell_word=shlex.quote,
        wording=wording,
        descriptions=descriptions,
    )
    write_text(path, f"{card}\n")


def _without_folders(run: Circumstances) -> Circumstances:
    """Return a run without the folders of this machine, and without results that are not finite."""
    # As JSON, numbers that are not finite become None.
    text = _FOLDERS.sub("", as_json(asdict(run)))
    # Generated texts may contain what looks like a path.
    return replace(from_parsed(Circumstances, json.loads(text)), samples=run.samples)


def _id_on_hub(name: str) -> str | None:
    """Return a name that is the id of a model or a data set on the hub; None for any other."""
    is_id = re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name)
    return name if is_id and not Path(name).exists() else None


def _results(run: Circumstances) -> tuple[list[tuple[str, str, str]], list[Any]]:
    """Return the measured results as rows of a table (name, before, after), and as metadata of the hub."""
    from huggingface_hub import EvalResult

    rows = []
    metadata = []
    for result in run.results:
        metric = METRICS[run.metric]
        after = result.after
        name = f"{metric.title}, {result.data}" if result.data else metric.title
        before = metric.text(result.before, result.before_error)
        rows.append((name, before, metric.text(after, result.after_error)))
        for title, value, error, _ in descriptions.agreement_of(result):
            rows.append((f"{title}, {result.data}", "", f"{value} {error}".strip()))
        if after is not None:
            data = result.data or "unknown"
            kind = data.partition(", ")[0]  # what follows describes the part and the windows
            metadata.append(
                EvalResult(metric.task, kind, data, metric.on_hub, after, metric_name=metric.name)
            )

    for task, scores in run.zero_shot.items():
        dense_scores = run.dense_zero_shot.get(task, {})
        for score, title in descriptions.TASK_METRICS.items():
            if score in scores:
                before = f"{dense_scores[score]:.2%}" if score in dense_scores else ""
                rows.append((f"{task}, {title}", before, f"{scores[score]:.2%}"))
        if task != "mean":
            metadata.append(EvalResult("text-generation", task, task, "accuracy", scores["acc"]))
    return rows, metadata


def _loading(config: Mapping[str, Any], is_embedding: bool) -> tuple[str | None, str | None, str]:
    """Return the library and the task, in the words of the hub, and what loads a model with this config."""
    if "architecture" in config:
        return "timm", "image-classification", config["architecture"]
    if "model_type" not in config:
        return None, None, ""
    if is_embedding:
        return "sentence-transformers", "sentence-similarity", "SentenceTransformer"

    (architecture, *_) = config.get("architectures") or ["AutoModel"]
    task = None
    if architecture.endswith(("ForCausalLM", "LMHeadModel")):
        task = "text-generation"
    if "auto_map" in config:  # the folder has its own modeling file
        for auto, own_class in config["auto_map"].items():
            if own_class.endswith(f".{architecture}"):
                architecture = auto
    elif task:
        architecture = "AutoModelForCausalLM"
    return "transformers", task, architecture


def _escaped(text: str) -> str:
    """Return a text on one line in which Markdown finds no markup."""
    return re.sub(r"([\\`*_{}\[\]<>#|&])", r"\\\1", " ".join(text.splitlines()))
