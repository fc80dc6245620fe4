"""Examples before and after pruning: text against one token at a time, images against predictions by hand."""

import base64
import io
import logging

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from support.callbacks import trainer
from torch.utils.data import DataLoader

from wanda_lightning import CausalLMModule, ImageClassifierModule, ImageDataModule, PruningCallback
from wanda_lightning.cli.examples import PROMPTS, ImageExamples, TextExamples, continuation, thumbnail

pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers")


@pytest.fixture
def model(inputs):
    return transformers.AutoModelForCausalLM.from_pretrained(inputs / "llama").eval()


@pytest.fixture
def tokenizer(inputs):
    return transformers.AutoTokenizer.from_pretrained(inputs / "llama")


def slow_continuation(model, tokenizer, prompt, tokens):
    """The most likely token, again and again, without a cache."""
    ids = tokenizer(prompt).input_ids
    start = len(ids)
    with torch.no_grad():
        for _ in range(tokens):
            ids.append(model(torch.tensor([ids])).logits[0, -1].argmax().item())
    return tokenizer.decode(ids[start:])


def test_text_is_the_most_likely_one_however_the_model_samples(model, tokenizer, caplog):
    tokens = min(40, 64 - len(tokenizer(PROMPTS[0]).input_ids))  # the context has 64
    expected = slow_continuation(model, tokenizer, PROMPTS[0], tokens)
    assert continuation(model, tokenizer, PROMPTS[0]) == expected
    model.generation_config.update(do_sample=True, temperature=2.0, top_p=0.5, top_k=7)
    transformers.utils.logging.enable_propagation()
    with caplog.at_level(logging.WARNING):
        assert {continuation(model, tokenizer, PROMPTS[0]) for _ in range(2)} == {expected}
    assert caplog.messages == []


def test_a_prompt_as_long_as_the_context_has_no_continuation(model, tokenizer):
    assert continuation(model, tokenizer, "x" * 64) == ""
    assert len(continuation(model, tokenizer, "x" * 63)) == 1


def test_text_of_two_models(model, tokenizer):
    module, batches = CausalLMModule(model, tokenizer), DataLoader(torch.arange(16).view(2, 8))
    dense, pruned = TextExamples(), TextExamples()
    trainer(dense).validate(module, batches, verbose=False)
    trainer(PruningCallback(0.9, method="magnitude"), pruned).validate(module, batches, verbose=False)
    (samples,) = pruned.since(dense).values()
    assert tuple(sample.prompt for sample in samples) == PROMPTS
    assert [sample.after for sample in samples] == [continuation(model, tokenizer, prompt) for prompt in PROMPTS]
    assert any(sample.before != sample.after for sample in samples)


def test_a_model_that_cannot_write_has_no_text(model, tokenizer):
    module, batches = CausalLMModule(model, tokenizer), DataLoader(torch.arange(16).view(2, 8))
    model.generate = None
    dense, pruned = TextExamples(), TextExamples()
    for examples in (dense, pruned):
        with pytest.warns(UserWarning, match="LlamaForCausalLM cannot continue a prompt, so the report has no text"):
            trainer(examples).validate(module, batches, verbose=False)
    assert pruned.since(dense) == {}


@pytest.fixture
def digits():
    torch.manual_seed(0)
    sizes = {"img_size": 8, "patch_size": 4, "embed_dim": 16, "depth": 1, "num_heads": 2}
    module = ImageClassifierModule("vit_tiny_patch16_224", pretrained=False, model_kwargs=sizes, num_classes=10)
    return module, ImageDataModule("digits", module, batch_size=50)


def test_images_whose_prediction_changed(digits):
    module, data = digits
    dense, pruned = ImageExamples(data), ImageExamples(data)
    trainer(dense).validate(module, data, verbose=False)
    with torch.no_grad():
        images = torch.cat([images for images, _ in data.val_dataloader()])
        before = module.eval()(images).argmax(-1).tolist()
        trainer(PruningCallback(0.9, method="magnitude"), pruned).validate(module, data, verbose=False)
        after = module.eval()(images).argmax(-1).tolist()
    assert (dense.predictions, pruned.predictions) == (before, after)
    changed = [index for index in range(len(images)) if before[index] != after[index]]
    assert len(changed) > 24

    (shown,) = pruned.since(dense).values()
    assert len(shown) == 12
    originals = {}
    for index in changed:
        image, label = data.evaluation_image(index)
        originals.setdefault((image.tobytes(), str(label), str(before[index]), str(after[index])), index)
    found = [originals[pixels_of(each), each.label, each.before, each.after] for each in shown]
    assert found == sorted(set(found))
    assert found[0] == changed[0]
    assert found[-1] > changed[-1] * 0.8  # from all classes, which folders would list one after another


def pixels_of(changed):
    return Image.open(io.BytesIO(base64.b64decode(changed.png))).tobytes()


def test_few_images_are_all_shown(digits):
    _, data = digits
    data.setup("validate")
    dense, pruned = ImageExamples(data), ImageExamples(data)
    dense.predictions, pruned.predictions = [0] * 10, [0] * 3 + [11] + [0] * 5 + [1]
    (shown,) = pruned.since(dense).values()
    assert [(each.before, each.after) for each in shown] == [("0", "output 11"), ("0", "1")]
    pruned.predictions = dense.predictions
    assert pruned.since(dense) == {"images": ()}


def test_thumbnails_are_small_and_similar():
    gradient = np.linspace(0, 255, 300 * 400).reshape(300, 400)
    image = Image.fromarray(np.stack([gradient, gradient.T.reshape(300, 400), gradient[::-1]], -1).astype(np.uint8))
    png = base64.b64decode(thumbnail(image))
    assert len(png) < 12_000
    small = Image.open(io.BytesIO(png))
    assert small.size == (96, 72)
    wanted = np.asarray(image.resize((96, 72), Image.Resampling.BOX), np.float32)
    assert np.abs(np.asarray(small.convert("RGB"), np.float32) - wanted).mean() < 12
