"""What a model reads and predicts: image models calibrate on the dense model by default."""

from functools import partial

import pytest
import timm
import torch
from support.tiny import on_meta
from support.zoo import ZOO
from torch import nn

from wanda_lightning import ImageClassifierModule, PruningConfig
from wanda_lightning.engine.plan import make_plan
from wanda_lightning.models import has_classes, reads_images

OF_TRANSFORMERS = {
    **dict.fromkeys(("ViTForImageClassification", "ConvNextForImageClassification", "CLIPVisionModel"), True),
    **dict.fromkeys(("LlavaForConditionalGeneration", "BlipForConditionalGeneration", "CLIPModel"), False),
    "Wav2Vec2ForSequenceClassification": False,
}
MODELS = {
    **{name: (ZOO[name].build, True) for name in ("vit", "deit", "convnext", "swin", "resnet18", "resnet50")},
    **{name: (ZOO[name].build, False) for name in ("llama", "t5", "mixtral", "plain_mlp", "torch_transformer")},
    **{name: (partial(on_meta, name), images) for name, images in OF_TRANSFORMERS.items()},
    "efficientnet": (lambda: timm.create_model("test_efficientnet"), True),
    "timm in our module": (lambda: ImageClassifierModule("test_vit", pretrained=False), True),
    "compiled": (lambda: torch.compile(ZOO["vit"].build(), backend="eager"), True),
    "images and text": (lambda: nn.ModuleList([nn.Conv2d(3, 8, 3), nn.Embedding(4, 8), nn.Linear(8, 8)]), False),
}


@pytest.mark.parametrize("name", MODELS)
def test_image_models_are_recognized(name):
    build, expected = MODELS[name]
    assert reads_images(build()) is expected


@pytest.mark.parametrize(
    ("name", "choices", "sequential"),
    [
        ("vit", {}, "none"),
        ("vit", {"sequential": "block"}, "block"),
        ("vit", {"method": "fast", "sequential": "layer"}, "layer"),
        ("vit", {"recovery": "reconstruct"}, "none"),
        ("llama", {"method": "best", "recovery": "reconstruct"}, "block"),
        ("llama", {"pattern": "structured", "recovery": "reconstruct"}, "block"),
        ("llama", {}, "block"),
        ("llama", {"method": "fast"}, "layer"),
        ("llama", {"method": "fast", "sequential": "auto"}, "block"),
        ("llama", {"sequential": "none"}, "none"),
        ("plain_mlp", {}, "block"),
    ],
)
def test_choices_that_are_made_win(name, choices, sequential):
    config = PruningConfig.from_names(**choices)
    plan = make_plan(config, ZOO[name].build())
    assert plan.config.sequential == sequential
    assert plan.units == make_plan(PruningConfig.from_names(**{**choices, "sequential": sequential}), plan.model).units
    assert config == PruningConfig.from_names(**choices)  # what was asked stays as it was


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        (torch.zeros(2, 5), True),
        (torch.zeros(2, 1), False),
        (torch.zeros(2, 3, 5), False),
        ((torch.zeros(2, 3, 5), None), False),
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
