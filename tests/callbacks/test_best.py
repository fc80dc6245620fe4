"""`BestAfterPruning` never chooses a model from before the last stage, although dense models score better."""

from functools import partial

import pytest
import torch
from support.callbacks import Net, Resumable, SaveAt, loader, trainer

from wanda_lightning import BestAfterPruning, CubicSchedule, KeepZeros, WandaPrune


class Worsening(Net):
    """Logs the number of optimizer steps as its loss, so that the first model is the best."""

    def training_step(self, batch, batch_idx):
        self.log("train_loss", float(self.trainer.global_step))
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch, batch_idx):
        self(batch[0])
        self.log("loss", float(self.trainer.global_step))


def best_after(tmp_path, *callbacks, monitor="loss", validate=True, ckpt_path=None, **options):
    """The steps of the checkpoints that were best at some time, in three epochs of three steps."""
    best = BestAfterPruning(monitor, dirpath=tmp_path, filename="{step}", **options)
    run = trainer(*callbacks, best, max_epochs=4, enable_checkpointing=True)
    run.fit(Worsening(), Resumable(12), *([loader()] if validate else []), ckpt_path=ckpt_path)
    saved = torch.load(best.best_model_path, weights_only=True)
    assert (saved["state_dict"]["layers.0.weight"] == 0).float().mean() == 0.5
    assert [path.name for path in tmp_path.glob("*=*.ckpt")] == [f"step={saved['global_step']}.ckpt"]
    return saved["global_step"]


prune_at = partial(WandaPrune, num_samples=12, dataloader=loader())


EACH_STEP = {"every_n_train_steps": 1}


@pytest.mark.parametrize(
    ("whens", "options", "step"),
    [
        ([{}], {}, 3),
        ([{"at_step": 3}], {}, 3),  # pruned in the last step before the first validation loop
        ([{"at_step": 4}], {}, 6),
        ([{"schedule": CubicSchedule(0, 7, every=2)}], {}, 9),
        # The loop that ends at step 6 measures the dense model.
        ([{"at_step": 4, "calibrate_on": "validation", "dataloader": None}], {}, 9),
        ([{"at_step": 4}], EACH_STEP, 7),  # at step 5, the latest loss is that of the dense model
        ([{"at_step": 4}], {**EACH_STEP, "monitor": "train_loss", "validate": False}, 5),
        ([{"at_step": 2, "skip": ["layers.2"]}, {"at_step": 5, "only": ["layers.2"]}], {}, 6),  # both must be done
        ([{}], {"monitor": "sparsity/model", "mode": "max"}, 3),
    ],
)
def test_the_best_is_from_after_the_last_stage(tmp_path, whens, options, step):
    assert best_after(tmp_path, *[prune_at(**when) for when in whens], **options) == step


def test_a_run_that_is_resumed_after_pruning_compares_at_once(tmp_path):
    trainer(prune_at(at_step=2), SaveAt(tmp_path, 4), max_steps=4).fit(Worsening(), Resumable(12), loader())
    (tmp_path / "best").mkdir()
    options = {"ckpt_path": tmp_path / "4.ckpt", "monitor": "train_loss", **EACH_STEP}
    assert best_after(tmp_path / "best", prune_at(at_step=2), **options) == 5


def test_a_model_that_was_pruned_earlier(tmp_path):
    run = trainer(prune_at(), max_steps=1)
    run.fit(module := Worsening(), loader())
    best = BestAfterPruning("loss", dirpath=tmp_path)
    trainer(KeepZeros(), best, max_epochs=2, enable_checkpointing=True).fit(module, loader(), loader())
    assert best.best_model_score == 3
