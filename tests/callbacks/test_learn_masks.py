"""LearnMasks keeps the number and the pattern of zeros at every step, and a resumed run goes on exactly."""

import copy
from functools import partial

import lightning as L
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import EMAWeightAveraging
from support.callbacks import (
    ADAMW,
    LAYERS,
    SGD,
    Manual,
    Net,
    Resumable,
    SaveAt,
    all_at,
    equal,
    hooks_of,
    loader,
    same,
    share_of_zeros,
    state,
    trainer,
    zeros,
)
from support.held_zeros import PRECISIONS, precision_of
from support.zoo import ZOO
from torch.nn import functional as F
from torch.utils.data import DataLoader

from wanda_lightning import CubicSchedule, KeepZeros, LearnMasks, WandaPrune, prune
from wanda_lightning.calibration.batches import forward_batch
from wanda_lightning.zeros import prunable_layers

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),  # they would only slow down these tests
    pytest.mark.filterwarnings("ignore:.*but have no `val_dataloader`"),  # some tests only train
]

FAST = {"travel": 20.0}  # masks move within a few steps


class Looks(L.Callback):
    """Checks the zeros after each batch and in validation loops."""

    def __init__(self, pattern="unstructured", total=False, by_chance=False, after=0):
        self.pattern, self.total, self.by_chance, self.after, self.seen = pattern, total, by_chance, after, []

    def look(self, trainer, pl_module):
        found = zeros(pl_module)
        least = sum if self.total else min
        shares = [int(where.sum()) - where.numel() // 2 for where in found.values()]
        assert least(shares) >= 0, trainer.global_step
        if not self.by_chance:  # in few bits, a kept weight may become zero
            assert sum(shares) == 0, trainer.global_step
        for where in found.values() if self.pattern == "2:4" else ():
            assert (where.view(-1, 4).sum(dim=1) >= 2).all()
        self.seen.append({name: where.clone() for name, where in found.items()})

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step > self.after:
            self.look(trainer, pl_module)

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        if not trainer.sanity_checking:
            self.look(trainer, pl_module)


def made(optimizer=ADAMW):
    torch.manual_seed(0)
    return Net(optimizer)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
@pytest.mark.parametrize("choices", [{}, {"straight_through": False, "noise": (1.0, 0.0)}, {"train_weights": False}])
def test_zeros_after_every_step(precision, accumulate, pattern, choices):
    looks, learning = Looks(pattern, by_chance=precision == "bf16-true"), LearnMasks(**FAST, **choices)
    module = made()
    options = {
        "max_steps": 12,
        "accumulate_grad_batches": accumulate,
        "gradient_clip_val": 0.5,
        **precision_of(precision),
    }
    pruning = WandaPrune(0.5, num_samples=24, pattern=pattern)
    trainer(pruning, learning, looks, **options).fit(module, loader(24))
    assert all(share > 0 for share in learning.moved.values())
    assert not hooks_of(module, module.used_optimizer)
    assert len(looks.seen) >= 12


def test_only_masks_learn_without_train_weights():
    module, learning = made(), LearnMasks(train_weights=False, **FAST)
    dense = copy.deepcopy(module.state_dict())
    trainer(WandaPrune(0.5, num_samples=24), learning, max_steps=12).fit(module, loader(24))
    for name, weight in module.state_dict().items():
        assert torch.equal(weight, torch.where(weight == 0, weight, dense[name]))
    assert max(learning.moved.values()) > 0.01


def test_better_masks_for_fixed_weights_lower_the_loss():
    def loss(module):
        return F.cross_entropy(module(samples), labels).item()

    samples, labels = next(iter(loader(24, batch_size=24)))
    module = made()
    trainer(max_steps=60).fit(module, loader(24))
    fixed, learned = copy.deepcopy(module), copy.deepcopy(module)
    prune(fixed, [samples], 0.75, progress=False)
    learning = LearnMasks(train_weights=False, prior=1.1)
    trainer(WandaPrune(0.75, num_samples=24), learning, max_steps=120).fit(learned, loader(24))
    assert loss(module) < loss(learned) < 0.8 * loss(fixed)


def test_validation_while_gradients_accumulate():
    looks = Looks()
    options = {"max_steps": 6, "accumulate_grad_batches": 3, "val_check_interval": 2}
    plain, module = made(), made()
    learning = LearnMasks(straight_through=False, **FAST)
    trainer(WandaPrune(num_samples=24), learning, looks, **options).fit(module, loader(24), loader())
    assert len(looks.seen) > 9
    options = {"max_steps": 6, "accumulate_grad_batches": 3, "limit_val_batches": 0}
    trainer(WandaPrune(num_samples=24), LearnMasks(straight_through=False, **FAST), **options).fit(plain, loader(24))
    assert same(module, plain)  # validation changes nothing


def test_zeros_move_between_layers():
    looks, learning = Looks(total=True), LearnMasks(scope="model", **FAST)
    module, pruning = made(), WandaPrune(0.5, num_samples=24)
    trainer(pruning, learning, looks, max_steps=12).fit(module, loader(24))
    counts = {name: int(where.sum()) for name, where in zeros(module).items()}
    assert len({count / module.state_dict()[name].numel() for name, count in counts.items()}) > 1
    assert {f"{layer.name}.weight": layer.zeros for layer in pruning.report.layers} == counts
    before = copy.deepcopy(module.state_dict())
    trainer(pruning).test(module, loader(), verbose=False)  # it is pruned already
    assert equal(before, module.state_dict())


@pytest.mark.parametrize("choices", [{}, {"noise": (2.0, 0.5), "straight_through": False}, {"scope": "model"}])
@pytest.mark.parametrize("optimizer", [ADAMW, SGD])
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path, choices, optimizer):
    def callbacks(*others):
        pruning = WandaPrune(num_samples=24, dataloader=list(loader(24)), at_step=2)
        return pruning, LearnMasks(**FAST, **choices), *others

    whole = made(optimizer)
    trainer(*callbacks(SaveAt(tmp_path, 1, 2, 3, 7)), max_steps=10).fit(whole, Resumable())
    for step in (1, 2, 3, 7):
        resumed = made(optimizer)
        torch.rand(step)
        used = callbacks()
        trainer(*used, max_steps=10).fit(resumed, Resumable(), ckpt_path=tmp_path / f"{step}.ckpt")
        assert equal(state(resumed), state(whole)), step
        assert max(used[1].moved.values()) > 0.01


