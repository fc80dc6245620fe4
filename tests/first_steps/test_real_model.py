"""The model that `make demo` downloads, on the files of a program; `.ci/run` then runs this file."""

from pathlib import Path

import lightning as L
import pytest

from wanda_lightning import CausalLMModule, TextDataModule, WandaPrune

MODEL = Path(__file__).parents[2] / ".cache/SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.mark.skipif(not MODEL.exists(), reason="make demo downloads the model")
@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_own_documents(pattern):
    model = CausalLMModule(MODEL)
    files = [path.read_text() for path in sorted(Path(L.__file__).parent.rglob("callbacks/*.py"))]
    data = TextDataModule(model.tokenizer, files, [files], seqlen=128, num_samples=4, limit=4)
    (dense,) = L.Trainer(logger=False).validate(model, data)
    pruning = WandaPrune(0.5, pattern=pattern)
    (pruned,) = L.Trainer(callbacks=[pruning], logger=False).validate(model, data)
    assert dense["val_perplexity"] < pruned["val_perplexity"] < 200
    model.save_pretrained("out/model")
