"""nbs/20_real_models.ipynb, all of it, on real weights: where CURVTOOLS_QWEN and CURVTOOLS_GEMMA say where they are, a small part of the work; else skipped.

Each is a model folder, a .gguf file or a hub id, of Qwen/Qwen2.5-Coder-0.5B-Instruct and of google/gemma-3-270m.
What so few passages show is no result; that every cell runs, and the assertions in them, is what is tested."""
import json
import os
from pathlib import Path

import nbdev.test as nt
import pytest

pytestmark = pytest.mark.real
ROOT = Path(__file__).parents[1]
NB = ROOT/"nbs"/"20_real_models.ipynb"
MISSING = [k for k in ("CURVTOOLS_QWEN", "CURVTOOLS_GEMMA") if not os.environ.get(k)]


@pytest.mark.skipif(bool(MISSING), reason=f"{' and '.join(MISSING)} not set: the weights of the study are not at hand")
def test_the_study_runs(monkeypatch):
    monkeypatch.setenv("CURVTOOLS_SMALL", "1")
    cwd = Path.cwd()
    try: ok, _ = nt.test_nb(NB, skip_flags=["notest", "gpu"], basepath=ROOT)
    finally: os.chdir(cwd)
    assert ok


def test_the_study_has_its_outputs():
    "What is committed was run: every slow cell that prints has something to show, nothing failed, and the file is small."
    cells = [c for c in json.loads(NB.read_text())["cells"] if c["cell_type"] == "code"]
    slow = [c for c in cells if "".join(c["source"]).startswith("#| slow")]
    assert len(slow) > 10 and NB.stat().st_size < 400_000
    assert not [c["id"] for c in cells for o in c["outputs"] if o["output_type"] == "error"]
    assert not [c["id"] for c in slow if "print(" in "".join(c["source"]) and not c["outputs"]]
    says = "".join("".join(o.get("text", "")) for c in slow for o in c["outputs"])
    assert all(f"{m:<20} +" in says for m in ("code.ppl_ratio", "prose.ppl_ratio")), "the paired differences are computed and kept"
