"""Train a small mixture of experts (the architecture of Qwen3-MoE) on text that every installation of Python has.

    python recipes/llm/small_mixture.py --output out/small_mixture

Mixtures with random weights route tokens at random, so what pruning costs can only be measured on one that was trained.
The text is the modules of Python's standard library, Python's reference (the part for calibration), and the files of
your own that you name. Every tenth module and the last tenth of each file are held out, in
out/small_mixture_text/heldout.txt.
Cost: 44 min on 2 CPU cores, while another program was running.
Result: 14.4 million parameters in 4 layers with 16 experts, with 2 experts for each token. Without files of your own,
the perplexity is 39.92 on the first 256 held-out windows. Seed 0, the library of Python 3.11, after version 0.3.0.
"""

import argparse
import sysconfig
from pathlib import Path

import lightning as L
from tokenizers import ByteLevelBPETokenizer, Tokenizer
from transformers import PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM

from wanda_lightning import CausalLMModule, SavePretrained, TextDataModule
from wanda_lightning.data.text_sources import python_docs

SEQLEN = 256


def texts(files: list[str]) -> tuple[str, str]:
    """Return the text for training and the text that is held out."""
    training = [*python_docs()["calibration"].values()]
    heldout = []
    modules = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    for number, module in enumerate(modules, start=1):
        part = heldout if number % 10 == 0 else training
        part.append(module.read_text(encoding="utf-8"))
    for file in files:
        text = Path(file).read_text(encoding="utf-8")
        end = len(text) * 9 // 10
        training.append(text[:end])
        heldout.append(text[end:])
    return "\n\n".join(training), "\n\n".join(heldout)


def main() -> None:
    """Train the tokenizer and the model, and save both in one folder."""
    parser = argparse.ArgumentParser(description="Train a small mixture of experts.")
    parser.add_argument("files", nargs="*", help="text files of your own")
    parser.add_argument("--output", required=True, help="folder to write")
    parser.add_argument(
        "--steps", type=int, default=2000, help="training steps, each on 16 windows of 256 tokens"
    )
    parser.add_argument(
        "--vocabulary", type=int, default=4096, help="number of tokens that the tokenizer learns"
    )
    options = parser.parse_args()
    L.seed_everything(0)

    training, heldout = texts(options.files)
    output = Path(options.output)
    folder = output.with_name(f"{output.name}_text")
    folder.mkdir(parents=True)  # fails if it exists: an earlier model keeps its texts
    (folder / "training.txt").write_text(training, encoding="utf-8")
    (folder / "heldout.txt").write_text(heldout, encoding="utf-8")

    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator([training], options.vocabulary, special_tokens=["<|endoftext|>"])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(trained.to_str()), eos_token="<|endoftext|>"
    )

    config = Qwen3MoeConfig(
        vocab_size=len(tokenizer),
        hidden_size=256,
        moe_intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        num_experts=16,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        output_router_logits=True,  # adds the loss that balances the experts
        router_aux_loss_coef=0.01,
        tie_word_embeddings=True,
        max_position_embeddings=1024,
        eos_token_id=tokenizer.eos_token_id,
    )
    module = CausalLMModule(
        Qwen3MoeForCausalLM(config), tokenizer, lr=1e-3, weight_decay=0.1, lr_decay=True
    )
    data = TextDataModule(
        tokenizer,
        calibration=folder / "training.txt",
        evaluation=[folder / "heldout.txt", "python-docs"],
        seqlen=SEQLEN,
        batch_size=16,
        num_samples=1,  # nothing is pruned here, so nothing is calibrated
        train_samples=16 * options.steps,
        limit=64,
    )
    trainer = L.Trainer(
        devices=1,
        max_epochs=1,
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=False,
        callbacks=[SavePretrained(output)],
    )
    trainer.fit(module, data)


if __name__ == "__main__":
    main()
