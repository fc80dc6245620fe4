"""Configuration of the documentation. `make docs` builds it without a network; warnings are errors."""

import os
import sys
from importlib import metadata
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "_extensions"))

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
    "tables",
]
exclude_patterns = ["_build", "results"]

html_theme = "furo"
html_title = "wanda_lightning"
html_logo = "logo.svg"
html_static_path = ["_static"]
html_css_files = ["style.css"]
html_theme_options = {"navigation_with_keys": True}
html_show_sphinx = False
smartquotes = False  # they turn -- into a dash

myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3

nb_execution_mode = "cache"
nb_execution_cache_path = str(Path(__file__).parent / "_build" / "notebooks")
nb_execution_in_temp = True
nb_execution_raise_on_error = True
nb_execution_timeout = 300
nb_merge_streams = True
nb_output_stderr = "remove"  # messages of Lightning and other libraries

napoleon_use_ivar = True
default_role = "code"  # docstrings write code in single backticks
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
autosummary_generate = False  # the pages are written by hand, so that methods and functions can be explained
toc_object_entries = False  # the headings of Methods are the same names

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
