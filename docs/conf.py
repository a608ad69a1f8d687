"""Sphinx's configuration: `make docs` builds the site from this folder."""

import inspect
import os
import pathlib
import re

import jax.numpy as jnp
from sphinx.util import logging

import optax_lowmem as lowmem
import pallas_kernels

_LOGGER = logging.getLogger(__name__)

ROOT = pathlib.Path(__file__).parent.parent
# The pages' code cells run in kernels of their own, which inherit these.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"
os.environ["MATPLOTLIBRC"] = str(ROOT / "docs" / "_static" / "matplotlibrc")
os.environ["PYTHONPATH"] = str(ROOT)  # for `examples` and `docs.figures`

project = "optax_lowmem"
author = "the optax_lowmem authors"
copyright = "the optax_lowmem authors, Apache-2.0"
version = release = lowmem.__version__

extensions = [
  "sphinx.ext.autodoc",
  "sphinx.ext.autosummary",
  "sphinx.ext.napoleon",
  "sphinx.ext.viewcode",
  "myst_nb",
  "sphinx_copybutton",
  "sphinx_design",
]
exclude_patterns = ["_build", "results", "jupyter_execute", "**.ipynb_checkpoints"]
nitpicky = True
# Names of other libraries: the build reads no site, so it has no pages to link them to.
nitpick_ignore_regex = [
  (r"py:.*", r"(jax|jnp|optax|flax|nnx|numpy|np|os|typing|collections)\b.*"),
  # Type aliases and private names in signatures.
  (r"py:.*", r"(optax_lowmem|pallas_kernels)\.(?!nnx\.)\w+\..*"),
  (r"py:.*", r"(Any|Self|Weights|Name|Implementation|Rounding|Array|ArrayTree|optional)"),
]

autosummary_generate = True
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_typehints = (
  "none"  # Optax's and JAX's unions fill a page; docstrings say what arguments are
)
default_role = "code"  # our docstrings have Markdown's `code`
maximum_signature_line_length = 80
python_use_unqualified_type_names = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False
viewcode_line_numbers = True

myst_enable_extensions = ["attrs_block", "attrs_inline", "colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 4
nb_execution_mode = "force"
nb_execution_timeout = 240
nb_execution_raise_on_error = False  # a warning, and so an error, with its traceback
nb_execution_show_tb = True
nb_merge_streams = True
nb_render_markdown_format = "myst"
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

templates_path = ["_templates"]
html_theme = "sphinx_book_theme"
html_title = "optax_lowmem"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sourcelink = False
html_copy_source = False
html_theme_options = {
  "show_navbar_depth": 1,
  "show_toc_level": 2,
  "use_download_button": False,
  "use_fullscreen_button": False,
  "navigation_with_keys": False,
  "navbar_persistent": [],
}


def _markdown(app, what, name, obj, options, lines):
  """Turns a docstring's Markdown into reStructuredText: links, and `code`s with a plural s."""
  if what == "class" and type(obj) is not type:  # NNX's metaclass hides the constructor
    lines += ["", *inspect.getdoc(obj.__init__).splitlines()]
  text = "\n".join(lines)
  text = re.sub(r"\[([^\]]+)\]\((https?://[^)\s]+)\)", r"`\1 <\2>`__", text)
  text = re.sub(r"(``[^`\n]+``|`[^`\n]+`)(?=([a-z])?)", lambda m: m[1] + r"\ " * bool(m[2]), text)
  if what == "property":  # Napoleon takes what stands before a colon for its type
    text = text.replace(": ", " — ", 1)
  lines[:] = text.split("\n")


def _signature(app, what, name, obj, options, signature, returns):
  """Mends two signatures: NNX hides a class's behind a metaclass, optimizers have a sentinel."""
  if signature is None:
    return None
  if what == "class" and signature == "(*args, **kwargs)":
    parameters = list(inspect.signature(obj.__init__).parameters.values())[1:]
    parameters = [x.replace(annotation=inspect.Parameter.empty) for x in parameters]
    signature = str(inspect.Signature(parameters))
  return signature.replace("=DEFAULT", "='int8'"), returns


def _skip_fields(app, what, name, obj, skip, options):
  """Leaves out what `NamedTuple` and defaults say of fields: a class has a docstring."""
  documentation = getattr(obj, "__doc__", None) or ""
  return skip or documentation.startswith("Alias for field number") or obj is jnp.bfloat16


def _site_links(app, docname, source):
  """Pages that the site includes from elsewhere in the repository have links of their own."""
  source[0] = source[0].replace("](../examples/README.md)", "](examples.md)")


def _all_names_documented(app, env):
  """Fails the build where a public name is missing from the API page."""
  page = (ROOT / "docs" / "api.md").read_text()
  for package in (lowmem, pallas_kernels):
    for name in _public(package):
      if not re.search(rf"^\s+(\w+\.)?{name}$", page, re.MULTILINE):
        _LOGGER.warning(f"docs/api.md has no entry for {package.__name__}.{name}")


def _public(package) -> list[str]:
  if hasattr(package, "__all__"):
    names = package.__all__
  else:
    names = [name for name in vars(package) if not name.startswith("_")]
  return [name for name in names if _is_ours(getattr(package, name))]


def _is_ours(x) -> bool:
  return callable(x) and x.__module__.startswith(("optax_lowmem", "pallas_kernels"))


def setup(app):
  """Connects the functions above."""
  app.connect("autodoc-process-docstring", _markdown, priority=400)
  app.connect("autodoc-process-signature", _signature)
  app.connect("autodoc-skip-member", _skip_fields)
  app.connect("source-read", _site_links)
  app.connect("env-check-consistency", _all_names_documented)
