"""Zeros stay zero in the Trainer of sentence-transformers."""

import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from support.embedding import PAIRS, SENTENCES, tiny as tiny, tiny_folder as tiny_folder
from support.quiet import prune

from wanda_lightning.integrations.transformers import KeepZerosCallback


def test_real_steps_keep_the_zeros_and_train_the_rest(tiny, tmp_path):
    report = prune(tiny, SENTENCES)
    pruned = {layer.name: tiny.get_submodule(layer.name).weight.clone() for layer in report.layers}
    first, second, scores = zip(*PAIRS, strict=True)
    rows = {"sentence1": first, "sentence2": second, "score": [score / 5 for score in scores]}
    arguments = SentenceTransformerTrainingArguments(
        str(tmp_path),
        max_steps=4,
        learning_rate=0.01,
        weight_decay=0.5,
        per_device_train_batch_size=4,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        save_strategy="no",
    )
    SentenceTransformerTrainer(
        tiny,
        arguments,
        train_dataset=Dataset.from_dict(rows),
        callbacks=[KeepZerosCallback()],
    ).train()

    for name, old in pruned.items():
        new = tiny.get_submodule(name).weight
        assert torch.equal(new == 0, old == 0)
        if "pooler" not in name:  # which has no gradient
            assert not torch.isclose(new, old)[old != 0].all()
