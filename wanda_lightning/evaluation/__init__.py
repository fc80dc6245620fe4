"""Evaluate pruned models: zero-shot tasks, sparsity, and tables that compare several models."""

from wanda_lightning.evaluation.results import Evaluation, Results, sparsity_of
from wanda_lightning.evaluation.tasks import PAPER_TASKS, answer, load_tasks

__all__ = ["PAPER_TASKS", "Evaluation", "Results", "answer", "load_tasks", "sparsity_of"]
