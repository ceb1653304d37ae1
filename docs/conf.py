"""Sphinx: `make docs` builds the site from docs/ into build/docs, without a network."""

import sys
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from generated import fill

project = "toolkit"
copyright = "the authors of toolkit"
version = release = installed_version("toolkit")

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 4
myst_links_external_new_tab = True
html_theme = "furo"
html_title = f"toolkit {version}"
html_show_sourcelink = False
html_static_path = ["_static"]
html_css_files = ["custom.css"]
smartquotes = False  # they would make one dash of the two before an option
copybutton_prompt_text = r"\$ "
copybutton_prompt_is_regexp = True
autodoc_typehints = "description"
autodoc_member_order = "bysource"
default_role = "code"  # docstrings write `name` as Markdown does
# Types of torch and numpy are not looked up: that would need a network.
nitpicky = True
nitpick_ignore_regex = [("py:.*", ".*")]


def setup(app: Any) -> None:
    """Fill in what pages take from the code."""

    def read(app: Any, docname: str, source: list[str]) -> None:
        source[0] = fill(source[0])

    def describe(
        app: Any, what: str, name: str, value: Any, options: Any, lines: list[str]
    ) -> None:
        if what in ("attribute", "property", "data"):
            lines.insert(0, "")  # else napoleon takes what stands before a colon for a type

    app.connect("source-read", read)
    app.connect("autodoc-process-docstring", describe, priority=400)