def test_a_checkpoint_is_plain_and_pruned(tmp_path):
    module = made()
    trainer(WandaPrune(num_samples=24), LearnMasks(**FAST), SaveAt(tmp_path, 3), max_steps=4).fit(module, loader(24))
    checkpoint = torch.load(tmp_path / "3.ckpt", weights_only=True)
    assert checkpoint["state_dict"].keys() == module.state_dict().keys()
    assert {
        (weight == 0).float().mean().item() for weight in checkpoint["state_dict"].values() if weight.ndim == 2
    } == {0.5}


@pytest.mark.parametrize("change", [{"travel": 0.5}, {"scope": "model"}, {"temperature": (2.0, 0.1)}])
def test_a_checkpoint_of_other_choices_is_refused(tmp_path, change):
    pruning = partial(WandaPrune, num_samples=24)
    trainer(pruning(), LearnMasks(**FAST), SaveAt(tmp_path, 3), max_steps=4).fit(made(), loader(24))
    run = trainer(pruning(), LearnMasks(**{**FAST, **change}), max_steps=8)
    with pytest.raises(ValueError, match="LearnMasks must have the choices of the checkpoint"):
        run.fit(made(), loader(24), ckpt_path=tmp_path / "3.ckpt")


def test_a_model_that_was_pruned_earlier():
    dense, module = made(), made()
    prune(module, [batch[0] for batch in loader(24)], 0.5, pattern="2:4", progress=False)
    before, looks, learning = zeros(module), Looks("2:4"), LearnMasks(dense.layers, "2:4", **FAST)
    with pytest.raises(ValueError, match=r"dense of LearnMasks must be the model before pruning, but.*layers\.0"):
        trainer(KeepZeros(), learning, max_steps=12).fit(copy.deepcopy(module), loader(24))
    learning = LearnMasks(dense, "2:4", **FAST)
    trainer(KeepZeros(), learning, looks, max_steps=12).fit(module, loader(24))
    moved = [(before[name] != where).float().mean().item() for name, where in zeros(module).items()]
    assert min(moved) > 0
    assert [*learning.moved.values()] == pytest.approx(moved)  # of half of the weights, and twice: dropped and grown


