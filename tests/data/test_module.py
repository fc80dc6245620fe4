"""Our LightningDataModules in a Trainer of pytorch_lightning."""

import pytest
import pytorch_lightning
from support.callbacks import OldNet
from support.data import byte_tokenizer

from wanda_lightning import ImageDataModule, TextDataModule


@pytest.mark.parametrize("data", [lambda: ImageDataModule("digits"), lambda: TextDataModule(byte_tokenizer())])
def test_a_trainer_of_the_older_package_is_refused(data):
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    run = pytorch_lightning.Trainer(accelerator="cpu", enable_model_summary=False, **quiet)
    with pytest.raises(ValueError, match=r"a Trainer of pytorch_lightning. Import .* from lightning\.pytorch"):
        run.validate(OldNet(), datamodule=data())
