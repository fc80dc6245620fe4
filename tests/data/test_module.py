"""Our LightningDataModules in Trainers: one that is resumed, and one of pytorch_lightning."""

import pytest
import pytorch_lightning
from support.callbacks import OldNet, SaveAt, trainer
from support.data import byte_tokenizer
from support.modules import tiny_llama

from wanda_lightning import CausalLMModule, ImageDataModule, TextDataModule


@pytest.mark.parametrize("data", [lambda: ImageDataModule("digits"), lambda: TextDataModule(byte_tokenizer())])
def test_a_trainer_of_the_older_package_is_refused(data):
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    run = pytorch_lightning.Trainer(accelerator="cpu", enable_model_summary=False, **quiet)
    with pytest.raises(ValueError, match=r"a Trainer of pytorch_lightning. Import .* from lightning\.pytorch"):
        run.validate(OldNet(), datamodule=data())


class Reading(CausalLMModule):
    """Records the batches of each step."""

    def __init__(self, **options):
        super().__init__(tiny_llama(vocab_size=300), **options)
        self.seen = []

    def training_step(self, batch, batch_idx):
        self.seen.append(batch["input_ids"].tolist())
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("lr_decay", [False, True])
@pytest.mark.parametrize("limit", [1.0, 0.5, pytest.param(2, marks=pytest.mark.nightly)])
def test_a_run_that_is_resumed_at_any_step_reads_the_batches_of_an_uninterrupted_one(tmp_path, limit, lr_decay):
    def fit(*callbacks, **options):
        module, data = Reading(lr_decay=lr_decay), TextDataModule(byte_tokenizer(), seqlen=32, num_samples=16, limit=1)
        lengths = {"max_epochs": 2, "limit_train_batches": limit, "limit_val_batches": 0}
        trainer(*callbacks, **lengths).fit(module, data, **options)
        return module.seen

    whole = fit(SaveAt(tmp_path, *range(1, 8)))
    assert whole[0] != whole[len(whole) // 2]  # each epoch has an order of its own
    for checkpoint in tmp_path.iterdir():
        assert fit(ckpt_path=checkpoint) == whole[int(checkpoint.stem) :]
