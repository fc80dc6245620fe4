"""Distillation while training, against the loss written out with `kl_div` and a loop by hand."""

from copy import deepcopy

import lightning as L
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from support import pair_cases as cases, reference
from support.callbacks import (
    ADAMW,
    LAYERS,
    SGD,
    Manual,
    Net,
    SaveAt,
    all_at,
    fit_module,
    hooks_of,
    loader,
    same,
    share_of_zeros,
    train_by_hand,
    wanda,
    zeros,
)
from support.layers import assert_same, rng
from support.modules import tiny_llama, tiny_vit
from support.quiet import prune
from support.recoveries import assert_close_states
from support.refusals import refuses
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

from wanda_lightning import CausalLMModule, DistillFromDense, KeepZeros
from wanda_lightning.callbacks.distillation import dense_model


def divergence(predicted, dense, temperature=1.0, keep=slice(None)):
    """The mean over the predictions that count, times the squared temperature."""
    rows = [logits[keep].flatten(0, -2) for logits in (predicted, dense)]
    return temperature**2 * reference.divergence(*rows, temperature)


class Dense(Net):
    """The dense model for `Net`: other weights of the same kind."""

    def __init__(self):
        super().__init__()
        with torch.no_grad():
            for weight in self.parameters():
                weight.add_(torch.randn(weight.shape, generator=rng(5)) * 0.1)


class ByHand(Net):
    """Its loss has the divergence written out."""

    def __init__(self, dense, weight, temperature):
        super().__init__()
        self.of_dense = [dense]  # no submodule
        self.weight = weight
        self.temperature = temperature

    def _loss(self, batch):
        x, labels = batch
        predicted = self(x)
        with torch.no_grad():
            dense = self.of_dense[0](x)
        own = F.cross_entropy(predicted, labels)
        return (1 - self.weight) * own + self.weight * divergence(
            predicted, dense, self.temperature
        )


class Losses(L.Callback):
    """Records the logged divergence of each step."""

    def __init__(self):
        self.logged = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.logged.append(trainer.callback_metrics["distillation_loss"].item())


@pytest.mark.parametrize(
    ("weight", "temperature", "accumulate", "clip"),
    [(0.5, 1.0, 1, None), (1.0, 1.0, 3, 0.1), (0.3, 2.5, 3, None)],
)
def test_it_trains_like_a_loop_with_the_loss_written_out(weight, temperature, accumulate, clip):
    module = Net()
    dense = Dense()
    by_hand = ByHand(deepcopy(dense), weight, temperature)
    for network in (module, by_hand):
        prune(network, criterion="magnitude")
    callbacks = KeepZeros(), DistillFromDense(dense, weight, temperature), Losses()
    fit_module(
        module,
        *callbacks,
        count=24,
        max_epochs=2,
        accumulate_grad_batches=accumulate,
        gradient_clip_val=clip,
    )
    batches = [*loader(24)]
    pruned = zeros(by_hand)
    first = divergence(
        by_hand(batches[0][0]), by_hand.of_dense[0](batches[0][0]), temperature
    ).item()
    train_by_hand(by_hand, batches * 2, SGD(by_hand.parameters()), accumulate, clip)

    assert callbacks[2].logged[0] == pytest.approx(first)
    assert_close_states(module, by_hand)
    assert_same(zeros(module), pruned)
    assert hooks_of(module, module.used_optimizer) == []
    assert "training_step" not in vars(module)


def test_by_default_the_dense_model_is_a_copy_from_before_pruning():
    module = Net()
    by_hand = ByHand(Net(), 0.5, 1.0)
    fit_module(module, wanda(), DistillFromDense(), max_epochs=2)
    prune(by_hand, [batch[0] for batch in loader()])
    train_by_hand(by_hand, [*loader()] * 2, SGD(by_hand.parameters()), 1, None)
    assert_close_states(module, by_hand)
    assert share_of_zeros(module) == all_at(0.5)


def test_the_dense_model_is_in_no_checkpoint_and_not_trained(tmp_path):
    module = Net(ADAMW)
    dense = Dense()
    before = deepcopy(dense.state_dict())
    fit_module(module, DistillFromDense(dense), SaveAt(tmp_path, 2), max_steps=2)
    saved = torch.load(tmp_path / "2.ckpt", weights_only=True)
    assert saved["state_dict"].keys() == Net().state_dict().keys()
    trained = saved["optimizer_states"][0]["param_groups"][0]["params"]
    assert len(trained) == len([*module.parameters()])
    assert_same(before, dense.state_dict())
    assert not any(weight.requires_grad or weight.grad is not None for weight in dense.parameters())