def test_gradual_pruning_comes_first():
    module, looks = made(), Looks(after=6)
    learning = LearnMasks(**FAST)
    schedule = CubicSchedule(0, 6, every=2)
    trainer(WandaPrune(num_samples=24, schedule=schedule), learning, looks, max_steps=16).fit(module, loader(24))
    assert share_of_zeros(module) == all_at(0.5)
    assert max(learning.moved.values()) > 0.01


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "vit", "convnext"])
@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_every_kind_of_layer(name, pattern):
    class Any(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = ZOO[name].build().train()

        @property
        def pruning_target(self):
            return self.model

        def calibration_step(self, batch):
            return forward_batch(self.model, batch)

        def training_step(self, batch, batch_idx):
            output = self.calibration_step(batch)
            return getattr(output, "logits", output).float().square().mean()

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), lr=1e-3)

    torch.manual_seed(0)
    module, batches = Any(), list(ZOO[name].batches())
    pruning = WandaPrune(0.5, num_samples=4, dataloader=batches, pattern=pattern)
    learning = LearnMasks(**FAST)
    trainer(pruning, learning, max_steps=6).fit(module, DataLoader(batches, batch_size=None))
    assert max(learning.moved.values()) > 0
    for layer in pruning.report.layers:
        assert layer.sparsity == pytest.approx(layer.target, abs=0.01), layer.name


def test_the_report_says_how_far_masks_moved(tmp_path):
    module, pruning, learning = made(), WandaPrune(num_samples=24, report_dir=tmp_path), LearnMasks(**FAST)
    trainer(pruning, learning, max_steps=12).fit(module, loader(24))
    mean = sum(learning.moved.values()) / len(LAYERS)
    assert f"LearnMasks moved {mean:.2%} of the kept weights of a layer in 12 steps" in pruning.report.notes[-1]
    for layer in pruning.report.layers:
        assert layer.note == f"{learning.moved[layer.name]:.2%} of the kept weights moved"
    assert "LearnMasks moved" in (tmp_path / "pruning_report.json").read_text()


class Indifferent(Net):
    def training_step(self, batch, batch_idx):
        self.layers(batch[0])
        return self.unused.square().sum()

    def __init__(self):
        super().__init__()
        self.unused = torch.nn.Parameter(torch.ones(3))


def frozen():
    module = Net()
    module.layers[2].weight.requires_grad_(False)
    return module


def all_frozen():
    module = Net()
    for layer in (0, 2, 4):
        module.layers[layer].weight.requires_grad_(False)
    return module


class Again(WandaPrune):
    """Prunes other layers, and again when it should not."""

    def __init__(self, **options):
        super().__init__(only=["layers.4"], **options)

    def should_prune(self, trainer):
        return trainer.global_step in (0, 3)


