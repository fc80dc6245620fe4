"""The model card of a pruned model: method, results, and code that loads the model."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from math import isfinite
from pathlib import Path
from textwrap import indent
from typing import Any

from wanda_lightning.common.model_source import ModelSource
from wanda_lightning.common.words import count, counted, duration
from wanda_lightning.common.write_whole import whole_file
from wanda_lightning.hub.source import CARD_NAME, Source, find_source
from wanda_lightning.report import Measured, PruningReport, Run
from wanda_lightning.report.descriptions import LEFT_OUT, choices_of, fate, method_in_words
from wanda_lightning.report.metrics import METRICS, TOP1
from wanda_lightning.report.page import write_report

PICTURE_NAME = "pruning_report.png"
_MARK = "<!-- Written by wanda_lightning, which may replace this file as long as it has this line. -->"
_HOW_PRUNED = "## How it was pruned"
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

    A README.md that this function did not write is not replaced. The model is loaded by `name`, a path or an id on the
    hub. `trained_steps` is the number of optimizer steps of the run that pruned the model.
    """
    folder = Path(folder).expanduser()
    path = folder / CARD_NAME
    if path.exists() and not read_card(ModelSource(folder)).text:
        return
    run, command = report.run or Run(), report.config.get("command", {})
    place = {name: command[name] for name in ("revision", "cache_dir") if command.get(name)}
    source = find_source(ModelSource(run.model, **place)) if run.model else Source()
    report = replace(report, run=_to_publish(run))
    has_picture = all(map(find_spec, ("jinja2", "matplotlib"))) and LEFT_OUT not in report.notes
    if has_picture:
        write_report(report, folder / PICTURE_NAME)
    saved = _Saved(os.fspath(name), _read_config(folder), on_hub)
    card = _model_card(report, source, saved, has_picture, trained_steps)
    with whole_file(path) as temporary:
        temporary.write_text(card, encoding="utf-8")


@dataclass(frozen=True)
class OwnCard:
    """A card that `write_card` wrote: its text and its picture, each empty if there is none."""

    text: str = ""
    picture: bytes = b""


def read_card(model: ModelSource) -> OwnCard:
    """Read the card of a folder or a hub model; an empty one if it has none that `write_card` wrote."""
    text = _read(model, CARD_NAME).decode("utf-8", errors="replace")
    return OwnCard(text, _read(model, PICTURE_NAME)) if _MARK in text else OwnCard()


def _read(model: ModelSource, file: str) -> bytes:
    path = model.path / file
    if not path.parent.exists():
        from huggingface_hub import hf_hub_download

        try:
            path = Path(hf_hub_download(str(model), file, revision=model.revision, cache_dir=model.cache_dir))
        except Exception:  # no such file, or no connection: libraries of the network raise errors of many kinds
            return b""
    return path.read_bytes() if path.is_file() else b""


def continue_card(card: OwnCard, folder: Path, run: Run, *, name: str | os.PathLike[str], on_hub: bool = False) -> None:
    """Write the card of a fine-tuned pruned model: its earlier card, unless empty, with a section on the fine-tuning.

    `run` has the command and the results before and after the fine-tuning. The model is loaded by `name`, a path or an
    id on the hub.
    """
    from huggingface_hub import ModelCard

    if not card.text or (folder / CARD_NAME).exists():
        return
    if card.picture:  # the zeros are the same
        (folder / PICTURE_NAME).write_bytes(card.picture)
    saved, run = _Saved(os.fspath(name), _read_config(folder), on_hub), _to_publish(run)
    new = ModelCard(re.sub(r"```python\n.*?\n```", lambda _: _code(saved), card.text, count=1, flags=re.DOTALL))
    new.data["model_name"], new.data["eval_results"] = saved.title, _eval_results(run)
    before, heading, after = new.text.partition(_HOW_PRUNED)
    before = re.sub(r"^# .*$", lambda _: f"# {_escaped(saved.title)}", before, count=1, flags=re.MULTILINE)
    new.text = "\n\n".join([before.rstrip("\n"), _fine_tuning(run), heading + after])
    new.save(folder / CARD_NAME)


@dataclass(frozen=True)
class _Saved:
    """A saved model: the name by which it is loaded, and its config.json."""

    name: str
    config: Mapping[str, Any]
    on_hub: bool

    @property
    def title(self) -> str:
        return Path(self.name).name

    @property
    def library(self) -> str | None:
        if "architecture" in self.config:
            return "timm"
        return "transformers" if "model_type" in self.config else None

    @property
    def model_class(self) -> str:
        """The class of transformers."""
        (name, *_) = self.config.get("architectures") or ["AutoModel"]
        return "AutoModelForCausalLM" if name.endswith(("ForCausalLM", "LMHeadModel")) else name

    @property
    def task(self) -> str | None:
        if self.library == "timm":
            return "image-classification"
        return "text-generation" if self.library and self.model_class.endswith("ForCausalLM") else None


def _read_config(folder: Path) -> dict[str, Any]:
    file = folder / "config.json"
    return json.loads(file.read_bytes()) if file.is_file() else {}


def _model_card(report: PruningReport, source: Source, saved: _Saved, has_picture: bool, trained_steps: int) -> str:
    """Return the text of the card: metadata as YAML, then Markdown."""
    from huggingface_hub import ModelCard

    run = report.run or Run()
    parts = [
        f"---\n{_metadata(report, run, source, saved)}\n---",
        _MARK,
        f"# {_escaped(saved.title)}",
        _summary(report, run, source, trained_steps),
        _results(run),
        f"![Where the zeros are]({PICTURE_NAME})" if has_picture else "",
        f"## How to load it\n\n{_code(saved)}" if saved.library else "",
        _settings(report, run),
        _samples(run),
        "\n".join(["## Notes\n", *(f"- {_escaped(note)}" for note in report.notes)]) if report.notes else "",
    ]
    return str(ModelCard("\n\n".join(filter(None, parts)) + "\n"))