@pytest.mark.parametrize(("precision", "tolerance"), [("bf16-mixed", 0.05), ("64-true", 1e-9)])
def test_precisions(precision, tolerance):
    module = Net(ADAMW)
    dense = Dense()
    losses = Losses()
    expected = ByHand(deepcopy(dense), 0.5, 1.0)
    inputs = next(iter(loader()))[0]
    first = divergence(expected(inputs), dense(inputs)).item()
    fit_module(module, DistillFromDense(dense), losses, precision=precision, max_steps=3)
    assert losses.logged[0] == pytest.approx(first, rel=tolerance, abs=1e-6)
    assert {weight.dtype for weight in dense.parameters()} == {
        weight.dtype for weight in module.parameters()
    }


@pytest.mark.parametrize("dense", [None, Dense])
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path, dense):
    def fit(steps, path=None):
        callbacks = wanda(), DistillFromDense(dense and dense(), temperature=2.0)
        module = Net(ADAMW)
        fit_module(module, *callbacks, SaveAt(tmp_path, 3), max_steps=steps, ckpt_path=path)
        return module

    whole = fit(6)
    assert same(whole, fit(6, tmp_path / "3.ckpt"))
    assert not same(whole, fit(3))


@pytest.mark.parametrize("strategy", ["ddp", pytest.param("fsdp2", marks=pytest.mark.nightly)])
def test_two_processes_train_like_one(pair, strategy):
    first, second = pair.run(cases.distill, strategy)
    assert_same(first, second)
    assert_close(first, cases.distill(None, "auto"))


IDS = torch.randint(128, (4, 24), generator=rng(1))
MASK = (torch.arange(24) < torch.tensor([24, 9, 2, 0])[:, None]).long()


def language_model(**lora):
    model = tiny_llama()
    prune(model, None, 0.5, criterion="magnitude")
    return CausalLMModule(model, lr=1e-2, lora=lora or None)


def learn(module, *callbacks, batch=IDS, steps=1):
    """Train on one batch."""
    data = DataLoader([batch] * steps, batch_size=None)
    fit_module(module, *callbacks, data=data, max_steps=steps)


@pytest.mark.parametrize(("padding", "temperature"), [(False, 2.0), (True, 1.0)])
def test_a_language_model_is_compared_without_padding(padding, temperature):
    module = language_model()
    losses = Losses()
    batch = IDS
    mask = None
    keep = slice(None)
    if padding:
        batch = {"input_ids": IDS, "attention_mask": MASK}
        mask = MASK
        keep = MASK.bool()
    with torch.no_grad():
        predicted, dense = (model(IDS, mask).logits for model in (module, tiny_llama()))
    learn(
        module, KeepZeros(), DistillFromDense(tiny_llama(), 0.3, temperature), losses, batch=batch
    )
    assert losses.logged == [
        pytest.approx(divergence(predicted, dense, temperature, keep).item(), rel=1e-4)
    ]


@pytest.mark.parametrize("keep_zeros", [True, False])
def test_adapters_learn_from_the_dense_model(keep_zeros):
    module = language_model(r=4, target_modules=["q_proj", "v_proj"], keep_zeros=keep_zeros)
    losses = Losses()
    base = deepcopy(module.pruning_target.state_dict())
    learn(module, DistillFromDense(tiny_llama(), weight=1.0), losses, steps=10)
    start = divergence(language_model()(IDS).logits, tiny_llama()(IDS).logits).item()
    assert losses.logged[0] == pytest.approx(start, rel=1e-4)
    assert losses.logged[-1] < 0.9 * start
    after = module.pruning_target.state_dict()
    learned = [name for name, value in base.items() if not torch.equal(value, after[name])]
    assert all("lora_" in name for name in learned)


def test_a_dense_language_model_by_name(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "dense")
    modules = [language_model() for _ in range(3)]
    denses = tmp_path / "dense", tiny_llama(), CausalLMModule(tiny_llama())
    for module, dense in zip(modules, denses, strict=True):
        learn(module, KeepZeros(), DistillFromDense(dense), steps=2)
    by_name, given, from_module = modules
    assert same(by_name, given)
    assert same(by_name, from_module)


def test_an_image_classifier(tmp_path):
    module = tiny_vit(lr=1e-5)
    dense = tiny_vit()
    losses = Losses()
    dense.save_pretrained(tmp_path / "dense")
    images = torch.randn(8, 3, 32, 32, generator=rng())
    prune(module, criterion="magnitude")
    expected = divergence(deepcopy(module).eval()(images), dense.eval()(images)).item()
    distilling = DistillFromDense(f"local-dir:{tmp_path / 'dense'}", weight=1.0)
    batch = images, torch.zeros(8, dtype=torch.long)
    learn(module, KeepZeros(), distilling, losses, batch=batch, steps=2)
    assert losses.logged[0] == pytest.approx(expected, rel=1e-4)
    assert losses.logged[1] < losses.logged[0]


