import json
import os
import re
import signal
import subprocess
import sys
from contextlib import closing
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.families import families
from support.parking import HiddenTransfers
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, LlamaConfig, LlamaForCausalLM, T5Config
from transformers import T5ForConditionalGeneration as T5

from wanda_lightning import OWL, Fisher, PerLayer, Reconstruct, perplexity_from_disk, progress, prune, prune_from_disk
from wanda_lightning.calibration import parking
from wanda_lightning.config import PruningConfig
from wanda_lightning.files import PROGRESS_NAME
from wanda_lightning.modules import WindowPerplexity
from wanda_lightning.parallel import Processes
from wanda_lightning.pruning import prune_as
from wanda_lightning.streaming import from_disk
from wanda_lightning.streaming.checkpoint import Checkpoint
from wanda_lightning.streaming.from_disk import pruned_from_disk
from wanda_lightning.streaming.output import OutputFolder

pytestmark = pytest.mark.filterwarnings("ignore")

VOCABULARY = 64


def batches(count=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [{"input_ids": torch.randint(VOCABULARY, (2, 48), generator=generator)} for _ in range(count)]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A tied Llama in bfloat16, in several files."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(**sizes, num_hidden_layers=4, vocab_size=VOCABULARY, tie_word_embeddings=True)
    folder = tmp_path_factory.mktemp("model") / "source"
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder, max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    return folder


def weights(folder):
    return {key: tensor for file in sorted(folder.glob("*.safetensors")) for key, tensor in load_file(file).items()}


def in_memory(source, folder, samples, auto_class=AutoModelForCausalLM, **choices):
    model = auto_class.from_pretrained(source)
    report = prune(model, samples, 0.5, progress=False, **choices)
    model.save_pretrained(folder)
    return report


def same(first, second):
    """Whether two sets of tensors are equal, bit for bit: 0.0 is not -0.0."""
    return first.keys() == second.keys() and all(
        (first[key].dtype, first[key].shape) == (second[key].dtype, second[key].shape)
        and torch.equal(bits(first[key]), bits(second[key]))
        for key in first
    )


def bits(tensor):
    return tensor.contiguous().flatten().view(torch.uint8)


CHOICES = {
    "magnitude": {"method": "magnitude"},
    "wanda": {"method": "wanda"},
    "layer": {"method": "wanda", "sequential": "layer"},
    "2:4": {"method": "sparsegpt", "pattern": "2:4"},
    "admm": {"solver": "admm", "sequential": "layer"},
    "reconstruct": {"method": "wanda", "recovery": Reconstruct()},
    "skip": {"method": "wanda", "skip": ["model.layers.1"]},
    "head": {"method": "wanda", "only": ["*.mlp"]},
    "owl": {"method": "wanda", "allocation": "owl"},
    "owl_layer": {"method": "sparsegpt", "allocation": "owl_layer", "sequential": "layer"},
    "owl without statistics": {"method": "magnitude", "allocation": OWL(m=2.0)},
    "alpha": {"method": "wanda", "allocation": "alpha", "pattern": "2:4"},
    "alpha_layer": {"method": "magnitude", "allocation": "alpha_layer"},
    "none": {"method": "wanda", "sequential": "none", "allocation": "owl"},
    "none without statistics": {"method": "magnitude", "sequential": "none"},
    "fisher": {"method": "wanda", "allocation": "fisher"},
    "best": {"method": "best"},
    "best 2:4": {"method": "best", "pattern": "2:4"},
    "permutation": {"method": "magnitude", "pattern": "2:4", "permutation": "assignment"},
    "more samples": {"method": "wanda", "allocation": Fisher(num_samples=3, num_predictions=240)},
    "rows": {"method": "magnitude", "pattern": "unstructured_layer_weighted"},
    "per_layer": {"method": "wanda", "allocation": PerLayer({"*.mlp.*": 0.6})},
}


@pytest.mark.parametrize("name", CHOICES)
def test_the_weights_and_the_report_are_those_of_prune(source, tmp_path, name):
    expected = in_memory(source, tmp_path / "memory", batches(), **CHOICES[name])
    report = prune_from_disk(source, tmp_path / "disk", batches(), 0.5, progress=False, **CHOICES[name])
    assert same(weights(tmp_path / "disk"), weights(tmp_path / "memory"))
    assert (report.layers, report.skipped, report.zeros) == (expected.layers, expected.skipped, expected.zeros)
    assert (report.notes, report.config) == (expected.notes, expected.config)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "disk").state_dict()
    assert same(reloaded, AutoModelForCausalLM.from_pretrained(tmp_path / "memory").state_dict())
    for file in ("config.json", "generation_config.json"):
        assert (tmp_path / "disk" / file).read_text() == (tmp_path / "memory" / file).read_text()


