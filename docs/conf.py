"""Sphinx: `make docs` builds the site from docs/ into build/docs, without a network."""

from importlib.metadata import version as installed_version

project = "toolkit"
copyright = "the authors of toolkit"
version = release = installed_version("toolkit")

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 4
html_theme = "furo"
html_title = f"toolkit {version}"
copybutton_prompt_text = r"\$ "
copybutton_prompt_is_regexp = True
autodoc_typehints = "description"
