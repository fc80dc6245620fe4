"""What a model reads and predicts, and which tokens are padding."""

import re

import pytest
import timm
import torch
from support.layers import assert_same
from support.refusals import refuses
from support.tiny import on_meta
from support.zoo import ZOO, model_of
from torch import nn
from torch.nn import functional as F

from wanda_lightning import ImageClassifierModule
from wanda_lightning.models import fitting_mask, has_classes, reads_images, token_masks

IMAGES = [
    "vit",
    "convnext",
    "swin",
    "resnet18",
    "ViTForImageClassification",
    "ConvNextForImageClassification",
    "CLIPVisionModel",
]
OTHERS = [
    "llama",
    "t5",
    "mixtral",
    "plain_mlp",
    "torch_transformer",
    "LlavaForConditionalGeneration",
    "BlipForConditionalGeneration",
    "CLIPModel",
    "Wav2Vec2ForSequenceClassification",
]


def build(name):
    return model_of(name) if name in ZOO else on_meta(name)


@pytest.mark.parametrize("name", [*IMAGES, *OTHERS])
def test_image_models_are_told_from_others(name):
    assert reads_images(build(name)) == (name in IMAGES)


def test_image_models_are_recognized_in_wrappers_and_by_their_modules():
    assert reads_images(timm.create_model("test_efficientnet"))
    assert reads_images(ImageClassifierModule("test_vit", pretrained=False))
    assert reads_images(torch.compile(model_of("vit"), backend="eager"))
    images_and_text = [nn.Conv2d(3, 8, 3), nn.Embedding(4, 8), nn.Linear(8, 8)]
    assert not reads_images(nn.ModuleList(images_and_text))


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        (torch.zeros(2, 5), True),
        (torch.zeros(2, 1), False),
        (torch.zeros(2, 3, 5), False),
        ({"logits": torch.zeros(2, 3, 5)}, True),
        ({"logits": torch.zeros(2, 5, 4, 4)}, True),
        ({"logits": torch.zeros(2, 1, 4, 4)}, False),
        ({"out": torch.zeros(2, 5, 4, 4), "aux": torch.zeros(2, 3, 4, 4)}, True),
        (F.normalize(torch.randn(4, 5)), False),
        (F.normalize(torch.randn(4, 5)).bfloat16(), False),
        ({"logits": F.normalize(torch.randn(4, 5))}, True),
        ({"last_hidden_state": torch.zeros(2, 3, 5)}, False),
        ((torch.zeros(2, 5), torch.zeros(2, 3)), True),
        ([{"boxes": torch.zeros(2, 4)}], False),
    ],
)
def test_which_outputs_are_classes(output, expected):
    assert has_classes(output) is expected


RIGHT = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
LEFT = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
IDS = torch.arange(10).view(2, 5)


def read(attention_mask, **batch):
    return token_masks(nn.Identity(), {"input_ids": IDS, "attention_mask": attention_mask, **batch})


def test_zeros_of_a_mask_are_padding():
    for mask in (RIGHT, LEFT):
        (found,) = read(mask)
        assert found.inside == ""
        assert torch.equal(found.keep, mask.bool())
    assert read(None) == read(torch.ones_like(RIGHT)) == token_masks(nn.Identity(), IDS) == ()


@pytest.mark.parametrize(
    "mask", [object(), torch.ones(5), torch.ones(2, 1, 5, 5), {"full_attention": RIGHT}]
)
def test_a_mask_that_does_not_show_the_padding_fits_nothing(mask):
    masks = read(mask)
    assert len(masks) == 1
    for x in (torch.zeros(2, 5, 8), torch.zeros(10, 8), torch.zeros(5, 8)):
        assert fitting_mask(masks, "layer", x) is None


@pytest.mark.parametrize("shape", [(2, 4), (2, 6), (1, 5), (5, 2)])
def test_a_mask_of_another_shape_is_refused(shape):
    text = f"attention_mask must have the shape of the tokens, (2, 5), but its shape is {shape}"
    for tokens in ({"input_ids": IDS}, {"inputs_embeds": torch.zeros(2, 5, 8)}):
        with refuses(re.escape(text)):
            token_masks(nn.Identity(), {**tokens, "attention_mask": torch.ones(shape)})


def test_a_mask_is_longer_than_the_tokens_after_a_cache():
    assert read(torch.ones(2, 9), past_key_values=object()) == ()


@pytest.mark.parametrize("compiled", ["model", "encoder"])
def test_the_encoder_of_a_compiled_model_is_found_under_its_own_name(compiled):
    model = model_of("t5")
    batch = {"input_ids": IDS, "attention_mask": RIGHT, "labels": IDS.clone().fill_diagonal_(-100)}
    expected = token_masks(model, batch)
    assert [mask.inside for mask in token_masks(model, {**batch, "labels": None})] == ["encoder"]
    if compiled == "encoder":
        model.encoder = torch.compile(model.encoder, backend="eager")
    else:
        model = torch.compile(model, backend="eager")
    masks = token_masks(model, batch)
    assert [mask.inside for mask in masks] == [mask.inside for mask in expected] == ["encoder", ""]
    assert_same([mask.keep for mask in masks], [mask.keep for mask in expected])
