"""Model cards: read back with huggingface_hub, and their code is run."""

import re
from dataclasses import replace
from functools import cache

import pytest
import timm
from huggingface_hub import ModelCard
from support.callbacks import same
from support.modules import tiny_llama, tiny_tokenizer

from wanda_lightning import CausalLMModule, prune
from wanda_lightning.hub.card import PICTURE_NAME, write_card
from wanda_lightning.report import Circumstances, Continuations, Measured

RUN = Circumstances(
    command="wanda-lightning prune --model 'a b' --sparsity_ratio 0.5",
    metric="perplexity",
    before=12.5,
    after=16.25,
    data="wikitext2, 83 windows of 2,048 tokens",
    others=(Measured("/home/me/own.txt, 9 windows of 2,048 tokens", 8.5, float("nan")),),
    calibration="c4, 128 windows of 2,048 tokens, seed 0",
    zero_shot={"boolq": {"acc": 0.625, "acc_stderr": 0.01}, "mean": {"acc": 0.625}},
    samples=(Continuations("Once", " upon\n# a time", " again"),),
)


@cache
def pruned_llama():
    return (model := tiny_llama()), prune(model, None, 0.5, criterion="magnitude", progress=False)


@pytest.fixture(autouse=True)
def undrawn(monkeypatch):
    """Write something else in place of a picture, which takes 1 s to draw."""
    monkeypatch.setattr("wanda_lightning.PruningReport._picture", lambda report: b"a picture")


def card_of(folder, run=RUN, **how):
    model, report = pruned_llama()
    CausalLMModule(model, tiny_tokenizer()).save_pretrained(folder)
    write_card(folder, replace(report, run=run), **{"name": folder, **how})
    return ModelCard.load(folder / "README.md")


def test_the_card_describes_the_model_and_its_results_and_how_to_repeat_them(tmp_path, monkeypatch):
    monkeypatch.undo()  # draw the picture
    data = (card := card_of(tmp_path / "tiny")).data
    assert (data.library_name, data.pipeline_tag, data.model_name) == (
        "transformers",
        "text-generation",
        "tiny",
    )
    assert not {"base_model", "base_model_relation", "license"} & data.to_dict().keys()
    names = ("dataset_type", "metric_type", "dataset_name", "task_type", "metric_value")
    assert [tuple(getattr(each, name) for name in names) for each in data.eval_results] == [
        (
            "wikitext2",
            "perplexity",
            "wikitext2, 83 windows of 2,048 tokens",
            "text-generation",
            16.25,
        ),
        ("boolq", "accuracy", "boolq", "text-generation", 0.625),
    ]
    for part in (
        f"50.00% of the weights in 14 layers are zero, which is {pruned_llama()[1].model_sparsity:.2%} of all",
        "| Perplexity, wikitext2, 83 windows of 2,048 tokens | 12.50 | 16.25 |",
        "| Perplexity, own.txt, 9 windows of 2,048 tokens | 8.50 | not measured |",
        "| boolq, accuracy |  | 62.50% |",
        f"\n\n    {RUN.command}\n\n",
        "Dense:\n\n    Once upon\n    # a time\n\nPruned:\n\n    Once again",  # no heading
        f"]({PICTURE_NAME})",
    ):
        assert part in card.text, part
    assert (tmp_path / "tiny" / PICTURE_NAME).read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("library", ["transformers", "timm"])
def test_the_code_of_the_card_loads_the_model(tmp_path, library):
    model = tiny_llama() if library == "transformers" else timm.create_model("test_vit")
    code = {}
    report = prune(model, None, 0.5, criterion="magnitude", progress=False)
    if library == "timm":
        timm.models.save_for_hf(model, str(tmp_path), safe_serialization=True)
    else:
        model.save_pretrained(tmp_path)
    for name in ("us/tiny", tmp_path):
        write_card(tmp_path, report, name=name, on_hub=name == "us/tiny")
        text = (tmp_path / "README.md").read_text()
        code[name] = "".join(re.findall(r"```python\n(.*?)\n```", text, flags=re.DOTALL))
        assert "wanda_lightning" not in code[name]
    assert ('("us/tiny"' if library == "transformers" else '("hf-hub:us/tiny", ') in code["us/tiny"]
    exec(code[tmp_path], names := {})
    assert same(names["model"], model)


def test_the_code_of_the_card_lets_a_modeling_file_run(tmp_path):
    (tmp_path / "config.json").write_text(
        '{"model_type": "llama", "auto_map": {"AutoModel": "modeling_shrunk.Own"}}'
    )
    write_card(
        tmp_path, prune(tiny_llama(), None, criterion="magnitude", progress=False), name="us/tiny"
    )
    assert (
        'from_pretrained("us/tiny", trust_remote_code=True)' in (tmp_path / "README.md").read_text()
    )


def test_only_our_own_card_is_replaced(tmp_path):
    assert "The same run trained it for 1 step." in card_of(tmp_path / "tiny", trained_steps=1).text
    assert (
        card_of(tmp_path / "inf", replace(RUN, after=float("inf"), zero_shot={})).data.eval_results
        is None
    )
    write_card(tmp_path, pruned_llama()[1], name=tmp_path)
    assert "```python" not in (tmp_path / "README.md").read_text()  # a model of neither library
    (tmp_path / "README.md").write_text("mine")
    write_card(tmp_path, pruned_llama()[1], name=tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"


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
    assert not [
        raw
        for raw in ("a|b_c", "<i>", "x*y", "a_b_c\n")
        if raw in text.replace(f'"{tmp_path}/a_b_c"', "")
    ]


def test_what_is_not_known_is_left_out_and_the_base_is_named_only_if_it_is_on_the_hub(
    tmp_path, monkeypatch
):
    card = card_of(tmp_path / "tiny", None)
    assert card.data.eval_results is None
    assert not [
        word
        for word in ("dense |", "wanda-lightning", "before and after", "Calibration")
        if word in card.text
    ]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "work/secret").mkdir(parents=True)
    names = (
        "us/base",
        "timm:hf-hub:us/base",
        "work/secret",
        "timm:test_vit",
        "vit (mine.safetensors)",
        "/us/base",
        "",
    )
    cards = [
        card_of(tmp_path / f"tiny{i}", replace(RUN, model=name)) for i, name in enumerate(names)
    ]
    assert [card.data.base_model for card in cards] == ["us/base"] * 2 + [None] * 5
    assert "\n[us/base](https://huggingface.co/us/base), pruned with" in cards[0].text
