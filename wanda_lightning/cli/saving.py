"""Write the results of a run beside the saved model."""

from dataclasses import replace
from pathlib import Path

from wanda_lightning.cli.options import JobOptions
from wanda_lightning.common.atomic_write import write_text
from wanda_lightning.common.wording import one_line
from wanda_lightning.hub.card import write_card
from wanda_lightning.report import PruningReport
from wanda_lightning.report.descriptions import METRICS


def write_results(report: PruningReport, options: JobOptions) -> PruningReport:
    """Write the card of the model and the results.

    Return the report, with a note if the card could not be written.
    """
    results = options.results
    if results.save_model is not None:
        report = _write_card(report, results.save_model)
    if results.save is not None:
        folder = Path(results.save).expanduser()
        report.save(folder)
        _write_log(report, folder, options.pruning.name)
    if results.report is not None:
        report.save(results.report)
    return report


def _write_card(report: PruningReport, folder: str) -> PruningReport:
    try:
        write_card(folder, report)
    except Exception as error:  # the saved model and the results matter more
        note = f"no model card could be written into {folder}: {one_line(error)}"
        return replace(report, notes=(*report.notes, note))
    return report


def _write_log(report: PruningReport, folder: Path, method: str) -> None:
    """Write the file in which scripts of the reference code look for the results."""
    columns = {"method": method, "actual_sparsity": f"{report.sparsity:.4f}"}
    run = report.run
    if run is not None and run.metric:
        columns[METRICS[run.metric].column] = f"{run.after:.4f}"
        for name, value in run.agreement.items():
            columns[name] = str(value) if name == "predictions" else f"{value:.6g}"
    lines = ("\t".join(columns), "\t".join(columns.values()))
    write_text(folder / f"log_{method}.txt", "".join(f"{line}\n" for line in lines))