@pytest.mark.parametrize(
    ("module", "callbacks", "options", "message"),
    [
        (
            Net,
            [],
            {},
            "LearnMasks moves the zeros that PruningCallback or KeepZeros holds, but the Trainer has neither",
        ),
        (Manual, [WandaPrune], {}, "LearnMasks needs automatic optimization, but Manual"),
        (frozen, [WandaPrune], {}, r"LearnMasks needs the gradients.*layers\.2 is frozen.*train_weights=False"),
        (all_frozen, [WandaPrune], {}, r"LearnMasks needs the gradients.*layers\.0 is frozen"),
        (Indifferent, [WandaPrune], {}, "LearnMasks needs a loss that depends on the pruned layers"),
        (Net, [partial(WandaPrune, at_step=4)], {}, "that is at optimizer step 4 and training ends at 4"),
        (Net, [WandaPrune], {"max_steps": -1, "max_epochs": -1}, "LearnMasks needs the number of training steps"),
        (Net, [WandaPrune, EMAWeightAveraging], {}, "averaging weights while zeros move fills them"),
        (Net, [partial(WandaPrune, keep_zeros=False)], {}, "WandaPrune has keep_zeros=False"),
        (Net, [partial(WandaPrune, skip=["layers.4"]), Again], {}, "a callback prunes again at optimizer step 3"),
        (partial(Net, torch.optim.LBFGS), [WandaPrune], {}, "but LBFGS makes several"),
    ],
)
def test_what_cannot_work_is_refused(module, callbacks, options, message):
    made = [make(num_samples=12) if make is not EMAWeightAveraging else make() for make in callbacks]
    run = trainer(*made, LearnMasks(), **{"max_steps": 4, **options})
    with pytest.raises(MisconfigurationException, match=message):
        run.fit(module(), loader())


@pytest.mark.parametrize("first", [True, False])
def test_a_callback_before_or_after_it_saves_the_same(tmp_path, first):
    """Before it, the weights of the step have no masks yet."""
    module, learning, saving = made(), LearnMasks(**FAST), SaveAt(tmp_path, 3)
    order = [saving, learning] if first else [learning, saving]
    trainer(WandaPrune(num_samples=24), *order, max_steps=6).fit(module, loader(24))
    plain = made()
    trainer(WandaPrune(num_samples=24), LearnMasks(**FAST), max_steps=6).fit(plain, loader(24))
    assert same(module, plain)
    saved = torch.load(tmp_path / "3.ckpt", weights_only=True)
    assert {(weight == 0).float().mean().item() for weight in saved["state_dict"].values() if weight.ndim == 2} == {0.5}
    layers = saved["callbacks"]["LearnMasks"]["layers"]
    assert all((layer["values"] != 0).all() for layer in layers.values())