@pytest.mark.parametrize("kind", ["disk", "host"])
@pytest.mark.parametrize("name", CHOICES)
def test_parked_activations_change_nothing(source, tmp_path, monkeypatch, name, kind):
    monkeypatch.setattr(parking, "SMALLEST", 0)
    if kind == "host":  # park='cpu' as far as it can be tested without a GPU
        host = parking.Host(HiddenTransfers())
        monkeypatch.setattr(from_disk, "parking_maker", lambda *_: partial(parking.HostParking, host))
    choices = {"progress": False, **CHOICES[name]}
    expected = prune_from_disk(source, tmp_path / "memory", batches(), 0.5, **choices)
    report = prune_from_disk(source, tmp_path / "disk", batches(), 0.5, park="disk", **choices)
    assert (report.layers, report.config) == (expected.layers, expected.config)
    files = {file.name: file.read_bytes() for file in (tmp_path / "disk").iterdir()}
    assert files == {file.name: file.read_bytes() for file in (tmp_path / "memory").iterdir()}


def test_a_run_may_continue_with_other_parking(source, tmp_path, monkeypatch):
    interrupted(source, tmp_path / "out", monkeypatch, method="wanda", park="disk")
    prune_from_disk(source, tmp_path / "out", batches(), method="wanda", progress=False)
    prune_from_disk(source, tmp_path / "whole", batches(), method="wanda", progress=False)
    assert same(weights(tmp_path / "out"), weights(tmp_path / "whole"))


@pytest.mark.parametrize(
    "name", ["mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss", "llama4_text", "gemma3_text", "falcon_mamba", "cpmant"]
)
@pytest.mark.parametrize(
    "choices",
    [
        {},
        {"sequential": "layer"},
        {"sequential": "none"},
        {"allocation": OWL(m=2.0)},
        {"allocation": "fisher"},
        {"pattern": "2:4", "permutation": "assignment"},
    ],
    ids=str,
)
def test_families_are_converted_as_transformers_does(tmp_path, monkeypatch, name, choices):
    (family,) = families(("causal",), (name,))
    model = family.build()
    model.save_pretrained(tmp_path / "source", max_shard_size="100KB")
    samples, choices = family.batches(model), {"method": "wanda", **choices}
    in_memory(tmp_path / "source", tmp_path / "memory", samples, **choices)
    monkeypatch.setattr(parking, "SMALLEST", 0)
    for park in ("memory", "disk"):
        prune_from_disk(
            tmp_path / "source", tmp_path / f"park {park}", samples, 0.5, progress=False, park=park, **choices
        )
        assert same(weights(tmp_path / f"park {park}"), weights(tmp_path / "memory"))


NOT_AUTO = ("emu3", "mllama", "musicgen", "musicgen_melody")  # from_pretrained of an auto class refuses them, too


