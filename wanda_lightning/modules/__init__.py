"""Language models, embedding models and image classifiers as LightningModules, and how they are loaded."""

from wanda_lightning.modules.causal_lm import CausalLMModule
from wanda_lightning.modules.embedding import EmbeddingModule
from wanda_lightning.modules.image_classifier import ImageClassifierModule
from wanda_lightning.modules.perplexity import WindowPerplexity

__all__ = ["CausalLMModule", "EmbeddingModule", "ImageClassifierModule", "WindowPerplexity"]
