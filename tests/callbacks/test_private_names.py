"""Private names of Lightning whose meaning a callback needs; `tests/test_private_names.py` checks that others exist."""

import inspect

from lightning.pytorch.callbacks import ModelCheckpoint, StochasticWeightAveraging


def test_a_checkpoint_is_saved_with_the_trainer_first():
    parameters = [*inspect.signature(ModelCheckpoint._save_topk_checkpoint).parameters]
    assert parameters[:2] == ["self", "trainer"], (
        "BestAfterPruning overrides ModelCheckpoint._save_topk_checkpoint, whose arguments have changed."
    )
    assert "_last_global_step_saved" in vars(ModelCheckpoint()), (
        "BestAfterPruning writes `last` beside a model that is not best, and then says so by this attribute."
    )


def test_both_averages_of_weights_have_the_name_that_pruning_reads():
    assert "_average_model" in vars(StochasticWeightAveraging(0.1)), (
        "The average of StochasticWeightAveraging has another name, so its pruned weights are not zeroed."
    )
