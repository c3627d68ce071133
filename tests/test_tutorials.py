"""Every tutorial runs from its first cell to its last; its exercises wait, refuse wrong answers and accept the right ones.

The right answers stand here and nowhere else, as expressions in the names that the tutorial itself leaves behind: an exercise
whose number no longer is what the tutorial computes fails."""
import contextlib
import io
import os
import pathlib
import re
import sys
import time

import pytest
from execnb.shell import CaptureShell, read_nb

from curvtools.check import _load, _folder, exercises

ROOT = pathlib.Path(__file__).parents[1]
TUTORIALS = [p for p in sorted((ROOT/"nbs"/"tutorials").glob("*.ipynb")) if not p.name.startswith(("_", "."))]

# tutorial -> exercise -> (the right answer, [wrong answers]): Python, evaluated in the tutorial's namespace after its run
ANSWERS = {
    "1": {1: ("'c' if half.fraction < .05 else 'b'", ["'a'", "'b'"]), 2: ("'a' if all(r['strict'] < .1 for r in by_tier if r['tier'] == 4) else 'b'", ["'b'", "'c'"]),
          3: ("'c' if cut['arithmetic.kept'] == min(cut[f'{f}.kept'] for f in families) else 'a'", ["'a'", "'b'"]),
          4: ("sweep(bench.model, basis.keep(rho=.95, blocks=[1, 2], projections=list('qkvo')), dict(m=learned), generate=False, ndcg=False, progress=False).rows[1]['m.strict']", ["0", "1."])},
}


def number(nb): return nb.stem.split("_")[0]


def said(check, *answer):
    with contextlib.redirect_stdout(io.StringIO()) as out: check(*answer)
    return out.getvalue()


@pytest.fixture(autouse=True)
def as_it_was(monkeypatch):
    monkeypatch.setenv("IN_TEST", "1")
    cwd, path = os.getcwd(), list(sys.path)
    yield
    os.chdir(cwd); sys.path[:] = path


@pytest.mark.parametrize("nb", TUTORIALS, ids=lambda p: p.stem)
def test_tutorial(nb, capsys):
    shell, start = CaptureShell(nb), time.time()
    os.chdir(nb.parent)
    shell.run_all(read_nb(nb), exc_stop=True, cell_timeout=600)   # raises what a cell raises
    with capsys.disabled(): print(f"\n{nb.stem}: {time.time() - start:.0f} s")
    answers = ANSWERS.get(number(nb), {})
    if answers: check = exercises(number(nb))
    for n, (right, wrong) in answers.items():
        assert said(check, n, eval(right, shell.user_ns)).startswith("right: "), f"exercise {n}: {right} is refused"
        for w in wrong: assert said(check, n, eval(w, shell.user_ns)).startswith("not yet: "), f"exercise {n}: {w} is not refused"
        for x in ("...", "None"): assert "waits for" in said(check, n, eval(x))
        for odd in ({}, object(), b"", float("nan")): assert said(check, n, odd).startswith(("wanted: ", "not yet: "))


@pytest.mark.parametrize("nb", [p for p in TUTORIALS if number(p).isdigit()], ids=lambda p: p.stem)
def test_exercises_of_a_tutorial(nb):
    "Asked for in its cells, in order, with the answer left open; and answered here."
    cells = read_nb(nb).cells
    asked = [int(n) for c in cells if c.cell_type == "code" for n in re.findall(r"^check\((\d+),", c.source, re.M)]
    there = _load(number(nb), _folder()) if asked else {}
    assert asked == sorted(ANSWERS.get(number(nb), {})) == [int(k.partition(".")[2]) for k in there]
    out = "".join(o.get("text", "") if isinstance(o.get("text", ""), str) else "".join(o["text"]) for c in cells for o in c.get("outputs", []))
    for k in there: assert f"exercise {k} waits for" in out, f"{nb.name}: the committed output of exercise {k} is not that of an open answer"


def test_every_exercise_belongs_to_a_tutorial():
    assert {p.stem for p in _folder().glob("*.json")} == set(ANSWERS)
