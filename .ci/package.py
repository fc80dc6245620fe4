"""Build the wheel and the sdist, check both, and prune with the wheel in an environment that has nothing else.

    make package

The environment holds the wheel and links to the packages that it requires, as its metadata say, in the environment that
runs this script. So a requirement that pyproject.toml lacks is found, and nothing large is installed a second time.
"""

import subprocess
import sys
import tempfile
import venv
import zipfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
PRUNE = """
import torch
from transformers import LlamaConfig, LlamaForCausalLM
import wanda_lightning
from wanda_lightning import CausalLMModule, prune

assert wanda_lightning.__file__.startswith({prefix!r}), wanda_lightning.__file__
sizes = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2, vocab_size=100)
model = LlamaForCausalLM(LlamaConfig(**sizes))
batches = [dict(input_ids=torch.randint(100, (2, 32))) for _ in range(4)]
for method in ("wanda", "best"):
    report = prune(model, batches, 0.5, method=method, pattern="2:4", progress=False)
    assert abs(report.sparsity - 0.5) < 1e-6, report.sparsity
print(report.summary())
report.save({prefix!r})
model.save_pretrained({prefix!r} + "/model")
"""
EXTRAS = {  # what asks for each extra
    "demo": "from wanda_lightning import ImageDataModule; ImageDataModule('digits').setup('fit')",
    "eval": "from wanda_lightning.evaluation import load_tasks; load_tasks(['boolq'])",
    "lora": "import wanda_lightning.lora",
    "report": "from pathlib import Path; from wanda_lightning import PruningReport; "
    "PruningReport.from_json(Path('pruning_report.json').read_text()).save('report.html')",
}


def closure(distribution: metadata.Distribution) -> set[str]:
    """Return the names of all distributions that a distribution requires, directly or not."""
    found: set[tuple[str, frozenset[str]]] = set()
    waiting = list(required(distribution, frozenset()))
    while waiting:
        pair = waiting.pop()
        if pair not in found:
            found.add(pair)
            waiting += required(metadata.distribution(pair[0]), pair[1])
    return {name for name, _ in found}


def required(
    distribution: metadata.Distribution, extras: frozenset[str]
) -> Iterator[tuple[str, frozenset[str]]]:
    """Yield the distributions that a distribution with some extras requires, with their extras."""
    for requirement in map(Requirement, distribution.requires or []):
        marker = requirement.marker
        if not marker or any(marker.evaluate({"extra": extra}) for extra in extras or {""}):
            yield requirement.name, frozenset(requirement.extras)


def link(name: str, folder: Path) -> None:
    """Link the files of a distribution into a folder."""
    distribution = metadata.distribution(name)
    for part in {file.parts[0] for file in distribution.files or ()} - {"..", "__pycache__"}:
        target, place = Path(distribution.locate_file(part)), folder / part
        if not place.exists():
            place.symlink_to(target, target_is_directory=target.is_dir())


def run(*command: object, cwd: Path = ROOT, env: dict[str, str] | None = None) -> str:
    """Run a command, print it, and return what it printed. End the script if it fails."""
    words = [str(part) for part in command]
    print("$", *(word for word in words if "\n" not in word), flush=True)
    done = subprocess.run(words, text=True, stdout=subprocess.PIPE, cwd=cwd, env=env)
    print(done.stdout, end="", flush=True)
    if done.returncode:
        sys.exit(f"Failed with status {done.returncode}.")
    return done.stdout


def main() -> None:
    """Build, check, install and prune."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run(sys.executable, "-m", "build", "--outdir", folder / "dist")
        built = sorted((folder / "dist").iterdir())
        run(sys.executable, "-m", "twine", "check", "--strict", *built)
        venv.create(folder / "venv", symlinks=True)
        python = folder / "venv" / "bin" / "python"
        wheel = next(file for file in built if file.suffix == ".whl")
        missing = set(run("git", "ls-files", "wanda_lightning").split()) - set(
            zipfile.ZipFile(wheel).namelist()
        )
        assert not missing, f"The wheel lacks {', '.join(sorted(missing))}"
        run(
            sys.executable,
            "-m",
            "pip",
            "--python",
            python,
            "install",
            "--quiet",
            "--no-deps",
            wheel,
        )
        site = next((folder / "venv" / "lib").glob("python*/site-packages"))
        installed = metadata.Distribution.at(next(site.glob("wanda_lightning-*.dist-info")))
        for distribution in sorted(closure(installed)):
            link(distribution, site)
        isolated = {
            "cwd": folder,
            "env": {"HOME": name, "PATH": "/usr/bin:/bin", "HF_HUB_OFFLINE": "1"},
        }
        run(python, "-c", PRUNE.format(prefix=name), **isolated)
        command = python.with_name("wanda-lightning")
        assert "wanda_lightning" in run(command, "--version", **isolated)
        run(command, "inspect", "--model", folder / "model", "--pattern", "2:4", **isolated)
        for extra, code in EXTRAS.items():
            check = f"try:\n    {code}\nexcept ImportError as error:\n    print(error)"
            assert f"pip install '.[{extra}]' in" in run(python, "-c", check, **isolated), extra


if __name__ == "__main__":
    main()
