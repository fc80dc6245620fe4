"""Chats as calibration and evaluation data, against the tokenizer's own chat template in plain loops."""

import copy
import json
import random

import datasets
import pytest
import torch
from support.callbacks import fit_module
from support.data import byte_tokenizer, documents
from support.modules import tiny_llama
from support.refusals import refuses

from wanda_lightning import SentenceDataModule, TextDataModule, prune
from wanda_lightning.lightning_modules import CausalLMModule

# Writes the token that begins a text, the tools, and each message; refuses a role, and leaves out another one.
TEMPLATE = """{{ bos_token }}{% if tools %}{{ tools | tojson }}{% endif %}{% for message in messages -%}
{% if message.role == 'bad' %}{{ raise_exception('Unknown role') }}{% endif -%}
{% if message.role != 'silent' %}{{ message.role }}: {% endif -%}
{% if message.role != 'silent' and message.content is defined %}{{ message.content }};{% endif -%}
{% if message.tool_calls is defined %}{{ message.tool_calls | tojson }};{% endif -%}
{% endfor %}"""


@pytest.fixture(scope="module")
def tokenizer():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def chat(*contents):
    """A conversation of user and assistant, who take turns."""
    roles = ("user", "assistant")
    return {
        "messages": [{"role": roles[i % 2], "content": text} for i, text in enumerate(contents)]
    }


CHATS = [chat(text, text[::-1]) for text in documents([3, 30, 12, 7, 50, 1, 21, 16])]


def with_tool(name, **properties):
    """A conversation with a tool; no two of them have the same keys."""
    call = {"type": "function", "function": {"name": name, "arguments": dict.fromkeys(properties)}}
    parameters = {"type": "object", "properties": properties, "default": None}
    return {
        "messages": [
            {"role": "user", "content": f"call {name}"},
            {"role": "assistant", "tool_calls": [call]},
            {"role": "tool", "name": name, "content": "done"},
        ],
        "tools": [{"type": "function", "function": {"name": name, "parameters": parameters}}],
    }


TOOLS = [
    with_tool("weather", city={"type": "string", "enum": ["Bern", "Rome"]}),
    with_tool("time", zone={"type": ["string", "null"], "default": None}, x={"type": "integer"}),
]


