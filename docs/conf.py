"""Sphinx configuration. A warning is an error: see `make docs`."""

import sys
from pathlib import Path

from sphinx.util import logging

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

import pages  # noqa: E402

import pyro_ssm  # noqa: E402
from pyro_ssm._version import __version__  # noqa: E402

pages.write_all(pyro_ssm, ROOT)

project = "pyro_ssm"
author = copyright = "The pyro_ssm developers"
version = release = __version__

extensions = ["sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.mathjax", "myst_nb"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"pyro_ssm {version}"

nb_execution_mode = "off"  # notebooks are executed by the tests, and shown with the outputs they are stored with
myst_enable_extensions = ["dollarmath", "amsmath"]

autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
python_use_unqualified_type_names = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True  # one entry an attribute, not a second one beside that of the class body
napoleon_use_rtype = False


def skip_namedtuple_noise(app, what, name, obj, skip, options):
    """The fields of a NamedTuple are told in the docstring of the class; "Alias for field number 0" tells nothing."""
    return True if (getattr(obj, "__doc__", "") or "").startswith("Alias for field number") else None


def check_every_name(app, env):
    """Complain about public names that the finished reference lacks."""
    documented = env.get_domain("py").data["objects"]
    for name in pages.undocumented(pyro_ssm, documented):
        logging.getLogger(__name__).warning("the API reference lacks %s", name)


def setup(app):
    app.connect("autodoc-skip-member", skip_namedtuple_noise)
    app.connect("env-check-consistency", check_every_name)
