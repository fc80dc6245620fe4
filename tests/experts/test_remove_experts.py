"""Whole experts leave a mixture; what is left equals the model in which they cannot be chosen."""

import re
from copy import deepcopy
from functools import partial
from itertools import cycle, product
from math import prod

import peft
import pytest
import torch
from support.disk import same, stream, weights
from support.experts import NUMBERS, build, cannot_be_chosen, slow_saliency, starved
from support.pairwise import with_nightly
from support.quiet import shrink
from support.refusals import Untouched, refusal
from support.zoo import ZOO, family, names, number_of_weights, run_all, seeded
from torch.testing import assert_close

from wanda_lightning.experts.mixtures import Mixture, mixtures
from wanda_lightning.experts.saliency import ExpertSaliency

BATCHES = ZOO["mixtral_padded"].batches


def dropped_in(report):
    """The dropped experts by block, from the records of their last matrices."""
    found = {}
    for layer in report.layers:
        block, _, rest = layer.name.partition(".experts.")
        if layer.note == "dropped":
            found.setdefault(block, set()).add(int(re.search(r"\d+", rest)[0]))
    return {block: sorted(indices) for block, indices in found.items()}


CASES = [(0.25, "auto"), (0.5, "auto"), (0.25, "block")]


@pytest.mark.parametrize(
    ("name", "choices"),
    [
        ("qwen3_moe", {"norm_topk_prob": True}),
        ("qwen3_moe", {"norm_topk_prob": False}),
        ("deepseek_v3", {"n_shared_experts": 1}),
        ("deepseek_v3", {"n_shared_experts": 3}),
    ],
)
def test_saliency_equals_a_plain_loop(name, choices, monkeypatch):
    """Gates may be renormalized, and the router may have groups and biases; shared experts do not count."""
    model = build(name, **choices)
    expected = slow_saliency(name, model, BATCHES())
    measured = {}
    of = ExpertSaliency.of

    def spied(self, mixture):
        measured[mixture.name] = of(self, mixture)
        return measured[mixture.name]

    monkeypatch.setattr(ExpertSaliency, "of", spied)
    shrink(model, BATCHES(), experts=0.25)
    for block, means in expected.items():
        slow, tokens = torch.tensor([means.get(index, (0.0, 0)) for index in range(8)]).T
        slow = slow * tokens / tokens.sum()
        assert_close(measured[block], slow.double(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "case"),
    with_nightly(
        [*zip(NUMBERS, cycle(CASES), strict=False), ("deepseek_v3", CASES[2])],
        product(NUMBERS, CASES),
    ),
)
def test_the_model_equals_the_one_in_which_the_dropped_experts_cannot_be_chosen(
    name, case, tmp_path
):
    sparsity, sequential = case
    model = build(name)
    batches = BATCHES()
    dense = deepcopy(model)
    saliency = slow_saliency(name, model, batches)
    report = shrink(model, batches, experts=sparsity, sequential=sequential)
    dropped = dropped_in(report)
    # The second block sees the smaller mixture of the first.
    if sequential == "block" and len(dropped) == 2:
        (first, chosen), (second, _) = dropped.items()
        with cannot_be_chosen(dense, {first: chosen}):
            before, saliency[second] = saliency[second], slow_saliency(name, dense, batches)[second]
        assert before != saliency[second]

    size = 4 if name == "deepseek_v3" else 8  # of each group of the router
    for block, means in saliency.items():
        scores = [means.get(index, (0.0, 0)) for index in range(8)]
        order = sorted(range(8), key=lambda index: prod(scores[index]))
        expected = []
        for group in range(8 // size):
            members = [index for index in order if index // size == group]
            expected += sorted(members[: int(sparsity * size)])
        assert dropped[block] == expected
        downs = [layer for layer in report.layers if f"{block}.experts.down" in layer.name]
        assert [layer.tokens for layer in downs] == [tokens for _, tokens in scores]

    with cannot_be_chosen(dense, dropped):
        expected = run_all(dense, batches)
    after = run_all(model, batches)
    assert_close(after, expected, rtol=1e-4, atol=1e-5)
    assert not any(map(torch.allclose, run_all(dense, batches), after))
    assert report.parameters == number_of_weights(dense)
    assert report.zeros == report.parameters - number_of_weights(model)
    assert report.sparsity == sparsity
    assert getattr(model.config, NUMBERS[name]) == 8 * (1 - sparsity)
    model.save_pretrained(tmp_path)
    loaded, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] | info["mismatched_keys"]
    assert all(map(torch.equal, after, run_all(loaded.eval(), batches)))


def test_everything_that_counts_experts_knows_the_new_number():
    model = build("mixtral")
    batches = BATCHES()
    shrink(model, batches, experts=0.25)
    assert {vars(module).get("num_experts") for module in model.modules()} - {None} == {6}
    ids = batches[0]["input_ids"]
    result = model.train()(ids, labels=ids, output_router_logits=True)
    result.loss.backward()  # the loss that balances the experts, too
    assert result.router_logits[0].shape[-1] == 6
    assert model.model.layers[0].mlp.experts.down_proj.grad.shape[0] == 6


def test_an_expert_without_tokens_goes_first_and_few_tokens_are_noted():
    model = starved()
    report = shrink(model, BATCHES(), experts=0.25)
    assert 2 in dropped_in(report)["model.layers.0.mlp"]
    tokens = {layer.name: layer.tokens for layer in report.layers}
    assert tokens["model.layers.0.mlp.experts.down_proj.2"] == 0
    few = [name for name, count in tokens.items() if "experts.down" in name and count < 32]
    start = f"{len(few)} experts received fewer than 32 tokens, "
    assert any(note.startswith(start) for note in report.notes)


# ---- refusals, each of which leaves the model as it was

MIXTRAL = partial(build, "mixtral")
DEEPSEEK = partial(build, "deepseek_v3")
LLAMA = ZOO["llama"].build


def adapted():
    return peft.get_peft_model(MIXTRAL(), peft.LoraConfig(r=2, target_modules=["q_proj"]))


def with_block(change):
    """A model whose second mixture something has changed."""
    model = MIXTRAL()
    change(model.model.layers[1])
    return model


class Fallback(type(MIXTRAL().model.layers[1].mlp)):
    def forward(self, hidden_states):
        return super().forward(hidden_states) + self.experts.down_proj[7].sum()


class OneSize(type(MIXTRAL())):
    def __init__(self, config):
        config.num_local_experts = 8
        config._experts_implementation = (
            "eager"  # transformers 5.10 finds no other for a class outside of it
        )
        super().__init__(config)


def unequal(layer):
    layer.mlp = build("mixtral", experts=4).model.layers[1].mlp


def fallback(layer):
    layer.mlp.__class__ = Fallback


def infinite(layer):
    layer.mlp.register_forward_pre_hook(lambda _, args: (args[0] * float("inf"),))


SKIPPED = r"skip or only leaves out model\.layers\.0\.mlp\.experts\."
EMPTY = [{"input_ids": torch.tensor([[1]]), "attention_mask": torch.tensor([[0]])}]
OTHER = r"model\.layers\.1\.mlp \(Fallback\) computes something else"
BEFORE_A_BATCH_IS_READ = [
    (LLAMA, {}, "experts=0.25 needs a mixture of experts, but no module"),
    (
        family("causal", "jetmoe").build,
        {},
        r"needs all matrices of a mixture in one module, but those of model\.layers\.0",
    ),
    (
        lambda: OneSize(MIXTRAL().config),
        {},
        "changes the shapes of the model, but no configuration of OneSize gives the new numbers",
    ),
    (
        ZOO["expert_list"].build,
        {},
        r"experts in stacked parameters \(a list of modules does not count\)",
    ),
    (adapted, {}, r"needs whole layers, but the model has adapters\. Merge"),
    (
        partial(with_block, unequal),
        {},
        r"needs as many experts in model\.layers\.0\.mlp as in \S+1\.mlp, in",
    ),
    (
        MIXTRAL,
        {"experts": 0.05},
        r"experts=0\.05 drops none of the 8 experts\. Choose at least 0\.125",
    ),
    (MIXTRAL, {"experts": 0.97}, r"drops all of the 8 experts.* at most 0\.875"),
    (DEEPSEEK, {"experts": 0.1}, "drops none of the 4 experts in each of the 2 groups"),
    *(
        (partial(build, name), {"experts": 0.875}, r"leaves 1 of 8 .* to 2\. Choose at most 0\.75")
        for name in NUMBERS
        if name != "deepseek_v3"
    ),
    (
        DEEPSEEK,
        {"experts": 0.75},
        r"leaves 2 of 8 .* a token 1 in the groups that are chosen for it, 1 of 2,",
    ),
    (
        partial(DEEPSEEK, num_experts_per_tok=3),
        {"experts": 0.5},
        r"leaves 4 of 8 .* a token 2 in the groups .* 1 of 2, .* to 3\. Choose at most 0\.25",
    ),
    (MIXTRAL, {"skip": "*.0.mlp.experts.*"}, SKIPPED),
    (MIXTRAL, {"only": "*.q_proj"}, SKIPPED),
]
BEFORE_AN_EXPERT_LEAVES = [
    (partial(with_block, fallback), 0.5, OTHER),
    (lambda: with_block(fallback).bfloat16(), 0.5, OTHER),
    (
        partial(with_block, infinite),
        0.25,
        r"the experts of model\.layers\.1\.mlp return NaN or infinity",
    ),
]


@pytest.mark.parametrize(
    ("make", "batches", "choices", "message"),
    [
        *(
            (make, Untouched(), choices, message)
            for make, choices, message in BEFORE_A_BATCH_IS_READ
        ),
        *(
            (make, BATCHES(), {"experts": sparsity}, message)
            for make, sparsity, message in BEFORE_AN_EXPERT_LEAVES
        ),
        (MIXTRAL, EMPTY, {}, r"the experts of model\.layers\.0\.mlp get no token except padding"),
    ],
)
def test_what_cannot_lose_experts_is_refused(make, batches, choices, message):
    choices = {"experts": 0.25, **choices}
    assert re.search(message, refusal(make(), batches, verb=shrink, **choices))


def test_logits_that_tie_in_16_bits_refuse_no_mixture():
    """A token then goes to either of two experts: without tolerance, this model would be refused."""
    report = shrink(build("mixtral", experts=128).bfloat16(), BATCHES(), experts=0.25)
    assert [len(each) for each in dropped_in(report).values()] == [32, 32]


def test_a_configuration_may_not_say_how_many_experts_a_token_needs(monkeypatch):
    monkeypatch.setattr(Mixture, "declared", lambda *_: 0)
    message = refusal(MIXTRAL(), BATCHES(), verb=shrink, experts=0.875)
    assert "a token may need more" in message


# ---- all families of transformers

OTHERS = {"dbrx", "inkling_text", "jetmoe", "longcat_flash", "zaya"}  # docs/methods.md says why


@pytest.mark.nightly
def test_families(tmp_path):
    """Every family with experts in one parameter, with at least two experts in each group of the router."""
    passed = set()
    refused = set()
    causal = names("causal")

    for name in [*causal, *names("other")]:
        if name == "hunyuan_v1_moe":  # it has one expert
            continue
        kind = "causal" if name in causal else "other"
        try:
            specimen = family(kind, name)
            model = specimen.build()
            batches = specimen.batches()
        except Exception:  # tests/models/test_families.py knows which cannot be built
            continue
        if not any(".experts" in key for key, _ in model.named_modules()):
            continue
        if any(found.groups > 1 for found in mixtures(model)):
            config = deepcopy(model.config)
            vars(config).update(dict.fromkeys({*NUMBERS.values()} & vars(config).keys(), 8))
            model = seeded(partial(type(model), config))
        dense = deepcopy(model)
        try:
            shrink(model, batches, experts=0.25)
        except ValueError:
            refused.add(name)
            continue
        model.save_pretrained(tmp_path / name)
        if name in causal:
            source = tmp_path / f"{name} dense"
            disk = tmp_path / f"{name} disk"
            dense.save_pretrained(source)
            stream(source, disk, batches, experts=0.25)
            assert same(weights(disk), weights(tmp_path / name)), name
        loaded = type(model).from_pretrained(tmp_path / name).eval()
        assert_close(loaded(**batches[0])[0], model.eval()(**batches[0])[0])
        passed.add(name)
    assert refused == OTHERS
    assert len(passed) == 57
