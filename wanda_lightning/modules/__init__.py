"""Language models and image classifiers as LightningModules: load, train, measure, save.

Both save an ordinary folder of their own library (`AutoModelForCausalLM.from_pretrained`,
`timm.create_model("local-dir:...")`), and both read weights from safetensors only.
"""

from wanda_lightning.modules.causal_lm import CausalLMModule
from wanda_lightning.modules.image_classifier import ImageClassifierModule
from wanda_lightning.modules.perplexity import WindowPerplexity

__all__ = ["CausalLMModule", "ImageClassifierModule", "WindowPerplexity"]
