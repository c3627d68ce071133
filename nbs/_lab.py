"Write the notebook that `curvtools lab` opens: the first tutorial without its outputs, so that nobody reads the answers first. Run: python nbs/_lab.py"
import json
import pathlib
import sys

here = pathlib.Path(__file__).parent
NAME = "1_see_it_happen.ipynb"


def bare():
    nb = json.loads((here/"tutorials"/NAME).read_text(encoding="utf-8"))
    for c in nb["cells"]:
        if c["cell_type"] == "code": c.update(outputs=[], execution_count=None)
    return json.dumps(nb, indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    if "--stdout" in sys.argv: sys.stdout.write(bare())
    else: (here.parent/"curvtools"/"static"/NAME).write_text(bare(), encoding="utf-8")