def write_chats(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def ids_of_chat(row, tokenizer):
    return tokenizer.apply_chat_template(row["messages"], row.get("tools"), return_dict=False)


def slow_order(rows, seed):
    numbers = random.Random(seed).sample(range(len(rows)), len(rows))
    return [rows[number] for number in numbers]


def slow_joined(rows, tokenizer):
    ids = []
    for row in rows:
        ids.extend(ids_of_chat(row, tokenizer))
    return ids


def slow_windows(rows, tokenizer, seqlen, count, seed):
    ids = slow_joined(slow_order(rows, seed), tokenizer)
    return torch.tensor([ids[k * seqlen : (k + 1) * seqlen] for k in range(count)])


def slow_rows(rows, tokenizer, seqlen, count, seed):
    return [ids_of_chat(row, tokenizer)[:seqlen] for row in slow_order(rows, seed)[:count]]


def real_tokens(loader):
    """The tokens of each window, without padding."""
    rows = []
    for batch in loader:
        ids = batch["input_ids"]
        mask = batch.get("attention_mask", torch.ones_like(ids)).bool()
        assert mask.any(dim=0).all()  # no longer than the longest row
        assert not (~mask[:, :-1] & mask[:, 1:]).any()  # padding is at the end
        rows += [row[keep].tolist() for row, keep in zip(ids, mask, strict=True)]
    return rows


# What is drawn


@pytest.mark.parametrize("seed", [0, 5])
def test_joined_chats_are_cut_into_windows(tmp_path, tokenizer, seed):
    file = write_chats(tmp_path / "chats.jsonl", CHATS)
    data = TextDataModule(tokenizer, file, seqlen=20, num_samples=9, batch_size=4, seed=seed)
    expected = slow_windows(CHATS, tokenizer, 20, 9, seed)
    assert torch.equal(data.calibration_windows, expected)
    batches = list(data.calibration_dataloader())
    assert all(batch.keys() == {"input_ids"} for batch in batches)
    assert torch.equal(torch.cat([batch["input_ids"] for batch in batches]), expected)


@pytest.mark.parametrize("seed", [0, 5])
def test_without_packing_each_chat_is_a_row_that_is_cut_and_padded(tmp_path, tokenizer, seed):
    file = write_chats(tmp_path / "chats.jsonl", CHATS)
    options = {"seqlen": 60, "num_samples": 7, "batch_size": 3, "seed": seed, "packing": "none"}
    data = TextDataModule(tokenizer, file, **options)
    expected = slow_rows(CHATS, tokenizer, 60, 7, seed)
    assert len({len(row) for row in expected}) > 3
    assert max(map(len, expected)) == 60  # one is cut
    assert real_tokens(data.calibration_dataloader()) == expected


def test_the_first_training_windows_are_those_for_calibration(tokenizer):
    for packing in ("windows", "none"):
        data = TextDataModule(
            tokenizer,
            [CHATS, documents([200])],
            seqlen=20,
            num_samples=3,
            train_samples=8,
            packing=packing,
        )
        first = data.calibration_windows
        assert torch.equal(data.train_windows[:3], first)


def test_messages_and_tools_reach_the_template_as_they_are_in_a_file(tmp_path, tokenizer):
    rows = TOOLS * 2
    file = write_chats(tmp_path / "tools.jsonl", rows)
    data = TextDataModule(tokenizer, file, seqlen=500, num_samples=4, packing="none")
    expected = slow_rows(rows, tokenizer, 500, 4, 0)
    assert real_tokens(data.calibration_dataloader()) == expected
    for row in rows:
        text = tokenizer.apply_chat_template(row["messages"], row["tools"], tokenize=False)
        assert '"default": null' in text


def test_a_table_adds_no_keys_to_messages(tmp_path, tokenizer):
    plain = copy.deepcopy(TOOLS)
    for row in plain:
        parameters = row["tools"][0]["function"]["parameters"]
        del parameters["default"]  # None stands for keys that are missing
        parameters["properties"] = {name: {"type": "string"} for name in parameters["properties"]}
        for name in parameters["properties"]:
            row["messages"][1]["tool_calls"][0]["function"]["arguments"] = {name: "x"}
    encoded = [row | {"tools": json.dumps(row["tools"])} for row in plain]
    for number, rows in enumerate((plain, encoded)):
        table = datasets.Dataset.from_list(rows)
        assert "None" in str(table[0])
        file = str(tmp_path / f"{number}.parquet")
        table.to_parquet(file)
        for source in (table, file):
            data = TextDataModule(tokenizer, source, seqlen=500, num_samples=2, packing="none")
            tokens = real_tokens(data.calibration_dataloader())
            if rows is plain:  # pyarrow orders keys anew
                written = [sorted(tokenizer.decode(row)) for row in tokens]
                order = slow_order(plain, 0)
                assert written == [
                    sorted(tokenizer.decode(ids_of_chat(r, tokenizer))) for r in order
                ]
            else:
                assert tokens == slow_rows(plain, tokenizer, 500, 2, 0)


def test_chats_from_the_hub(tokenizer, monkeypatch):
    table = datasets.Dataset.from_list(CHATS)
    monkeypatch.setattr(datasets, "load_dataset", lambda name, **_: {"train": table, "test": table})
    data = TextDataModule(tokenizer, "own/chats", "own/chats", seqlen=20, num_samples=5)
    assert torch.equal(data.calibration_windows, slow_windows(CHATS, tokenizer, 20, 5, 0))
    assert data.evaluation_windows[0].tolist() == slow_joined(CHATS, tokenizer)[:20]


def test_a_text_beside_messages_is_the_one_that_is_read(tmp_path, tokenizer):
    texts = documents([40, 50])
    rows = [{"text": text, **row} for text, row in zip(texts, CHATS, strict=False)]
    file = write_chats(tmp_path / "both.jsonl", rows)
    plain = TextDataModule(tokenizer, texts, seqlen=20, num_samples=4)
    data = TextDataModule(tokenizer, file, seqlen=20, num_samples=4)
    assert torch.equal(data.calibration_windows, plain.calibration_windows)


# Several sources


@pytest.mark.parametrize("count", [6, 7])
@pytest.mark.parametrize("packing", ["windows", "none"])
def test_several_sources_take_turns(tmp_path, tokenizer, count, packing):
    chats = write_chats(tmp_path / "chats.jsonl", CHATS)
    text = tmp_path / "text.txt"
    text.write_text(documents([300])[0])
    options = {"seqlen": 60, "batch_size": 2, "seed": 3}
    shares = []
    for source, share in ((chats, count - count // 2), (text, count // 2)):
        more = {"packing": packing} if source == chats else {}
        alone = TextDataModule(tokenizer, source, num_samples=share, **more, **options)
        shares.append(real_tokens(alone.calibration_dataloader()))
    expected = [shares[k % 2][k // 2] for k in range(count)]
    for sources in (f"{chats}, {text}", [chats, str(text)], (chats, text)):
        data = TextDataModule(tokenizer, sources, num_samples=count, packing=packing, **options)
        assert real_tokens(data.calibration_dataloader()) == expected
        assert data.calibrations == (chats, str(text))


def test_a_list_of_documents_is_one_source(tokenizer):
    texts = ["a.txt is a file, not a name", *documents([70])]
    data = TextDataModule(tokenizer, texts, seqlen=20, num_samples=4)
    assert data.calibrations == ("texts in memory",)
    both = TextDataModule(tokenizer, [texts, CHATS], seqlen=20, num_samples=4)
    assert torch.equal(both.calibration_windows[::2], data.calibration_windows[:2])


# What is described and measured


@pytest.mark.parametrize(
    ("sources", "packing", "expected"),
    [
        ("{chats}", "windows", "{chats} (joined chats), 4 windows of 20 tokens, seed 0"),
        (
            "{chats}",
            "none",
            "{chats} (chats, one in each window), 4 windows of at most 20 tokens, seed 0",
        ),
        (
            "{chats},{text}",
            "windows",
            "{chats} (joined chats) and {text}, 4 windows in equal shares of 20 tokens, seed 0",
        ),
    ],
)
def test_the_description_says_that_there_were_chats(
    tmp_path, tokenizer, sources, packing, expected
):
    names = {"chats": write_chats(tmp_path / "chats.jsonl", CHATS), "text": tmp_path / "a.txt"}
    names["text"].write_text(documents([100])[0])
    data = TextDataModule(
        tokenizer,
        sources.format(**names),
        seqlen=20,
        num_samples=4,
        packing=packing,
    )
    assert data.describe_calibration(4) == expected.format(**names)


def test_padding_counts_nowhere_in_pruning(tokenizer):
    data = TextDataModule(tokenizer, CHATS, seqlen=60, num_samples=8, batch_size=3, packing="none")
    rows = slow_rows(CHATS, tokenizer, 60, 8, 0)
    model = tiny_llama(vocab_size=257)
    expected = copy.deepcopy(model)
    report = prune(model, data.calibration_dataloader(), 0.5, progress=False)
    prune(expected, [{"input_ids": torch.tensor([row])} for row in rows], 0.5, progress=False)
    assert {layer.tokens for layer in report.layers} == {sum(map(len, rows))}
    for name, weight in model.named_parameters():
        assert torch.equal(weight == 0, expected.get_parameter(name) == 0), name


def test_training_on_padded_chats_predicts_their_tokens_only(tokenizer):
    data = TextDataModule(
        tokenizer, CHATS, [documents([90])], seqlen=60, num_samples=3, batch_size=3, packing="none"
    )
    module = CausalLMModule(tiny_llama(vocab_size=257))
    model = copy.deepcopy(module.model).eval()
    fit_module(module, data=data, max_steps=1)
    rows = slow_rows(CHATS, tokenizer, 60, 3, 0)
    losses = torch.zeros(())
    for row in rows:
        ids = torch.tensor([row])
        losses += model(ids, labels=ids).loss.detach() * (len(row) - 1)
    expected = losses / sum(len(row) - 1 for row in rows)
    assert module.trainer.callback_metrics["train_loss"].item() == pytest.approx(
        expected.item(), rel=1e-5
    )


def test_chats_for_evaluation_are_joined_in_their_order(tmp_path, tokenizer):
    file = write_chats(tmp_path / "chats.jsonl", CHATS)
    ids = slow_joined(CHATS, tokenizer)
    windows = torch.tensor(ids[: len(ids) // 20 * 20]).view(-1, 20)
    for limit in (None, 3):
        data = TextDataModule(
            tokenizer, evaluation=[file, CHATS], seqlen=20, limit=limit, packing="none"
        )
        for name in data.evaluations:
            assert torch.equal(data.windows_of(name), windows[:limit])
    assert data.describe_evaluation() == f"{file}, 3 windows of 20 tokens"


# What is refused


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"text": "a"}, "must have messages, a list of .* but it is {'text': 'a'}"),
        ({"messages": []}, "must have messages, a list of objects with a role"),
        ({"messages": "hello"}, "must have messages, a list of objects with a role"),
        ({"messages": [{"content": "a"}]}, "must have messages, a list of objects with a role"),
        (
            {"messages": [{"role": "user", "text": "a"}]},
            "must have messages, a list of objects with a role and a content",
        ),
        ([1, 2], r"must have messages, .* but it is \[1, 2\]"),
        (
            {"messages": [{"role": "bad", "content": "a"}]},
            "cannot be written by the tokenizer's chat template: .*Unknown role",
        ),
        (
            {"messages": [{"role": "silent", "content": "a"}]},
            "must have roles that the tokenizer's chat template writes, but it leaves out messages of 'silent'",
        ),
    ],
)
def test_a_bad_row_is_refused_by_its_line(tmp_path, tokenizer, line, message):
    file = tmp_path / "chats.jsonl"
    rows = [json.dumps(row) for row in (CHATS[0], line, CHATS[1])]
    file.write_text("\n\n".join(rows))
    data = TextDataModule(tokenizer, str(file), seqlen=20, num_samples=3, packing="none")
    with refuses(rf"^Line 3 of .*chats\.jsonl {message}"):
        data.calibration_dataloader()
    if isinstance(line, dict):
        data = TextDataModule(tokenizer, [CHATS[0], line], seqlen=20, num_samples=2, packing="none")
        with refuses(rf"^Row 2 of texts in memory {message}"):
            data.calibration_dataloader()


@pytest.mark.parametrize("line", ['{"messages": [', "[" * 100_000])
def test_a_line_that_is_no_json_is_refused_by_its_number(tmp_path, tokenizer, line):
    file = tmp_path / "chats.jsonl"
    file.write_text(f"{json.dumps(CHATS[0])}\n{line}\n")
    with refuses(r"^Line 2 of .*chats\.jsonl must be a JSON object with messages: "):
        TextDataModule(tokenizer, str(file), seqlen=20).calibration_dataloader()


def test_a_tokenizer_without_a_template_is_refused(tmp_path):
    file = write_chats(tmp_path / "chats.jsonl", CHATS)
    message = (
        r"^tokenizer must have a chat template, since .*chats\.jsonl has messages, but it has none"
    )
    with refuses(message):
        TextDataModule(byte_tokenizer(), file, seqlen=20).calibration_dataloader()
    with refuses(message):
        TextDataModule(byte_tokenizer(), evaluation=file, seqlen=20).setup("validate")


@pytest.mark.parametrize(
    ("packing", "count", "message"),
    [
        ("none", 9, "^9 rows with packing='none' need as many chats, but texts in memory has 8"),
        ("windows", 50, "^50 windows of seqlen=20 need 1,000 tokens, but the 8 chats of .* have"),
    ],
)
def test_too_few_chats_are_refused(tokenizer, packing, count, message):
    data = TextDataModule(tokenizer, CHATS, seqlen=20, num_samples=count, packing=packing)
    with refuses(message):
        data.calibration_dataloader()


def test_what_cannot_be_combined_is_refused(tmp_path, tokenizer):
    text = str(tmp_path / "a.txt")
    (tmp_path / "a.txt").write_text("a" * 50)
    for options in ({"calibration": ["self", text]}, {"calibration": "self", "packing": "none"}):
        with refuses("^calibration='self' takes no other texts and no packing"):
            TextDataModule(tokenizer, **options)
    with refuses(
        "^num_samples must be at least the number of texts in calibration, 2, but it is 1"
    ):
        TextDataModule(tokenizer, [text, text], num_samples=1)
    with refuses("^packing must be one of windows, none, but it is 'rows'"):
        TextDataModule(tokenizer, packing="rows")
    with refuses("^packing='none' needs chats, but .*a.txt is text"):
        TextDataModule(tokenizer, text, seqlen=20, packing="none").calibration_dataloader()
    chats = write_chats(tmp_path / "chats.jsonl", CHATS)
    with refuses(r"calibration must be a text to cut into sentences, but .*chats\.jsonl has chats"):
        _ = SentenceDataModule(calibration=chats).calibration_sentences
