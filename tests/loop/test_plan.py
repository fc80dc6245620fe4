"""What is pruned, and to which sparsity, is found once; what cannot be pruned is refused, and left as it was."""

import math
import re
from functools import partial

import pytest
import torch
import yaml
from support.chains import Chain, Mlp, vectors
from support.layers import assert_same
from support.pairwise import spread
from support.quiet import prune, shrinks
from support.refusals import Untouched, refusal
from support.zoo import ZOO, batches_of, model_of, seeded
from torch import nn

from wanda_lightning import NM, OWL, Distill, Fisher, PerLayer, PruningConfig
from wanda_lightning.core import Unstructured
from wanda_lightning.loop.plan import make_plan
from wanda_lightning.methods import SEQUENTIAL_CHOICES
from wanda_lightning.models import find_layers
from wanda_lightning.shrink_config import ShrinkConfig

EVERY_GRANULARITY = pytest.mark.parametrize("sequential", SEQUENTIAL_CHOICES)
LLAMA = ZOO["llama"].build
NAMED = {
    "weighed": Unstructured("layer", weigh_rows=True),
    "not weighed": Unstructured("layer", weigh_rows=False),
    "with blocks": Distill(blocks=True),
    "without blocks": Distill(blocks=False),
}
# Models, choices, an option, and what the plan has for it: a name above, or a text.
RESOLVED = """
- [llama, {method: best}, pattern, weighed]
- [vit convnext, {method: best}, pattern, not weighed]
- [vit convnext llama, {method: best, pattern: weighed}, pattern, weighed]
- [llama, {method: best}, sequential, layer]
- [llama, {method: thorough}, sequential, layer]
- [vit convnext, {method: best}, sequential, none]
- [vit convnext, {method: thorough}, sequential, none]
- [llama, {method: thorough, pattern: unstructured}, recovery, without blocks]
- [llama, {method: thorough, pattern: '2:4'}, recovery, without blocks]
- [vit convnext, {method: thorough, pattern: unstructured}, recovery, with blocks]
- [vit convnext, {method: thorough, pattern: '2:4'}, recovery, with blocks]
- [vit convnext llama, {units: 0.5, recovery: distill}, recovery, without blocks]
- [vit convnext llama, {method: thorough, sequential: layer}, recovery, without blocks]
- [llama, {units: 0.5}, sequential, layer]
- [vit convnext, {}, sequential, none]
- [vit convnext, {units: 0.5}, sequential, none]
- [vit convnext llama, {method: fast, sequential: block}, sequential, block]
- [vit convnext llama, {method: fast, sequential: layer}, sequential, layer]
- [vit convnext llama, {method: fast, sequential: none}, sequential, none]
- [llama, {}, sequential, block]
- [llama, {method: fast, sequential: auto}, sequential, block]
- [vit convnext, {recovery: reconstruct}, sequential, none]
- [llama, {method: best, recovery: reconstruct}, sequential, block]
- [llama, {units: 0.5, recovery: reconstruct}, sequential, block]
- [mixtral, {experts: 0.5}, sequential, none]
"""


@pytest.mark.parametrize(("names", "choices", "option", "expected"), yaml.safe_load(RESOLVED))
def test_choices_that_depend_on_the_model(names, choices, option, expected):
    """Rows are weighed except in image models, whose blocks Distill also trains, and which are pruned in one pass."""
    chosen = {name: NAMED.get(choice, choice) for name, choice in choices.items()}
    if shrinks(chosen):
        (config,) = ShrinkConfig(**chosen).parts
    else:
        config = PruningConfig(**chosen)
    for name in names.split():
        plan = make_plan(config, model_of(name))
        assert getattr(plan.config, option) == NAMED.get(expected, expected)
        assert plan.preset == choices.get("method") or choices.keys() != {"method"}


# ---- allocations on whole models


MODELS = ["llama", "t5", "resnet18", "unreached"]
SPREADING = {"owl": OWL(m=2.0), "fisher": Fisher()}


@pytest.mark.parametrize(("model_name", "name"), spread(MODELS, SPREADING))
def test_an_allocation_sees_the_dense_model_at_every_granularity(model_name, name):
    specimen = ZOO[model_name]
    given_out = []
    for sequential in SEQUENTIAL_CHOICES:
        report = prune(
            specimen.build(),
            specimen.batches(),
            0.5,
            allocation=SPREADING[name],
            sequential=sequential,
        )
        given_out.append({layer.name: layer.target for layer in report.layers})
        for layer in report.layers:
            assert layer.sparsity == pytest.approx(layer.target, abs=1e-6)
    assert given_out[0] == given_out[1] == given_out[2]
    assert len(set(given_out[0].values())) > 1
    assert report.sparsity == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("allocation", [PerLayer({"*.0.*q*": 0.0}), OWL(m=2.0)], ids=str)
def test_mixed_n_of_m(allocation):
    model = LLAMA()
    pattern = NM(8, 16)
    report = prune(model, batches_of("llama"), 0.5, pattern=pattern, allocation=allocation)
    sparsities = {layer.name: layer.sparsity for layer in report.layers}
    for layer in find_layers(model).layers:
        (kept,) = (layer.read().reshape(-1, 16) != 0).sum(dim=1).unique().tolist()
        assert sparsities[layer.name] == 1 - kept / 16
    assert len(set(sparsities.values())) > 1
    assert report.sparsity == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize(
    "choices",
    [
        {"allocation": "owl", "sequential": "none"},
        {"allocation": "owl", "sequential": "block"},
        {"recovery": "reconstruct", "sequential": "none"},
    ],
)
def test_batches_are_read_once(choices):
    """A generator is as good as a list, though most of these choices need a pass more."""
    kept = []
    for batches in (batches_of("llama"), iter(batches_of("llama"))):
        model = LLAMA()
        report = prune(model, batches, **choices)
        assert report.config["calibration_batches"] == len(batches_of("llama"))
        kept.append(model.state_dict())
    assert_same(*kept)


