"""Detectors and segmentation models of torchvision: every method, and zeros that stay zero in training."""

import ast
import copy
import re
from functools import partial
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from support.callbacks import trainer
from support.detectors import (
    DETECTORS,
    SEGMENTERS,
    USUAL,
    anchor_outputs,
    batches_for,
    build,
    class_logits,
    finds_boxes,
    pictures,
    scenes,
)
from support.pairwise import spread, with_nightly
from support.refusals import refusal
from timm.utils import ModelEmaV3
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader

from wanda_lightning import Distil, KeepZeros, WandaPrune, keep_zeros, prune, shrink
from wanda_lightning.methods import METHODS, PRESETS
from wanda_lightning.models import SkipReason, find_layers
from wanda_lightning.training.held_zeros import zeros_of

READ_PREDICTIONS = {"best", "thorough"}
ONE_STAGE = sorted(DETECTORS.keys() - {"faster_rcnn", "mask_rcnn"})
pytestmark = [
    pytest.mark.filterwarnings(
        "ignore:.*does not have many workers",
        "ignore:.*but have no `val_dataloader`",
        "ignore:.*The number of training batches",
    ),
    pytest.mark.usefixtures("one_thread"),
]


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def all_finite(model, batch):
    with torch.no_grad():
        outputs = [each for each in tree_leaves(model(batch[0])) if each.is_floating_point()]
    assert outputs
    assert sum(each.numel() for each in outputs)
    return all(bool(each.isfinite().all()) for each in outputs)


def masks(model):
    return {name: weight == 0 for name, weight in model.named_parameters() if weight.ndim > 1}


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# ---- every method


def choices_for(name, model, method):
    """The best presets read predictions, which the detections are not."""
    return {"forward": class_logits(model)} if method in READ_PREDICTIONS and finds_boxes(name) else {}


def fits(name, method):
    return method not in READ_PREDICTIONS or name not in ("faster_rcnn", "mask_rcnn")


@pytest.mark.filterwarnings("ignore:Memory use")
@pytest.mark.parametrize(
    ("method", "name"),
    with_nightly(
        [
            ("wanda", "faster_rcnn"),
            ("magnitude", "mask_rcnn"),
            ("ria", "retinanet"),
            ("sparsegpt", "fcos"),
            ("ablate_mag_seq", "lraspp"),
            ("ablate_wanda_seq", "fcn"),
            ("ablate_mag_iter", "faster_rcnn"),
            ("ablate_wanda_iter", "retinanet"),
            ("refit", "fcos"),
            ("admm", "lraspp"),
            ("fast", "ssdlite"),
            ("balanced", "mask_rcnn"),
            ("best", "retinanet"),
            ("thorough", "lraspp"),
        ],
        [(method, name) for method in (*METHODS, *PRESETS) for name in (*DETECTORS, *SEGMENTERS) if fits(name, method)],
    ),
)
def test_every_method_prunes_as_asked(method, name):
    model, batches = build(name), batches_for(name, 2, 1)
    report = prune(model, batches, 0.5, method=method, progress=False, **choices_for(name, model, method))
    assert not [matrix.name for matrix in report.skipped if matrix.reason.name in ("UNREACHED", "INACTIVE")]
    share = sum(layer.zeros for layer in report.layers) / sum(layer.size for layer in report.layers)
    # SparseGPT also zeroes weights that only multiply zeros.
    assert 0.49 < share < (0.8 if method == "sparsegpt" or method.startswith("ablate") else 0.51)
    assert all_finite(model, batches[0])


@pytest.mark.parametrize(("method", "name"), spread(sorted(READ_PREDICTIONS), DETECTORS))
def test_what_reads_predictions_is_refused_on_detections(method, name):
    message = refusal(build(name), scenes(2, 1), method=method)
    assert message.startswith("forward must return predictions, since gradients are read, but a batch gave list")
    assert "Let forward= (or calibration_step) return the logits" in message
    assert "\n" not in message


