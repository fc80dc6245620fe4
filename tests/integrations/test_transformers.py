"""Zeros stay zero in the Trainers of transformers and of sentence-transformers."""

import pytest
import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from support.callbacks import zeros
from support.embedding import PAIRS, SENTENCES, tiny as tiny, tiny_folder as tiny_folder
from support.layers import assert_same, rng
from support.modules import tiny_llama
from support.quiet import prune
from support.refusals import refuses
from support.reports import read_json
from torch.optim.optimizer import _global_optimizer_post_hooks
from transformers import Trainer, TrainerCallback, TrainingArguments

from wanda_lightning.integrations.transformers import KeepZerosCallback

IDS = torch.randint(64, (16, 12), generator=rng())
WINDOWS = [{"input_ids": ids, "labels": ids} for ids in IDS]


def pruned_llama():
    model = tiny_llama()
    prune(model, method="magnitude")
    return model


def arguments(folder, kind=TrainingArguments, **options):
    options = {
        "max_steps": 4,
        "learning_rate": 0.01,
        "weight_decay": 0.5,
        "per_device_train_batch_size": 4,
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "save_strategy": "no",
        "logging_strategy": "no",
        **options,
    }
    return kind(str(folder), **options)


class Looks(TrainerCallback):
    """Checks the zeros after each optimizer step."""

    def __init__(self, pruned):
        self.pruned = pruned
        self.looks = 0

    def on_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.looks += 1
        assert_same(zeros(model), self.pruned)


def trained(folder, *callbacks, model=None, checkpoint=None, **options):
    model = model or pruned_llama()
    Trainer(
        model, arguments(folder, **options), train_dataset=WINDOWS, callbacks=list(callbacks)
    ).train(checkpoint)
    return model


@pytest.mark.parametrize(
    "options",
    [
        {"gradient_accumulation_steps": 2, "max_grad_norm": 0.01},
        {"optim": "sgd", "optim_args": "momentum=0.9", "bf16": True},
        {"optim": "adafactor"},
        pytest.param(
            {"torch_compile": True, "torch_compile_backend": "eager"}, marks=pytest.mark.nightly
        ),
    ],
)
def test_exactly_the_pruned_weights_are_zero_after_every_step(options, tmp_path):
    model = pruned_llama()
    begun = {key: value.clone() for key, value in model.state_dict().items()}
    looks = Looks(zeros(model))
    trained(tmp_path, KeepZerosCallback(), looks, model=model, **options)
    assert looks.looks == 4
    for key, where in looks.pruned.items():
        now = model.state_dict()[key]
        assert torch.equal(now == 0, where)
        assert (now != begun[key])[~where].float().mean() > 0.9
    assert not _global_optimizer_post_hooks
    assert not any(weight._post_accumulate_grad_hooks for weight in model.parameters())


def test_real_steps_of_sentence_transformers_keep_the_zeros_and_train_the_rest(tiny, tmp_path):
    report = prune(tiny, SENTENCES)
    pruned = {layer.name: tiny.get_submodule(layer.name).weight.clone() for layer in report.layers}
    first, second, scores = zip(*PAIRS, strict=True)
    rows = {"sentence1": first, "sentence2": second, "score": [score / 5 for score in scores]}
    SentenceTransformerTrainer(
        tiny,
        arguments(tmp_path, SentenceTransformerTrainingArguments),
        train_dataset=Dataset.from_dict(rows),
        callbacks=[KeepZerosCallback()],
    ).train()
    for name, old in pruned.items():
        new = tiny.get_submodule(name).weight
        assert torch.equal(new == 0, old == 0)
        if "pooler" not in name:  # which has no gradient
            assert not torch.isclose(new, old)[old != 0].all()


class ZeroByChance(TrainerCallback):
    """Makes one kept weight zero at step 2, as rounding may. It trains on, also after a resume."""

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step == 2:
            weight = model.model.layers[0].mlp.up_proj.weight
            with torch.no_grad():
                weight[tuple((weight != 0).nonzero()[0])] = 0


@pytest.mark.parametrize("restore", [False, True])
def test_a_resumed_run_equals_one_that_was_not_interrupted(restore, tmp_path):
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    options["restore_callback_states_from_checkpoint"] = restore
    whole = trained(tmp_path, KeepZerosCallback(), ZeroByChance(), **options)
    checkpoint = tmp_path / "checkpoint-2"
    saved = read_json(checkpoint / "trainer_state.json")["stateful_callbacks"]["KeepZerosCallback"]
    assert len(saved["attributes"]["held"]["layers"]) == 14
    assert saved["attributes"]["held"]["unheld_zeros"].keys() == {"model.layers.0.mlp.up_proj"}
    options["checkpoint"] = str(checkpoint)
    again = trained(tmp_path, KeepZerosCallback(), ZeroByChance(), **options)
    assert_same(again, whole)
    assert_same(zeros(again), zeros(pruned_llama()))


def test_a_run_that_began_without_it_can_go_on_with_it(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 1}
    trained(tmp_path, learning_rate=0.0, max_steps=1, **options)
    options["checkpoint"] = str(tmp_path / "checkpoint-1")
    trained(tmp_path, KeepZerosCallback(), max_steps=2, **options)
    saved = read_json(tmp_path / "checkpoint-2" / "trainer_state.json")["stateful_callbacks"]
    assert "held" in saved["KeepZerosCallback"]["attributes"]


class Stops(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        raise KeyboardInterrupt


def test_an_interrupted_run_leaves_no_hook_for_the_next(tmp_path):
    callback = KeepZerosCallback()
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path, callback, Stops())
    assert _global_optimizer_post_hooks
    trained(tmp_path, callback, max_steps=1)
    assert not _global_optimizer_post_hooks


@pytest.mark.parametrize(("name", "launches"), [("FSDP", False), ("DeepSpeed", True)])
def test_distributed_weights_are_refused(name, launches, tmp_path, monkeypatch):
    options = arguments(tmp_path)
    if launches:  # as accelerate launch does
        monkeypatch.setenv(f"ACCELERATE_USE_{name.upper()}", "true")
    else:
        setattr(options, name.lower(), True)
    with refuses(f"needs each process to hold the whole model, but {name} distributes"):
        KeepZerosCallback().on_train_begin(options, None, None, model=pruned_llama())
