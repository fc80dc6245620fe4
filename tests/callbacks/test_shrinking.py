"""ShrinkCallback in the loops of Lightning: a model is smaller before it is trained, or after it."""

from functools import partial

import lightning as L
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from support import pair_cases as cases
from support.callbacks import (
    ADAMW,
    Net,
    Notes,
    OfZoo,
    SaveAt,
    fit_module,
    loader,
    run_loop,
    same,
    trainer,
    validate_module,
)
from support.layers import assert_same
from support.modules import tiny_llama, windows_of_text
from support.quiet import shrink
from support.refusals import refuses
from support.zoo import batches_of
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

from wanda_lightning import (
    CausalLMModule,
    CubicSchedule,
    DistillFromDense,
    OneShot,
    SavePretrained,
    ShrinkCallback,
)

pytestmark = pytest.mark.filterwarnings("ignore:num_samples is")

half = partial(ShrinkCallback, units=0.5, num_samples=12)
AFTER_ONE = {"schedule": OneShot(1)}


def widths(module):
    return [module.layers[place].in_features for place in (2, 4)]


Untrained = partial(Net, partial(torch.optim.SGD, lr=0))


class Data(L.LightningDataModule):
    def train_dataloader(self):
        return loader()

    val_dataloader = train_dataloader


@pytest.mark.parametrize(
    ("loop", "make_data", "choices"),
    [
        ("fit", loader, {"multiple_of": 4, "refit": False, "by": "loss", "skip": "layers.4"}),
        ("fit", Data, {}),
        ("validate", loader, {}),
        ("validate", Data, {}),
        ("predict", loader, {}),
    ],
)
def test_the_model_is_that_of_shrink(loop, make_data, choices):
    module = Untrained()
    run_loop(loop, module, half(**choices), data=make_data(), max_epochs=1)
    expected = Net()
    shrink(expected, list(loader()), units=0.5, **choices)
    assert same(module, expected)


def test_the_optimizer_holds_what_is_left():
    module = Net()
    fit_module(module, half(), max_epochs=1)
    (group,) = module.used_optimizer.param_groups
    assert [*map(id, group["params"])] == [*map(id, module.parameters())]


@pytest.mark.parametrize("options", [{}, AFTER_ONE])
def test_a_second_run_does_not_shrink_again(options):
    callback = half(**options)
    module = Net()
    for module_of_run in (module, module, Net()):
        run = trainer(callback, max_steps=3)
        run.fit(module_of_run, loader())
        run.validate(module_of_run, loader())
        assert widths(module_of_run) == [32, 32]
        assert module_of_run.layers[4].weight.all()


def test_a_run_that_resumes_in_a_new_module_is_the_uninterrupted_one(tmp_path):
    whole = Net(ADAMW)
    fit_module(whole, half(), SaveAt(tmp_path, 3), max_epochs=2)
    resumed = Net(ADAMW)
    callback = half()
    fit_module(resumed, callback, max_epochs=2, ckpt_path=tmp_path / "3.ckpt")
    assert same(resumed, whole)
    assert callback.report.shrunk


def test_a_model_in_bfloat16_is_shrunk_in_bfloat16():
    module = Untrained()
    expected = Net().bfloat16()
    batches = [x.bfloat16() for x, _ in loader()]
    shrink(expected, batches, units=0.5)
    fit_module(module, half(), precision="bf16-true", max_epochs=1)
    assert same(module, expected)


@pytest.mark.parametrize("options", [{}, {"schedule": CubicSchedule(0, 8, every=2)}])
def test_fast_dev_run_shrinks_and_writes_nothing(options, tmp_path):
    module = Net()
    fit_module(module, half(report_dir=tmp_path / "out", **options), fast_dev_run=True)
    assert widths(module) == [32, 32]
    assert not any(tmp_path.iterdir())


def test_experts_leave_before_training():
    module = OfZoo("qwen3_moe")
    expected = OfZoo("qwen3_moe").pruning_target
    data = DataLoader(batches_of("qwen3_moe"), batch_size=None)
    shrink(expected, batches_of("qwen3_moe"), experts=0.25)
    callback = ShrinkCallback(experts=0.25, num_samples=100)
    for _ in range(2):
        validate_module(module, callback, data=data)
        assert_same(module.pruning_target.state_dict(), expected.state_dict())
    fit_module(module, callback, data=data, max_epochs=1)
    assert not same(module.pruning_target, expected)


def test_two_processes_shrink_alike(pair):
    data = DataLoader(cases.SAMPLES, batch_size=2)
    make = partial(half, num_samples=16, dataloader=data, refit=False)  # sums of another order
    results = pair.run(cases.fit_with, "ddp", make)
    expected = cases.Regression()
    shrink(expected, list(data), units=0.5, refit=False)
    for weights, trained, report in results:
        assert_same(weights, dict(expected.named_parameters()))
        assert_same(trained, results[0][1])
        assert report.shrunk


# ---- a schedule: zeros in stages, which leave when training ends


def test_units_become_zero_in_stages_and_leave_at_the_end():
    module = Net(ADAMW)
    notes = Notes()
    callback = half(schedule=CubicSchedule(0, 8, every=2))
    fit_module(module, callback, notes, max_steps=12)
    zeros = [int((at["layers.2.weight"] == 0).all(dim=0).sum()) for at in notes.at.values()]
    assert zeros == sorted(zeros)
    assert {*zeros} == {0, 16, 32}
    last = notes.at[12]["layers.4.weight"]
    assert torch.equal(module.layers[4].weight, last[:, (last != 0).any(dim=0)])
    assert widths(module) == [32, 32]
    assert callback.report.shrunk


def test_a_schedule_in_two_processes(pair):
    make = partial(half, **AFTER_ONE, num_samples=16)
    for _, _, report in pair.run(cases.fit_with, "ddp", make):
        assert report.shrunk


# ---- with other callbacks


def fit_llama(*callbacks):
    module = CausalLMModule(tiny_llama(), lr=0)
    run = trainer(*callbacks, max_steps=2)
    run.fit(module, DataLoader(windows_of_text(), batch_size=2))
    return module.model.eval(), run.callback_metrics


@pytest.mark.parametrize("options", [{}, AFTER_ONE])
def test_what_is_saved_is_smaller(tmp_path, options):
    model, _ = fit_llama(half(num_samples=7, **options), SavePretrained(tmp_path / "out"))
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert saved.config.intermediate_size == 32
    assert same(saved, model)
    assert "were taken out" in (tmp_path / "out/README.md").read_text()


def test_a_smaller_model_learns_from_the_dense_one():
    _, metrics = fit_llama(DistillFromDense(), half(num_samples=7))
    assert metrics["distillation_loss"] > 1e-6  # a copy of the smaller model would give 0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda out: (half(), DistillFromDense()), "it must come before ShrinkCallback"),
        (
            lambda out: (SavePretrained(out), half(**AFTER_ONE)),
            "SavePretrained must come after it",
        ),
    ],
)
def test_callbacks_in_the_wrong_order_are_refused(make, message, tmp_path):
    with pytest.raises(MisconfigurationException, match=message):
        fit_llama(*make(tmp_path / "out"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"ShrinkCallback needs units= or experts="),
        ({"max_size": "1GB"}, "it takes no max_size"),
        ({"experts": 0.25, **AFTER_ONE}, "experts leave at once"),
    ],
)
def test_choices_that_contradict_each_other_are_refused_at_once(options, message):
    with refuses(message):
        ShrinkCallback(**options)
