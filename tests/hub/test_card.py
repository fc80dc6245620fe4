"""Model cards: read back with huggingface_hub, and their code is run."""

import re
from dataclasses import replace
from functools import cache

import pytest
import timm
from huggingface_hub import EvalResult, ModelCard
from support.callbacks import same
from support.modules import tiny_llama, tiny_tokenizer
from support.quiet import prune

from wanda_lightning import CausalLMModule
from wanda_lightning.hub.card import PICTURE_NAME, write_card
from wanda_lightning.report import Circumstances, Continuations, Measured

RUN = Circumstances(
    command="wanda-lightning prune --model 'a b' --sparsity_ratio 0.5",
    metric="perplexity",
    before=12.5,
    after=16.25,
    after_error=0.125,
    agreement={"same_top": 0.75, "predictions": 1000},
    data="wikitext2, 83 windows of 2,048 tokens",
    others=(Measured("/home/me/own.txt, 9 windows of 2,048 tokens", 8.5, float("nan")),),
    calibration="c4, 128 windows of 2,048 tokens, seed 0",
    zero_shot={"boolq": {"acc": 0.625, "acc_stderr": 0.01}, "mean": {"acc": 0.625}},
    samples=(Continuations("Once", " upon\n# a time", " again"),),
    date="2026-02-03",
)


@cache
def pruned_llama():
    model = tiny_llama()
    return model, prune(model, None, 0.5, criterion="magnitude")


@pytest.fixture(autouse=True)
def undrawn(monkeypatch):
    """Write something else in place of a picture, which takes 1 s to draw."""
    monkeypatch.setattr("wanda_lightning.PruningReport._picture", lambda report: b"a picture")