@pytest.mark.parametrize("name", [family.name for family in families(("causal",))])
def test_every_family(tmp_path, name):
    (family,) = families(("causal",), (name,))
    model = family.build()
    model.save_pretrained(tmp_path / "source", max_shard_size="100KB")
    samples, choices = family.batches(model), {"method": "wanda", "sequential": "layer"}
    if name in NOT_AUTO:
        for loaded in (AutoModelForCausalLM.from_pretrained, Checkpoint):
            with pytest.raises(ValueError, match="Unrecognized configuration class"):
                loaded(str(tmp_path / "source"))
        return
    in_memory(tmp_path / "source", tmp_path / "memory", samples, **choices)
    if name == "rwkv":  # divides weights of all blocks first
        with pytest.raises(ValueError, match="source' cannot be read block by block, because it changes weights of a"):
            prune_from_disk(tmp_path / "source", tmp_path / "disk", samples, 0.5, progress=False, **choices)
        return
    prune_from_disk(tmp_path / "source", tmp_path / "disk", samples, 0.5, progress=False, **choices)
    assert same(weights(tmp_path / "disk"), weights(tmp_path / "memory"))


@pytest.mark.parametrize("allocation", ["uniform", "owl", "fisher"])
def test_an_encoder_decoder(tmp_path, allocation):
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=0
    )
    T5(config).save_pretrained(tmp_path / "source")
    samples = [{**batch, "labels": batch["input_ids"]} for batch in batches()]
    choices = {"method": "wanda", "allocation": allocation}
    in_memory(tmp_path / "source", tmp_path / "memory", samples, AutoModelForSeq2SeqLM, **choices)
    prune_from_disk(tmp_path / "source", tmp_path / "disk", samples, 0.5, progress=False, **choices)
    assert same(weights(tmp_path / "disk"), weights(tmp_path / "memory"))


def routed(model, batch):
    """Run the blocks from number `batch["first"]` on."""
    inner = model.model
    states = inner.embed_tokens(batch["input_ids"])
    positions = torch.arange(states.shape[1])[None]
    rotary = inner.rotary_emb(states, position_ids=positions)
    for layer in inner.layers[batch["first"] :]:
        states = layer(states, position_embeddings=rotary, position_ids=positions)
    return states


@pytest.mark.parametrize(
    "choices", [{}, {"sequential": "layer"}, {"allocation": "owl"}, {"sequential": "none"}], ids=str
)
def test_batches_may_take_different_routes(source, tmp_path, choices):
    samples = [{**batch, "first": first} for batch, first in zip(batches(), (1, 0, 2), strict=True)]
    choices = {"method": "wanda", "progress": False, **choices}
    model = AutoModelForCausalLM.from_pretrained(source)
    expected = prune(model, samples, 0.5, forward=partial(routed, model), **choices)
    model.save_pretrained(tmp_path / "memory")
    report = prune_from_disk(source, tmp_path / "disk", samples, 0.5, forward=routed, **choices)
    assert same(weights(tmp_path / "disk"), weights(tmp_path / "memory"))
    assert report.layers == expected.layers


@pytest.mark.parametrize("method", ["wanda", "best"])
def test_at_most_two_blocks_are_in_memory(source, tmp_path, monkeypatch, method):
    loaded, most, load, unload = set(), [0], Checkpoint.load, Checkpoint.unload

    def counting(self, part, *args):
        result = load(self, part, *args)
        loaded.add(part)
        most[0] = max(most[0], len(loaded - {""}))
        return result

    def discounting(self, part):
        unload(self, part)
        loaded.discard(part)

    monkeypatch.setattr(Checkpoint, "load", counting)
    monkeypatch.setattr(Checkpoint, "unload", discounting)
    prune_from_disk(source, tmp_path / "out", batches(), 0.5, method=method, progress=False)
    assert most[0] == 2
    assert loaded == {""}


