"""What a pruning callback refuses or warns of before training starts."""

import pytest
from lightning.fabric.utilities.exceptions import MisconfigurationException
from support.callbacks import (
    Manual,
    Net,
    Steps,
    TwoOptimizers,
    all_at,
    loader,
    same,
    share_of_zeros,
    trainer,
)

from wanda_lightning import (
    CubicSchedule,
    WandaPrune,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),  # they would only slow down these tests
    pytest.mark.filterwarnings("ignore:.*but have no `val_dataloader`"),  # some tests only train
]


@pytest.mark.parametrize(
    ("when", "options", "end"),
    [
        ({"at_step": 1000}, {"max_steps": 10}, 10),
        ({"at_step": 7}, {"max_epochs": 2, "accumulate_grad_batches": 2}, 6),  # three steps an epoch
        ({"at_step": 5}, {"max_epochs": 2, "accumulate_grad_batches": 4}, 4),  # two, of four batches and of two
        ({"at_step": 13}, {"max_epochs": 2}, 12),
        ({"at_step": 5}, {"max_epochs": 2, "limit_train_batches": 2}, 4),
        ({"at_step": 5}, {"max_epochs": 2, "max_steps": 4}, 4),
        ({"schedule": CubicSchedule(0, 13, every=2)}, {"max_epochs": 2}, 12),
        ({"schedule": Steps((1, 0.5), (20, 1.0))}, {"max_epochs": 2}, 12),
    ],
)
def test_a_stage_after_the_end_of_training_is_refused_at_the_start(when, options, end):
    module = Net()
    steps = []
    module.register_forward_pre_hook(lambda *_: steps.append(1))
    with pytest.raises(MisconfigurationException, match=rf"but training ends at {end}: .*Prune earlier, or train"):
        trainer(WandaPrune(num_samples=24, **when), **options).fit(module, loader(24))
    assert same(module, Net())
    assert not steps


@pytest.mark.parametrize("options", [{"max_steps": 4}, {"max_epochs": 2, "accumulate_grad_batches": 3}])
def test_a_stage_at_the_end_of_training_is_not_refused(options):
    module = Net()
    trainer(WandaPrune(num_samples=24, at_step=4), **options).fit(module, loader(24))
    assert share_of_zeros(module) == all_at(0.5)


@pytest.mark.parametrize("make", [Manual, TwoOptimizers])
def test_manual_optimization_is_refused_by_max_steps(make):
    module = make()
    with pytest.raises(MisconfigurationException, match="ends at optimizer step 9, but training ends at 8"):
        trainer(WandaPrune(num_samples=24, at_step=9), max_steps=8).fit(module, loader(24))
    assert same(module, Net())


@pytest.mark.parametrize("max_epochs", [1, 3])
def test_manual_optimization_is_not_held_to_one_step_a_batch(max_epochs):
    module = TwoOptimizers()  # twelve steps an epoch of six batches
    trainer(WandaPrune(num_samples=24, at_step=12), max_epochs=max_epochs).fit(module, loader(24))
    assert share_of_zeros(module) == all_at(0.5)


def test_a_dry_run_of_a_few_steps_is_not_refused():
    module = Net()
    with pytest.warns(UserWarning, match="training ended at optimizer step 1, before WandaPrune had pruned"):
        trainer(WandaPrune(num_samples=24, at_step=1000), fast_dev_run=True).fit(module, loader(24))
