"""What the callbacks read from a Trainer."""

import pytest
import pytorch_lightning
from support.callbacks import Net, OldNet, all_at, loader, share_of_zeros, trainer

from wanda_lightning import DistillFromDense, KeepZeros, SavePretrained, WandaPrune


def test_layers_are_named_as_in_the_pruning_target():
    class Wrapper(Net):
        @property
        def pruning_target(self):
            return self.layers

    module, callback = Wrapper(), WandaPrune(num_samples=12, skip=["2"])
    trainer(callback, max_epochs=1).fit(module, loader())
    assert [layer.name for layer in callback.report.layers] == ["0", "4"]
    assert share_of_zeros(module) == {**all_at(0.5), "layers.2.weight": 0.0}


class OldTrainer(pytorch_lightning.Trainer):
    """A subclass has a module name of its own."""


@pytest.mark.parametrize(
    ("make", "kind", "loop"),
    [
        (WandaPrune, pytorch_lightning.Trainer, "fit"),
        (WandaPrune, OldTrainer, "predict"),
        (KeepZeros, OldTrainer, "validate"),
        (lambda: SavePretrained("never"), pytorch_lightning.Trainer, "test"),
        (DistillFromDense, OldTrainer, "fit"),
    ],
)
def test_a_trainer_of_the_older_package_is_refused(make, kind, loop):
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    run = kind(accelerator="cpu", callbacks=[make()], enable_model_summary=False, max_steps=1, **quiet)
    message = rf"but it is a {kind.__name__} of pytorch_lightning. Import Trainer, .* from lightning.pytorch"
    with pytest.raises(ValueError, match=message):
        getattr(run, loop)(OldNet(), loader())