def test_progress_shows_the_unit_the_bytes_and_the_seconds_left(source, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(progress, "_SECONDS_BETWEEN_LINES", 0)
    prune_from_disk(source, tmp_path / "out", batches(), 0.5, method="wanda")
    sizes = {key: tensor.nbytes for key, tensor in weights(source).items()}
    block = sum(size for key, size in sizes.items() if "layers.0." in key)
    outside, lines = sum(sizes.values()) - 4 * block, capsys.readouterr().err.splitlines()
    for number, line in enumerate(lines[:4]):
        found = re.fullmatch(
            rf"Pruning {number}/4 model\.layers\.{number}, (.*) KB read, (.*) KB written \(\d+ s(, \d+ s left)?\)", line
        )
        assert found, line
        assert float(found[1]) * 1000 == pytest.approx(outside + (number + 1) * block, abs=block + 100)
        assert max(0, number - 2) * block - 100 <= float(found[2]) * 1000 <= max(0, number - 1) * block + 100
        assert bool(found[3]) == (number > 0)
    perplexity_from_disk(source, batches(40))
    assert re.search(r"Measuring 5/8 model\.layers\.1, .* KB read \(\d+ s, \d+ s left\)", capsys.readouterr().err)


def test_the_perplexity_is_that_of_the_model_in_memory(source, tmp_path, monkeypatch):
    model, metric = AutoModelForCausalLM.from_pretrained(source), WindowPerplexity()
    with torch.no_grad():
        for batch in batches(40):
            metric.update(model(**batch).logits, batch["input_ids"])
    measured = perplexity_from_disk(source, batches(40), progress=False)
    assert measured == pytest.approx(float(metric.compute()), rel=1e-6)
    monkeypatch.setattr(parking, "SMALLEST", 0)
    assert perplexity_from_disk(source, batches(40), progress=False, park="disk", parked_in=tmp_path) == measured


def streamed(rank, source, folder, shares, choices):
    """Prune with two processes, in memory and from disk; return the report, or the error as (type, text)."""
    processes, own = Processes(torch.distributed.group.WORLD), shares[rank::2]
    model = AutoModelForCausalLM.from_pretrained(source)
    config = PruningConfig.from_names(0.5, **choices)
    try:
        report = prune_from_disk(source, f"{folder}/disk", own, progress=False, processes=processes, **choices)
        expected = prune_as(config, model, own, progress=False, processes=processes)
    except (ValueError, RuntimeError, OSError) as error:
        return type(error).__name__, str(error)
    if rank == 0:
        model.save_pretrained(f"{folder}/memory")
    assert report.layers == expected.layers
    assert report.config == expected.config
    return report.layers, report.zeros, report.notes


KILLED = """
import os, signal, sys
import torch
from wanda_lightning import prune_from_disk
from wanda_lightning.streaming.output import OutputFolder
sys.path[:0] = [sys.argv[4], sys.argv[4] + "/streaming"]
from test_prune_from_disk import batches

save, written = OutputFolder.save, []

def killed(self, part, *args):
    if len(written) == int(sys.argv[3]):
        os.kill(os.getpid(), signal.SIGKILL)
    save(self, part, *args)
    written.append(part)

OutputFolder.save = killed
prune_from_disk(sys.argv[1], sys.argv[2], batches(), 0.5, method="sparsegpt", sequential="layer", progress=False)
"""


def test_a_killed_run_continues_where_it_was(source, tmp_path):
    choices = {"method": "sparsegpt", "sequential": "layer", "progress": False}
    expected = prune_from_disk(source, tmp_path / "whole", batches(), 0.5, **choices)
    out = tmp_path / "killed"
    for after in (0, 2):
        command = [sys.executable, "-c", KILLED, source, out, str(after), Path(__file__).parents[1]]
        assert subprocess.run(command, env=os.environ, check=False).returncode == -signal.SIGKILL
        assert not (out / "config.json").exists()
        assert len(json.loads((out / PROGRESS_NAME).read_text())["written"]) == after
    report = prune_from_disk(source, out, batches(), 0.5, **choices)
    files = {file.name: file.read_bytes() for file in out.iterdir()}
    assert files == {file.name: file.read_bytes() for file in (tmp_path / "whole").iterdir()}
    assert (report.layers, report.zeros, report.notes) == (expected.layers, expected.zeros, expected.notes)


@pytest.mark.parametrize(
    ("choices", "passes", "repeated"),
    [
        ({"method": "magnitude"}, 1, 0),
        ({"method": "magnitude", "allocation": "alpha"}, 2, 0),
        ({"method": "magnitude", "allocation": "owl"}, 3, 0),
        ({"method": "wanda", "allocation": "owl", "sequential": "none"}, 3, 1),
        ({"method": "best"}, 4, 0),
        ({"method": "wanda", "pattern": "2:4", "permutation": "assignment"}, 2, 1),
    ],
)
def test_a_continued_run_does_not_allocate_again(source, tmp_path, monkeypatch, choices, passes, repeated):
    loads, load, save = [], Checkpoint.load, OutputFolder.save

    def counting(self, part, stored=None):
        loads.append((part, stored is None))
        return load(self, part, stored)

    def interrupting(self, part, *arguments):
        if part == "model.layers.2":
            raise KeyboardInterrupt
        save(self, part, *arguments)

    arguments = (source, tmp_path / "out", batches(), 0.5)
    choices = {**choices, "progress": False}
    expected = prune_from_disk(source, tmp_path / "whole", batches(), 0.5, **choices)
    monkeypatch.setattr(Checkpoint, "load", counting)
    with monkeypatch.context() as patched:
        patched.setattr(OutputFolder, "save", interrupting)
        with pytest.raises(KeyboardInterrupt):
            prune_from_disk(*arguments, **choices)
    blocks = [f"model.layers.{index}" for index in range(4)]
    assert [loads.count((block, True)) for block in blocks[:3]] == [passes] * 3
    loads.clear()
    report = prune_from_disk(*arguments, **choices)
    assert loads[1:] == [(block, True) for block in blocks] * repeated + [(b, i > 1) for i, b in enumerate(blocks)]
    assert (report.layers, report.config) == (expected.layers, expected.config)
    assert len({layer.target for layer in report.layers}) > 1 or "allocation" not in choices
    files = {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}
    assert files == {file.name: file.read_bytes() for file in (tmp_path / "whole").iterdir()}


def interrupted(source, folder, monkeypatch, **choices):
    """Leave a folder with some parts, as a killed run does."""
    with monkeypatch.context() as patched:
        patched.setattr(OutputFolder, "finish", lambda self, *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            prune_from_disk(source, folder, batches(), 0.5, progress=False, **choices)


@pytest.mark.parametrize("name", ["magnitude", "layer", "2:4", "owl_layer", "none", "skip", "permutation"])
def test_two_processes_share_the_batches(pair, source, tmp_path, name):
    shares = batches(5)
    ours, theirs = pair.run(streamed, str(source), str(tmp_path), shares, CHOICES[name])
    assert ours == theirs
    assert same(weights(tmp_path / "disk"), weights(tmp_path / "memory"))
    assert not (tmp_path / "disk" / PROGRESS_NAME).exists()


def test_two_processes_fail_together(pair, source, tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk" / "file").touch()
    (kind, ours), (_, theirs) = pair.run(streamed, str(source), str(tmp_path), batches(), {"method": "magnitude"})
    assert kind == "FileExistsError"
    assert "not empty" in ours
    assert "not empty" in theirs
    for _, error in pair.run(streamed, str(source), str(tmp_path), batches(), {"method": "best"}):
        assert "reads gradients, which only a single process can compute" in error


def test_a_run_that_ended_before_its_report_was_used_gives_it_again(source, tmp_path, monkeypatch):
    config = PruningConfig.from_names(method="wanda")
    with (
        pytest.raises(KeyboardInterrupt),
        pruned_from_disk(config, source, tmp_path, batches(), progress=False) as first,
    ):
        raise KeyboardInterrupt
    assert (tmp_path / PROGRESS_NAME).is_file()
    AutoModelForCausalLM.from_pretrained(tmp_path)  # it is complete
    monkeypatch.setattr(Checkpoint, "stored", None)  # nothing is pruned again
    report = prune_from_disk(source, tmp_path, batches(), method="wanda", progress=False)
    assert report == first
    assert not (tmp_path / PROGRESS_NAME).exists()


def test_a_finished_run_without_a_block_prunes_it_again(source, tmp_path):
    expected = prune_from_disk(source, tmp_path / "whole", batches(), method="wanda", progress=False)
    config = PruningConfig.from_names(method="wanda")
    with (
        pytest.raises(KeyboardInterrupt),
        pruned_from_disk(config, source, tmp_path / "out", batches(), progress=False),
    ):
        raise KeyboardInterrupt
    next((tmp_path / "out").glob("model-00003-*.safetensors")).unlink()
    report = prune_from_disk(source, tmp_path / "out", batches(), method="wanda", progress=False)
    assert report.layers == expected.layers
    assert same(weights(tmp_path / "out"), weights(tmp_path / "whole"))


@pytest.mark.parametrize("number", [0, 2, 3, 4])
def test_a_block_that_cannot_be_written_is_an_error(source, tmp_path, monkeypatch, number):
    """The blocks are written in the background; the last part is what lies outside of the blocks."""
    save, calls = OutputFolder.save, []

    def failing(self, part, *args):
        calls.append(part)
        if len(calls) == number + 1:
            raise OSError("no space left")
        save(self, part, *args)

    with monkeypatch.context() as patched:
        patched.setattr(OutputFolder, "save", failing)
        with pytest.raises(OSError, match="no space left") as caught:
            prune_from_disk(source, tmp_path / "out", batches(), 0.5, method="wanda", progress=False)
    assert any("start again with the same choices" in note for note in caught.value.__notes__)
    assert not (tmp_path / "out" / "config.json").exists()
    prune_from_disk(source, tmp_path / "out", batches(), 0.5, method="wanda", progress=False)
    prune_from_disk(source, tmp_path / "whole", batches(), 0.5, method="wanda", progress=False)
    assert same(weights(tmp_path / "out"), weights(tmp_path / "whole"))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"batches": batches(seed=1)}, "begun with calibration="),
        ({"method": "magnitude"}, "begun with choices="),
        ({"sparsity": 0.6}, "begun with choices="),
        ({"dtype": "float32"}, "begun with dtype='torch.bfloat16', but now it is 'torch.float32'"),
    ],
)
def test_other_choices_are_refused(source, tmp_path, monkeypatch, changed, message):
    interrupted(source, tmp_path / "out", monkeypatch, method="wanda")
    before = sorted(tmp_path.rglob("*"))
    arguments = {"batches": batches(), "sparsity": 0.5, "method": "wanda", **changed}
    with pytest.raises(ValueError, match=message):
        prune_from_disk(source, tmp_path / "out", progress=False, **arguments)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"sequential": "none", "method": "sparsegpt"}, "sequential='none' with solver='sparsegpt' needs the Gram"),
        ({"method": "thorough"}, "recovery='distil' needs the whole model in memory"),
    ],
)
def test_what_needs_the_whole_model_is_refused(source, tmp_path, choices, message):
    with pytest.raises(ValueError, match=message):
        prune_from_disk(source, tmp_path / "out", batches(), 0.5, **choices)
    assert not (tmp_path / "out").exists()


