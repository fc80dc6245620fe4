"""SavePretrained: what is saved when training ends, and what is refused before it starts."""

import lightning as L
import pytest
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.strategies import FSDPStrategy
from support.callbacks import Net, loader, same, share_of_zeros, trainer

from wanda_lightning import MagnitudePrune, SavePretrained

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*but have no `val_dataloader`"),
]


class Saving(Net):
    """Records how it is saved."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def merge(self):
        self.calls.append("merge")

    def save_pretrained(self, folder, overwrite, **more):
        self.calls.append((folder, overwrite, share_of_zeros(self)["layers.0.weight"], *more.items()))


@pytest.mark.parametrize("overwrite", [False, True])
def test_merges_then_saves_the_trained_model_once(tmp_path, overwrite):
    module = Saving()
    trainer(MagnitudePrune(), SavePretrained(tmp_path / "out", overwrite), max_steps=2).fit(module, loader())
    assert module.calls == ["merge", (tmp_path / "out", overwrite, 0.5)]


def test_packed_is_passed_on(tmp_path):
    module = Saving()
    trainer(MagnitudePrune(), SavePretrained(tmp_path / "out", packed=True), max_steps=2).fit(module, loader())
    assert module.calls == ["merge", (tmp_path / "out", False, 0.5, ("packed", True))]


@pytest.mark.parametrize("loop", ["validate", "test", "predict"])
def test_saves_nothing_where_nothing_is_trained(tmp_path, loop):
    module = Saving()
    getattr(trainer(SavePretrained(tmp_path / "out")), loop)(module, loader())
    assert module.calls == []


def test_a_folder_that_is_not_empty_is_refused_before_training(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    module = Saving()
    with pytest.raises(FileExistsError, match="overwrite"):
        trainer(SavePretrained(tmp_path), max_steps=1).fit(module, loader())
    assert same(module, Saving())
    trainer(SavePretrained(tmp_path, overwrite=True), max_steps=1).fit(module, loader())
    assert module.calls[-1][:2] == (tmp_path, True)


def test_a_module_that_cannot_save_itself_is_refused_before_training(tmp_path):
    module = Net()
    with pytest.raises(MisconfigurationException, match="but Net has no such method"):
        trainer(SavePretrained(tmp_path / "out"), max_steps=1).fit(module, loader())
    assert same(module, Net())


def test_a_module_that_cannot_be_saved_packed_is_refused_before_training(tmp_path):
    class Plain(Net):
        def save_pretrained(self, folder, overwrite):
            raise AssertionError

    module = Plain()
    with pytest.raises(MisconfigurationException, match="but that of Plain does not take packed"):
        trainer(SavePretrained(tmp_path / "out", packed=True), max_steps=1).fit(module, loader())
    assert same(module, Plain())


def test_a_strategy_that_distributes_the_model_is_refused(tmp_path):
    run = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    run.strategy.__class__ = FSDPStrategy  # which itself needs a GPU
    with pytest.raises(MisconfigurationException, match="FSDPStrategy distributes the model"):
        SavePretrained(tmp_path / "out").setup(run, Saving(), "fit")
