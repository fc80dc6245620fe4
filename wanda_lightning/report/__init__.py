"""What happened to every matrix: as objects, as JSON, as text, and as a page with figures."""

from wanda_lightning.report.pruning_report import (
    REPORT_NAME,
    BatchNormCorrection,
    ChangedImage,
    Permuted,
    PrunedLayer,
    PruningReport,
    Run,
    Sample,
    Training,
    TrainingPass,
    read_layer,
    read_skipped,
    skipped_table,
    versions,
)

__all__ = [
    "REPORT_NAME",
    "BatchNormCorrection",
    "ChangedImage",
    "Permuted",
    "PrunedLayer",
    "PruningReport",
    "Run",
    "Sample",
    "Training",
    "TrainingPass",
    "read_layer",
    "read_skipped",
    "skipped_table",
    "versions",
]