def test_a_refused_run_can_be_repeated_with_other_choices(source, tmp_path, monkeypatch):
    interrupted(source, tmp_path / "out", monkeypatch, method="wanda")
    with pytest.raises(ValueError, match="begun with choices="):
        prune_from_disk(source, tmp_path / "out", batches(), 0.5, method="magnitude", progress=False)
    (tmp_path / "out" / ".wanda-left").mkdir()  # of a run that was killed while it finished
    prune_from_disk(source, tmp_path / "out", batches(), 0.5, method="wanda", progress=False)
    assert not list((tmp_path / "out").glob(".wanda-*"))


def test_bad_places_are_refused(source, tmp_path):
    with pytest.raises(ValueError, match="park must be one of memory, cpu, disk, but it is 'tape'"):
        prune_from_disk(source, tmp_path / "out", batches(), park="tape")
    for place in (source, source / "out"):
        with pytest.raises(ValueError, match="output must lie outside of the source"):
            prune_from_disk(source, place, batches())
    with pytest.raises(
        ValueError, match=r"^output must be a string or a path, but it is a list\. Call prune_from_disk"
    ):
        prune_from_disk(source, batches(), tmp_path / "out")
    with pytest.raises(ValueError, match=r"^source must be a string or a path, but it is a Linear\. .* in memory\.$"):
        prune_from_disk(torch.nn.Linear(2, 2), tmp_path / "out", batches())
    full = tmp_path / "full"
    full.mkdir()
    (full / "file").touch()
    with pytest.raises(FileExistsError, match="not empty"):
        prune_from_disk(source, full, batches(), progress=False)


