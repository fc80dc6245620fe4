"""Language models, embedding models and image classifiers as LightningModules, and how they are loaded."""

from wanda_lightning.lightning_modules.causal_lm import CausalLMModule
from wanda_lightning.lightning_modules.embedding import EmbeddingModule
from wanda_lightning.lightning_modules.image_classifier import ImageClassifierModule

__all__ = ["CausalLMModule", "EmbeddingModule", "ImageClassifierModule"]
