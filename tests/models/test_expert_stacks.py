"""Experts that are one parameter are found, and their matrices read and written in place."""

import pytest
import torch
from support import tiny
from support.experts import BY_COLUMNS, SPECIMENS, Stack, experts_of, jetmoe, reasons
from support.zoo import model_of
from torch import nn

from wanda_lightning.models import find_layers


@pytest.mark.parametrize("name", SPECIMENS)
def test_each_expert_is_a_layer_that_lies_in_its_parameter(name):
    model = model_of(name)
    layers = [layer for layer in find_layers(model).layers if layer.expert is not None]
    assert len(layers) == 2 * 4 * len(experts_of(model))
    for layer in layers:
        stored = layer.parameter[layer.expert].detach()
        assert layer.name == f"{layer.siblings[:-2]}.{layer.expert}"
        assert model.get_parameter(layer.siblings[:-2]) is layer.parameter
        assert torch.equal(layer.read(), stored.T if name in BY_COLUMNS else stored)
        assert layer.read().shape == layer.shape
        assert layer.read().data_ptr() == stored.data_ptr()
        expected = layer.parameter.detach().clone()
        expected[layer.expert] = 0
        layer.write(torch.zeros(layer.shape))
        assert torch.equal(layer.parameter, expected)


def test_square_experts_are_read_as_those_of_their_class():
    """JetMoE's attention has experts of 32 x 32, which do not say which side is the input; those of its MLP do."""
    found = {layer.name: layer for layer in find_layers(jetmoe()).layers}
    assert found["model.layers.0.mlp.input_linear.3"].shape == (128, 32)
    square = found["model.layers.0.self_attention.experts.output_linear.0"]
    assert square.kind is found["model.layers.0.mlp.input_linear.3"].kind
    assert square.kind.rows_first


def routers_of(model):
    return {name for name, reason in reasons(model).items() if reason == "router"}


def test_routers_are_left_dense():
    assert routers_of(tiny.on_meta("Qwen2MoeForCausalLM")) == {
        "model.layers.0.mlp.gate",
        "model.layers.0.mlp.shared_expert_gate",
        "model.layers.1.mlp.gate",
        "model.layers.1.mlp.shared_expert_gate",
    }
    assert routers_of(jetmoe()) >= {
        "model.layers.1.mlp.router.layer",
        "model.layers.1.self_attention.experts.router.layer",
    }
    assert "transformer.blocks.0.ffn.router.layer" in routers_of(tiny.on_meta("DbrxForCausalLM"))


def test_experts_in_one_matrix_are_left_dense():
    found = reasons(tiny.on_meta("DbrxForCausalLM"))
    assert found["transformer.blocks.0.ffn.experts.mlp.w1"].startswith("w1 of DbrxExpertGLU is not")


UNSAID = "does not show which dimension of the experts' matrices in"


@pytest.mark.parametrize(
    ("stack", "expected"),
    [
        (Stack(num_experts=4, hidden_size=32), [(48, 32), (32, 48)]),
        (Stack((4, 32, 48), (4, 48, 32), num_experts=4, hidden_size=32), [(48, 32), (32, 48)]),
        (
            Stack((4, 32, 32), (4, 32, 32), num_experts=4, hidden_size=32, is_transposed=True),
            [(32, 32), (32, 32)],
        ),
        (Stack((4, 32, 32), (4, 32, 32), num_experts=4, hidden_size=32), UNSAID),
        (Stack(num_experts=4), UNSAID),
        (Stack(num_experts=4, hidden_size=16), UNSAID),
        (Stack(num_experts=3, hidden_size=32), "is not the weight of a supported layer"),
        (Stack(num_experts_per_tok=4, hidden_size=32), "is not the weight of a supported layer"),
        (Stack(num_groups=4, hidden_size=32), "is not the weight of a supported layer"),
    ],
)
def test_only_what_declares_itself_is_taken_for_experts(stack, expected):
    found = find_layers(nn.ModuleDict({"experts": stack, "other": nn.Linear(8, 8)}))
    if isinstance(expected, str):
        assert [layer.name for layer in found.layers] == ["other"]
        assert all(expected in matrix.detail for matrix in found.skipped)
        assert [matrix.name for matrix in found.skipped] == ["experts.up_proj", "experts.down_proj"]
    else:
        assert [layer.shape for layer in found.layers[::4]][:2] == expected


def test_skip_names_experts_one_by_one_or_together():
    model = model_of("mixtral")
    whole = "*.experts.gate_up_proj"
    one = "model.layers.1.mlp.experts.down_proj.2"
    found = reasons(model, skip=[whole, one])
    assert {name for name, reason in found.items() if reason == f"skip={whole!r}"} == {
        f"model.layers.{block}.mlp.experts.gate_up_proj.{expert}"
        for block in range(2)
        for expert in range(4)
    }
    assert found[one] == f"skip={one!r}"


def test_experts_tied_to_others_are_pruned_once():
    model = nn.ModuleDict(
        {name: Stack(num_experts=4, hidden_size=32) for name in ("first", "second")}
    )
    model["second"].up_proj = model["first"].up_proj
    assert reasons(model) == {"second.up_proj": "tied to first.up_proj"}
    assert reasons(model, skip=["second.up_proj"])["first.up_proj.1"] == "skip='second.up_proj'"
