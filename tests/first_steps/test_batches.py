"""Batches as a DataLoader gives them."""

import copy
from collections import namedtuple

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset
from transformers import BatchEncoding, T5Config, T5ForConditionalGeneration

from wanda_lightning import CausalLMModule, WandaPrune, prune

IDS = torch.randint(256, (16, 512), generator=torch.Generator().manual_seed(0))
Example = namedtuple("Example", "input_ids label")


def encoding(rows):
    return BatchEncoding({"input_ids": torch.stack(rows)})


LOADERS = {
    "dictionaries": DataLoader([{"input_ids": row, "number": 7} for row in IDS], 4),
    "encodings": DataLoader(IDS, 4, collate_fn=encoding),
    "named_tuples": DataLoader([Example(row, 0) for row in IDS], 4),
    "tensors": DataLoader(IDS, 4),
    "tuples": DataLoader(TensorDataset(IDS, IDS), 4),
}


@pytest.mark.parametrize("kind", LOADERS)
def test_prune_and_the_callback_take_every_kind_of_batch(llama, kind):
    other = copy.deepcopy(llama)
    report = prune(other, LOADERS[kind], 0.5, method="wanda")
    assert report.layers[-1].tokens == IDS.numel()

    trainer = L.Trainer(callbacks=[WandaPrune(0.5)], logger=False)
    trainer.validate(CausalLMModule(llama), LOADERS[kind])
    assert torch.equal(llama(IDS).logits, other(IDS).logits)


def test_a_wrong_batch_leaves_the_model_unchanged(sparsity):
    config = T5Config(vocab_size=256, d_model=32, num_layers=2, decoder_start_token_id=0)
    model = T5ForConditionalGeneration(config).eval()
    with pytest.raises(ValueError, match="inputs_embeds"):
        prune(model, [{"input_ids": IDS}], 0.5)  # without labels
    assert sparsity(model) == 0
    assert prune(model, [{"input_ids": IDS, "labels": IDS[:, :128]}], 0.5).sparsity == 0.5
