"""Documents of the zero-shot tasks, their accuracy counted by hand, and tiny models to measure."""

import json

import torch
from support import modules
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

VOCABULARY = 400

DOCUMENTS = {
    "boolq": [
        {"passage": "A cat is an animal.", "question": "is a cat an animal", "label": 1},
        {"passage": "Stones sink.", "question": "do stones swim", "label": 0},
    ],
    "rte": [
        {"sentence1": "A cat sleeps.", "sentence2": "An animal sleeps.", "label": 0},
        {"sentence1": "It rains.", "sentence2": "It is dry.", "label": 1},
    ],
    "hellaswag": 2
    * [
        {"activity_label": "Cooking", "ctx_a": "A man cuts an onion.", "ctx_b": "he", "label": "1"}
        | {
            "endings": [
                "flies [step] away and is not seen again.",
                "cries.",
                "sings  a song.",
                "[title] ends",
            ]
        }
    ],
    "winogrande": 2
    * [
        {
            "sentence": "The cup did not fit; _ was too big.",
            "option1": "the cup",
            "option2": "a box",
            "answer": "1",
        }
    ],
    "arc_easy": [
        {
            "question": "What do plants need?",
            "choices": {"text": ["light", "a hammer"], "label": ["A", "B"]},
        },
        {
            "question": "What is hot?",
            "choices": {"text": ["ice", "the sun", "deep snow"], "label": ["1", "2", "3"]},
        },
    ],
    "openbookqa": [
        {
            "question_stem": "A magnet attracts",
            "choices": {"text": ["iron", "dry wood"], "label": ["A", "B"]},
        },
        {
            "question_stem": "Frogs begin as",
            "choices": {"text": ["eagles", "tadpoles"], "label": ["A", "B"]},
        },
    ],
}
for name in ("arc_easy", "openbookqa"):
    for number, document in enumerate(DOCUMENTS[name]):
        document["answerKey"] = document["choices"]["label"][number]
DOCUMENTS["arc_challenge"] = DOCUMENTS["arc_easy"]


def by_hand(name, doc):
    """Return (prompt, continuation) of each choice, the choices, and the index of the right one."""
    if name == "boolq":
        prompt = f"{doc['passage']}\nQuestion: {doc['question']}?\nAnswer:"
        choices = ["no", "yes"]
    elif name == "rte":
        prompt = f"{doc['sentence1']}\nQuestion: {doc['sentence2']} True or False?\nAnswer:"
        choices = ["True", "False"]
    else:
        prompt = (
            doc["question_stem"]
            if name == "openbookqa"
            else f"Question: {doc['question']}\nAnswer:"
        )
        choices = doc["choices"]["text"]
    gold = int(doc["label"]) if "label" in doc else doc["choices"]["label"].index(doc["answerKey"])
    # Blanks at the end of a prompt belong to what follows: tokens begin with them.
    blanks = prompt[len(prompt.rstrip()) :]
    return [(prompt.rstrip(), f"{blanks} {choice}") for choice in choices], choices, gold


def log_likelihood(model, tokenizer, prompt, continuation):
    given = len(tokenizer(prompt).input_ids)
    ids = tokenizer(prompt + continuation).input_ids
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
    return sum(logits[i - 1, ids[i]].item() for i in range(given, len(ids)))


def accuracies_by_hand(model, tokenizer, name, documents):
    hits = {"acc": 0, "acc_norm": 0}
    for doc in documents:
        pairs, choices, gold = by_hand(name, doc)
        scores = [log_likelihood(model, tokenizer, *pair) for pair in pairs]
        normed = [score / len(choice) for score, choice in zip(scores, choices, strict=True)]
        hits["acc"] += scores.index(max(scores)) == gold
        hits["acc_norm"] += normed.index(max(normed)) == gold
    return {metric: count / len(documents) for metric, count in hits.items()}


def tiny_llama(seed):
    special = dict.fromkeys(["pad_token_id", "bos_token_id", "eos_token_id"])
    sizes = {"vocab_size": VOCABULARY, "max_position_embeddings": 256, "initializer_range": 0.3}
    return modules.tiny_llama(seed, num_attention_heads=4, **sizes, **special)


def tiny_tokenizer():
    """Whole words are tokens, so that short choices are not always the likelier ones."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([json.dumps(DOCUMENTS), " yes no True False" * 20], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def write_tasks(folder):
    folder.mkdir(exist_ok=True)
    for name, rows in DOCUMENTS.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
