"""What is done twice: a cell of a notebook, a seed, a callback. And a report, printed."""

import copy

import lightning as L
import pytest
import torch
from torch.nn.utils import parameters_to_vector

from wanda_lightning import CausalLMModule, TextDataModule, WandaPrune, prune


@pytest.fixture
def data(tokenizer):
    """A function that makes the data of a seed."""

    def of_seed(seed):
        return TextDataModule(tokenizer, seqlen=256, num_samples=8, seed=seed, limit=4)

    return of_seed


@pytest.mark.parametrize("loads", [True, False])
def test_a_cell_that_is_run_twice(folder, llama, data, sparsity, loads):
    for _ in range(2):
        module = CausalLMModule(folder if loads else llama)
        L.Trainer(callbacks=[WandaPrune(0.5)], logger=False).validate(module, data(0))
        assert sparsity(module.model.model) == 0.5
        module.save_pretrained("out/model", overwrite=True)


def test_a_callback_that_is_used_again(llama, data, sparsity):
    pruning = WandaPrune(0.5)
    results = []
    for model in (llama, copy.deepcopy(llama), llama):
        trainer = L.Trainer(callbacks=[pruning], logger=False)
        results += trainer.validate(CausalLMModule(model), data(0))
    assert results[0] == results[1] == results[2]
    assert sparsity(llama.model) == 0.5


def test_a_seed_that_changes(llama, data):
    weights = []
    for seed in (0, 0, 1):
        model = copy.deepcopy(llama)
        prune(model, data(seed).calibration_dataloader(), 0.5)
        weights.append(parameters_to_vector(model.parameters()))
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_a_report_prints_a_few_lines(llama, data):
    report = prune(llama, data(0).calibration_dataloader(), 0.5)
    assert len(str(report).splitlines()) <= 8
    assert report.layers[-1].name in report.table()
