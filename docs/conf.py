"""Sphinx configuration."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from cce_cupy.version import VERSION

project = "cce_cupy"
author = "the cce_cupy authors"
release = version = VERSION

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.mathjax", "numpydoc"]
exclude_patterns = ["_build", "examples", "figures"]
nitpicky = True
nitpick_ignore_regex = [("py:class", ".*")]  # types of parameters are prose, not cross-references

myst_enable_extensions = ["dollarmath", "amsmath"]
myst_heading_anchors = 3

# Not needed to read the docstrings of what uses them, and large; the last registers operators.
autodoc_mock_imports = ["torch", "transformers", "cce_cupy.frameworks.torch_autograd"]
autodoc_typehints = "none"  # the docstrings say shapes and dtypes, which annotations cannot
numpydoc_show_class_members = False
numpydoc_validation_checks = {
    "all",
    "ES01",  # a summary may be enough
    "EX01",  # longer examples are whole files, in the quickstart
    "GL01",  # summaries start on the line of the opening quotes
    "RT03",  # a named tuple is described where it is defined
    "RT04",  # descriptions may start with the name of a dtype
    "SA01",  # "See Also" where there is something to see
    "SA04",  # its names speak for themselves
}
numpydoc_validation_overrides = {
    # Functions that share a signature refer to the one that documents it.
    "PR01": [r"As for `linear_cross_entropy`", r"Attributes\n-"],
    "PR04": [r"As for `linear_cross_entropy`"],
}

html_theme = "furo"
html_title = f"cce_cupy {VERSION}"
