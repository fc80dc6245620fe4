"""Detectors and segmentation models of torchvision: every method, and zeros that stay zero in training."""

import ast
import copy
import itertools
import re
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from support.callbacks import ADVICE, trainer
from support.detectors import MODELS, batches_for, build, class_logits
from support.pairwise import with_nightly
from torch import nn
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader
from torchvision.models import detection, segmentation

from wanda_lightning import KeepZeros, WandaPrune, prune, shrink
from wanda_lightning.methods import METHODS, PRESETS
from wanda_lightning.models import SkipReason, find_layers
from wanda_lightning.training.held_zeros import zeros_of

pytestmark = pytest.mark.filterwarnings(*(f"ignore:.*{message}" for message in ADVICE))


def masks(model):
    return {name: weight == 0 for name, weight in model.named_parameters() if weight.ndim > 1}


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


SAMPLE = [("wanda", "mask_rcnn"), ("balanced", "mask_rcnn"), ("sparsegpt", "retinanet"), ("fast", "lraspp")]
SAMPLE += [("best", "retinanet"), ("thorough", "lraspp")]
READ_PREDICTIONS = ("best", "thorough")
EVERY = [
    (method, name)
    for method, name in itertools.product((*METHODS, *PRESETS), MODELS)
    if method not in READ_PREDICTIONS or name != "mask_rcnn"
]


@pytest.mark.parametrize(("method", "name"), with_nightly(SAMPLE, EVERY))
def test_every_method_prunes_as_asked(method, name):
    """The best presets read predictions, which the detections are not."""
    model, batches = build(name), batches_for(name, 2, 1)
    choices = {"forward": class_logits(model)} if method in READ_PREDICTIONS and name == "retinanet" else {}
    report = prune(model, batches, 0.5, method=method, progress=False, **choices)
    assert not [matrix.name for matrix in report.skipped if matrix.reason.name in ("UNREACHED", "INACTIVE")]
    share = sum(layer.zeros for layer in report.layers) / sum(layer.size for layer in report.layers)
    # SparseGPT also zeroes weights that only multiply zeros.
    assert 0.49 < share < (0.8 if method == "sparsegpt" or method.startswith("ablate") else 0.51)
    with torch.no_grad():
        outputs = [each for each in tree_leaves(model(batches[0][0])) if each.is_floating_point()]
    assert sum(each.numel() for each in outputs)
    assert all(each.isfinite().all() for each in outputs)


@pytest.mark.parametrize(
    ("row", "make", "left"),
    [
        ("Faster R-CNN", detection.fasterrcnn_resnet50_fpn, 4),
        ("RetinaNet", detection.retinanet_resnet50_fpn, 2),
        ("FCOS", detection.fcos_resnet50_fpn, 3),
        ("DeepLabV3", segmentation.deeplabv3_resnet50, 1),
        ("FCN", segmentation.fcn_resnet50, 1),
        ("LR-ASPP", segmentation.lraspp_mobilenet_v3_large, 2),
    ],
)
def test_the_page_names_the_output_heads(row, make, left):
    """With the patterns for `skip` in the table of docs/detectors.md."""
    page = (Path(__file__).parents[2] / "docs/detectors.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ([A-Z][^|]*) \| `(\[.*?\])`", page, flags=re.MULTILINE)
    (patterns,) = (ast.literal_eval(patterns) for names, patterns in rows if row in names.split(", "))
    with torch.device("meta"):
        model = make(weights=None, weights_backbone=None)
    assert len(find_layers(model, skip=patterns).skipped_for(SkipReason.USER)) == left


def test_images_in_a_list_and_in_a_tensor_give_the_same_masks():
    """Of equal sizes; a list is no tensor with one row for each channel."""
    pruned, images = [], torch.rand(3, 3, 48, 48, generator=torch.Generator().manual_seed(3)).double()
    for batch in ((tuple(images), [{}] * 3), {"images": list(images)}, (images,)):
        model = build("retinanet").double()
        logits = class_logits(model)
        choices = {"allocation": "fisher", "keep_batch_norm": True, "progress": False}
        forward = (lambda batch, of=logits: of(tuple(batch.values()))) if isinstance(batch, dict) else logits
        prune(model, [batch], 0.5, forward=forward, **choices)
        pruned.append(masks(model))
    assert all(equal(pruned[0], other) for other in pruned[1:])


