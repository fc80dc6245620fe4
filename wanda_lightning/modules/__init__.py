"""Language models and image classifiers as LightningModules, to load, train, measure and save.

Both save an ordinary folder of their own library, which `AutoModelForCausalLM.from_pretrained` and
`timm.create_model("local-dir:...")` load.
"""

from wanda_lightning.modules.causal_lm import CausalLMModule
from wanda_lightning.modules.image_classifier import ImageClassifierModule
from wanda_lightning.modules.perplexity import WindowPerplexity

__all__ = ["CausalLMModule", "ImageClassifierModule", "WindowPerplexity"]
