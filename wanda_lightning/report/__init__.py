"""The report of a pruning: what happened to every matrix, as JSON, as text, and as a page with figures."""

from wanda_lightning.report.comparison import comparison_table, groups_of, read_reports, write_comparison
from wanda_lightning.report.page import images_of, write_report
from wanda_lightning.report.pruning_report import (
    POOLED,
    REPORT_NAME,
    BatchNormCorrection,
    ChangedImage,
    Permuted,
    PrunedLayer,
    PruningReport,
    Run,
    Sample,
    TrainedPart,
    Training,
    TrainingPass,
    read_layer,
    read_skipped,
    skipped_table,
    versions,
)

__all__ = [
    "POOLED",
    "REPORT_NAME",
    "BatchNormCorrection",
    "ChangedImage",
    "Permuted",
    "PrunedLayer",
    "PruningReport",
    "Run",
    "Sample",
    "TrainedPart",
    "Training",
    "TrainingPass",
    "comparison_table",
    "groups_of",
    "images_of",
    "read_layer",
    "read_reports",
    "read_skipped",
    "skipped_table",
    "versions",
    "write_comparison",
    "write_report",
]
