"""Detectors and a segmentation model of torchvision: every method, and callbacks; docs/detectors.md runs the rest."""

import itertools

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from support.callbacks import WITHOUT_ADVICE, trainer
from support.detectors import batches_for, build, class_logits, scenes
from support.layers import assert_same, rng
from support.pairwise import with_nightly
from support.quiet import prune
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader

from wanda_lightning import WandaPrune
from wanda_lightning.methods import METHODS, PRESETS
from wanda_lightning.training.held_zeros import zeros_of

pytestmark = WITHOUT_ADVICE


READ_PREDICTIONS = ("best", "thorough")
SAMPLE = [
    ("wanda", "mask_rcnn"),
    ("fast", "lraspp"),
    ("best", "retinanet"),
    ("thorough", "lraspp"),
]


@pytest.mark.parametrize(
    ("method", "name"),
    with_nightly(
        SAMPLE,
        [
            *itertools.product((*METHODS, *PRESETS), ("retinanet", "lraspp")),
            ("balanced", "mask_rcnn"),
        ],
    ),
)
def test_every_method_prunes_as_asked(method, name):
    """The best presets read predictions, which the detections are not."""
    model = build(name)
    batches = batches_for(name, 2, 1)
    choices = (
        {"forward": class_logits(model)}
        if method in READ_PREDICTIONS and name == "retinanet"
        else {}
    )
    report = prune(model, batches, 0.5, method=method, **choices)
    assert not [
        matrix.name for matrix in report.skipped if matrix.reason.name in ("UNREACHED", "INACTIVE")
    ]
    # SparseGPT also zeroes weights that only multiply zeros.
    assert (
        0.49
        < report.sparsity
        < (0.8 if method == "sparsegpt" or method.startswith("ablate") else 0.51)
    )
    with torch.no_grad():
        outputs = [each for each in tree_leaves(model(batches[0][0])) if each.is_floating_point()]
    assert sum(each.numel() for each in outputs)
    assert all(each.isfinite().all() for each in outputs)


def test_images_in_a_list_and_in_a_tensor_give_the_same_masks():
    """Of equal sizes; a list is no tensor with one row for each channel."""
    pruned = []
    images = torch.rand(3, 3, 48, 48, generator=rng(3)).double()
    for batch in ((tuple(images), [{}] * 3), {"images": list(images)}, (images,)):
        model = build("retinanet").double()
        logits = class_logits(model)
        choices = {"allocation": "fisher", "keep_batch_norm": True}
        forward = (
            (lambda batch, of=logits: of(tuple(batch.values())))
            if isinstance(batch, dict)
            else logits
        )
        prune(model, [batch], 0.5, forward=forward, **choices)
        pruned.append(model.state_dict())
    assert_same(pruned[1:], pruned[:1] * 2)


class Module(L.LightningModule):
    """A user's module around a detector of torchvision, without any code for pruning."""

    def __init__(self):
        super().__init__()
        self.net = build("retinanet").train()

    def forward(self, images):
        return self.net(images)

    def training_step(self, batch, batch_idx):
        return sum(self.net(*batch).values())

    def validation_step(self, batch, batch_idx):
        pass

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.01, weight_decay=0.5)


def loader():
    return DataLoader(
        [*zip(*scenes(4)[0], strict=True)],
        2,
        collate_fn=lambda samples: tuple(zip(*samples, strict=True)),
    )


@pytest.mark.parametrize("order", [1, -1])
def test_a_callback_prunes_a_detector_in_training_beside_an_average(order):
    module = Module()
    pruning = WandaPrune(0.5, num_samples=4, at_step=2)
    averaging = EMAWeightAveraging(decay=0.5)
    run = trainer(*[pruning, averaging][::order], max_epochs=2, num_sanity_val_steps=0)
    run.fit(module, loader())
    assert sum(zeros_of(module).values()) == sum(layer.zeros for layer in pruning.report.layers)
    assert pruning.report.sparsity == pytest.approx(0.5, abs=0.02)


def test_a_module_says_how_a_detector_predicts():
    module = Module()
    module.calibration_predictions = class_logits(module.net)
    callback = WandaPrune(0.5, num_samples=4, allocation="fisher", keep_batch_norm=True)
    trainer(callback).validate(module, loader(), verbose=False)
    assert len({round(layer.target, 3) for layer in callback.report.layers}) > 1
