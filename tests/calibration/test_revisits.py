"""Whether a model comes to a unit again is found out, and nothing large is computed for it."""

import pytest
import torch
import transformers as hf
from support.chains import Chain, Mlp, route, through, travel, vectors
from support.zoo import ZOO
from torch import nn

from wanda_lightning import prune
from wanda_lightning.models import find_layers


def revisited(model, batches, sequential="block"):
    units = find_layers(model, sequential).units
    found = set()
    for _ in travel(model, batches, [unit.module for unit in units], revisited=found):
        pass
    return {units[index].name for index in found}


class Looped(nn.Module):
    """Two blocks, applied three times."""

    def __init__(self, *blocks, times=3):
        super().__init__()
        self.blocks, self.norm, self.head = nn.ModuleList(blocks), nn.LayerNorm(8), nn.Linear(8, 4)
        self.times = times

    def forward(self, x):
        for _ in range(self.times):
            for block in self.blocks:
                x = block(x)
            x = self.norm(x)
        return self.head(x)


@pytest.mark.parametrize("count", [1, 3])
def test_a_looped_model_comes_again_to_all_its_units(count):
    blocks = Mlp(), Mlp()
    looped, once = Looped(*blocks), Looped(*blocks, times=1)
    found, never = set(), set()
    assert route(looped, vectors(count), looped.blocks, revisited=found) == [(i, list(range(count))) for i in (0, 1)]
    assert found == {0, 1}
    route(once, vectors(count), once.blocks, revisited=never)
    assert never == set()


@pytest.mark.parametrize("sequential", ["block", "layer"])
def test_albert_shares_its_block(sequential):
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48, "embedding_size": 16}
    model = hf.AlbertModel(hf.AlbertConfig(vocab_size=64, num_hidden_layers=3, **sizes)).eval()
    batches = [{"input_ids": torch.arange(8).view(2, 4)} for _ in range(2)]
    found = revisited(model, batches, sequential)
    inside = {unit.name for unit in find_layers(model, sequential).units if "albert_layers" in unit.name}
    assert inside
    assert found == inside


def looped():
    return Looped(Mlp(), Mlp())


def tied():
    model = Looped(Mlp(), Mlp(), times=1)
    model.blocks[1].up.weight = model.blocks[0].up.weight
    return model


def shared():
    model = Looped(Mlp(), Mlp(), times=1)
    model.blocks[1].up = model.blocks[0].up
    return model


def within():
    model = Looped(Mlp(), Mlp(), times=1)
    block, model.alias = model.blocks[0], model.blocks  # a block has two names
    block.up, block.down = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), nn.Linear(8, 8)
    block.up[1].weight = block.up[0].weight
    return model


@pytest.mark.parametrize(("sequential", "noted"), [("block", True), ("layer", True), ("none", False)])
@pytest.mark.parametrize(
    ("build", "calls"), [(looped, [3] * 4), (tied, [2, 1, 1]), (shared, [2, 1, 1])], ids=["looped", "tied", "shared"]
)
def test_the_report_says_that_the_statistics_are_those_of_the_first_call(build, calls, sequential, noted):
    report = prune(build(), vectors(), sequential=sequential, skip=["head"], progress=False)
    more = sum(number > 1 for number in calls)
    start = f"the model calls {more} layer{'s' * (more > 1)} more than once, blocks.0.up first, but"
    assert sum(note.startswith(start) for note in report.notes) == noted
    assert [layer.tokens for layer in report.layers] == [18 * (1 if noted else number) for number in calls]


def test_a_weight_tied_within_a_block_or_seen_by_nothing_says_no_such_thing():
    for model, choices in ((within(), {}), (tied(), {"method": "magnitude"}), (tied(), {"skip": ["*.up"]})):
        report = prune(model, vectors(), **choices, progress=False)
        assert not any("more than once" in note for note in report.notes)


@pytest.mark.parametrize("name", ["llama", "vit", "convnext", "t5", "routed", "unreached", "plain_mlp", "resnet18"])
@pytest.mark.parametrize("sequential", ["block", "layer"])
def test_other_models_do_not(name, sequential):
    assert revisited(ZOO[name].build(), ZOO[name].batches(), sequential) == set()


def test_the_head_is_not_computed():
    model, seen = Chain(Mlp(), Mlp()), []
    model.head.register_forward_hook(lambda *_: seen.append(1))
    route(model, vectors(), model.blocks)
    assert seen == []
    through([model], vectors(1)[0])
    assert seen == [1]


def test_an_error_behind_the_last_unit_does_not_matter():
    def glue(index):
        if index == 2:
            raise OSError("no more disk")

    model = Chain(Mlp(), Mlp(), glue=glue)
    assert [unit for unit, _ in route(model, vectors(), model.blocks)] == [0, 1]
