"""The site: Markdown pages, an options reference made from the settings, an API reference made from the docstrings."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "docs")]

import rl_lora  # noqa: E402  after the paths

project = "rl_lora"
author = "rl_lora maintainers"
release = version = rl_lora.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx_copybutton",
    "reference",
]
source_suffix = {".md": "markdown"}
exclude_patterns = ["_build"]

myst_heading_anchors = 4
smartquotes = False  # -- begins an option
autodoc_inherit_docstrings = False
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
python_maximum_signature_line_length = 100
suppress_warnings = ["ref.python"]  # a public name stands in the API and in the room that it comes from

html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["code.css"]
html_title = f"rl_lora {release}"
html_copy_source = False
html_show_sphinx = False
html_show_copyright = False