class Parts(Net):
    """Its training step calls a part, and returns a dictionary."""

    def training_step(self, batch, batch_idx):
        with torch.no_grad():
            self.layers(batch[0] + 1)  # does not count
        logits = self.layers(batch[0])
        return {"loss": F.cross_entropy(logits, batch[1]), "logits": logits.detach()}


def test_a_part_of_a_module_and_a_training_step_that_returns_a_dictionary():
    whole = Net()
    parts = Parts()
    for module, network in ((whole, None), (parts, "layers")):
        fit_module(module, DistillFromDense(Dense(), network=network), max_steps=3)
    assert same(whole, parts)


class Recomputing(Net):
    def forward(self, x):
        return checkpoint(self.layers, x, use_reentrant=False)


class Compiled(Net):
    def __init__(self):
        super().__init__()
        self.layers = torch.compile(self.layers, backend="eager")


class CompiledPart(Compiled):
    """The compiled module is the network."""

    pruning_target = property(lambda self: self.layers)


COMPILES = pytest.mark.skipif(
    not torch._dynamo.is_dynamo_supported(), reason="torch.compile does not know this Python"
)


@pytest.mark.parametrize(
    "make",
    [Recomputing, *(pytest.param(make, marks=COMPILES) for make in (Compiled, CompiledPart))],
)
def test_other_ways_to_run_a_network(make):
    results = []
    for module in (Net(), make()):
        fit_module(module, wanda(), DistillFromDense(), max_steps=3)
        results.append([*module.parameters()])
    assert_close(*results)


@COMPILES
def test_code_that_is_compiled_with_the_training_step_is_refused():
    in_place = Net()
    in_place.compile(backend="eager")
    for module in (in_place, torch.compile(Net(), backend="eager")):
        with pytest.raises(MisconfigurationException, match="the compiled code of Net hides"):
            fit_module(module, DistillFromDense(), max_steps=1)


class NeverCalls(Net):
    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.layers(batch[0]), batch[1])


class Pixels(Net):
    def forward(self, x):
        return self.layers(x)[:, :, None, None]

    def _loss(self, batch):
        return self(batch[0]).square().mean()


class Detached(Net):
    def _loss(self, batch):
        x = batch[0].requires_grad_()
        return self(x).sum() * 0 + self.layers[0].weight.sum()

    def forward(self, x):
        return self.layers(x).detach()


def pruned_net():
    module = Net()
    prune(module, criterion="magnitude", only=[LAYERS[1]])
    return module


class Later(Net):
    """Builds its layers only when the strategy asks."""

    def __init__(self):
        super().__init__()
        self.layers = None

    def configure_model(self):
        self.layers = Net().layers


@pytest.mark.parametrize(
    ("make", "choices", "error", "message"),
    [
        (
            pruned_net,
            {},
            ValueError,
            "dense must be given, since the network is already pruned: 50% .* layers.2 are",
        ),
        (
            Later,
            {},
            ValueError,
            "dense must be given, since the network has no parameters in setup",
        ),
        (Manual, {}, MisconfigurationException, "Manual optimizes manually"),
        # Shown by the first step:
        (
            NeverCalls,
            {},
            MisconfigurationException,
            "training_step never called NeverCalls .* there are layers",
        ),
        (Pixels, {}, ValueError, r"logits.*it returns a tensor of shape \(4, 1, 1, \d+\)"),
        (Detached, {"dense": Dense()}, ValueError, "its predictions have none"),
    ],
)
def test_what_cannot_be_distilled_is_refused_before_a_weight_changes(make, choices, error, message):
    module = make()
    before = deepcopy(module.state_dict())
    with pytest.raises(error, match=message):
        fit_module(module, DistillFromDense(**choices), max_steps=3)
    if before:
        assert_same(module.state_dict(), before)
    assert "training_step" not in vars(module)
    assert all("forward" not in vars(part) for part in module.modules())


def test_a_given_model_that_was_pruned_is_warned_of():
    with pytest.warns(
        UserWarning,
        match=r"dense should be the model before pruning, but 50% of .* layers.2 are zero",
    ):
        fit_module(Net(), DistillFromDense(pruned_net()), max_steps=1)


def test_a_given_model_that_is_trained_itself_is_refused():
    module = Net()
    for dense in (module, module.layers):
        with refuses(r"layers.0.weight of Net belongs to it, too.*deepcopy"):
            fit_module(module, DistillFromDense(dense), max_steps=1)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.uint8])
def test_quantized_weights_of_a_dense_model_are_not_read(dtype):
    dense = nn.Module()
    dense.weight = nn.Parameter(torch.ones(4, 4).to(dtype), requires_grad=False)
    assert dense_model(dense, Net(), None).weight.dtype == dtype
