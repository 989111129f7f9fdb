"""The settings of the documentation site, which ``make docs`` builds."""

from __future__ import annotations

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.application import Sphinx
from sphinx.writers.html5 import HTML5Translator

from fastkd import __version__

project, release, language = "fastkd", __version__, "en"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme = "furo"
html_title = f"fastkd {release}"
html_copy_source = False
html_show_copyright = False
html_static_path = html_css_files = ["site.css"]

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3

autodoc_typehints = "none"  # the docstrings say shapes and dtypes
autodoc_member_order = "bysource"
# The frameworks of the integrations, which need not be installed.
autodoc_mock_imports = ["lightning", "modelopt", "torchtune", "transformers", "trl"]

# A reference in a docstring must lead somewhere, unless it is to PyTorch or to an exception of Python's.
nitpicky = True
nitpick_ignore_regex = [("py:.*", r"torch\..*|[A-Z]\w+Error")]

html_math_renderer = "mathml"


def setup(app: Sphinx) -> None:
    """Formulas as MathML: browsers show it without a script, which would have to come from somewhere."""

    def inline(translator: HTML5Translator, node: nodes.Element) -> None:
        translator.body.append(tex2mathml(node.astext()))
        raise nodes.SkipNode

    def block(translator: HTML5Translator, node: nodes.Element) -> None:
        translator.body.append(tex2mathml(node.astext(), as_block=True))
        raise nodes.SkipNode

    app.add_html_math_renderer("mathml", (inline, None), (block, None))
