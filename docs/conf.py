"""Sphinx: Markdown pages, reference from docstrings. ``make docs``; warnings are errors."""

import re
from typing import Any

project = "clado"
author = "the clado authors"
copyright = author
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_click",
    "sphinx_copybutton",
]
html_theme = "furo"
html_title = "clado"
html_static_path: list[str] = ["images"]
html_show_sphinx = False
html_theme_options = {
    "light_css_variables": {"color-brand-primary": "#0a62c9", "color-brand-content": "#0a62c9"},
    "dark_css_variables": {"color-brand-primary": "#62abff", "color-brand-content": "#62abff"},
}
exclude_patterns = ["_build"]
myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3
autodoc_typehints = "none"  # docstrings give shapes and dtypes, the signature the rest
autodoc_member_order = "bysource"
napoleon_use_ivar = True
napoleon_use_rtype = False
python_use_unqualified_type_names = True
copybutton_prompt_text = "$ "


def bars_are_bars(app: Any, what: str, name: str, item: Any, options: Any, lines: list[str]) -> None:
    """Outside of literals, | is the magnitude of something and not a substitution."""
    text = re.split(r"(``.*?``)", "\n".join(lines), flags=re.S)
    lines[:] = "".join(part if part.startswith("``") else part.replace("|", "\\|") for part in text).split("\n")


def setup(app: Any) -> None:
    app.connect("autodoc-process-docstring", bars_are_bars)
