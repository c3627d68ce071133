"Every sentence of the README and of the pages that holds a number, and where the number comes from. Used by test_claims.py; `python tests/claims.py` prints what is not accounted for."
import json
import pathlib
import re

ROOT = pathlib.Path(__file__).parents[1]
PAGES = ["README.md", *(f"nbs/pages/{n}.md" for n in ("glossary", "limits", "others", "sharp_and_flat", "stability"))]
NUMBER = re.compile(r"(?<![\w.@/-])-?(?:\d{1,3}(?:,\d{3})+|\d+)?\.?\d+(?![\w-]|\.\d|@)")


def plain(text):
    "Text without code, formulas, addresses of links and comments."
    text = re.sub(r"^```.*?^```|^(?: {4}[^\n]*\n)+", "", text, flags=re.S | re.M)
    text = re.sub(r"\$[^$]*\$|`[^`]*`|<!--.*?-->", " ", text, flags=re.S)
    text = re.sub(r"\[(\d\d_\w+|\d [A-Z][^\]]*)\]", "[]", text)             # the number in the name of a room or a tutorial
    return re.sub(r"\]\([^)]*\)", "]", text)


def sentences(path):
    "The sentences of a page, one table row or item at most."
    for block in re.split(r"\n\s*\n|\n(?=[|*-] |\d+\. )", plain((ROOT/path).read_text(encoding="utf-8"))):
        if block.lstrip().startswith("#") and "\n" not in block.strip(): continue
        block = re.sub(r"^\s*(\d+\.|[-*]) ", "", " ".join(block.split()))
        yield from filter(None, map(str.strip, re.split(r"(?<=[.:!?])\*? +(?=[A-Z*\[(])", block)))


def numbers(text): return [m.replace(",", "") for m in NUMBER.findall(text.replace("−", "-"))]


def claimed(): return [(p, s) for p in PAGES for s in sentences(p) if numbers(s)]


def output(cell):
    "What a cell printed or showed as text."
    text = []
    for o in cell.get("outputs", []):
        d = o.get("data", {})
        text.append("".join(o.get("text", "")) or "".join(d.get("text/plain", "")) + " " + re.sub(r"<[^>]*>", " ", "".join(d.get("text/html", ""))))
    return " ".join(text)


def notebook(name):
    path = next(p for p in (ROOT/"nbs").rglob(f"{name}.ipynb"))
    return {c["id"]: c for c in json.loads(path.read_text(encoding="utf-8"))["cells"]}


def found(number, text):
    "Does a text hold this number, as it stands or as a share of 1 for a percentage, before it was rounded? `x 1.023` also stands for 2.3 %."
    places, want = len(number.partition(".")[2]), float(number)
    half = .5 * 10**-places + 1e-9
    for x in map(float, numbers(text)):
        for y in (x, 100 * x, 100 * (x - 1), 100 * (1 - x)):
            if abs(y - want) <= half: return True
    return False


def ledger(): return json.loads((ROOT/"tests"/"claims.json").read_text(encoding="utf-8"))


def source(claim):
    "The text a claim's numbers must stand in: the named lines of the outputs of cells, or a file of the repository."
    if "test" in claim: return (ROOT/claim["test"]).read_text(encoding="utf-8")
    text = []
    for cell in claim["cells"]:
        name, which, *lines = cell.split(":", 2)
        text += [l for l in output(notebook(name)[which]).split("\n") if not lines or re.search(lines[0], l)]
    return "\n".join(text)


def of(page, sentence): return [c for c in ledger() if c["page"] == page and c["says"] in sentence]


if __name__ == "__main__":
    for page, s in claimed():
        for c in (mine := of(page, s)):
            if "why" not in c and (lost := [n for n in numbers(s) if not found(n, source(c))]): print(f"{page}: {lost} of “{s[:90]}” not in {c.get('cells') or c.get('test')}")
        if len(mine) != 1: print(f"{page}: {len(mine)} sources for “{s}”")
