"""The report of a pruning: every matrix of the model, pruned or skipped with its reason."""

from wanda_lightning.report.descriptions import LEFT_OUT
from wanda_lightning.report.pruning_report import REPORT_NAME, PruningReport, skipped_table
from wanda_lightning.report.records import (
    POOLED,
    BatchNormCorrection,
    ChangedImage,
    Measured,
    Permuted,
    PrunedLayer,
    Run,
    Sample,
    TrainedPart,
    Training,
    TrainingPass,
    versions,
)

__all__ = [
    "LEFT_OUT",
    "POOLED",
    "REPORT_NAME",
    "BatchNormCorrection",
    "ChangedImage",
    "Measured",
    "Permuted",
    "PrunedLayer",
    "PruningReport",
    "Run",
    "Sample",
    "TrainedPart",
    "Training",
    "TrainingPass",
    "skipped_table",
    "versions",
]
