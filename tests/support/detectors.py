"""Small detectors and a segmentation model of torchvision, with random weights, and batches for them."""

from functools import partial

import torch
from support.layers import rng
from support.zoo import seeded
from torch import nn
from torchvision.models import detection, mobilenet_v2
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.segmentation.lraspp import LRASPP
from torchvision.ops import MultiScaleRoIAlign

CLASSES = 3
WIDTH = 32  # of the feature pyramid
LEVELS = {"3": "0", "5": "1", "7": "2"}  # layers of the backbone, and their names in the pyramid
# The expansion, channels, number and stride of the blocks of each stage.
BLOCKS = [
    [1, 8, 1, 1],
    [6, 8, 2, 2],
    [6, 16, 2, 2],
    [6, 24, 2, 2],
]
SMALL = {"min_size": 64, "max_size": 128}


def features(norm_layer=nn.BatchNorm2d):
    return mobilenet_v2(
        weights=None, inverted_residual_setting=BLOCKS, norm_layer=norm_layer
    ).features[:8]


def pyramid(norm_layer=nn.BatchNorm2d):
    return BackboneWithFPN(features(norm_layer), LEVELS, [8, 16, 24], WIDTH)


def anchors():
    return AnchorGenerator(((8,), (16,), (32,), (64,)), ((0.5, 1.0),) * 4)


def mask_rcnn():
    pool = partial(MultiScaleRoIAlign, ["0", "1", "2"], sampling_ratio=2)
    return detection.MaskRCNN(
        pyramid(),
        rpn_anchor_generator=anchors(),
        rpn_post_nms_top_n_test=20,
        rpn_post_nms_top_n_train=20,
        box_roi_pool=pool(output_size=3),
        box_head=TwoMLPHead(WIDTH * 3 * 3, 32),
        box_predictor=FastRCNNPredictor(32, CLASSES),
        box_score_thresh=0.0,  # random weights find nothing that they are sure of
        mask_roi_pool=pool(output_size=4),
        mask_head=MaskRCNNHeads(WIDTH, (16, 16), 1),
        mask_predictor=MaskRCNNPredictor(16, 16, CLASSES),
        **SMALL,
    )


def retinanet(norm_layer=nn.BatchNorm2d):
    return detection.RetinaNet(
        pyramid(norm_layer), CLASSES, anchor_generator=anchors(), score_thresh=0.0, **SMALL
    )


def lraspp():
    return LRASPP(
        IntermediateLayerGetter(features(), {"5": "low", "7": "high"}), 16, 24, CLASSES, 16
    )


MODELS = {"mask_rcnn": mask_rcnn, "retinanet": retinanet, "lraspp": lraspp}


def build(name):
    """Return a model in evaluation mode, with the same random weights every time."""
    return seeded(MODELS[name]).eval()


def scenes(*sizes):
    """Batches of images of different sizes, each with one box, as torchvision's `tuple(zip(*samples))` makes them."""
    random = rng(1)
    box = {"boxes": torch.tensor([[8.0, 8.0, 48.0, 40.0]]), "labels": torch.tensor([1])}
    batches = []
    for size in sizes:
        widths = [64 + 16 * (number % 2) for number in range(size)]
        images = tuple(torch.rand(3, 64, width, generator=random) for width in widths)
        batches.append((images, (box,) * size))
    return batches


def batches_for(name, *sizes):
    if name != "lraspp":
        return scenes(*sizes)
    random = rng(1)
    return [(torch.rand(size, 3, 64, 64, generator=random),) for size in sizes]


def class_logits(model):
    """Return a forward pass that gives the logits of a detector with one stage: (images, anchors, classes)."""

    def forward(batch):
        images, _ = model.transform(list(batch[0]))
        features = list(model.backbone(images.tensors).values())
        return {"logits": model.head(features)["cls_logits"]}

    return forward
