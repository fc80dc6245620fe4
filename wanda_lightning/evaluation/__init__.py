"""Measure models: perplexity, agreement with the dense model, zero-shot tasks, and tables of several models."""

from wanda_lightning.evaluation.perplexity import WindowPerplexity
from wanda_lightning.evaluation.results import Evaluation, Results, sparsity_of
from wanda_lightning.evaluation.tasks import PAPER_TASKS, answer, load_tasks

__all__ = [
    "PAPER_TASKS",
    "Evaluation",
    "Results",
    "WindowPerplexity",
    "answer",
    "load_tasks",
    "sparsity_of",
]
