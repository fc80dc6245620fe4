"""What a model reads and predicts, and which tokens are padding."""

from functools import partial

import pytest
import timm
import torch
from support.tiny import on_meta
from support.zoo import ZOO
from torch import nn

from wanda_lightning import ImageClassifierModule
from wanda_lightning.models import fitting_mask, has_classes, reads_images, token_masks

OF_TRANSFORMERS = {
    **dict.fromkeys(
        ("ViTForImageClassification", "ConvNextForImageClassification", "CLIPVisionModel"), True
    ),
    **dict.fromkeys(
        ("LlavaForConditionalGeneration", "BlipForConditionalGeneration", "CLIPModel"), False
    ),
    "Wav2Vec2ForSequenceClassification": False,
}
MODELS = {
    **{
        name: (ZOO[name].build, True)
        for name in ("vit", "convnext", "swin", "resnet18", "resnet50")
    },
    **{
        name: (ZOO[name].build, False)
        for name in ("llama", "t5", "mixtral", "plain_mlp", "torch_transformer")
    },
    **{name: (partial(on_meta, name), images) for name, images in OF_TRANSFORMERS.items()},
    "efficientnet": (lambda: timm.create_model("test_efficientnet"), True),
    "timm in our module": (lambda: ImageClassifierModule("test_vit", pretrained=False), True),
    "compiled": (lambda: torch.compile(ZOO["vit"].build(), backend="eager"), True),
    "images and text": (
        lambda: nn.ModuleList([nn.Conv2d(3, 8, 3), nn.Embedding(4, 8), nn.Linear(8, 8)]),
        False,
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_image_models_are_recognized(name):
    build, expected = MODELS[name]
    assert reads_images(build()) is expected


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        (torch.zeros(2, 5), True),
        (torch.zeros(2, 1), False),
        (torch.zeros(2, 3, 5), False),
        ({"logits": torch.zeros(2, 3, 5)}, True),
        (torch.zeros(2, 5, 4, 4), False),
        ({"logits": torch.zeros(2, 5, 4, 4)}, True),
        ({"logits": torch.zeros(2, 1, 4, 4)}, False),
        ({"out": torch.zeros(2, 5, 4, 4), "aux": torch.zeros(2, 3, 4, 4)}, True),
        ({"boxes": torch.zeros(2, 4)}, False),
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
    text = rf"attention_mask must have the shape of the tokens, \(2, 5\), but its shape is \({shape[0]}, {shape[1]}\)"
    with pytest.raises(ValueError, match=text):
        read(torch.ones(shape))
    with pytest.raises(ValueError, match=text):
        token_masks(
            nn.Identity(),
            {"inputs_embeds": torch.zeros(2, 5, 8), "attention_mask": torch.ones(shape)},
        )
    # Longer where a cache comes first.
    assert read(torch.ones(2, 9), past_key_values=object()) == ()


@pytest.mark.parametrize("compiled", ["model", "encoder"])
def test_the_encoder_of_a_compiled_model_is_found_under_its_own_name(compiled):
    model = ZOO["t5"].build()
    batch = {"input_ids": IDS, "attention_mask": RIGHT, "labels": IDS.clone().fill_diagonal_(-100)}
    expected = token_masks(model, batch)
    assert [mask.inside for mask in token_masks(model, {**batch, "labels": None})] == ["encoder"]
    if compiled == "encoder":
        model.encoder = torch.compile(model.encoder, backend="eager")
    found = token_masks(
        torch.compile(model, backend="eager") if compiled == "model" else model, batch
    )
    assert [mask.inside for mask in found] == [mask.inside for mask in expected] == ["encoder", ""]
    assert all(torch.equal(a.keep, b.keep) for a, b in zip(found, expected, strict=True))
