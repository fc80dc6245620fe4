"""A user's own LightningModule in a Trainer with Lightning's defaults: validation, checkpoints and a logger."""

from contextlib import suppress

import lightning as L
import pytest
import pytorch_lightning
import timm
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from wanda_lightning import DistillFromDense, KeepZeros, UserError, WandaPrune


def classifier(library=L):
    class Classifier(library.LightningModule):
        def __init__(self):
            super().__init__()
            sizes = {"img_size": 64, "embed_dim": 32, "depth": 2, "num_heads": 2}
            self.net = timm.create_model("vit_tiny_patch16_224", num_classes=300, **sizes)

        def forward(self, images):
            return self.net(images)

        def training_step(self, batch, batch_idx):
            return nn.functional.cross_entropy(self(batch[0]), batch[1])

        def validation_step(self, batch, batch_idx):
            self.log("val_loss", self.training_step(batch, batch_idx))

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters())

    return Classifier()


@pytest.fixture
def loader():
    images = TensorDataset(torch.randn(64, 3, 64, 64), torch.randint(300, (64,)))
    return DataLoader(images, batch_size=16)


def test_fit_with_the_defaults_of_lightning(loader, sparsity):
    module = classifier()
    trainer = L.Trainer(max_epochs=2, callbacks=[WandaPrune(0.5)])
    trainer.fit(module, loader, loader)
    assert sparsity(module.net.blocks) == 0.5
    saved = torch.load(trainer.checkpoint_callback.best_model_path)["state_dict"]
    assert (saved["net.blocks.0.mlp.fc1.weight"] == 0).float().mean() == 0.5


def test_validate_twice_then_train(loader, sparsity):
    module = classifier()
    trainer = L.Trainer(callbacks=[WandaPrune(0.5)])
    assert trainer.validate(module, loader) == trainer.validate(module, loader)

    callbacks = [KeepZeros(), DistillFromDense(classifier())]
    L.Trainer(max_epochs=1, callbacks=callbacks).fit(module, loader, loader)
    assert sparsity(module.net.blocks) == 0.5


def test_pytorch_lightning_prunes_or_is_refused_in_a_sentence(loader, sparsity):
    module = classifier(pytorch_lightning)
    with suppress(UserError):
        trainer = pytorch_lightning.Trainer(max_epochs=1, callbacks=[WandaPrune(0.5)])
        trainer.fit(module, loader, loader)
    assert sparsity(module.net.blocks) in (0, 0.5)
