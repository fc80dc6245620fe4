"""Configuration of the documentation. `make docs` builds it without a network; warnings are errors."""

import os
import re
from importlib import metadata
from pathlib import Path

from sphinx.application import Sphinx

project = "wanda_lightning"
author = "The wanda_lightning authors"
copyright = author
release = metadata.version("wanda_lightning")

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.intersphinx",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
exclude_patterns = ["_build", "README.md"]
root_doc = "contents"  # the table of contents; index is an ordinary page, which GitHub shows, too

html_theme = "furo"
html_title = "wanda_lightning"
html_logo = "logo.svg"
html_static_path = ["_static"]
html_css_files = ["style.css"]
html_theme_options = {"navigation_with_keys": True}
html_show_sphinx = False
smartquotes = False  # they turn -- into a dash

myst_heading_anchors = 3

nb_execution_mode = "off"  # the files hold the outputs: make notebooks
nb_merge_streams = True

napoleon_use_ivar = True
default_role = "code"  # docstrings write code in single backticks
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
# The pages are written by hand, so that methods and functions can be explained.
autosummary_generate = False
toc_object_entries = False  # the headings of Methods are the same names

# Pages that only link to a file.
ELSEWHERE = {
    "index": "docs/README.md",
    "changelog": "CHANGELOG.md",
    "contributing": "CONTRIBUTING.md",
}


def read_elsewhere(app: Sphinx, page: str, source: list[str]) -> None:
    """Show the file in place of a link to it, and whole docstrings in place of names."""
    if page in ELSEWHERE:
        file = Path(__file__).parents[1] / ELSEWHERE[page]
        text = file.read_text(encoding="utf-8").replace("](docs/", "](")
        source[0] = text.replace("](notebooks)", "](notebooks/language_model.ipynb)")
    elif page == "api":
        source[0] = NAME.sub(whole_docstring, source[0].replace(HEAD, ""))
    for name, file in ELSEWHERE.items():
        link = rf"\]\((?:\.\./)?{re.escape(file)}(#[\w-]+)?\)"
        source[0] = re.sub(link, rf"]({name}.md\1)", source[0])


HEAD = "| name | members | what it is |\n| --- | --- | --- |\n"
NAME = re.compile(r"^\| `(wanda_lightning[\w.]+)` \| ([^|]*) \| .*$", re.MULTILINE)


def whole_docstring(found: re.Match[str]) -> str:
    """Return the directive that replaces a name with its members and summary."""
    name, members = found.groups()
    kind = "function" if name.rpartition(".")[2].islower() else "class"
    shown = f"   :members: {members.replace('`', '').replace(' ', ', ')}\n" if members else ""
    return f"```{{eval-rst}}\n.. auto{kind}:: {name}\n{shown}```"


def setup(app: Sphinx) -> None:
    """Let pages be replaced."""
    app.connect("source-read", read_elsewhere)


# The inventories of other projects come from the network, so links to them are made only on request.
intersphinx_mapping = (
    {
        "python": ("https://docs.python.org/3", None),
        "torch": ("https://docs.pytorch.org/docs/stable", None),
        "lightning": ("https://lightning.ai/docs/pytorch/stable", None),
        "transformers": ("https://huggingface.co/docs/transformers/main/en", None),
        "timm": ("https://huggingface.co/docs/timm/main/en", None),
    }
    if os.environ.get("DOCS_ONLINE")
    else {}
)
