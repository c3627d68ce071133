"Build the site in _docs/ with Sphinx, from the notebooks as they are: nothing is executed. Run: make docs, or python nbs/_site/build.py"
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

here = pathlib.Path(__file__).parent
nbs, root = here.parent, here.parents[1]
OUTSIDE = dict(CONTRIBUTING="contributing", CHANGELOG="changelog", LICENSE="licence")   # files of the repository that become pages


def text(cell): return "".join(cell["source"])


def room(nb):
    "The module that a notebook is the source of, if any."
    return next((m[1] for c in nb["cells"] if (m := re.search(r"^#\|\s*default_exp (\w+)", text(c), re.M))), None)


def code(cell):
    "A code cell for the reader: directives gone, tables and pictures instead of widgets that need a kernel. None if it is hidden."
    if re.search(r"^#\|\s*hide\b", text(cell), re.M): return None
    src = re.sub(r"^#\|.*\n?", "", text(cell), flags=re.M).strip("\n")
    outs = [o for o in cell["outputs"] if "application/vnd.jupyter.widget-view+json" not in o.get("data", {}) or "text/html" in o["data"]]
    for o in outs: o.get("data", {}).pop("application/vnd.jupyter.widget-view+json", None)
    return dict(cell, source=src, outputs=outs) if src else None


def markdown(cell, up):
    "A text cell: files above nbs/ are pages of the site, and the rest of the repository stands in code."
    def link(m): return f"]({up}pages/{OUTSIDE[m[1]]}.md)" if m[1] in OUTSIDE else m[0]
    return dict(cell, source=re.sub(r"\]\((?:\.\./)+(\w+)(?:\.md)?\)", link, text(cell)))


def notebook(path):
    "One page: the notebook's own cells, and a way to the reference of its module."
    nb = json.loads(path.read_text(encoding="utf-8"))
    up = "../" * (len(path.relative_to(nbs).parts) - 1)
    cells = [c for c in (markdown(c, up) if c["cell_type"] == "markdown" else code(c) for c in nb["cells"]) if c]
    if room(nb) and room(nb) != "all": cells[1:1] = [dict(cell_type="markdown", id="reference", metadata={}, source=f"Module `curvtools.{room(nb)}`: [what it exports](reference/{room(nb)}.md), in short.")]
    if path.name == "index.ipynb": cells.append(dict(cell_type="markdown", id="contents", metadata={}, source=contents()))
    return json.dumps(dict(nb, cells=cells))




def rooms(): return {p.stem: room(json.loads(p.read_text(encoding="utf-8"))) for p in sorted(nbs.glob("[0-9]*.ipynb"))}


def toc(title, *docs): return "\n".join(["```{toctree}", f":caption: {title}", ":hidden:", "", *docs, "```", ""])


def contents():
    "The tables of contents, from the files that are there."
    learn = [f"tutorials/{p.stem}" for p in sorted((nbs/"tutorials").glob("*.ipynb"))]
    pages = [f"pages/{p.stem}" for p in sorted((nbs/"pages").glob("*.*"))]
    return "\n".join([toc("Learn", *learn, "gallery"), toc("Know", *pages), toc("Rooms", *[p for p, m in rooms().items() if m]), toc("Studies", *[p for p, m in rooms().items() if not m]),
                      toc("Reference", "reference/index"), toc("Project", *[f"pages/{p}" for p in OUTSIDE.values()])])


def reference():
    "A page a module, and one that lists them."
    mods = {p: m for p, m in rooms().items() if m not in (None, "all")}
    yield "reference/index.md", "# Reference\n\nEvery public name, by module. Signatures and the notes beside the parameters come from the code; `[source]` shows it, with the shapes beside the algebra. `from curvtools.all import *` brings all of them but those of `cli`.\n\n```{toctree}\n:maxdepth: 1\n\n" + "\n".join(mods.values()) + "\n```\n"
    for stem, m in mods.items(): yield f"reference/{m}.md", f"# curvtools.{m}\n\nExplained, with examples that ran, in [{stem}](../{stem}.ipynb).\n\n```{{eval-rst}}\n.. automodule:: curvtools.{m}\n```\n"


def gallery():
    "All static copies of panels that stand in the notebooks, with the lines that made them."
    out = ["# Gallery", "The panels of the `Lab`, as they looked when the notebooks ran: static copies, which need no kernel. In a notebook, `panel.snapshot()` makes one and `panel.save(\"page.html\")` writes it. The same by hand: the [tutorial](tutorials/1_see_it_happen.ipynb); how they are built: [11_widgets](11_widgets.ipynb)."]
    for path in sorted(nbs.rglob("*.ipynb")):
        for c in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            for o in c.get("outputs", []):
                html = "".join(o.get("data", {}).get("text/html", ""))
                if (m := re.search(r"<b>(\w+)</b> \(static copy\)", html)):
                    out += [f"## {m[1]}", f"```python\n{text(c)}\n```", f'````{{raw}} html\n<div class="snapshot">{html}</div>\n````']
    return "\n\n".join(out) + "\n"


def pages():
    "What the site is made of: path -> text or bytes."
    for p in sorted(nbs.glob("*.ipynb")) + sorted((nbs/"tutorials").glob("*.ipynb")) + sorted((nbs/"pages").glob("*.ipynb")): yield p.relative_to(nbs), notebook(p)
    for p in sorted((nbs/"pages").glob("*.md")) + [p for p in sorted((nbs/"images").iterdir()) if p.is_file()]: yield p.relative_to(nbs), p.read_bytes()
    for src, page in OUTSIDE.items():
        p = next(root.glob(f"{src}*"))
        yield f"pages/{page}.md", p.read_text(encoding="utf-8") if p.suffix else f"# Licence\n\n```text\n{p.read_text(encoding='utf-8')}```\n"
    yield from reference()
    yield "gallery.md", gallery()


def write(src):
    "Only what changed, so that Sphinx reads only that again; what is gone is deleted."
    have = {p for p in src.rglob("*") if p.is_file()}
    for name, body in pages():
        p, body = src/name, body if isinstance(body, bytes) else body.encode()
        have.discard(p)
        if p.exists() and p.read_bytes() == body: continue
        p.parent.mkdir(parents=True, exist_ok=True); p.write_bytes(body)
    for p in have: p.unlink()


def build(src=root/"_proc"/"site", out=root/"_docs", args=("-q",)):
    "Any warning is an error."
    write(pathlib.Path(src))
    env = dict(os.environ, PYTHONPATH=os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")])), HF_HUB_OFFLINE="1")
    rc = subprocess.run([sys.executable, "-m", "sphinx", "-W", "--keep-going", "-b", "html", "-a", "-c", here, "-d", f"{src}-doctrees", *args, src, out], env=env).returncode
    shutil.rmtree(pathlib.Path(out).parent/"jupyter_execute", ignore_errors=True)   # copies of the notebooks that myst-nb leaves beside the site
    return rc


if __name__ == "__main__": sys.exit(build(args=sys.argv[1:]))