def test_two_runs_cannot_write_into_one_folder(source, tmp_path):
    with (
        closing(OutputFolder(tmp_path / "out", {}, ["a"])),
        pytest.raises(FileExistsError, match="is being written by another run"),
    ):
        prune_from_disk(source, tmp_path / "out", batches(), progress=False)


@pytest.fixture
def copied(source, tmp_path):
    """A copy of the source that a test may damage."""
    folder = tmp_path / "copy"
    LlamaForCausalLM.from_pretrained(source).save_pretrained(folder, max_shard_size="20KB")
    return folder


def test_a_changed_source_is_refused(copied, tmp_path, monkeypatch):
    load = Checkpoint.load

    def touching(self, part, *args):
        if part == "model.layers.2":
            for path in copied.glob("*.safetensors"):
                os.utime(path, (0, 0))
        return load(self, part, *args)

    monkeypatch.setattr(Checkpoint, "load", touching)
    with pytest.raises(OSError, match="must not change while the model is pruned"):
        prune_from_disk(copied, tmp_path / "out", batches(), progress=False)


def test_another_configuration_is_refused(copied, tmp_path, monkeypatch):
    interrupted(copied, tmp_path / "out", monkeypatch, method="wanda")
    described = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps({**described, "rms_norm_eps": 0.5}))
    with pytest.raises(ValueError, match="was begun with source_config="):
        prune_from_disk(copied, tmp_path / "out", batches(), method="wanda", progress=False)


