"""Evaluate pruned models: zero-shot tasks, sparsity, and tables that compare several models."""

from wanda_lightning.evaluation.results import Evaluation, KeptZeros, Results, sparsity_of
from wanda_lightning.evaluation.tasks import PAPER_TASKS, load_tasks, task_names, zero_shot

__all__ = ["PAPER_TASKS", "Evaluation", "KeptZeros", "Results", "load_tasks", "sparsity_of", "task_names", "zero_shot"]
