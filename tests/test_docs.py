"""The documentation: blocks of Python run, commands have these options, and pages read well on GitHub.

The blocks run with smaller models and data. `SMALLER` is all that is replaced.
"""

import re
import shlex
import shutil
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from markdown_it import MarkdownIt
from support.data import few_digits as few_digits
from support.embedding import SENTENCES, save_pairs, save_tiny
from support.zoo import save_llama_of_bytes
from transformers import AutoModelForCausalLM, AutoTokenizer

import wanda_lightning
from wanda_lightning import prune
from wanda_lightning.cli import parse_options
from wanda_lightning.cli.commands import LIGHTNING

DOCS = Path(__file__).parents[1] / "docs"
PAGES = [*sorted(DOCS.glob("*.md")), DOCS.parent / "README.md"]
SMALLER = {
    "sentence-transformers/all-MiniLM-L6-v2": "embedding",
    ".cache/SmolLM2-135M-Instruct.Q4_1.gguf": "folder",
    "HuggingFaceTB/SmolLM2-135M": "folder",
    '"c4"': '"text.txt"',
    '"wikitext2"': '"text.txt"',
    '"python-docs"': '"text.txt"',
    "seqlen=2048": "seqlen=16",
    "seqlen=512": "seqlen=16",
    "seqlen=256": "seqlen=16",
    "num_samples=128": "num_samples=4",
    '"convnext_tiny.fb_in1k"': '"convnext_atto", False, 10, model_kwargs={"in_chans": 1, "depths": (1, 1, 1, 1)}',
    '"/data/imagenet", model': '"digits", model, image_size=32',
    "devices=4": 'devices=2, accelerator="cpu"',
    "data_parallel_size=4": "data_parallel_size=2",
    "num_samples=1024": "num_samples=64",
    '"embed_dim": 96, "depth": 4': '"embed_dim": 32, "depth": 2',
    "max_epochs=30": "max_epochs=1, limit_train_batches=1",
}
ROOT = DOCS.parent
MARKDOWN = [*DOCS.glob("*.md"), *ROOT.glob("*.md"), *(ROOT / ".github").glob("*.md")]


def blocks(page, language):
    """Return the line and the text of each block in a language."""
    text = page.read_text(encoding="utf-8")
    matches = re.finditer(rf"^```{language}\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)
    return [(text[: match.start(1)].count("\n"), match[1]) for match in matches]


def pages_with(language):
    return [page for page in PAGES if blocks(page, language)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with models, a pruned model, texts and pairs of sentences."""
    folder = tmp_path_factory.mktemp("pages")
    save_llama_of_bytes(folder / "folder")
    tokenizer = AutoTokenizer.from_pretrained(folder / "folder")
    tokenizer.bos_token = "A"  # after which `sample_windows` writes
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}{% endfor %}"
    tokenizer.save_pretrained(folder / "folder")
    model = AutoModelForCausalLM.from_pretrained(folder / "folder")
    prune(model, sparsity=0.5, method="magnitude", progress=False)
    model.save_pretrained(folder / "out/model")
    (folder / "text.txt").write_text("A page of text, " * 200)
    save_tiny(folder / "embedding")
    (folder / "sentences.txt").write_text("\n".join(SENTENCES))
    save_pairs(folder / "pairs.csv")
    return folder


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("page", pages_with("python"), ids=lambda page: page.stem)
def test_the_python_on_a_page_runs(page, folder, tmp_path, monkeypatch, few_digits):
    shutil.copytree(folder, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    torch.manual_seed(0)
    names = {}
    for line, block in blocks(page, "python"):
        for large, small in SMALLER.items():
            block = block.replace(large, small)
        # The empty lines give a traceback the line numbers of the page.
        exec(compile("\n" * line + block, str(page), "exec"), names)


@pytest.mark.parametrize("page", pages_with("bash"), ids=lambda page: page.stem)
def test_the_commands_on_a_page_have_these_options(page):
    for _, block in blocks(page, "bash"):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words[:1] != ["wanda-lightning"] or "--help" in words:
                continue
            command, *options = words[1:]
            if command not in LIGHTNING:
                parse_options(command, options)


def tokens(page):
    """Return what GitHub's Markdown has on a page."""
    parser = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"])
    flat = []
    for token in parser.parse(page.read_text(encoding="utf-8")):
        flat += [token, *(token.children or ())]
    return flat


def anchors(page):
    """Return the anchors that GitHub gives to the headings of a page."""
    anchors = set()
    for token, title in pairwise(tokens(page)):
        if token.type == "heading_open":
            anchors.add(re.sub(r"[^\w\- ]", "", title.content.lower()).replace(" ", "-"))
    return anchors


@pytest.mark.parametrize("page", MARKDOWN, ids=lambda page: page.stem)
def test_the_links_of_a_page_lead_to_files_and_headings(page):
    for token in tokens(page):
        target = str(token.attrs.get("href") or token.attrs.get("src") or "")
        if not target or "://" in target or target.startswith("mailto:"):
            continue
        path, _, heading = target.partition("#")
        file = page.parent / path if path else page
        assert file.exists(), target
        if heading:
            assert heading in anchors(file), target


def test_every_public_name_is_described():
    described = (DOCS / "api.md").read_text(encoding="utf-8")
    assert sorted(
        re.findall(r"^\| `wanda_lightning\.(\w+)`", described, flags=re.MULTILINE)
    ) == sorted(wanda_lightning.__all__)
