"""What will be pruned is found once, and what cannot be pruned is refused before anything is written."""

import pytest
import timm
from support.zoo import ZOO
from torch import nn

import wanda_lightning.plan as plan_module
from wanda_lightning import PruningConfig, prune
from wanda_lightning.models import SkipReason
from wanda_lightning.plan import make_plan


@pytest.mark.parametrize("allocation", ["uniform", "owl", "fisher"])
@pytest.mark.parametrize("sequential", ["block", "layer", "none"])
def test_layers_are_found_once(monkeypatch, sequential, allocation):
    walks = []
    find_layers = plan_module.find_layers

    def counted(*args, **kwargs):
        walks.append(args)
        return find_layers(*args, **kwargs)

    monkeypatch.setattr(plan_module, "find_layers", counted)
    specimen = ZOO["llama"]
    prune(specimen.build(), specimen.batches(), sequential=sequential, allocation=allocation, progress=False)
    assert len(walks) == 1


def test_blocks_do_not_depend_on_where_batches_stop():
    blocks = [
        make_plan(PruningConfig.from_names(sequential=sequential), ZOO["llama"].build()).inventory.blocks
        for sequential in ("block", "layer", "none")
    ]
    assert blocks[0] == blocks[1] == blocks[2]
    assert blocks[0]["model.layers.1.mlp.up_proj"] == "model.layers.1"


def test_only_that_names_a_head_says_why_it_is_not_pruned():
    model = timm.create_model("test_vit")
    with pytest.raises(ValueError, match=r"only=\['head'\] names nothing to prune \(head: output head\)"):
        make_plan(PruningConfig.from_names(only=["head"]), model)


def test_nothing_to_prune():
    with pytest.raises(ValueError, match="the model has nothing to prune \\(there are no weight matrices\\)"):
        make_plan(PruningConfig.from_names(), nn.ReLU())


def test_a_skipped_matrix_has_a_reason_of_the_enumeration():
    plan = make_plan(PruningConfig.from_names(skip=["model.layers.0.mlp"]), ZOO["llama"].build())
    reasons = {matrix.name: matrix.reason for matrix in plan.inventory.skipped}
    assert reasons["model.embed_tokens"] is SkipReason.EMBEDDING
    assert reasons["lm_head"] in (SkipReason.OUTPUT_HEAD, SkipReason.TIED)
    assert reasons["model.layers.0.mlp.up_proj"] is SkipReason.USER
    assert {matrix.name for matrix in plan.inventory.skipped_for(SkipReason.USER)} == {
        f"model.layers.0.mlp.{name}_proj" for name in ("gate", "up", "down")
    }