class Stops(L.Callback):
    """Ends training between two optimizer steps."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if batch_idx == 4:
            trainer.should_stop = True


def test_training_that_stops_while_gradients_accumulate():
    module, learning = made(), LearnMasks(straight_through=False, **FAST)
    options = {"max_steps": 30, "accumulate_grad_batches": 3}
    trainer(WandaPrune(num_samples=24), learning, Stops(), **options).fit(module, loader(48))
    assert share_of_zeros(module) == all_at(0.5)


class Skips(Net):
    """Skips some batches."""

    def training_step(self, batch, batch_idx):
        return None if batch_idx in (0, 3) else super().training_step(batch, batch_idx)


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
def test_batches_that_are_skipped():
    torch.manual_seed(0)
    module, looks, learning = Skips(ADAMW), Looks(), LearnMasks(**FAST)
    trainer(WandaPrune(num_samples=24), learning, looks, max_steps=12).fit(module, loader(24))
    assert max(learning.moved.values()) > 0.01


def test_two_callbacks_that_hold_one_layer_are_refused():
    module = made()
    prune(module, [batch[0] for batch in loader(24)], 0.25, progress=False)
    callbacks = KeepZeros(), WandaPrune(0.5, num_samples=24), LearnMasks(made(), "unstructured")
    with pytest.raises(MisconfigurationException, match=r"two hold those of layers\.0\. Remove KeepZeros"):
        trainer(*callbacks, max_steps=4).fit(module, loader(24))


def test_a_model_that_the_same_callbacks_have_pruned_for_validation():
    module, pruning, learning = made(), WandaPrune(num_samples=24), LearnMasks(**FAST)
    run = trainer(pruning, learning, max_steps=8)
    run.validate(module, loader(24), verbose=False)
    run.fit(module, loader(24))
    assert max(learning.moved.values()) > 0.01
    again = trainer(pruning, learning, max_steps=8)  # another training goes on
    again.fit(module, loader(24))
    assert share_of_zeros(module) == all_at(0.5)
    assert max(learning.moved.values()) > 0.01


class Gated(L.LightningModule):
    """A block whose hidden units the preset permutes."""

    def __init__(self):
        super().__init__()
        self.model = ZOO["llama"].build().train()

    @property
    def pruning_target(self):
        return self.model

    def calibration_step(self, batch):
        return self.model(**batch)

    def training_step(self, batch, batch_idx):
        return self.calibration_step(batch).logits.float().square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-3)


class Remembers(LearnMasks):
    """Compares what it starts from with the pruned weights."""

    def _start(self, trainer):
        dense = {name: value.clone() for name, value in self._dense_values.items()}
        weights = {layer.name: layer.read().clone() for layer in prunable_layers(trainer.lightning_module.model)}
        super()._start(trainer)
        self.shares = {
            name: float((weight[weight != 0] == dense[name][weight != 0]).float().mean())
            for name, weight in weights.items()
            if (weight == 0).any()
        }


def test_hidden_units_that_pruning_permutes():
    torch.manual_seed(0)
    module, batches = Gated(), list(ZOO["llama"].batches())
    dense = copy.deepcopy(module.model)
    pruning = WandaPrune(0.5, pattern="2:4", permutation="assignment", num_samples=5, dataloader=batches)
    learning = Remembers(**FAST)
    data = DataLoader(batches, batch_size=None)
    trainer(pruning, learning, max_steps=4).fit(module, data)
    assert any("permuted" in note for note in pruning.report.notes)
    assert set(learning.shares.values()) == {1.0}  # Wanda keeps weights as they are
    with pytest.raises(ValueError, match=r"the kept weights of .* have a cosine similarity of .* permutation='none'"):
        trainer(KeepZeros(), LearnMasks(dense, "2:4"), max_steps=4).fit(module, data)


def test_a_kept_weight_that_is_zero_by_chance():
    module, looks = made(), Looks("2:4")
    prune(module, [batch[0] for batch in loader(24)], 0.5, pattern="2:4", progress=False)
    weight = module.layers[0].weight
    with torch.no_grad():
        weight[0, int(weight[0].nonzero()[0])] = 0.0
    trainer(KeepZeros(), LearnMasks(made(), "2:4", **FAST), looks, max_steps=4).fit(module, loader(24))


@pytest.mark.parametrize(
    ("callbacks", "message"),
    [
        ([partial(WandaPrune, pattern="8:16"), LearnMasks], "pattern must have at most 100 choices.*12,870"),
        ([partial(WandaPrune, pattern="2:4"), partial(LearnMasks, scope="model")], "scope='model' moves zeros between"),
        (
            [WandaPrune, partial(LearnMasks, pattern="2:4")],
            "pattern of LearnMasks must be that of the zeros",
        ),
        ([KeepZeros, partial(LearnMasks, pattern="2:4")], "dense of LearnMasks must be given if no callback prunes"),
    ],
)
def test_patterns_are_refused_before_training(callbacks, message):
    made = [make(at_step=3, num_samples=12) if "Wanda" in str(make) else make() for make in callbacks]
    module = Net()
    before = copy.deepcopy(module.state_dict())
    with pytest.raises((ValueError, MisconfigurationException), match=message):
        trainer(*made, max_steps=6).fit(module, loader())
    assert equal(module.state_dict(), before)


def test_a_pattern_is_required_without_a_pruning_callback():
    module = made()
    prune(module, [batch[0] for batch in loader(24)], 0.5, progress=False)
    with pytest.raises(MisconfigurationException, match=r"pattern of LearnMasks must be given.*KeepZeros"):
        trainer(KeepZeros(), LearnMasks(made()), max_steps=4).fit(module, loader())
    with pytest.raises(ValueError, match=r"pattern of LearnMasks must be that of the zeros, but layers\.0.*group of 4"):
        trainer(KeepZeros(), LearnMasks(made(), "2:4"), max_steps=4).fit(module, loader())
    with pytest.raises(ValueError, match="scope='model' moves zeros between layers"):
        LearnMasks(pattern="2:4", scope="model")
    with pytest.raises(ValueError, match="scope of LearnMasks must be one of layer, model"):
        LearnMasks(scope="block")
