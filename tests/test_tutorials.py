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
    "2": {1: ("(640*192)**2/(640**2 + 192**2)", ["33000", "2"]),
          2: ("'c'", ["'a'", "'B'"]),
          3: ("lambda lam, mu, rho: staircase(lam, mu, rho=rho).dense()", ["lambda lam, mu, rho: torch.outer(lam, mu) >= rho", "lambda lam: lam", "lambda lam, mu, rho: staircase(lam, mu, rho=rho)"]),
          4: ("e.mask(rho=.9).fraction", ["e.mask(rho=.5).fraction", ".9", "100*e.mask(rho=.9).fraction"])},
    "3": {1: ("max(d for d in range(49) if scores([1]*48, [1]*(48 - d) + [2]*d)['loose'])", ["36", "13"]),
          2: ("'abc'[(tiers[16].strict >= .1) + (tiers[16].strict > .8)]", ["'a'", "'c'"]),
          3: ("lambda z, n: 1 - (1 - z)**n", ["lambda z, n: n*z", "lambda z, n: 1/0"]),
          4: ("len(report.clean)", ["3", "6"]),
          5: ("'b' if loss['auc'] > flat['auc'] else 'a'", ["'a'", "'c'"])},
    "4": {1: ("(.65 - .5)/(.8 - .5)", [".65/.8", ".15"]),
          2: ("{'closed-book': 'a', 'open-book': 'b', 'arithmetic': 'c', 'logic': 'd'}[min(kept, key=lambda f: kept[f].share)]", ["'a'", "'d'"]),
          3: ("'b' if mild[1]['arithmetic'].low > mild[0]['arithmetic'].high else 'c'", ["'a'", "'c'"]),
          4: ("'b' if full['arithmetic'].share > .5 else 'a'", ["'a'"])},
    "5": {1: ("lambda said, given, true: (said == true)[given != true].float().mean()", ["lambda said, given, true: (said == true).float().mean()", "lambda said, given, true: (said == given)[given != true].float().mean()"]),
          2: ("'b' if after.recovered.value > .5 else 'c'", ["'a'", "'c'"]),
          3: ("1/len(pg.classes)", [".5", "10"]),
          4: ("compare_edits(pg, {'': planned(basis, plan_at(pg.plan, .3))})[1]['scores'].recovered.value", ["after.recovered.value", "before.recovered.value"])},
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
