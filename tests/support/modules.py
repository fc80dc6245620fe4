"""Tiny models, a tokenizer and text for the tests of the modules."""

import math
from statistics import fmean

import torch
from support.layers import rng
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from wanda_lightning.lightning_modules import ImageClassifierModule

VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
CONVNEXT = {"depths": (1, 1, 1, 1), "dims": (8, 8, 16, 16)}


def tiny_llama(seed=0, **kwargs):
    torch.manual_seed(seed)
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "vocab_size": 128,
        "max_position_embeddings": 64,
        **kwargs,
    }
    return LlamaForCausalLM(LlamaConfig(**sizes)).eval()


def tiny_tokenizer():
    words = Tokenizer(WordLevel({f"w{i}": i for i in range(128)}, unk_token="w0"))
    words.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0")


def tiny_vit(num_classes=10, **kwargs):
    torch.manual_seed(0)
    return ImageClassifierModule(
        "vit_tiny_patch16_224",
        pretrained=False,
        model_kwargs=VIT,
        num_classes=num_classes,
        **kwargs,
    )


def slow_losses(logits, input_ids, attention_mask=None):
    """The losses of the real tokens of each window, one token at a time, in float64."""
    if attention_mask is None:
        attention_mask = torch.ones_like(input_ids)
    windows = []
    for window, ids in enumerate(input_ids):
        losses = []
        for position in range(len(ids) - 1):
            if attention_mask[window, position : position + 2].all():
                probabilities = logits[window, position].double().softmax(-1)
                losses.append(-math.log(probabilities[ids[position + 1]].item()))
        windows.append(losses)
    return windows


def slow_perplexity(logits, input_ids, attention_mask=None):
    """Straight from the definition of perplexity over windows."""
    windows = slow_losses(logits, input_ids, attention_mask)
    return math.exp(fmean(fmean(losses) for losses in windows if losses))


def windows_of_text(count=7):
    return torch.randint(128, (count, 24), generator=rng(1))


MASKS = {
    "none": lambda ids: None,
    "right padding": lambda ids: (
        torch.arange(ids.shape[1]) < torch.tensor([24, 9, 2, 1, 0, 24, 5])[:, None]
    ).long(),
    "left padding": lambda ids: (
        torch.arange(ids.shape[1]) >= torch.tensor([0, 9, 22, 23, 24, 3, 5])[:, None]
    ).long(),
}
