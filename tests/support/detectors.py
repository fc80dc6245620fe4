"""Small detectors and segmentation models of torchvision, with random weights, and batches for them."""

from functools import partial

import torch
from support.zoo import seeded
from torch import nn
from torchvision.models import detection, mobilenet_v2, segmentation
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.segmentation.deeplabv3 import DeepLabHead
from torchvision.models.segmentation.fcn import FCNHead
from torchvision.models.segmentation.lraspp import LRASPP
from torchvision.ops import MultiScaleRoIAlign

CLASSES = 3
WIDTH = 32  # of the feature pyramid
LEVELS = {"3": "0", "5": "1", "7": "2"}  # of the backbone, by their names in the pyramid
BLOCKS = [[1, 8, 1, 1], [6, 8, 2, 2], [6, 16, 2, 2], [6, 24, 2, 2]]  # expansion, channels, number, stride
SMALL = {"min_size": 64, "max_size": 128}


def features(norm_layer=nn.BatchNorm2d):
    return mobilenet_v2(weights=None, inverted_residual_setting=BLOCKS, norm_layer=norm_layer).features[:8]


def pyramid(norm_layer=nn.BatchNorm2d):
    return BackboneWithFPN(features(norm_layer), LEVELS, [8, 16, 24], WIDTH)


def anchors(*sizes):
    return AnchorGenerator(tuple((size,) for size in sizes), ((0.5, 1.0),) * len(sizes))


def two_stages(cls=detection.FasterRCNN, norm_layer=nn.BatchNorm2d, **more):
    pool = partial(MultiScaleRoIAlign, ["0", "1", "2"], sampling_ratio=2)
    if cls is detection.MaskRCNN:
        more |= {"mask_roi_pool": pool(output_size=4), "mask_head": MaskRCNNHeads(WIDTH, (16, 16), 1)}
        more |= {"mask_predictor": MaskRCNNPredictor(16, 16, CLASSES)}
    return cls(
        pyramid(norm_layer),
        rpn_anchor_generator=anchors(8, 16, 32, 64),
        rpn_post_nms_top_n_test=20,
        rpn_post_nms_top_n_train=20,
        box_roi_pool=pool(output_size=3),
        box_head=TwoMLPHead(WIDTH * 3 * 3, 32),
        box_predictor=FastRCNNPredictor(32, CLASSES),
        box_score_thresh=0.0,  # random weights find nothing that they are sure of
        **SMALL,
        **more,
    )


def retinanet(norm_layer=nn.BatchNorm2d):
    return detection.RetinaNet(
        pyramid(norm_layer), CLASSES, anchor_generator=anchors(8, 16, 32, 64), score_thresh=0.0, **SMALL
    )


def fcos():
    generator = AnchorGenerator(((8,), (16,), (32,), (64,)), ((1.0,),) * 4)
    return detection.FCOS(pyramid(), CLASSES, anchor_generator=generator, score_thresh=0.0, **SMALL)


def segmenter(cls, head):
    return cls(IntermediateLayerGetter(features(), {"7": "out"}), head(24, CLASSES), None)


def lraspp():
    return LRASPP(IntermediateLayerGetter(features(), {"5": "low", "7": "high"}), 16, 24, CLASSES, 16)


DETECTORS = {
    "faster_rcnn": two_stages,
    "mask_rcnn": partial(two_stages, detection.MaskRCNN),
    "retinanet": retinanet,
    "fcos": fcos,
    "ssdlite": partial(
        detection.ssdlite320_mobilenet_v3_large,
        weights=None,
        weights_backbone=None,
        num_classes=CLASSES,
        width_mult=0.25,
        score_thresh=0.0,
        norm_layer=partial(nn.BatchNorm2d, momentum=None),
    ),
}
SEGMENTERS = {
    "lraspp": lraspp,
    "fcn": partial(segmenter, segmentation.FCN, FCNHead),
    "deeplabv3": partial(segmenter, segmentation.DeepLabV3, DeepLabHead),
}


def build(name):
    """Return a model in evaluation mode, with the same random weights every time."""
    model = seeded({**DETECTORS, **SEGMENTERS}[name])
    if name == "ssdlite":  # without statistics for BatchNorm, the numbers in its last layers are too small for float32
        with torch.no_grad():
            model.train()(*scenes(2)[0])
    return model.eval()


def finds_boxes(name):
    return name in DETECTORS


def scenes(*sizes, seed=1, height=64):
    """Batches of images of different sizes, each with one box, as torchvision's `tuple(zip(*samples))` makes them."""
    random = torch.Generator().manual_seed(seed)
    batches = []
    for size in sizes:
        images = tuple(torch.rand(3, height, height + 16 * (n % 2), generator=random) for n in range(size))
        box = {"boxes": torch.tensor([[8.0, 8.0, 48.0, 40.0]]), "labels": torch.tensor([1])}
        batches.append((images, tuple({**box, "masks": torch.ones_like(x[:1], dtype=torch.uint8)} for x in images)))
    return batches


def pictures(*sizes, seed=1, height=64):
    """Batches for segmentation: images, and the class of each pixel."""
    random, side = torch.Generator().manual_seed(seed), (height, height)
    return [
        (torch.rand(n, 3, *side, generator=random), torch.randint(CLASSES, (n, *side), generator=random)) for n in sizes
    ]


def batches_for(name, *sizes, **more):
    return (scenes if finds_boxes(name) else pictures)(*sizes, **more)


def class_logits(model):
    """Return a forward pass that gives the logits of a detector with one stage: (images, anchors, classes)."""

    def forward(batch):
        images, _ = model.transform(list(batch[0]))
        return {"logits": model.head(list(model.backbone(images.tensors).values()))["cls_logits"]}

    return forward
