"""Language models and image classifiers as LightningModules.

Both save a folder that their own library loads: `AutoModelForCausalLM.from_pretrained` or
`timm.create_model("local-dir:...")`.
"""

from wanda_lightning.modules.causal_lm import CausalLMModule
from wanda_lightning.modules.image_classifier import ImageClassifierModule
from wanda_lightning.modules.perplexity import WindowPerplexity

__all__ = ["CausalLMModule", "ImageClassifierModule", "WindowPerplexity"]