@EVERY_GRANULARITY
@pytest.mark.parametrize(
    ("criterion", "allocation", "passes"),
    [
        ("wanda", "uniform", {"block": 2, "layer": 1, "none": 1}),
        ("wanda", "owl", {"block": 3, "layer": 2, "none": 1}),
        ("magnitude", "owl", dict.fromkeys(SEQUENTIAL_CHOICES, 1)),
    ],
)
def test_how_often_each_layer_runs(criterion, allocation, passes, sequential):
    model = LLAMA()
    calls = []
    model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    prune(
        model,
        batches_of("llama"),
        criterion=criterion,
        allocation=allocation,
        sequential=sequential,
    )
    # The hook may keep state, so two samples run plainly, and in lockstep, where each block that waits runs twice.
    compared = 0
    if criterion == "wanda":
        compared = {"block": 2 * (1 + 2), "layer": 2 * (1 + 1), "none": 0}[sequential]
    assert len(calls) == passes[sequential] * len(batches_of("llama")) + compared


# ---- what is impossible

LAYERS = [
    "blocks.0.up",
    "blocks.0.down",
    "blocks.1.up",
    "blocks.1.down",
    "blocks.2.up",
    "blocks.2.down",
    "blocks.3.up",
    "blocks.3.down",
    "head",
]


def build(make=Chain):
    return seeded(lambda: make(*(Mlp() for _ in range(4))))


ONLY = {"only": ["blocks.0.up"], "skip": ["blocks.0"]}
INFERENCE = torch.inference_mode()(lambda: nn.Sequential(nn.Linear(8, 8)))
ROWS = [
    (INFERENCE, {}, r"but 0 was created under torch\.inference_mode\(\) and cannot change\. Build"),
    (
        lambda: build().to("meta"),
        {},
        r"blocks\.0\.up is on the meta device\. .* prune_from_disk or, in the shell, --stream",
    ),
    (
        build,
        {"pattern": "2:5", "sparsity": 0.6},
        r"NM\(n=2, m=5\) fits none of the 9 layers: .*blocks\.0\.up: input",
    ),
    (nn.ReLU, {"skip": ["head"]}, "skip='head' matches no matrix of the model; the model has none"),
    (nn.ReLU, {}, "model has nothing to prune .there are no weight matrices"),
    (lambda: nn.Sequential(nn.Embedding(4, 8)), {}, "nothing to prune .0: embedding"),
    (build, ONLY, r"nothing to prune .*skip='blocks\.0'.*not in only=\['blocks\.0\.up'\]"),
    (LLAMA, {"allocation": PerLayer({"lm_head": 0.5})}, "matches no pruned layer"),
    (LLAMA, {"allocation": PerLayer({"*.mlp": 0.9})}, "with this PerLayer"),
]


@pytest.mark.parametrize(("make", "choices", "message"), ROWS)
def test_what_is_impossible_is_refused_before_a_batch_is_read(make, choices, message):
    for sequential in SEQUENTIAL_CHOICES:
        assert re.search(message, refusal(make(), Untouched(), sequential=sequential, **choices))


# ---- numbers that are not finite


class Unforeseen(Exception):
    pass


def spoil(value, module, args):
    """Spoil the second batch, which is the one with three samples."""
    if len(args[0]) == 3:
        if value is None:
            raise Unforeseen("out of luck")
        return args[0].index_fill(1, torch.tensor(1), value)
    return None


@pytest.mark.parametrize("value", [math.nan, 1e30, None])
@EVERY_GRANULARITY
@pytest.mark.parametrize("place", ["blocks.0", "blocks.2", "blocks.2.down"])
def test_inputs_that_are_not_finite_and_errors_name_what_was_written(place, sequential, value):
    """Also if only the squares overflow (1e30). No weight of the unit is written, nor that of the layer before."""
    model = build()
    found = place if place == "blocks.2.down" else f"{place}.up"
    model.get_submodule(place).register_forward_pre_hook(partial(spoil, value))
    written = () if sequential == "none" else LAYERS[: LAYERS.index(found)]
    if place == "blocks.2.down" and sequential == "block":
        # Only at "layer", the up-projection of the block is done when a batch is between its layers.
        written.remove("blocks.2.up")
    error = Unforeseen if value is None else ValueError
    message = refusal(model, vectors(), error=error, sequential=sequential, written=written)
    if value is None:
        assert message == "out of luck"
    else:
        assert f"input of {found} holds NaN or infinity" in message
        assert re.search("batch 1 .*Check that batch.*wider dtype", message)


@EVERY_GRANULARITY
def test_what_is_padding_may_be_anything(sequential):
    class Masked(Chain):
        def forward(self, x, attention_mask):
            return super().forward(x.masked_fill(attention_mask[..., None] == 0, math.nan))

    report = prune(
        build(Masked),
        [{"x": x, "attention_mask": torch.tensor([[0, 1, 1]] * len(x))} for x in vectors()],
        sequential=sequential,
    )
    assert {layer.tokens for layer in report.layers} == {2 * (2 + 3 + 2)}


@pytest.mark.parametrize(("criterion", "value"), [("wanda", -math.inf), ("magnitude", math.nan)])
def test_a_weight_that_is_not_finite(criterion, value):
    model = build()
    model.head.weight.data[1, 2] = value
    assert "head has weights that are NaN or infinite. Check the checkpoint" in refusal(
        model, Untouched(), criterion=criterion
    )
    assert prune(model, vectors(), skip=["head"], criterion=criterion).sparsity == 0.5