@pytest.mark.parametrize(
    "name", with_nightly(["fasterrcnn_mobilenet_v3_large_320_fpn", "lraspp_mobilenet_v3_large"], USUAL)
)
def test_models_of_their_usual_size(name):
    model, batches = build(name), batches_for(name, 2)
    report = prune(model, batches, 0.5, progress=False)
    found = {layer.name: layer for layer in find_layers(model).layers}
    for layer in report.layers:
        rows = found[layer.name].read() == 0
        assert rows.sum(dim=1).eq(rows.shape[1] // 2).all(), layer.name
    left_out = [matrix.detail for matrix in report.skipped]
    assert all(
        detail.startswith(("stem", "depthwise", "weight of ConvTranspose2d", "no calibration batch"))
        for detail in left_out
    )
    assert all_finite(model, batches[0])


def test_a_head_that_no_detection_reaches_stays_dense():
    model = build("mask_rcnn")
    model.roi_heads.score_thresh = 2.0
    report = prune(model, scenes(2), 0.5, progress=False)
    names = {matrix.name for matrix in report.skipped if matrix.reason.name == "UNREACHED"}
    assert names == {"roi_heads.mask_head.0.0", "roi_heads.mask_head.1.0", "roi_heads.mask_predictor.mask_fcn_logits"}
    assert any("no calibration batch called 3 layers" in note for note in report.notes)


def rows_of_the_page():
    """The patterns that docs/detectors.md gives for the output heads, by the names in its table."""
    page = (Path(__file__).parents[2] / "docs/detectors.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ([A-Z][^|]*) \| `(\[.*?\])`", page, flags=re.MULTILINE)
    return {name: ast.literal_eval(patterns) for names, patterns in rows for name in names.split(", ")}


@pytest.mark.parametrize(
    ("row", "name", "left"),
    [
        ("Faster R-CNN", "faster_rcnn", 4),
        ("RetinaNet", "retinanet", 2),
        ("FCOS", "fcos", 3),
        ("DeepLabV3", "deeplabv3", 1),
        ("FCN", "fcn", 1),
        ("LR-ASPP", "lraspp", 2),
    ],
)
def test_the_page_names_the_output_heads(row, name, left):
    found = find_layers(build(name), skip=rows_of_the_page()[row])
    assert len(found.skipped_for(SkipReason.USER)) == left


@pytest.mark.parametrize("sequential", ["layer", "none"])
def test_a_head_sees_all_levels_without_stops(sequential):
    """And the report says which layers saw only the first level."""
    report = prune(build("retinanet"), scenes(1), 0.5, method="fast", sequential=sequential, progress=False)
    tokens = {layer.name: layer.tokens for layer in report.layers}
    levels = [size**2 for size in (16, 8, 4, 2)]  # of one image of 64 pixels
    assert tokens["head.regression_head.bbox_reg"] == (levels[0] if sequential == "layer" else sum(levels))
    assert any("the model calls 10 layers more than once" in note for note in report.notes) == (sequential == "layer")


# ---- lists of images


def test_images_in_a_list_and_in_a_tensor_give_the_same_masks():
    """Of equal sizes; a list is no tensor with one row for each channel."""
    pruned = []
    images = torch.rand(3, 3, 48, 48, generator=torch.Generator().manual_seed(3))
    for batch in ((tuple(images), [{}] * 3), {"images": list(images)}, (images,)):
        model = build("retinanet").double()
        forward = class_logits(model)
        prune(
            model,
            [to_double(batch)],
            0.5,
            allocation="fisher",
            keep_batch_norm=True,
            forward=lambda batch, forward=forward: forward([*batch.values()] if isinstance(batch, dict) else batch),
            progress=False,
        )
        pruned.append(masks(model))
    assert all(equal(pruned[0], other) for other in pruned[1:])


def to_double(batch):
    return torch.utils._pytree.tree_map_only(torch.Tensor, torch.Tensor.double, batch)


# ---- predictions


def test_the_output_of_a_segmentation_model_is_its_logits():
    pruned = []
    for named in (False, True):
        model, batches = build("lraspp"), pictures(8, height=32)
        forward = (lambda batch, model=model: {"logits": model(batch[0])["out"]}) if named else None
        choices = {"allocation": "fisher", "recovery": Distil(passes=2)}
        report = prune(model, batches, 0.7, forward=forward, progress=False, **choices)
        pruned.append(dict(model.named_parameters()))
        assert report.training.passes[-1].loss < report.training.passes[1].loss
    assert equal(*pruned)


@pytest.mark.parametrize("name", with_nightly(["retinanet"], ONE_STAGE))
def test_a_detector_learns_from_what_its_head_computes(name, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)  # rounding to bfloat16 exceeds the loss of random weights
    model, batches = build(name), scenes(*[1] * 8)
    before, dense = copy.deepcopy(model), []

    def forward(batch):
        return anchor_outputs(model, batch[0], "cls_logits", "bbox_regression")

    report = prune(model, batches, 0.5, recovery=Distil(passes=1), forward=forward, progress=False)
    held_out = [each.held_out for each in report.training.passes]
    assert min(held_out[1:]) < held_out[0]
    with torch.no_grad():
        for each in (before, model):
            dense.append(anchor_outputs(each, batches[0][0], "cls_logits", "bbox_regression"))
    assert (dense[0] - dense[1]).square().mean() < dense[0].square().mean()
    assert report.sparsity == pytest.approx(0.5, abs=0.02)


# ---- smaller models


@pytest.mark.parametrize("name", with_nightly(["retinanet"], [*DETECTORS, *SEGMENTERS]))
def test_hidden_units_are_taken_out(name):
    model, (batch,) = build(name), batches_for(name, 2)
    forward = class_logits(model) if name in ONE_STAGE else lambda batch: model(batch[0])
    prune(model, [batch], 0.5, pattern="structured", forward=forward, progress=False)
    with torch.no_grad():
        before = tree_leaves(forward(batch))
        shrunk = shrink(model, batch, forward)
        after = tree_leaves(forward(batch))
    assert shrunk.units > 0
    assert not shrunk.unproven
    assert shrunk.parameters[1] < shrunk.parameters[0]
    if finds_boxes(name) and name not in ONE_STAGE:  # rounding may change the order of boxes
        before, after = before[:1], after[:1]
    for one, other in zip(before, after, strict=True):
        assert (one - other).norm() <= 1e-4 * one.norm()


# ---- training


class Module(L.LightningModule):
    """A user's module around a model of torchvision, without any code for pruning."""

    def __init__(self, name, lr=0.01):
        super().__init__()
        self.net, self.lr = build(name).train(), lr
        self.boxes = finds_boxes(name)
        self.calibrated, self.validated = 0, []

    def forward(self, images):
        if not self.training:
            self.calibrated += len(images)
        return self.net(images)

    def training_step(self, batch, batch_idx):
        if self.boxes:
            return sum(self.net(*batch).values())
        return nn.functional.cross_entropy(self.net(batch[0])["out"], batch[1])

    def validation_step(self, batch, batch_idx):
        self.validated.append(masks(self.net))

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=self.lr, weight_decay=0.5)


