r"""Calibrate a chat model on web text, on chats or on both, and measure its perplexity on other chats and on web text.

    python benchmarks/chats.py --model M.gguf --calibration c4_sample.txt --eval wikitext2_test.raw.txt \
        --nsamples 16 --seqlen 512 --limit 40 --chats out/chats --save benchmarks/results

The model writes the chats itself, if the folder `--chats` has none yet. A user asks about a sentence of the calibration
text, then asks for an example; the answers are drawn from the predictions of the dense model, without temperature or
truncation, and end by themselves. The chats for calibration and those for evaluation are about different documents.
"""

import json
import random
from pathlib import Path

import torch
from measuring import LanguageModel, Text, run_from_shell

from wanda_lightning.data.sentence_pairs import split_sentences

QUESTIONS = (
    "Explain this in simple words: {}",
    "What do you think about this? {}",
    "Rewrite this in a friendlier tone: {}",
    "Write a short story that begins with this sentence: {}",
    "Which questions would you ask about this? {}",
)
FOLLOW_UP = "Can you give me an example?"
CHATS = {"calibration": 72, "heldout": 64}
ANSWER = 192  # tokens at most; chats with a longer answer are left out
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


def write_chats(file, part, language, text):
    """Write the chats of a part."""
    language.tokenizer.padding_side = "left"
    torch.manual_seed(list(CHATS).index(part))
    asked = questions(text, part)
    chats = []
    while len(chats) < CHATS[part]:
        started = [[{"role": "user", "content": asked.pop()}] for _ in range(WRITTEN_TOGETHER)]
        first = answer(language.model, language.tokenizer, started)
        again = [[*chat, {"role": "user", "content": FOLLOW_UP}] for chat in first]
        chats += answer(language.model, language.tokenizer, again)
        print(f"{part}: {len(chats)} chats", flush=True)
    lines = [json.dumps({"messages": chat}, ensure_ascii=False) for chat in chats[: CHATS[part]]]
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