def test_incomplete_sources_are_refused(copied, tmp_path):
    file = next(path for path in copied.glob("*.safetensors") if "model.layers.3.mlp.up_proj.weight" in load_file(path))
    tensors = {key: tensor.clone() for key, tensor in load_file(file).items()}
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="incomplete or damaged"):
        prune_from_disk(copied, tmp_path / "out", batches(), progress=False)
    del tensors["model.layers.3.mlp.up_proj.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"no weights for 1 parameters .*model\.layers\.3\.mlp\.up_proj\.weight"):
        prune_from_disk(copied, tmp_path / "out", batches(), progress=False)
    file.unlink()
    with pytest.raises((OSError, ValueError)):
        prune_from_disk(copied, tmp_path / "out2", batches(), progress=False)
    assert not (tmp_path / "out2").exists()


def test_a_source_that_changed_between_two_runs_is_refused(copied, tmp_path, monkeypatch):
    interrupted(copied, tmp_path / "out", monkeypatch, method="wanda")
    os.utime(next(copied.glob("*.safetensors")), (0, 0))
    with pytest.raises(ValueError, match="begun with source="):
        prune_from_disk(copied, tmp_path / "out", batches(), 0.5, method="wanda", progress=False)


def test_a_source_that_cannot_be_written_is_fine(copied, tmp_path):
    for path in (*copied.iterdir(), copied):
        path.chmod(0o555)
    prune_from_disk(copied, tmp_path / "out", batches(), 0.5, method="wanda", progress=False)
    copied.chmod(0o755)


def test_weights_in_other_formats_are_refused(copied, tmp_path):
    torch.save(LlamaForCausalLM.from_pretrained(copied).state_dict(), copied / "pytorch_model.bin")
    for file in copied.glob("*.safetensors*"):
        file.unlink()
    with pytest.raises(ValueError, match=r"has other weights \(pytorch_model\.bin\) only\. Save it in this format"):
        prune_from_disk(copied, tmp_path / "out", batches(), progress=False)
    assert not (tmp_path / "out").exists()


def test_a_full_disk_is_refused_before_anything_is_pruned(source, tmp_path, monkeypatch):
    size = sum(tensor.nbytes for tensor in weights(source).values())
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=size - 1))
    with pytest.raises(OSError, match="Free some space"):
        prune_from_disk(source, tmp_path / "out", batches(), progress=False)
    assert not any((tmp_path / "out").iterdir())
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=2 * size))
    prune_from_disk(source, tmp_path / "out", batches(), method="magnitude", progress=False)