def collated(samples):
    return tuple(zip(*samples, strict=True))


def loader(name, batch_size=2):
    if finds_boxes(name):
        (batch,) = scenes(4)
        return DataLoader([*zip(*batch, strict=True)], batch_size, collate_fn=collated)
    (batch,) = pictures(4)
    return DataLoader([*zip(*batch, strict=True)], batch_size)


@pytest.mark.parametrize("name", with_nightly(["faster_rcnn", "lraspp"], [*DETECTORS, *SEGMENTERS]))
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


class Predicting(Module):
    def calibration_predictions(self, batch):
        return class_logits(self.net)(batch)


def test_a_module_says_how_a_detector_predicts():
    callbacks = [WandaPrune(0.5, num_samples=4, allocation="fisher", keep_batch_norm=True) for _ in range(2)]
    trainer(callbacks[0]).validate(Predicting("retinanet"), loader("retinanet"), verbose=False)
    assert len({round(layer.target, 3) for layer in callbacks[0].report.layers}) > 1
    with pytest.raises(ValueError, match=r"Let forward= \(or calibration_step\) return the logits"):
        trainer(callbacks[1]).validate(Module("retinanet"), loader("retinanet"), verbose=False)


class Decayed:
    """The average of weights and buffers that the training loops of many detectors keep, with their own code."""

    def __init__(self, model, decay=0.5):
        self.module, self.decay = copy.deepcopy(model).eval(), decay

    @torch.no_grad()
    def update_parameters(self, model):
        current = model.state_dict()
        for name, value in self.module.state_dict().items():
            if value.is_floating_point():
                value *= self.decay
                value += (1 - self.decay) * current[name].detach()


class OfTimm(ModelEmaV3):
    def update_parameters(self, model):
        self.update(model)


AVERAGES = {
    "torch": partial(AveragedModel, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=True),
    "torch mean": AveragedModel,
    "timm": partial(OfTimm, decay=0.5),
    "own": Decayed,
}


@pytest.mark.parametrize(("kind", "made"), spread(AVERAGES, ["before pruning", "after pruning"]))
def test_zeros_stay_in_a_plain_loop_with_an_average(kind, made):
    model, (batch,) = build("retinanet"), scenes(2)
    average = AVERAGES[kind](model) if made == "before pruning" else None
    prune(model, [batch], 0.5, method="magnitude", keep_batch_norm=True, progress=False)
    pruned, average = masks(model), average or AVERAGES[kind](model)
    optimizer = torch.optim.SGD(model.train().parameters(), lr=1e-3, momentum=0.9, weight_decay=0.1)
    with keep_zeros(model, optimizer) as zeros:
        if made == "before pruning":
            zeros.clear_copies(model, [average])
        for _ in range(2):
            sum(model(*batch).values()).backward()
            optimizer.step()
            optimizer.zero_grad()
            average.update_parameters(model)
    assert equal(masks(model), pruned)
    assert equal(masks(average.module), pruned)
