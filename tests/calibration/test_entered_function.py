"""A mode sees the calls inside a function."""

import torch
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from wanda_lightning.calibration.entered_function import entered_function


class Seen(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.functions = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.functions.append(func)
        return func(*args, **(kwargs or {}))


def test_the_products_inside_attention_are_seen():
    x, weight, out = torch.randn(5, 2, 8), torch.randn(24, 8), torch.randn(8, 8)
    given = (x, x, x, 8, 2, weight, torch.randn(24), None, None, False, 0.0, out, torch.randn(8))
    options = {"training": False, "need_weights": False}
    with Seen() as whole:
        expected, _ = F.multi_head_attention_forward(*given, **options)
    with Seen() as inside:
        output, _ = entered_function(F.multi_head_attention_forward)(*given, **options)
    assert torch.equal(output, expected)
    assert F.linear not in whole.functions
    assert F.linear in inside.functions
