"""The report of a pruning: every matrix of the model, pruned or skipped with its reason."""

from wanda_lightning.report.pruning_report import (
    REPORT_NAME as REPORT_NAME,
    PruningReport as PruningReport,
    skipped_table as skipped_table,
)
from wanda_lightning.report.records import (
    POOLED as POOLED,
    BatchNormCorrection as BatchNormCorrection,
    Circumstances as Circumstances,
    Continuations as Continuations,
    Measured as Measured,
    PrunedLayer as PrunedLayer,
    TrainedPart as TrainedPart,
    Training as Training,
    TrainingPass as TrainingPass,
    versions as versions,
)
