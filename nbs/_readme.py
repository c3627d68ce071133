"Write README.md from nbs/index.ipynb: hidden cells dropped, code fenced, text outputs indented. Run: python nbs/_readme.py"
import json
import pathlib
import re
import sys

here = pathlib.Path(__file__).parent


def block(cell):
    src = "".join(cell["source"])
    if re.search(r"^#\|\s*hide\b", src, re.M): return ""
    if cell["cell_type"] == "markdown": return re.sub(r"\]\((?!https?:|#)(\.\./)?", lambda m: "](" if m[1] else "](nbs/", src)   # links are relative to nbs/ there
    code = "\n".join(l for l in src.splitlines() if not l.startswith("#|")).strip()
    outs = []
    for o in cell["outputs"]:
        text = o.get("text") or o.get("data", {}).get("text/plain") or ""
        outs += ["    " + l for l in "".join(text).rstrip().splitlines()]
    return f"```python\n{code}\n```" + ("\n\n" + "\n".join(outs) if outs else "")


def readme(): return "\n\n".join(filter(None, map(block, json.loads((here/"index.ipynb").read_text(encoding="utf-8"))["cells"]))) + "\n"


if __name__ == "__main__":
    if "--stdout" in sys.argv: sys.stdout.write(readme())
    else: (here.parent/"README.md").write_text(readme(), encoding="utf-8")
