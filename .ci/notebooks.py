"""Run the notebooks in docs/notebooks from the top, and write their outputs into them.

make notebooks
"""

import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "docs" / "notebooks"
CACHE = ROOT / ".cache"  # the downloaded models


def main() -> None:
    """Run all; a notebook that raises an error is not written."""
    for file in sorted(FOLDER.glob("*.ipynb")):
        print(file.stem, flush=True)
        notebook = nbformat.read(file, as_version=4)
        with tempfile.TemporaryDirectory() as folder:
            Path(folder, ".cache").symlink_to(CACHE)
            NotebookClient(
                notebook, timeout=600, record_timing=False, resources={"metadata": {"path": folder}}
            ).execute()
        for cell in notebook.cells:
            if cell.cell_type == "code":  # stderr has messages of other libraries
                cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
        notebook.metadata = {
            "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "language_info": {"name": "python"},
        }
        nbformat.write(notebook, file)


if __name__ == "__main__":
    main()
