"""The Lab on real language models that nobody here made, where CURVTOOLS_STORIES (a small Llama of stories) or CURVTOOLS_QWEN (Qwen2.5 0.5B) say where they are; else skipped.

Each control is set as a click would; what takes long runs in a worker, whose bar is looked at, and every button of a long job is cancelled once."""
import html
import os
import re
import time

import pytest
import torch

from curvtools.data import Passage, Passages, windows
from curvtools.cli import load_model
from curvtools.recite import continuation
from curvtools.widgets import Lab
from test_real import CALIBRATION, HELD, prose

pytestmark = pytest.mark.real
MODELS = dict(CURVTOOLS_STORIES=dict(targets="mlp", down="down", blocks=[0, 2, -1], collect=6000, passages=8, tokens=1024, slow=60), CURVTOOLS_QWEN=dict(targets="attention", down="o", blocks=[2, 12, -2], collect=2048, passages=4, tokens=512, slow=300))


def text(w): return html.unescape(re.sub("<[^>]*>", "", w.value))


class Clock:
    "How long things took, printed at the end; no callback may hold the page for over a second."
    def __init__(self, lab, slow): self.lab, self.slow, self.rows = lab, slow, []
    def __call__(self, name, f, ok=True):
        t0 = time.perf_counter(); f(); t1 = time.perf_counter(); self.lab.wait(self.slow); t2 = time.perf_counter()
        self.rows.append((name, t1 - t0, t2 - t0))
        if ok: assert "⚠" not in text(self.lab.panel.c.status), (name, text(self.lab.panel.c.status))
    def __str__(self): return "\n".join(f"{n:<44}{a:8.2f} s held {b:8.2f} s in all" for n, a, b in self.rows)


def cancelled(lab, panel, press, what):
    "Start, press Cancel when it runs, and say how long it took to stop."
    s, before = lab.session, lab.checksum()
    lab.wait(120); press()
    while s.job and what not in text(panel.c.status): time.sleep(.002)
    t0 = time.perf_counter(); panel.c.cancel.click(); lab.wait(120)
    assert lab.checksum() == before and not s.job and panel.c.cancel.disabled
    return "cancelled" in text(panel.c.status), time.perf_counter() - t0


