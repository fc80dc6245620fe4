"""Write one text of several kinds for a longer distillation, since text of one kind harms the others.

    python recipes/llm/mixed_text.py --model .cache/SmolLM2-135M-Instruct.Q4_1.gguf --output .cache/mixed.txt FILE...

It has your own files, such as web text, Python's reference (the part for calibration) and what the dense model
writes.
Cost: 5 min on 2 CPU cores.
Result: one text file, which recipes/llm/smaller_longer.yaml reads.
"""

import argparse
from pathlib import Path

from wanda_lightning import CausalLMModule, sample_windows
from wanda_lightning.data.text_sources import python_docs

SEQLEN = 256  # longer pieces take more time for each token


def main() -> None:
    """Let the model write, and join the texts."""
    parser = argparse.ArgumentParser(description="Write one text of several kinds.")
    parser.add_argument("files", nargs="*", help="text files of your own")
    parser.add_argument("--model", required=True, help="hub id, folder or .gguf file")
    parser.add_argument("--output", required=True, help="file to write")
    parser.add_argument("--tokens", type=int, default=65536, help="number of tokens that the dense model writes")
    options = parser.parse_args()
    files = [Path(file).read_text(encoding="utf-8") for file in options.files]
    dense = CausalLMModule(options.model)
    windows = sample_windows(dense.model, dense.tokenizer, options.tokens // SEQLEN, SEQLEN, batch_size=64)
    own = dense.tokenizer.batch_decode(windows, skip_special_tokens=True)
    Path(options.output).write_text("\n\n".join([*files, *python_docs()[0].values(), *own]), encoding="utf-8")


if __name__ == "__main__":
    main()
