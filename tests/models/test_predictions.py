"""The predictions in the output of a model."""

import pytest
import torch

from wanda_lightning.models import has_classes


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
    ],
    ids=["classes", "one_class", "sequence", "tuple", "tokens", "image", "segmentation", "one_class_of_pixels"],
)
def test_which_outputs_are_classes(output, expected):
    assert has_classes(output) is expected
