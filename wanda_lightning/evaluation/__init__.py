"""Evaluate pruned models: zero-shot tasks, sparsity, and tables that compare several models."""

from wanda_lightning.evaluation.results import Evaluation, Results, sparsity_of
from wanda_lightning.evaluation.tasks import PAPER_TASKS, load_tasks, zero_shot

__all__ = ["PAPER_TASKS", "Evaluation", "Results", "load_tasks", "sparsity_of", "zero_shot"]
