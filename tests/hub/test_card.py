"""Model cards: read back with huggingface_hub, and their code is run."""

import re
import shlex
from dataclasses import replace
from functools import cache

import pytest
import timm
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt
from support.callbacks import same
from support.modules import tiny_llama, tiny_tokenizer
from support.zoo import ZOO

from wanda_lightning import CausalLMModule, prune
from wanda_lightning.hub.card import PICTURE_NAME, write_card
from wanda_lightning.report import Measured, Run, Sample

RUN = Run(
    command="wanda-lightning prune --model 'a b' --sparsity_ratio 0.5",
    model="",
    metric="perplexity",
    before=12.5,
    after=16.25,
    data="wikitext2, 83 windows of 2,048 tokens",
    others=(Measured("/home/me/own.txt, 9 windows of 2,048 tokens", 8.5, float("nan")),),
    calibration="c4, 128 windows of 2,048 tokens, seed 0",
    zero_shot={"boolq": {"acc": 0.625, "acc_stderr": 0.01}, "mean": {"acc": 0.625}},
    samples=(Sample("Once", " upon\n# a time", " again"),),
)


@cache
def without_run():
    model = tiny_llama()
    return model, prune(model, None, 0.5, criterion="magnitude", progress=False)


def pruned_llama(run=RUN):
    model, report = without_run()
    return model, replace(report, run=run)


@pytest.fixture(autouse=True)
def undrawn(monkeypatch):
    """Write something else in place of a picture, which takes 1 s to draw."""
    monkeypatch.setattr("wanda_lightning.PruningReport.to_png", lambda report, path: path.write_bytes(b"a picture"))


def card_of(model, report, folder, **how):
    CausalLMModule(model, tiny_tokenizer()).save_pretrained(folder)
    write_card(folder, report, **{"name": folder, **how})
    return ModelCard.load(folder / "README.md")


def test_metadata_describe_the_model_and_its_results(tmp_path):
    card = card_of(*pruned_llama(), tmp_path / "tiny")
    assert (card.data.library_name, card.data.pipeline_tag) == ("transformers", "text-generation")
    assert {"pruned", "sparse"} <= set(card.data.tags)
    assert card.data.model_name == "tiny"
    assert not {"base_model", "base_model_relation", "license"} & card.data.to_dict().keys()
    found = {(each.dataset_type, each.dataset_name, each.metric_type): each for each in card.data.eval_results}
    assert {key: (each.task_type, each.metric_value) for key, each in found.items()} == {
        ("wikitext2", "wikitext2, 83 windows of 2,048 tokens", "perplexity"): ("text-generation", 16.25),
        ("boolq", "boolq", "accuracy"): ("text-generation", 0.625),
    }


def test_the_text_says_what_was_measured_and_how_to_repeat_it(tmp_path, monkeypatch):
    monkeypatch.undo()  # draw the picture
    model, report = pruned_llama()
    text = card_of(model, report, tmp_path / "tiny").text
    assert f"50.00% of the weights in 14 layers are zero, which is {report.model_sparsity:.2%} of all" in text
    assert "| Perplexity, wikitext2, 83 windows of 2,048 tokens | 12.50 | 16.25 |" in text
    assert "| Perplexity, own.txt, 9 windows of 2,048 tokens | 8.50 | not measured |" in text
    assert "| boolq, accuracy |  | 62.50% |" in text
    assert "| Calibration data | c4, 128 windows of 2,048 tokens, seed 0 |" in text
    assert f"\n\n    {RUN.command}\n\n" in text
    assert "Dense:\n\n    Once upon\n    # a time\n\nPruned:\n\n    Once again" in text  # no heading
    assert (tmp_path / "tiny" / PICTURE_NAME).read_bytes().startswith(b"\x89PNG")
    assert f"]({PICTURE_NAME})" in text


def test_what_is_not_known_is_left_out(tmp_path):
    card = card_of(*pruned_llama(None), tmp_path / "tiny")
    assert card.data.eval_results is None
    assert not [word for word in ("dense |", "wanda-lightning", "before and after", "Calibration") if word in card.text]