def _to_publish(run: Run) -> Run:
    """Return the run without folders of this machine, and without results that are not finite."""
    names = ("model", "data", "calibration", "command")
    texts: dict[str, Any] = {name: _FOLDERS.sub("", getattr(run, name)) for name in names}
    others = tuple(
        Measured(_FOLDERS.sub("", each.data), _known(each.before), _known(each.after)) for each in run.others
    )
    return replace(run, before=_known(run.before), after=_known(run.after), others=others, **texts)


def _known(value: float | None) -> float | None:
    return None if value is None or not isfinite(value) else value


def _metadata(report: PruningReport, run: Run, source: Source, saved: _Saved) -> str:
    from huggingface_hub import ModelCardData

    results = _eval_results(run)
    derived = {"base_model": source.hub_id, "base_model_relation": "finetune"} if source.hub_id else {}
    method = choices_of(report.config).partition(",")[0].lower()
    kept_zeros = [] if LEFT_OUT in report.notes else ["sparse"]
    data = ModelCardData(
        **{**source.metadata, **derived},
        library_name=saved.library,
        pipeline_tag=saved.task,
        tags=["pruned", *kept_zeros, "wanda_lightning", *([method] if method else [])],
        model_name=saved.title if results else None,
        eval_results=results or None,
    )
    return data.to_yaml()


def _eval_results(run: Run) -> list[Any]:
    from huggingface_hub import EvalResult

    results = []
    for each in run.results:
        if each.after is not None:
            metric, data = METRICS[run.metric], each.data or "unknown"
            kind = data.partition(", ")[0]
            results.append(EvalResult(metric.task, kind, data, metric.on_hub, each.after, metric_name=metric.name))
    for name, measured in run.zero_shot.items():
        if name != "mean":
            results.append(EvalResult("text-generation", name, name, "accuracy", measured["acc"]))
    return results


def _summary(report: PruningReport, run: Run, source: Source, trained_steps: int) -> str:
    is_on_hub = source.hub_id and not source.is_derived
    base = f"[{source.hub_id}](https://huggingface.co/{source.hub_id})" if is_on_hub else _escaped(run.model)
    trained = f" The same run trained it for {counted(trained_steps, 'step')}." if trained_steps else ""
    return (
        f"{base or 'A model'}, pruned with wanda_lightning: {report.sparsity:.2%} of the weights in "
        f"{counted(len(report.layers), 'layer')} {fate(report)}, which is {report.model_sparsity:.2%} of all "
        f"{count(report.parameters)} parameters.{trained}"
    )


def _results(run: Run) -> str:
    rows = []
    for each in run.results:
        where = f", {each.data}" if each.data else ""
        metric = METRICS[run.metric]
        rows.append([f"{metric.title}{where}", metric.text(each.before), metric.text(each.after)])
    rows += [[f"{name}, accuracy", "", TOP1.text(found["acc"])] for name, found in run.zero_shot.items()]
    return _table(["", "dense", "pruned"], rows) if rows else ""


def _settings(report: PruningReport, run: Run) -> str:
    known = {
        "Method": method_in_words(report.config),
        "Calibration data": run.calibration,
        "Time": duration(report.total_seconds),
        "Versions": ", ".join(f"{name} {found}" for name, found in report.versions.items() if found[0].isdigit()),
    }
    rows = [(name, value) for name, value in known.items() if value]
    parts = [_HOW_PRUNED, _table(["", ""], rows), _fenced(run.command, "shell") if run.command else ""]
    return "\n\n".join(filter(None, parts))


def _code(saved: _Saved) -> str:
    if saved.library == "transformers":
        library, call = f"from transformers import {saved.model_class}", f"{saved.model_class}.from_pretrained"
        arguments = json.dumps(saved.name)
    else:
        library, call = "import timm", "timm.create_model"
        arguments = json.dumps(f"{'hf-hub' if saved.on_hub else 'local-dir'}:{saved.name}") + ", pretrained=True"
    return _fenced(f"{library}\n\nmodel = {call}({arguments})", "python")


def _fine_tuning(run: Run) -> str:
    metric = METRICS[run.metric]
    row = [f"{metric.title}, {run.data}", metric.text(run.before), metric.text(run.after)]
    table, command = _table(["", "before", "after"], [row]), _fenced(run.command, "shell")
    return f"## Fine-tuning\n\nThe kept weights were fine-tuned.\n\n{table}\n\n{command}"


def _samples(run: Run) -> str:
    parts = ["## Text before and after"] if run.samples else []
    for sample in run.samples:
        for model, text in (("Dense", sample.before), ("Pruned", sample.after)):
            parts += [f"{model}:", indent(sample.prompt + text, "    ", lambda _: True)]
    return "\n\n".join(parts)


def _table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [headings, ["---"] * len(headings), *([_escaped(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _fenced(code: str, language: str) -> str:
    """Return a block of code, between fences that are longer than any in it."""
    fence = "`" * max(3, *(len(ticks) + 1 for ticks in re.findall("`+", code)), 0)
    return f"{fence}{language}\n{code}\n{fence}"


def _escaped(text: str) -> str:
    """Return a text on one line in which Markdown finds no markup."""
    return re.sub(r"([\\`*_{}\[\]<>#|&])", r"\\\1", " ".join(text.splitlines()))