@pytest.mark.parametrize("which", MODELS)
def test_a_tour(which):
    path, how = os.environ.get(which), MODELS[which]
    if not path: pytest.skip(f"{which} is not set")
    model, tokenizer = load_model(path)
    whole = {k: v.clone() for k, v in model.state_dict().items()} if which == "CURVTOOLS_STORIES" else None
    clean, held = windows(prose(CALIBRATION), tokenizer, length=128, max_tokens=how["collect"]), windows(prose(HELD), tokenizer, length=128, max_tokens=how["tokens"])
    starts = [held.ids[k][:24].tolist() for k in range(how["passages"])]
    mem = Passages(Passage(p, continuation(model, p, 12), label=f"its own {k}") for k, p in enumerate(starts))     # what it writes of itself, greedily: recited, by definition
    new = Passages(Passage(p, held.ids[k][24:36].tolist()) for k, p in enumerate(starts))
    t0 = time.perf_counter()
    lab = Lab(model=model, tokenizer=tokenizer, clean=clean, heldout=held, memorized=mem, unseen=new, plan=dict(collect=dict(targets=how["targets"], blocks=how["blocks"])), tokens=how["tokens"])
    opened = time.perf_counter() - t0
    lab.wait(600)
    clock, s, e = Clock(lab, how["slow"]*4), lab.session, lab.explorer
    clock.rows.append(("open", opened, time.perf_counter() - t0))
    start = s.checked

    assert all(getattr(e.c, n).value.startswith("<img alt=") for n in ("spectrum", "mass", "region", "energy")), text(e.c.status)
    blocks = sorted({t.block for t in s.targets})
    assert e.c.block.value in blocks
    for k in range(2): clock("Explorer: previous block", e.c.prev.click)
    for k in range(2): clock("Explorer: next block", e.c.next.click)
    clock("Explorer: projection", lambda: setattr(e.c.projection, "value", how["down"]))
    assert f"{how['down']}_proj" in e.c.spectrum.value
    clock("Explorer: rho", lambda: setattr(e.c.rho, "value", .5))
    clock("Explorer: order", lambda: setattr(e.c.by, "value", e.c.by.options[1][1] if isinstance(e.c.by.options[1], tuple) else e.c.by.options[1]))
    clock("Explorer: component", lambda: setattr(e.c.component, "value", (0, 0)))
    assert "most" in text(e.c.reading) and len(text(e.c.writing)) > 20
    clock("Explorer: two halves", e.c.stable.click)
    assert e.c.overlap.value.startswith("<img alt=")

    p = lab.probe; clock("Probe", lambda: lab.show("probe"))
    assert "recited: all 12 tokens" in text(p.c.text), text(p.c.text)
    clock("Probe: next", p.c.next.click)
    clock("Probe: next recited", p.c.recited.click)
    clock("Probe: own text", lambda: setattr(p.c.pasted, "value", "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. 🦊 çé"))
    assert "original" in text(p.c.text)
    clock("Probe: split", lambda: setattr(p.c.split, "value", p.c.split.value + 2))

    ed = lab.editor; clock("Editor", lambda: lab.show("editor"))
    clock("Editor: blocks", lambda: setattr(ed.c.blocks, "value", blocks[-2:]))
    clock("Editor: strength", lambda: setattr(ed.c.strength, "value", .3))
    clock("Editor: preview", ed.c.preview_now.click)
    assert "Would keep" in text(ed.c.preview), text(ed.c.preview)
    clock("Editor: apply with control", ed.c.apply.click)
    assert lab.checksum() != start and "control" in text(ed.c.readout) and "strict recitation, memorised" in text(ed.c.readout)
    clock("Editor: undo", ed.c.undo.click); assert lab.checksum() == start
    clock("Editor: redo", ed.c.redo.click)

    sp = lab.spectrum; clock("Spectrum", lambda: lab.show("spectrum"))
    clock("Spectrum: bands", sp.c.measure.click); assert sp.c.bands.value.startswith("<img alt="), text(sp.c.status)
    clock("Lens", lambda: lab.show("lens"))
    assert "original" in text(lab.lens.c.before) and "edited" in text(lab.lens.c.after)
    clock("Lens: own text", lambda: setattr(lab.lens.c.pasted, "value", "Call me Ishmael. Some years ago, never mind how long precisely." * 4))
    clock("Lens: window", lambda: setattr(lab.lens.c.width, "value", 3))
    clock("snapshot", lambda: lab.snapshot())
    state = lab.state
    lab.show("editor"); clock("Editor: reset", ed.c.reset.click); assert lab.checksum() == start

    stops = {}
    lab.show("editor"); ed.c.strength.value = .6; lab.wait(100)
    stops["apply"] = cancelled(lab, ed, ed.c.apply.click, "measuring")
    lab.show("spectrum").wait(); s.cache.pop("bands")
    stops["bands"] = cancelled(lab, sp, sp.c.measure.click, "bands of text")
    lab.show("explorer").wait(); s.cache.clear()
    stops["two halves"] = cancelled(lab, e, e.c.stable.click, "half")
    stops["another block"] = cancelled(lab, e, e.c.prev.click, "look")
    lab.show("lens").wait(); s.cache.pop("scale", None)
    stops["lens"] = cancelled(lab, lab.lens, lambda: setattr(lab.lens.c.pasted, "value", "Nobody knows the trouble I have seen. "*20), "scoring")
    print(f"\n{clock}\n" + "\n".join(f"Cancel {k}: {'stopped' if ok else 'was done already'} after {t:.2f} s" for k, (ok, t) in stops.items()))

    if whole: assert all(torch.equal(v, whole[k]) for k, v in model.state_dict().items())
    again = Lab(model=model, tokenizer=tokenizer, clean=clean, heldout=held, memorized=mem, unseen=new, plan=s.plan, tokens=how["tokens"], factors=s.factors, state=state).wait(600)
    assert again.state["at"] == 1 and again.checksum() != start and again.panel.title == "Lens"
    again.session.reset(); assert again.checksum() == start
    held_too_long = [r for r in clock.rows if r[1] > 1 and r[0] not in ("snapshot", "open")]
    if which == "CURVTOOLS_QWEN": assert not held_too_long, held_too_long
