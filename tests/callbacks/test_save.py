"""What SavePretrained saves when training ends, and what BestAfterPruning compares."""

from functools import partial

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from safetensors.torch import load_file
from support import forks
from support.callbacks import (
    ADAMW,
    Net,
    PrintedSteps,
    Resumable,
    SaveAt,
    fit_module,
    killed_and_resumed,
    loader,
    run_loop,
    same,
    share_of_zeros,
    state,
    trainer,
)
from support.layers import assert_same
from support.modules import VIT, tiny_llama, windows_of_text
from torch import nn
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

from wanda_lightning import (
    BestAfterPruning,
    CausalLMModule,
    CubicSchedule,
    ImageClassifierModule,
    KeepZeros,
    PruningCallback,
    SavePretrained,
    WandaPrune,
)


class Saving(Net):
    """Records how it is saved."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def merge(self):
        self.calls.append("merge")

    def save_pretrained(self, folder, overwrite):
        self.calls.append((folder, overwrite, share_of_zeros(self)["layers.0.weight"]))


@pytest.mark.parametrize("overwrite", [False, True])
def test_merges_then_saves_the_trained_model(tmp_path, overwrite):
    if overwrite:
        (tmp_path / "config.json").write_text("{}")
    module = Saving()
    saving = SavePretrained(tmp_path, overwrite)
    for loop in ("validate", "test", "predict"):  # which train nothing
        run_loop(loop, module, saving)
    fit_module(module, PruningCallback(method="magnitude"), saving, max_steps=2)
    assert module.calls == ["merge", (tmp_path, overwrite, 0.5)]


def test_a_folder_with_a_model_is_refused_before_training(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    module = Saving()
    with pytest.raises(FileExistsError, match="overwrite"):
        fit_module(module, SavePretrained(tmp_path), max_steps=1)
    assert same(module, Saving())


@pytest.mark.parametrize("clash", ["report_dir", "default_root_dir"])
def test_a_folder_that_is_filled_while_the_model_trains_costs_no_model(tmp_path, clash):
    out = tmp_path / "out"
    module = CausalLMModule(tiny_llama(), lr=0.1)
    pruning = PruningCallback(method="magnitude")
    options = {"max_steps": 2}
    if clash == "report_dir":
        pruning.report_dir = out
    else:
        options |= {"default_root_dir": out, "enable_checkpointing": True}
    run = trainer(pruning, SavePretrained(out), **options)
    with pytest.warns(
        UserWarning, match=f"{out} was written to while the model trained, so .* saved in {out}-2"
    ):
        run.fit(module, DataLoader(windows_of_text(2)))
    assert not (out / "config.json").exists()
    assert same(AutoModelForCausalLM.from_pretrained(f"{out}-2"), module.model)
    assert f'from_pretrained("{out}-2")' in (tmp_path / "out-2/README.md").read_text()


def test_fast_dev_run_writes_nothing(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").write_text("good")
    pruning = PruningCallback(report_dir=tmp_path / "report", method="magnitude")
    saving = SavePretrained(tmp_path / "out", overwrite=True)
    fit_module(
        CausalLMModule(tiny_llama()),
        pruning,
        saving,
        data=DataLoader(windows_of_text(2)),
        fast_dev_run=True,
    )
    assert [file.name for file in tmp_path.rglob("*")] == ["out", "config.json"]


def built(change=lambda model: None, **options):
    module = ImageClassifierModule("vit_tiny_patch16_224", False, 10, model_kwargs=VIT | options)
    change(module.model)
    return module


def generating():
    module = CausalLMModule(tiny_llama())
    module.model.generation_config.temperature = 0.5
    return module


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: built(act_layer=nn.ReLU), "type is not JSON serializable"),
        (
            lambda: built(lambda model: setattr(model, "norm", nn.LayerNorm(8))),
            r"timm has `.*LayerNorm\(\(32,.*` where this model has `.*LayerNorm\(\(8,",
        ),
        (generating, "`temperature`"),
        (Net, r"save_pretrained\(folder, overwrite\), but Net has no such method"),
    ],
)
def test_a_model_that_cannot_be_written_is_refused_before_training(tmp_path, make, message):
    module = make()
    module.training_step = lambda batch, batch_idx: pytest.fail("training has begun")
    with pytest.raises((ValueError, TypeError, MisconfigurationException), match=message):
        fit_module(module, SavePretrained(tmp_path / "out"), max_steps=1)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("failing", ["save_pretrained", "merge"])
def test_a_trained_model_that_cannot_be_saved_is_not_lost(tmp_path, failing):
    module = Saving()

    def fail(*_, **__):
        raise RuntimeError("out of ink")

    setattr(module, failing, fail)
    (tmp_path / "out-state.pt").touch()
    with pytest.raises(OSError, match=rf"RuntimeError: out of ink.*{tmp_path}/out-state-2\.pt"):
        fit_module(module, SavePretrained(tmp_path / "out"), max_steps=2)
    again = Net()
    again.load_state_dict(torch.load(tmp_path / "out-state-2.pt"))
    assert same(again, module)
    assert not same(again, Net())


def card_after(tmp_path, *callbacks):
    module = CausalLMModule(tiny_llama(), lr=0.1)
    fit_module(
        module,
        *callbacks,
        SavePretrained(tmp_path / "out"),
        data=DataLoader(windows_of_text(2)),
        max_steps=2,
    )
    path = tmp_path / "out/README.md"
    return module, path.read_text() if path.exists() else None


def test_a_dense_model_gets_no_card(tmp_path):
    assert card_after(tmp_path)[1] is None


def test_the_card_says_how_the_model_was_trained_and_counts_the_zeros_after_it(tmp_path):
    module, card = card_after(tmp_path, PruningCallback(keep_zeros=False, method="magnitude"))
    weights = [m.weight for name, m in module.model.named_modules() if name.endswith("_proj")]
    zeros = sum(int((weight == 0).sum()) for weight in weights)
    size = sum(map(torch.numel, weights))
    assert zeros < size / 4
    assert f"{zeros / size:.2%} of the weights in 14 layers are zero" in card
    assert "The same run trained it for 2 steps." in card
    assert f'from_pretrained("{tmp_path}/out")' in card


@pytest.mark.parametrize("keep_zeros", [True, False])
def test_the_card_counts_the_zeros_of_the_saved_model(tmp_path, keep_zeros):
    module = built()
    first_block = module.model.blocks[0]
    assert not first_block.mlp.fc1.bias.any()  # zero before training, but not after it
    pruning = PruningCallback(method="magnitude", keep_zeros=keep_zeros)
    fit_module(
        module,
        pruning,
        SavePretrained(tmp_path / "out"),
        data=DataLoader([(torch.randn(3, 32, 32), label) for label in range(4)], batch_size=2),
        max_steps=2,
    )
    saved = load_file(tmp_path / "out/model.safetensors").values()
    share = sum(int((tensor == 0).sum()) for tensor in saved) / sum(map(torch.numel, saved))
    assert f"which is {share:.2%} of all" in (tmp_path / "out/README.md").read_text()


class Worsening(Net):
    """Logs the number of optimizer steps as its loss, so that the first model is the best."""

    def training_step(self, batch, batch_idx):
        self.log("train_loss", float(self.trainer.global_step))
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch, batch_idx):
        self(batch[0])
        self.log("loss", float(self.trainer.global_step))


def best_after(
    tmp_path, *callbacks, module=None, monitor="loss", validate=True, ckpt_path=None, **options
):
    """The steps of the checkpoints that were best at some time, in three epochs of three steps."""
    best = BestAfterPruning(monitor, dirpath=tmp_path, filename="{step}", **options)
    run = trainer(*callbacks, best, max_epochs=4, enable_checkpointing=True)
    validation = loader() if validate else None
    run.fit(module or Worsening(), Resumable(12), validation, ckpt_path=ckpt_path)
    saved = torch.load(best.best_model_path, weights_only=True)
    assert (saved["state_dict"]["layers.0.weight"] == 0).float().mean() == 0.5
    assert [path.name for path in tmp_path.glob("*=*.ckpt")] == [
        f"step={saved['global_step']}.ckpt"
    ]
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
        # Both callbacks must be done.
        ([{"at_step": 2, "skip": ["layers.2"]}, {"at_step": 5, "only": ["layers.2"]}], {}, 6),
        ([{}], {"monitor": "sparsity/model", "mode": "max"}, 3),
    ],
)
def test_the_best_is_from_after_the_last_stage(tmp_path, whens, options, step):
    assert best_after(tmp_path, *[prune_at(**when) for when in whens], **options) == step


def test_a_run_that_is_resumed_after_pruning_compares_at_once(tmp_path):
    trainer(prune_at(at_step=2), SaveAt(tmp_path, 4), max_steps=4).fit(
        Worsening(), Resumable(12), loader()
    )
    (tmp_path / "best").mkdir()
    assert (
        best_after(
            tmp_path / "best",
            prune_at(at_step=2),
            ckpt_path=tmp_path / "4.ckpt",
            monitor="train_loss",
            **EACH_STEP,
        )
        == 5
    )


def test_a_model_that_was_pruned_earlier(tmp_path):
    module = Worsening()
    fit_module(module, prune_at(), max_steps=1)
    assert best_after(tmp_path, KeepZeros(), module=module) == 3


def continue_gradual_run(folder, is_killed):
    """Train for four epochs of three steps, from the last checkpoint if there is one, and write the result."""
    module = Worsening(ADAMW)
    steps = PrintedSteps(7 if is_killed else None)  # it is dense until step 9
    last = folder / "last.ckpt"
    pruning = prune_at(sparsity=0.75, schedule=CubicSchedule(0, 9, every=3))
    best = BestAfterPruning("loss", dirpath=folder, save_last=True)
    run = trainer(pruning, best, steps, max_epochs=4, enable_checkpointing=True)
    run.fit(module, loader(), loader(), ckpt_path=last if last.exists() else None)
    torch.save({**state(module), "best": best.best_model_score}, folder / "final.pt")


@pytest.mark.nightly  # three runs in processes of their own, as in test_state.py
@forks.IN_ONE_WORKER
def test_a_gradual_run_that_is_killed_before_the_last_stage_resumes_from_last(tmp_path):
    first_step, whole, resumed = killed_and_resumed(tmp_path, continue_gradual_run)
    assert first_step == "step 6"
    assert_same(resumed, whole)
    assert (whole["weights"]["layers.0.weight"] == 0).float().mean() == 0.75


def test_last_is_the_latest_model_and_not_the_best(tmp_path):
    assert best_after(tmp_path, prune_at(), save_last=True) == 3
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 12
