"""Take half of the hidden units out of an embedding model, and compare its embeddings in a second environment.

    make test-onnx

The second environment has sentence-transformers[onnx], whose libraries are older than those of this project. The folder
that is saved here must load there with backend="onnx" and with the same embeddings, also after the export to int8.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from sentence_transformers import SentenceTransformer

from wanda_lightning import EmbeddingModule, SentenceDataModule, shrink

# What docs/embeddings.md shows, run by the second environment.
LOAD = """
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
from sentence_transformers import SentenceTransformer, export_dynamic_quantized_onnx_model

folder = sys.argv[1]
print(*(f"{name} {version(name)}" for name in ("sentence-transformers", "transformers", "onnxruntime")))
sentences = Path("sentences.txt").read_text().splitlines()
expected = np.load("embeddings.npy")

model = SentenceTransformer(folder, backend="onnx")
difference = abs(model.encode(sentences) - expected).max()
print(f"float32: embeddings differ by at most {difference:.1e}")
assert difference < 1e-5

model.save_pretrained(folder, create_model_card=False)
export_dynamic_quantized_onnx_model(model, "avx2", folder)
options = {"file_name": "onnx/model_quint8_avx2.onnx"}
int8 = SentenceTransformer(folder, backend="onnx", model_kwargs=options)
cosine = (int8.encode(sentences) * expected).sum(axis=1)  # of vectors of length 1
print(f"int8: cosines of {cosine.min():.4f} or more, {cosine.mean():.4f} on average")
assert cosine.mean() > 0.97
"""


def main(python: Path, model: str) -> None:
    """Save the smaller model and its embeddings, and load it with the Python of the second environment."""
    module = EmbeddingModule(model).eval()
    sentences = SentenceDataModule(
        module.model, "python-docs", num_samples=256
    ).calibration_sentences
    print(shrink(module.model, sentences, units=0.5))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        module.save_pretrained(folder / "smaller")
        smaller = SentenceTransformer(str(folder / "smaller"), device="cpu")
        np.save(folder / "embeddings.npy", smaller.encode(sentences))
        (folder / "sentences.txt").write_text("\n".join(sentences))
        subprocess.run([python.absolute(), "-c", LOAD, "smaller"], cwd=folder, check=True)
        SentenceTransformer(str(folder / "smaller"), device="cpu")  # what version 5 has saved


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
