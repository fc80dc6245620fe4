"""What can run on sparse tensor cores, and, where there are some, that it computes the same."""

import copy

import pytest
import torch
from torch import nn

from wanda_lightning import accelerate_2to4
from wanda_lightning.acceleration.semi_structured import dense_reason, refuse_devices

HAS_SPARSE_CORES = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)


def two_to_four(rows, columns, dtype=torch.float16):
    weight = torch.randn(rows, columns // 4, 4)
    keep = torch.rand(weight.shape).argsort(-1) < 2
    return (weight * keep).reshape(rows, columns).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_weight_that_fits(dtype):
    weight = two_to_four(64, 128, dtype)
    assert dense_reason(weight) is None
    weight[3, 4:8] = 0  # more zeros fit, too
    weight[4, 4:8] = -0.0
    assert dense_reason(weight) is None


@pytest.mark.parametrize(
    ("weight", "reason"),
    [
        (two_to_four(64, 128, torch.float32), "its dtype is float32, not float16 or bfloat16"),
        (two_to_four(48, 128), "its 48 rows must be a multiple of 32 and its 128 columns a multiple of 64"),
        (two_to_four(64, 96), "its 64 rows must be a multiple of 32 and its 96 columns a multiple of 64"),
        (torch.ones(32, 64).half(), "its zeros are not 2:4"),
        (torch.full((32, 64), torch.nan).half(), "its zeros are not 2:4"),
    ],
)
def test_why_a_weight_stays_dense(weight, reason):
    assert dense_reason(weight) == reason


def test_zeros_in_the_wrong_groups_do_not_fit():
    weight = torch.zeros(32, 64, dtype=torch.float16)
    weight[5, [4, 6]] = 1
    assert dense_reason(weight) is None
    weight[5, 7] = 1
    assert dense_reason(weight) == "its zeros are not 2:4"


def test_a_model_on_the_cpu_is_refused():
    model = nn.Linear(64, 64).half()
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(
        ValueError, match=r"CUDA device of compute capability 8\.0 or later, but its weights are on cpu"
    ):
        accelerate_2to4(model)
    assert torch.equal(model.state_dict()["weight"], state["weight"])


def test_an_old_device_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    with pytest.raises(ValueError, match=r"but cuda:0 has 7\.5: it has no sparse tensor cores"):
        refuse_devices({torch.device("cuda:0")})


@pytest.mark.skipif(not HAS_SPARSE_CORES, reason="needs a GPU with sparse tensor cores")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 7, 64])
def test_a_model_on_a_gpu(dtype, tokens):
    model = nn.Sequential(nn.Linear(128, 256), nn.ReLU(), nn.Linear(256, 128), nn.Linear(128, 64)).cuda().to(dtype)
    for index in (0, 2):
        model[index].weight.data = two_to_four(*model[index].weight.shape, dtype).cuda()
    model[0].weight.data[0, 0:4] = -0.0
    bits = model[0].weight.data.view(torch.int16).clone()
    state, inputs = copy.deepcopy(model.state_dict()), torch.randn(2, tokens, 128, dtype=dtype, device="cuda")
    with torch.no_grad():
        expected = model(inputs)
        with accelerate_2to4(model) as accelerated:
            assert list(accelerated.layers) == ["0", "2"]
            assert accelerated.dense == {"3": "its zeros are not 2:4"}
            assert torch.allclose(model(inputs), expected, atol=0.05, rtol=0.05)
            inside = model.state_dict()
            assert all(torch.equal(inside[name], state[name]) for name in state)
            assert accelerated.nbytes < 0.6 * 2 * 2 * 128 * 256
        assert torch.equal(model(inputs), expected)
    assert torch.equal(model[0].weight.data.view(torch.int16), bits)
