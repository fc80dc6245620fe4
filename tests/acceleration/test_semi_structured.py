"""What can run on sparse tensor cores, and, where there are some, that it computes the same."""

import copy

import pytest
import torch
from torch import nn

from wanda_lightning import accelerate_2to4
from wanda_lightning.acceleration import semi_structured
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
    weight[4, [4, 6, 7]] = 1
    assert dense_reason(weight) == "its zeros are not 2:4"


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


@pytest.fixture
def dense_products(monkeypatch):
    """Multiply by ordinary tensors on the CPU, which tests everything around PyTorch's semi-structured tensors."""
    monkeypatch.setattr(semi_structured, "refuse_devices", lambda devices: None)
    monkeypatch.setattr(semi_structured, "compressed", lambda weight: weight.clone())


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(64, 128), nn.Linear(128, 64, bias=False)
        self.head.weight = self.embed.weight
        self.up, self.down = nn.Linear(128, 192), nn.Linear(192, 128)
        self.full, self.convolution = nn.Linear(128, 128), nn.Conv1d(128, 128, 1)
        for weight in (self.up.weight, self.down.weight):
            weight.data = two_to_four(*weight.shape, torch.bfloat16)

    def forward(self, ids):
        return self.head(self.full(self.down(self.up(self.embed(ids)).relu())))


def test_a_model_accelerates_and_returns(dense_products):
    model, ids = Tied().bfloat16().eval(), torch.tensor([[3]])
    state, parameters = copy.deepcopy(model.state_dict()), dict(model.named_parameters())
    with torch.no_grad():
        expected = model(ids)
        with accelerate_2to4(model) as accelerated:
            assert list(accelerated.layers) == ["up", "down"]
            assert accelerated.dense == {
                "embed.weight": "its module is of class Embedding, not Linear",
                "head": "another module uses its weight",
                "full": "its zeros are not 2:4",
                "convolution.weight": "its module is of class Conv1d, not Linear",
            }
            assert torch.equal(model(ids), expected)
            inside = model.state_dict()
            assert list(inside) == list(state)
            assert all(torch.equal(inside[name], state[name]) for name in state)
            assert model.up.weight.isnan().all()  # the dense weight is not on the device
            with pytest.raises(ValueError, match="load_state_dict needs dense weights to replace"):
                model.load_state_dict(state)
        accelerated.undo()  # again, which does nothing
        assert torch.equal(model(ids), expected)
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
    model.load_state_dict(state)
    assert all(torch.equal(model.state_dict()[name], state[name]) for name in state)


def test_gradients_and_autocast_use_the_dense_weight(dense_products):
    model, inputs = nn.Sequential(nn.Linear(64, 32)).half(), torch.randn(1, 64).half().requires_grad_()
    model[0].weight.data = two_to_four(32, 64)
    (expected,) = torch.autograd.grad(model(inputs).sum(), inputs)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        cast = model(inputs)
    with accelerate_2to4(model) as accelerated:
        accelerated.layers["0"]._sparse.fill_(torch.nan)  # which is not used
        (gradient,) = torch.autograd.grad(model(inputs).sum(), inputs)
        assert torch.equal(gradient, expected)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(model(inputs), cast)


def test_a_model_without_2to4_layers_is_refused(dense_products):
    with pytest.raises(ValueError, match=r"all stay dense: its zeros are not 2:4 \(1\)\."):
        accelerate_2to4(nn.Linear(64, 64).half())


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