@pytest.mark.parametrize("name", with_nightly(["retinanet"], MODELS))
def test_hidden_units_are_taken_out(name):
    model, (batch,) = build(name), batches_for(name, 2)
    forward = class_logits(model) if name == "retinanet" else lambda batch: model(batch[0])
    prune(model, [batch], 0.5, pattern="structured", forward=forward, progress=False)
    with torch.no_grad():
        before = tree_leaves(forward(batch))
        shrunk = shrink(model, batch, forward)
        after = tree_leaves(forward(batch))
    assert shrunk.units > 0
    assert not shrunk.unproven
    assert shrunk.parameters[1] < shrunk.parameters[0]
    if name == "mask_rcnn":  # rounding may change the order of boxes
        before, after = before[:1], after[:1]
    for one, other in zip(before, after, strict=True):
        assert (one - other).norm() <= 1e-4 * one.norm()


class Module(L.LightningModule):
    """A user's module around a model of torchvision, without any code for pruning."""

    def __init__(self, name):
        super().__init__()
        self.net = build(name).train()
        self.calibrated, self.validated = 0, []

    def forward(self, images):
        if not self.training:
            self.calibrated += len(images)
        return self.net(images)

    def training_step(self, batch, batch_idx):
        if isinstance(batch[1], torch.Tensor):  # the class of each pixel
            return nn.functional.cross_entropy(self.net(batch[0])["out"], batch[1])
        return sum(self.net(*batch).values())

    def validation_step(self, batch, batch_idx):
        self.validated.append(masks(self.net))

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.01, weight_decay=0.5)


def collated(samples):
    return tuple(zip(*samples, strict=True))


def loader(name):
    (batch,) = batches_for(name, 4)
    return DataLoader([*zip(*batch, strict=True)], 2, collate_fn=None if name == "lraspp" else collated)


@pytest.mark.parametrize("name", ["mask_rcnn", "lraspp"])
def test_zeros_stay_in_training_with_an_average(name):
    """The weights that are validated and kept at the end are averages."""
    module = Module(name)
    prune(module.net, batches_for(name, 2), 0.5, method="magnitude", keep_batch_norm=True, progress=False)
    pruned, begun = masks(module.net), copy.deepcopy(module.net.state_dict())
    averaging = EMAWeightAveraging(decay=0.5)
    run = trainer(KeepZeros(), averaging, max_epochs=2, num_sanity_val_steps=0)
    run.fit(module, loader(name), loader(name))
    assert len(module.validated) == 4
    for found in (*module.validated, masks(module.net), masks(averaging._average_model.module.net)):
        assert all((found[name] | ~zero).all() for name, zero in pruned.items())
    assert any((module.net.state_dict()[name] != begun[name]).any() for name in pruned)


@pytest.mark.parametrize("order", [1, -1])
def test_a_callback_prunes_a_detector_in_training_beside_an_average(order):
    module = Module("retinanet")
    pruning, averaging = WandaPrune(0.5, num_samples=4, at_step=2), EMAWeightAveraging(decay=0.5)
    trainer(*[pruning, averaging][::order], max_epochs=2, num_sanity_val_steps=0).fit(module, loader("retinanet"))
    assert module.calibrated == 2 + 4 * 3  # a trial of one batch, once for the statistics, and twice for BatchNorm
    assert sum(zeros_of(module).values()) == sum(layer.zeros for layer in pruning.report.layers)
    assert pruning.report.sparsity == pytest.approx(0.5, abs=0.02)


def test_a_module_says_how_a_detector_predicts():
    module = Module("retinanet")
    module.calibration_predictions = class_logits(module.net)
    callback = WandaPrune(0.5, num_samples=4, allocation="fisher", keep_batch_norm=True)
    trainer(callback).validate(module, loader("retinanet"), verbose=False)
    assert len({round(layer.target, 3) for layer in callback.report.layers}) > 1
