r"""Calibrate a chat model on web text, on chats or on both, and measure its perplexity on other chats and on web text.

    python benchmarks/chats.py --model M.gguf --calibration c4_sample.txt --eval wikitext2_test.raw.txt \
        --nsamples 16 --seqlen 256 --limit 20 --chats out/chats --save benchmarks/results

The dense model writes the chats itself, if the folder `--chats` has none yet, with a temperature of 0.7 and the most
likely 90 % of tokens. The user asks about a sentence of the calibration text, then for an example; chats with an answer
of more than 192 tokens are left out. Those for calibration and for evaluation are about different documents.
"""

import copy
import json
import random
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path

import torch
from measuring import Text, in_batches, perplexity, run_from_shell
from result import Result, Runs, Samples

from wanda_lightning import CausalLMModule, TextDataModule, prune
from wanda_lightning.data.sentence_pairs import split_sentences

METHODS = ("wanda", "balanced")
QUESTIONS = (
    "Explain this in simple words: {}",
    "What do you think about this? {}",
    "Rewrite this in a friendlier tone: {}",
    "Write a short story that begins with this sentence: {}",
    "Which questions would you ask about this? {}",
)
FOLLOW_UP = "Can you give me an example?"
CHATS = {"calibration": 72, "heldout": 40}
ANSWER = 192  # tokens at most
WRITTEN_TOGETHER = 32


def questions(text, part):
    """Return questions about sentences of every other document of a text, which is a line."""
    documents = text.splitlines()[list(CHATS).index(part) :: len(CHATS)]
    sentences = []
    for document in documents:
        sentences += [sentence for sentence in split_sentences(document) if len(sentence) < 200]
    generator = random.Random(0)
    generator.shuffle(sentences)
    return [generator.choice(QUESTIONS).format(sentence) for sentence in dict.fromkeys(sentences)]


@torch.no_grad()
def answer(model, tokenizer, chats):
    """Add an answer to each chat; return the chats whose answer ended by itself."""
    batch = tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, return_tensors="pt", padding=True, return_dict=True
    )
    written = model.generate(
        **batch, do_sample=True, temperature=0.7, top_k=0, top_p=0.9, max_new_tokens=ANSWER
    )
    answered = []
    for chat, tokens in zip(chats, written[:, batch["input_ids"].shape[1] :], strict=True):
        if tokenizer.eos_token_id in tokens:
            content = tokenizer.decode(tokens, skip_special_tokens=True)
            answered.append([*chat, {"role": "assistant", "content": content}])
    return answered


def write_chats(folder, part, module, text):
    """Return the file with the chats of a part, which are written if there is none."""
    file = folder / f"{part}.jsonl"
    if file.exists():
        return str(file)
    module.tokenizer.padding_side = "left"
    torch.manual_seed(list(CHATS).index(part))
    asked = questions(text, part)
    chats = []
    while len(chats) < CHATS[part]:
        started = [[{"role": "user", "content": asked.pop()}] for _ in range(WRITTEN_TOGETHER)]
        first = answer(module.model, module.tokenizer, started)
        again = [[*chat, {"role": "user", "content": FOLLOW_UP}] for chat in first]
        chats += answer(module.model, module.tokenizer, again)
        print(f"{part}: {len(chats)} chats", flush=True)
    lines = [json.dumps({"messages": chat}, ensure_ascii=False) for chat in chats[: CHATS[part]]]
    folder.mkdir(parents=True, exist_ok=True)
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(file)


def main(options: Text, chats: str, save: str = "", draws: int = 1):
    """Measure all rows, for so many draws of the calibration windows."""
    module = CausalLMModule(options.model, dtype="float32")
    model = module.model.eval()
    web = Path(options.calibration).read_text(encoding="utf-8")
    written, heldout = (write_chats(Path(chats), part, module, web) for part in CHATS)

    data = TextDataModule(
        module.tokenizer,
        evaluation=[options.eval, heldout],
        seqlen=options.seqlen,
        limit=options.limit,
    )
    texts = {
        "perplexity": in_batches(data.windows_of(options.eval)),
        "perplexity_chats": in_batches(data.windows_of(heldout)),
    }
    planned = Result(
        model=Path(options.model).name,
        method="dense",
        evaluation=Samples(Path(options.eval).name, options.limit, options.seqlen),
    )
    runs = Runs(save, "chats")
    dense = copy.deepcopy(model.state_dict())

    def measure():
        return {name: perplexity(model, windows) for name, windows in texts.items()}

    def prune_and_measure(row, source, packing):
        model.load_state_dict(dense)
        data = TextDataModule(
            module.tokenizer,
            source,
            seqlen=options.seqlen,
            num_samples=options.nsamples,
            seed=row.case["draw"],
            packing=packing,
        )
        prune(model, data.calibration_dataloader(), 0.5, method=row.method, progress=False)
        return measure()

    runs(planned, measure)
    name = Path(options.calibration).name
    calibrations = {
        "text": (name, options.calibration, "windows"),
        "chats": ("chats", written, "windows"),
        "both": (f"{name} and chats", [options.calibration, written], "windows"),
        "rows": ("chats, one in each window", written, "none"),
    }
    for draw, key, method in product(range(draws), calibrations, METHODS):
        name, source, packing = calibrations[key]
        row = replace(
            planned,
            method=method,
            sparsity=0.5,
            case={"calibration": key, "draw": draw},
            arguments={"method": method},
            calibration=Samples(name, options.nsamples, options.seqlen),
        )
        runs(row, partial(prune_and_measure, row, source, packing))


if __name__ == "__main__":
    run_from_shell(main)
