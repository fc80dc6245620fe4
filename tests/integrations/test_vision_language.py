"""The language half of vision-language models, pruned with images in the calibration batches."""

import itertools
from copy import deepcopy

import pytest
import torch
from support.callbacks import zeros
from support.pairwise import with_nightly
from support.quiet import prune
from support.zoo import other

from wanda_lightning.models import find_layers

# Models of transformers warn about their own arguments.
pytestmark = pytest.mark.filterwarnings("ignore")
MODELS = [f"{name}ForConditionalGeneration" for name in ("Llava", "PaliGemma", "Qwen2VL")]
LANGUAGE = "model.language_model"
METHODS = ["wanda", "balanced", "best", "thorough"]


def assert_half_of_the_language_model(model, dense, report):
    layers = {layer.name: layer for layer in find_layers(model).layers}
    assert {layer.name for layer in report.layers} == {
        name for name in layers if name.startswith(f"{LANGUAGE}.")
    }
    zeros = sum(int((layers[layer.name].read() == 0).sum()) for layer in report.layers)
    assert zeros == pytest.approx(0.5 * sum(layer.size for layer in report.layers), rel=0.02)
    before = dense.state_dict()
    for name, value in model.state_dict().items():
        assert name.startswith(f"{LANGUAGE}.") or torch.equal(value, before[name]), name


@pytest.mark.parametrize(
    ("name", "method"),
    with_nightly(
        zip(MODELS, METHODS, strict=False),
        [*itertools.product(MODELS, METHODS), (MODELS[0], "thorough")],
    ),
)
def test_images_reach_the_statistics(name, method):
    found = []
    batches = other(name).batches()
    # The same tokens; those of the image are ordinary words then.
    words = [{"input_ids": batch["input_ids"]} for batch in batches]
    for data in (batches, words):
        model = other(name).build()
        # Or `Distill` trains the norms and biases of the vision model, too.
        model.requires_grad_(False)
        model.model.language_model.requires_grad_(True)
        dense = deepcopy(model)
        report = prune(model, data, 0.5, method=method, only=[LANGUAGE])
        assert_half_of_the_language_model(model, dense, report)
        if method == "wanda":
            assert {layer.tokens for layer in report.layers} == {
                sum(batch["input_ids"].numel() for batch in batches)
            }
        found.append(zeros(model))
    assert any((found[0][name] != found[1][name]).any() for name in found[0])
    with torch.no_grad():
        assert all(model(**batch).logits.isfinite().all() for batch in batches)