def card_of(folder, run=RUN):
    model, report = pruned_llama()
    CausalLMModule(model, tiny_tokenizer()).save_pretrained(folder)
    write_card(folder, replace(report, run=run))
    return ModelCard.load(folder / "README.md")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A folder called tiny, with the card of a measured model, for which a picture is drawn."""
    folder = tmp_path_factory.mktemp("card") / "tiny"
    card_of(folder)
    return folder


@pytest.fixture
def card(tiny):
    return ModelCard.load(tiny / "README.md")


def test_the_metadata_says_what_the_model_is(card):
    metadata = (card.data.library_name, card.data.pipeline_tag, card.data.model_name)
    assert metadata == ("transformers", "text-generation", "tiny")
    # Nothing is guessed.
    assert not {"base_model", "base_model_relation", "license"} & card.data.to_dict().keys()


def test_the_metadata_have_the_results_that_are_finite(card):
    perplexity, boolq = card.data.eval_results
    assert perplexity == EvalResult(
        task_type="text-generation",
        dataset_type="wikitext2",
        dataset_name="wikitext2, 83 windows of 2,048 tokens",
        metric_type="perplexity",
        metric_value=16.25,
        metric_name="perplexity",
    )
    assert boolq == EvalResult("text-generation", "boolq", "boolq", "accuracy", 0.625)


@pytest.mark.parametrize(
    "part",
    [
        "50.00% of the weights in 14 layers are zero, which is {:.2%} of all",
        "| Perplexity, wikitext2, 83 windows of 2,048 tokens | 12.50 | 16.25 ± 0.12 |",
        "| Same top prediction, wikitext2, 83 windows of 2,048 tokens |  | 75.00% |",
        "| Perplexity, own.txt, 9 windows of 2,048 tokens | 8.50 | not measured |",
        "| boolq, accuracy |  | 62.50% |",
        f"\n\n    {RUN.command}\n\n",
        "Dense:\n\n    Once upon\n    # a time\n\nPruned:\n\n    Once again",  # no heading
        f"]({PICTURE_NAME})",
    ],
)
def test_the_text_describes_the_model_and_its_results_and_how_to_repeat_them(card, part):
    assert part.format(pruned_llama()[1].model_sparsity) in card.text


def test_the_card_has_a_picture(tiny):
    assert (tiny / PICTURE_NAME).read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("library", ["transformers", "timm"])
def test_the_code_of_the_card_loads_the_model(tmp_path, library):
    model, report = pruned_llama()
    if library == "timm":
        model = timm.create_model("test_vit")
        report = prune(model, None, 0.5, criterion="magnitude")
        timm.models.save_for_hf(model, str(tmp_path), safe_serialization=True)
    else:
        model.save_pretrained(tmp_path)
    write_card(tmp_path, report)
    text = (tmp_path / "README.md").read_text()
    code = "".join(re.findall(r"```python\n(.*?)\n```", text, flags=re.DOTALL))
    assert "wanda_lightning" not in code
    names = {}
    exec(code, names)
    assert same(names["model"], model)


def text_after(folder, **how):
    """Return the text of the card that is in a folder after another one was written."""
    write_card(folder, pruned_llama()[1], **how)
    return (folder / "README.md").read_text()


def test_the_code_of_the_card_lets_a_modeling_file_run(tmp_path):
    (tmp_path / "config.json").write_text(
        '{"model_type": "llama", "auto_map": {"AutoModel": "modeling_shrunk.Own"}}'
    )
    assert f'from_pretrained("{tmp_path}", trust_remote_code=True)' in text_after(tmp_path)


def test_a_model_of_no_known_library_has_a_card_without_code(tmp_path):
    assert "```python" not in text_after(tmp_path)


def test_our_own_card_is_replaced(tmp_path):
    text_after(tmp_path)
    assert "The same run trained it for 1 step." in text_after(tmp_path, trained_steps=1)


def test_a_card_of_somebody_else_is_kept(tmp_path):
    (tmp_path / "README.md").write_text("mine")
    assert text_after(tmp_path) == "mine"


@pytest.mark.parametrize("model", ["dense.gguf", "timm:local-dir:vit"])
def test_a_path_on_this_machine_is_shown_without_its_folders(tmp_path, monkeypatch, model):
    drawn = []
    monkeypatch.setattr(
        "wanda_lightning.PruningReport._picture", lambda report: drawn.append(report.run) or b""
    )
    data = {"data": "/home/me/t.txt, 4 windows", "calibration": "~/c.jsonl, 2 windows"}
    data["command"] = "wanda-lightning prune --model x --cache_dir /home/me/cache --save out/log"
    data["model"] = re.sub(r"(\w+(\.gguf)?)$", r"/home/me/\1", model)
    card = card_of(tmp_path / "tiny", replace(RUN, **data))
    assert f"\n{model}, pruned with wanda_lightning" in card.text
    assert not [raw for raw in ("home/me", "~") if raw in f"{card.content} {drawn}"]
    assert "--cache_dir cache --save out/log" in card.text


def test_names_are_no_markup(tmp_path):
    text = card_of(tmp_path / "a_b_c", replace(RUN, data="a|b_c, <i>", model="x*y*z")).text
    text = text.replace(f"{tmp_path}/a_b_c", "")
    for raw in ("a|b_c", "<i>", "x*y", "a_b_c\n"):
        assert raw not in text


def test_what_is_not_known_is_left_out(tmp_path):
    card = card_of(tmp_path, None)
    assert card.data.eval_results is None
    for word in ("dense |", "wanda-lightning", "before and after", "Calibration"):
        assert word not in card.text


@pytest.mark.parametrize("name", ["us/base", "timm:hf-hub:us/base"])
def test_a_base_on_the_hub_is_named(tmp_path, name):
    card = card_of(tmp_path, replace(RUN, model=name))
    assert card.data.base_model == "us/base"
    assert "\n[us/base](https://huggingface.co/us/base), pruned with" in card.text


@pytest.mark.parametrize(
    "name", ["work/secret", "timm:test_vit", "vit (mine.safetensors)", "/us/base", ""]
)
def test_another_base_is_not_named(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "work/secret").mkdir(parents=True)
    assert card_of(tmp_path / "tiny", replace(RUN, model=name)).data.base_model is None