@pytest.mark.parametrize("library", ["transformers", "timm", "neither"])
def test_the_code_of_the_card_loads_the_model(tmp_path, library):
    builders = {"transformers": tiny_llama, "timm": lambda: timm.create_model("test_vit")}
    model = builders.get(library, ZOO["plain_mlp"].build)()
    report = prune(model, None, 0.5, criterion="magnitude", progress=False)
    if library == "timm":
        timm.models.save_for_hf(model, str(tmp_path), safe_serialization=True)
    elif library == "transformers":
        model.save_pretrained(tmp_path)
    for on_hub, line in ((False, ""), (True, '("us/tiny"' if library == "transformers" else '("hf-hub:us/tiny", ')):
        write_card(tmp_path, report, name="us/tiny" if on_hub else tmp_path, on_hub=on_hub)
        codes = re.findall(r"```python\n(.*?)\n```", (tmp_path / "README.md").read_text(), flags=re.DOTALL)
        if library == "neither":
            assert codes == []
            continue
        (code,), names = codes, {}
        assert "wanda_lightning" not in code
        assert line in code
        if not on_hub:
            exec(code, names)
            assert same(names["model"], model)


def test_a_card_that_someone_else_wrote_is_kept(tmp_path):
    (tmp_path / "README.md").write_text("mine")
    write_card(tmp_path, pruned_llama()[1], name=tmp_path)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("README.md", "mine")]


def test_our_own_card_is_replaced(tmp_path):
    model, report = pruned_llama()
    assert "The same run trained it for 1 step." in card_of(model, report, tmp_path / "tiny", trained_steps=1).text
    write_card(tmp_path / "tiny", replace(report, run=replace(RUN, after=99.0)), name="tiny")
    assert ModelCard.load(tmp_path / "tiny/README.md").data.eval_results[0].metric_value == 99.0
    broken = replace(report, run=replace(RUN, after=float("inf"), zero_shot={}))
    write_card(tmp_path / "tiny", broken, name="tiny")  # results that are no numbers are left out
    card = (tmp_path / "tiny/README.md").read_text()
    assert "model-index" not in card
    assert ".inf" not in card


@pytest.mark.parametrize(
    ("model", "shown"),
    [
        ("/home/me/dense.gguf", "dense.gguf"),
        ("timm:local-dir:/home/me/vit", "timm:local-dir:vit"),
    ],
)
def test_a_path_on_this_machine_is_shown_without_its_folders(tmp_path, monkeypatch, model, shown):
    drawn = []
    monkeypatch.setattr("wanda_lightning.PruningReport.to_png", lambda report, path: drawn.append(report.run))
    data = {"data": "/home/me/t.txt, 4 windows", "calibration": "~/c.jsonl, 2 windows"}
    command = "wanda-lightning prune --model x --cache_dir /home/me/cache --save out/log"
    card = card_of(*pruned_llama(replace(RUN, model=model, command=command, **data)), tmp_path / "tiny")
    assert f"\n{shown}, pruned with wanda_lightning" in card.text
    assert "home/me" not in f"{card.content} {drawn}"
    assert "~" not in card.content
    assert "--cache_dir cache --save out/log" in card.text
    assert card.data.eval_results[0].dataset_name == "t.txt, 4 windows"
    assert drawn[0].model == shown


def test_names_are_no_markup(tmp_path):
    model, report = pruned_llama(replace(RUN, data="a|b_c, <i>", model="x*y*z"))
    text = card_of(model, replace(report, notes=["few tokens: `layers.*.up_proj`"]), tmp_path / "a_b_c").text
    for raw in ("a|b_c", "<i>", "x*y", " `layers", "a_b_c\n"):
        assert raw not in text.replace(f'"{tmp_path}/a_b_c"', "")
    name = "x'\n```\n<img src=y onerror=z>\n````\n"  # must not end a block of code
    run = replace(RUN, command=shlex.join(["wanda-lightning", "prune", "--model", name]), model=name)
    html = MarkdownIt("commonmark", {"html": True}).render(card_of(*pruned_llama(run), tmp_path / "tiny").text)
    assert "&lt;img src=y" in html
    assert "<img src=y" not in html


def test_the_base_is_named_only_if_it_is_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "work/secret").mkdir(parents=True)
    names = ("us/base", "timm:hf-hub:us/base", "work/secret", "timm:test_vit", "vit (mine.safetensors)", "/us/base", "")
    cards = [card_of(*pruned_llama(replace(RUN, model=name)), tmp_path / f"tiny{i}") for i, name in enumerate(names)]
    assert [card.data.base_model for card in cards] == ["us/base"] * 2 + [None] * 5
    assert "\n[us/base](https://huggingface.co/us/base), pruned with" in cards[0].text
