"Sphinx: notebooks as they are (myst-nb), the reference from the code, nothing executed, nothing fetched."
import configparser
import pathlib
import re

import curvtools.all
from docutils import nodes
from docutils.utils.math import MathError
from docutils.utils.math.latex2mathml import tex2mathml
from fastcore.docments import docments
from sphinx import addnodes

here = pathlib.Path(__file__).parent
ini = configparser.ConfigParser(delimiters=["="])
ini.read(here.parents[1]/"settings.ini", encoding="utf-8")

project, author, release = (ini["DEFAULT"][k] for k in ("title", "author", "version"))
copyright = ini["DEFAULT"]["copyright"]
language = "en"
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.viewcode"]

nb_execution_mode = "off"
nb_merge_streams = True
nb_ipywidgets_js = {}                                       # static copies are shown instead
nb_mime_priority_overrides = [("html", "text/html", 0)]
myst_enable_extensions = ["dollarmath", "colon_fence", "deflist"]
myst_heading_anchors = 4

foreign = {c.__name__ for x in vars(curvtools.all).values() if isinstance(x, type) for c in x.__mro__ if not c.__module__.startswith("curvtools")}
autodoc_default_options = {"members": True, "member-order": "bysource", "inherited-members": ",".join(sorted(foreign))}   # inherited, but from our own bases only
autodoc_typehints = "signature"
autodoc_class_signature = "mixed"
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 100
add_module_names = False
viewcode_follow_imported_members = False                    # a name stands where it is defined

html_theme = "furo"
html_title = f"{project} {release}"
html_static_path = ["site.css"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sphinx = False
html_math_renderer = "mathml"                             # browsers draw it themselves, so that the site works offline
highlight_language = "none"
pygments_style, pygments_dark_style = "friendly", "monokai"


def rst(line):
    "Docstrings are plain sentences: what stands in backticks is code or a name, all else means itself."
    return "".join(f":py:obj:`{x}`" if k % 2 and x.isidentifier() else f"``{x}``" if k % 2 and x else re.sub(r"([*|_\\])", r"\\\1", x) for k, x in enumerate(line.split("`")))


def notes(app, what, name, obj, options, lines):
    "The notes beside the parameters (docments), as fields of the docstring."
    lines[:] = map(rst, lines)
    if what not in ("function", "method", "class"): return
    try: have = docments(obj, full=True, returns=True)
    except (TypeError, ValueError, OSError, SyntaxError): return
    said = [(f":param {k}:" if k != "return" else ":returns:", v["docment"]) for k, v in have.items() if v.get("docment")]
    if said: lines += ["", *(f"{field} {rst(' '.join(note.split()))}" for field, note in said)]


def link(app, doctree, docname):
    "A public name in backticks leads to its reference."
    objects = app.env.get_domain("py").objects
    known = {k.rsplit(".", 1)[-1]: v for k, v in sorted(objects.items()) if k.count(".") == 2}
    for node in list(doctree.findall(nodes.literal)):
        entry = known.get(node.astext().removesuffix("()"))
        if entry is None or any(isinstance(p, (nodes.reference, nodes.title, addnodes.pending_xref)) for p in ancestors(node)): continue
        ref = nodes.reference("", "", internal=True, refuri=f"{app.builder.get_relative_uri(docname, entry.docname)}#{entry.node_id}")
        node.replace_self(ref); ref += node


def ancestors(node):
    while (node := node.parent) is not None: yield node


def mathml(block):
    def visit(self, node):
        tex = re.sub(r"\\[bB]igg?[lr]?(?![a-z])", "", node.astext())        # brackets grow by themselves
        try: self.body.append(tex2mathml(tex, as_block=block))
        except MathError as e: raise ValueError(f"{node.source}: the formula {tex!r} cannot be shown ({e}); write it another way") from e
        raise nodes.SkipNode
    return visit, None


def setup(app):
    app.add_html_math_renderer("mathml", mathml(False), mathml(True))
    app.connect("autodoc-process-docstring", notes)
    app.connect("doctree-resolved", link)
