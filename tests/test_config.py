"""Names become objects in one place, and what does not fit together is refused there."""

import dataclasses
import inspect

import pytest
import torch
import yaml
from support.refusals import refuses
from torch import nn

import wanda_lightning as wl
from wanda_lightning import (
    ADMM,
    OWL,
    PruningCallback,
    PruningConfig,
    Reconstruct,
    SparseGPT,
    WandaPrune,
    prune,
)
from wanda_lightning.config import PruningChoices
from wanda_lightning.core import Magnitude, Uniform, Unstructured, Wanda, ZeroOut
from wanda_lightning.core.criteria import Saliency
from wanda_lightning.methods import (
    ALLOCATIONS,
    CRITERIA,
    PATTERNS,
    PRESETS,
    RECOVERIES,
    SOLVERS,
)
from wanda_lightning.training import NoRecovery

TABLES = {
    "criterion": CRITERIA,
    "pattern": PATTERNS,
    "allocation": ALLOCATIONS,
    "solver": SOLVERS,
    "recovery": RECOVERIES,
}


def test_the_defaults_are_wanda():
    expected = PruningConfig(
        sparsity=0.5,
        criterion=Wanda(),
        pattern=Unstructured("row"),
        allocation=Uniform(),
        solver=ZeroOut(),
        recovery=NoRecovery(),
        sequential="auto",
        skip=(),
        only=(),
        keep_batch_norm=False,
    )
    assert PruningConfig() == PruningConfig(method="wanda") == expected


@pytest.mark.parametrize(
    ("option", "name"), [(option, name) for option, table in TABLES.items() for name in table]
)
def test_a_name_and_its_object_are_the_same(option, name):
    choices = {"sparsity": 0.5}
    if name == "assignment":
        choices["pattern"] = "2:4"
    choices[option] = name
    by_name = PruningConfig(**choices)
    choices[option] = TABLES[option][name]()
    assert by_name == PruningConfig(**choices)
    assert getattr(by_name, option) == choices[option]
    assert by_name.shown(option) == f"{option}={name!r}"


@pytest.mark.parametrize(
    ("choices", "criterion"),
    [
        ({"solver": SparseGPT(0.1)}, Saliency(0.1)),
        ({"solver": "sparsegpt", "criterion": "wanda"}, Wanda()),
        ({"method": "magnitude", "solver": "refit"}, Wanda()),
        ({"method": "magnitude"}, Magnitude()),
    ],
)
def test_the_solver_brings_its_criterion_unless_one_is_given(choices, criterion):
    assert PruningConfig(**choices).criterion == criterion


@pytest.mark.parametrize("choices", [{"criterion": "magnitude"}, {"solver": "sparsegpt"}])
def test_a_method_is_its_criterion_or_its_solver(choices):
    (name,) = choices.values()
    assert PruningConfig(**choices) == PruningConfig(method=name)


def test_choices_replace_those_of_the_method():
    config = PruningConfig(method="best", solver=ADMM(iterations=2), allocation="owl")
    assert (config.solver, config.allocation) == (ADMM(iterations=2), OWL())
    assert config.sequential == "one_pass"  # as in the preset
    assert PruningConfig(method="admm", recovery="reconstruct").recovery == Reconstruct()


def test_one_name_to_skip_is_a_list_of_one():
    assert PruningConfig(skip="lm_head").skip == ("lm_head",)


# What is chosen, and what the sentence says.
REFUSED = r"""
- [{sparsity: 1.0}, 'sparsity must be .* at least 0 and below 1, but it is 1\.0']
- [{sparsity: 50}, 'sparsity \(0\.5 for 50 %\) must be .* but it is 50\.']
- [{criterion: wnda}, "criterion must be one of wanda, .* but it is 'wnda'. Did you mean wanda?"]
- [{pattern: 2;4}, "must be one of unstructured_row, .* 4:8, unstructured, but it is '2;4'"]
- [{method: bets}, "method must be one of .* but it is 'bets'. Did you mean best"]
- [{sequential: model}, "must be one of block, layer, none, auto, one_pass, but it is 'model'"]
- [{skip: ['re:(']}, 'skip=.* must be a regular expression after']
- [{sparsity: 0.4, pattern: '2:4'}, 'sparsity must be 0.5 for the pattern 2:4, but it is 0.4']
- [{solver: admm, criterion: ria}, "solver='admm', because the solver scores the weights"]
- [{solver: sparsegpt, criterion: ria}, "solver='sparsegpt', because the one compares whole rows"]
- [{recovery: reconstruct, sequential: layer}, "sequential='layer', because the recovery"]
"""


@pytest.mark.parametrize(("choices", "message"), yaml.safe_load(REFUSED))
def test_what_is_refused(choices, message):
    with refuses(message):
        PruningConfig(**choices)


def test_a_class_in_the_place_of_an_object_is_told_so():
    message = r"criterion must be of class Criterion or .*, but it is <class.* Wanda\(\.\.\.\)"
    with refuses(message):
        PruningConfig(criterion=Wanda)


def test_the_description_is_plain_data():
    described = PruningConfig(pattern="2:4", skip=["a"]).describe()
    assert described["pattern"] == {"name": "NM", "n": 2, "m": 4}
    assert described["skip"] == ["a"]
    assert described.keys() == {field.name for field in dataclasses.fields(PruningConfig)}


@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_has_its_name(name, pattern):
    assert PruningConfig(method=name, pattern=pattern).preset == name
    assert PruningConfig(method=name, pattern=pattern, allocation="owl").preset == ""


@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_a_preset_is_recognized_by_its_choices(pattern):
    choices = {"criterion": "wanda", "pattern": pattern}
    assert PruningConfig(**choices, sequential="one_pass").preset == "fast"
    assert PruningConfig(**choices).preset == ""


def test_typed_choices_are_the_arguments():
    arguments = inspect.get_annotations(PruningConfig.__init__)
    del arguments["sparsity"], arguments["return"]
    typed = inspect.get_annotations(PruningChoices)
    assert {name: hint.__forward_arg__ for name, hint in typed.items()} == arguments


@pytest.mark.parametrize(
    "start",
    [
        lambda **choices: wl.prune(torch.nn.Linear(2, 2), [], **choices),
        lambda **choices: wl.WandaPrune(0.5, **choices),
        lambda **choices: wl.prune_from_disk("model", "out", [], **choices),
    ],
)
@pytest.mark.parametrize(
    ("wrong", "advice"),
    [
        ("patern", r"Did you mean pattern\?"),
        ("sparcity", r"Did you mean sparsity\?"),
        ("report", r"Call report\.save.* or callback\.report\.save.*"),
    ],
)
def test_an_unknown_choice_is_named(start, wrong, advice):
    with refuses(rf"^{wrong} is no choice of pruning\. {advice}$"):
        start(**{wrong: 0.5})


def test_a_config_replaces_the_choices():
    config = PruningConfig(0.5, method="balanced", pattern="2:4")
    assert PruningCallback(config).config is config
    assert PruningCallback(config, method=None).config is config  # as YAML files give it
    with refuses("A PruningConfig holds all choices, but skip came with one"):
        prune(nn.Linear(4, 4), [], config, skip="a")
    assert WandaPrune(PruningConfig(0.3)).config.sparsity == 0.3
    with refuses(r"WandaPrune prunes by Wanda, .* Use PruningCallback"):
        WandaPrune(config)
