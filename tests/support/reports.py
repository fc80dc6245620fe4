"""Reports of models that are too large to prune in a test, and readers of pages and of JSON."""

import json
import math
from html.parser import HTMLParser
from pathlib import Path

from wanda_lightning import PruningReport
from wanda_lightning.models import SkippedMatrix, SkipReason
from wanda_lightning.report import (
    Circumstances,
    Continuations,
    Measured,
    PrunedLayer,
    Training,
    TrainingPass,
)


def read_json(path):
    return json.loads(Path(path).read_text())


SHAPES = {
    "self_attn.q_proj": (576, 576),
    "self_attn.k_proj": (192, 576),
    "self_attn.v_proj": (192, 576),
    "self_attn.o_proj": (576, 576),
    "mlp.gate_proj": (1536, 576),
    "mlp.up_proj": (1536, 576),
    "mlp.down_proj": (576, 1536),
}
CONFIG = {
    "sparsity": 0.5,
    "criterion": {"name": "Saliency", "dampening": 0.01},
    "pattern": {"name": "Unstructured", "group": "layer", "weigh_rows": True},
    "allocation": {"name": "Fisher", "max_deviation": 0.15, "num_samples": 16},
    "solver": {"name": "SparseGPT", "block_size": 128},
    "recovery": {"name": "Distill", "epochs": 3},
    "unit_costs": {"mlp.down_proj": 0.00123456},
}


def llama_report(blocks=30):
    """A report with everything that one can have: 30 blocks are those of SmolLM2-135M."""
    layers = []
    for block in range(blocks):
        for number, (kind, shape) in enumerate(SHAPES.items()):
            layers.append(_layer(block, number, kind, shape))

    embedding = SkippedMatrix("model.embed_tokens", (49152, 576), SkipReason.EMBEDDING, "embedding")
    head = SkippedMatrix("lm_head", (49152, 576), SkipReason.TIED, "tied to model.embed_tokens")
    passes = (
        TrainingPass(None, 0.61),
        TrainingPass(0.52, 0.44),
        TrainingPass(0.43, 0.41),
        TrainingPass(0.4, 0.395),
    )
    return PruningReport(
        layers=tuple(layers),
        skipped=(embedding, head),
        parameters=sum(layer.size for layer in layers) + embedding.size + (2 * blocks + 1) * 576,
        zeros=sum(layer.zeros for layer in layers),
        seconds={"prepare": 0.5, "prune": 95.0},
        config=CONFIG,
        notes=("an <escaped> note & a second half",),
        training=Training("Distill(epochs=3)", 28, 4, passes),
        run=Circumstances(
            command="wanda-lightning prune --model smollm2 --prune_method thorough --nsamples 32",
            model="smollm2",
            metric="perplexity",
            before=16.06,
            after=18.93,
            before_error=0.312,
            after_error=0.406,
            agreement=AGREEMENT,
            data="sklearn-docs, 24 windows of 512 tokens",
            others=(Measured("python-docs, 32 windows of 512 tokens", 12.95, 14.72),),
            calibration="python-docs, 32 windows of 512 tokens, seed 0",
            costs=(
                Measured("MiB of weights", 513.1, 513.1),
                Measured("times as fast", 1.0, 1.234, after_error=0.04),
            ),
            zero_shot={"boolq": {"acc": 0.5625, "acc_stderr": 0.02, "right_to_wrong": 0.05}},
            dense_zero_shot={"boolq": {"acc": 0.6}},
            samples=(
                Continuations("The library", " is <b>open</b>.", " is closed."),
                Continuations("def f():", "\n    return", " f f f"),
            ),
        ),
    )


def _layer(block, number, kind, shape):
    size = math.prod(shape)
    sparsity = round((0.42 + 0.006 * block + 0.03 * math.sin(block + number)) * size) / size
    name = f"model.layers.{block}"
    error = (0.02 + 0.02 * number) * (1 + block / 40)
    note = "3 inputs never active" if block % 7 == 0 else ""
    return PrunedLayer(
        f"{name}.{kind}", shape, sparsity, sparsity, 16384, note, block=name, error=error
    )


AGREEMENT = {
    "same_top": 0.71234,
    "same_top_stderr": 0.0042,
    "kl_divergence": 0.25671,
    "kl_divergence_stderr": 0.0031,
    "kl_divergence_p99": 2.5,
    "predictions": 12264,
}


class Page(HTMLParser):
    """Texts and attributes of a page, and whether each element is closed."""

    VOID = frozenset({"meta", "link", "img", "br", "input", "path", "use"})

    def __init__(self, path):
        super().__init__()
        self.words = []
        self.tags = []
        self.open = []
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source.replace("<wbr>", ""))
        self.close()
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("style", "script"):
            self.words.append(data)
