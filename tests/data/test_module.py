"""Our LightningDataModules in a Trainer of pytorch_lightning."""

import pytest
import pytorch_lightning
from tokenizers import Tokenizer, models
from torch import nn
from transformers import PreTrainedTokenizerFast

from wanda_lightning import ImageDataModule, TextDataModule


class OldModule(pytorch_lightning.LightningModule):
    """A module of a user of pytorch_lightning."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def validation_step(self, batch, batch_idx):
        raise AssertionError


def text():
    return TextDataModule(PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE())), seqlen=8)


@pytest.mark.parametrize("data", [lambda: ImageDataModule("digits"), text], ids=["images", "text"])
def test_a_trainer_of_the_older_package_is_refused(data):
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    run = pytorch_lightning.Trainer(accelerator="cpu", enable_model_summary=False, **quiet)
    with pytest.raises(ValueError, match=r"a Trainer of pytorch_lightning. Import .* from lightning\.pytorch"):
        run.validate(OldModule(), datamodule=data())