@pytest.mark.parametrize(
    ("key", "change", "message"),
    [
        ("model.layers.2.input_layernorm.weight", lambda tensor: tensor * torch.nan, "holds NaN or infinity"),
        ("model.norm.weight", lambda tensor: tensor * torch.inf, "holds NaN or infinity"),
        ("model.layers.1.mlp.up_proj.weight", lambda tensor: tensor.to(torch.int8), "stores .* as I8"),
    ],
)
def test_weights_that_cannot_be_used_are_refused(copied, tmp_path, key, change, message):
    for file in copied.glob("*.safetensors"):
        tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
        if key in tensors:
            save_file({**tensors, key: change(tensors[key])}, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=message):
        prune_from_disk(copied, tmp_path / "out", batches(), method="wanda", progress=False)


@pytest.mark.parametrize("device", ["cuda:99", "meta", "nonsense"])
def test_a_device_that_cannot_be_used_is_refused(source, tmp_path, device):
    with pytest.raises(ValueError, match=f"device must be one that PyTorch can use .* but '{device}' is not: .* Use"):
        prune_from_disk(source, tmp_path / "out", batches(), device=device)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("park", "device", "message"),
    [
        ("disk", "cuda", "park='disk' moves activations out of the memory of the CPU, but device='cuda' has its own"),
        ("cpu", "cpu", "park='cpu' moves activations from the device .* but device='cpu' keeps them there anyway"),
    ],
)
def test_a_place_for_activations_that_does_not_suit_the_device_is_refused(source, tmp_path, park, device, message):
    with pytest.raises(ValueError, match=message):
        prune_from_disk(source, tmp_path / "out", batches(), park=park, device=device)
    with pytest.raises(ValueError, match=message):
        perplexity_from_disk(source, batches(), park=park, device=device)
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("park", ["memory", "cpu"])
@pytest.mark.parametrize("name", CHOICES)
def test_a_gpu_gives_the_weights_that_it_gives_in_memory(source, tmp_path, monkeypatch, name, park):
    monkeypatch.setattr(parking, "SMALLEST", 0)
    model = AutoModelForCausalLM.from_pretrained(source).cuda()
    expected = prune(model, batches(), 0.5, progress=False, **CHOICES[name])
    model.save_pretrained(tmp_path / "memory")
    on_gpu = {"progress": False, "device": "cuda", "park": park}
    report = prune_from_disk(source, tmp_path / "disk", batches(), 0.5, **on_gpu, **CHOICES[name])
    assert same(weights(tmp_path / "disk"), weights(tmp_path / "memory"))
    assert report.layers == expected.layers
    perplexity = perplexity_from_disk(tmp_path / "disk", batches(), **on_gpu)
    assert perplexity == pytest.approx(perplexity_from_disk(tmp_path / "disk", batches(), progress=False), rel=1e-2)


@pytest.mark.parametrize("name", ["timm:test_vit", "model.gguf"])
def test_other_formats_are_refused(tmp_path, name):
    with pytest.raises(ValueError, match="only Hugging Face models in safetensors"):
        prune_from_disk(name, tmp_path / "out", batches())


def test_a_part_without_values_is_never_written(source, tmp_path):
    checkpoint = Checkpoint(str(source))
    with pytest.raises(RuntimeError, match=r"model\.layers\.0 is not loaded"):
        checkpoint.stored("model.layers.0")
    output = OutputFolder(tmp_path / "out", {}, ["a"])
    with pytest.raises(RuntimeError, match="has no values"):
        output.save("a", {"weight": torch.empty(2, device="meta")}, {})
