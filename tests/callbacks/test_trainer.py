"""What the callbacks read from a Trainer."""

import os
import signal

import pytest
import pytorch_lightning
from support import forks
from support.callbacks import Net, OldNet, all_at, loader, share_of_zeros, trainer

from wanda_lightning import DistillFromDense, KeepZeros, SavePretrained, WandaPrune


class Terminated(Net):
    """Sends SIGTERM to its own process in its third forward pass, or after its first layer was pruned."""

    passes = 0

    def calibration_step(self, batch):
        print("pass", flush=True)
        self.passes += 1
        if self.passes == 3 and self.between is None:
            os.kill(os.getpid(), signal.SIGTERM)
        return self(batch[0])


def prune_until_terminated(sequential):
    module = Terminated()
    module.between = None if sequential == "none" else module.layers[1].register_forward_hook(terminate_if_pruned)
    module.layers[1].reader = module.layers[0]
    trainer(WandaPrune(0.5, num_samples=24, sequential=sequential), max_steps=9).fit(module, loader(24), loader(4))
    print("went on", flush=True)


def terminate_if_pruned(relu, args, output):
    if (relu.reader.weight == 0).any():
        os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize(("sequential", "passes"), [("none", 3), ("layer", 6)])
def test_sigterm_ends_a_pruning(sequential, passes):
    """Within a pass through the whole model, or at the next layer."""
    ended = forks.run(prune_until_terminated, sequential)
    assert ended.returncode == 143, ended.stderr
    assert ended.stdout.split() == ["pass"] * passes
    assert ("layers.0 is already pruned" in ended.stderr) == (sequential == "layer")


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
