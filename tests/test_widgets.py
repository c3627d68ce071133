"The Lab without a browser: clicks, threads, errors, undo, and the numbers of the plain functions."
import gc
import html
import random
import re
import threading
import time
import weakref

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from curvtools.data import Passage, Passages, Windows
from curvtools.evaluate import perplexity
from curvtools.kfac import collect
from curvtools.recite import continuation, recite
from curvtools.widgets import Cancelled, Lab, Session, Snapshot, checksum, measure, preview_html, readout_html, some_of

EVIL = "<script>alert(1)</script>"


class Tok:
    "Token 5 is markup; all others are words."
    def decode(self, ids): return "".join(EVIL if i == 5 else f" w{i}" for i in ids)


def parts(seed=0):
    "A random Llama; 'memorised' is what it writes of itself, 'unseen' is noise. So strict is 1 and 0, without any training."
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(LlamaConfig(vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2, max_position_embeddings=64,
                                             initializer_range=.3, bos_token_id=1, eos_token_id=None, pad_token_id=0)).eval()
        draw = lambda n, T: torch.randint(2, 40, (n, T))
        mem = Passages(Passage(p.tolist(), continuation(model, p.tolist(), 6), label=f"{EVIL} {i}", kind=("natural", "canary")[i % 2], tier=(4, 64)[i % 3 == 0], count=5)
                       for i, p in enumerate(draw(12, 8)))
        new = Passages(Passage(p.tolist(), draw(1, 6)[0].tolist(), kind="natural") for p in draw(10, 8))
        return dict(model=model, tokenizer=Tok(), clean=Windows(draw(24, 16)), heldout=Windows(draw(12, 16)), memorized=mem, unseen=new)


@pytest.fixture
def P(): return parts()


@pytest.fixture
def lab(P): return Lab(**P).wait(120)


def text(w): return html.unescape(re.sub("<[^>]*>", "", w.value))
def state(model): return {k: v.clone() for k, v in model.state_dict().items()}
def same(a, b): return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_opens_with_everything_drawn(lab):
    c = lab.c
    assert "curvature: done" in text(c.status) and not lab.job and c.cancel.disabled and c.undo.disabled and not c.apply.disabled
    assert list(c.block.options) == [0, 1, 2] and list(c.projection.options) == ["gate", "up", "down"]
    for w in (c.spectrum, c.mass, c.region): assert w.value.startswith("<img alt=") and "model.layers.2.mlp.gate_proj" in w.value
    assert "12.0 x" not in text(c.readout) and "n = 12" in text(c.readout) and "n = 10" in text(c.readout) and "12 windows of 16" in text(c.readout)
    assert lab.line.startswith("factors = collect(model, clean")


def test_a_click_does_what_the_method_does(P):
    a, b = Lab(**P).wait(), Lab(**P).wait()
    a.c.prev.click(); b.step(-1)
    a.c.projection.value = "up"; b.choose(projection="up")
    a.c.rho.value = .5; b.plan(rho=.5)
    a.c.blocks.value = [0, 2]; b.plan(blocks=[0, 2])
    a.c.projections.value = ["gate"]; b.plan(projections=["gate"])
    a.c.kind.value = "canary"; b.read(0, tier=64, kind="canary")
    a.c.next_text.click(); b.turn()
    for name in ("spectrum", "mass", "region", "preview", "text", "weights", "readout", "code"):
        assert getattr(a.c, name).value == getattr(b.c, name).value, name
    assert (a.c.block.value, a.c.index.value, a.c.rho_box.value) == (1, 2, .5)
    with a.edit.applied(P["model"]): edited = checksum(P["model"], a.session.targets)
    a.c.apply.click(); a.wait()
    assert a.session.active and a.session.checksum() == edited
    a.c.undo.click()
    b.apply()
    assert b.session.checksum() == edited
    assert a.c.readout.value.replace(" (undone)", "") == b.c.readout.value
    b.undo()


def test_numbers_are_those_of_the_functions(lab, P):
    lab.plan(rho=.6, blocks=[1, 2], projections=["gate", "up", "down"]).apply()
    r, m = lab.session.readings, P["model"]
    assert r["original"]["memorised"].strict == 1 and r["original"]["unseen"].strict == 0
    found = {k: (recite(m, P["memorized"]).strict, recite(m, P["unseen"]).strict, float(perplexity(m, P["heldout"]))) for k in ["edited"]}
    lab.undo()
    found["original"] = recite(m, P["memorized"]).strict, recite(m, P["unseen"]).strict, float(perplexity(m, P["heldout"]))
    with lab.basis.random(0).keep(rho=.6, blocks=[1, 2], projections=["gate", "up", "down"]).applied(m):
        found["random"] = recite(m, P["memorized"]).strict, recite(m, P["unseen"]).strict, float(perplexity(m, P["heldout"]))
    for k, (a, b, p) in found.items():
        assert (r[k]["memorised"].strict, r[k]["unseen"].strict, float(r[k]["perplexity"])) == (a, b, p), k
        assert f"{p:.2f} [" in text(lab.c.readout)
    ratio = r["edited"]["perplexity"].ratio(r["original"]["perplexity"])
    assert "× {:.3f} [{:.3f}, {:.3f}]".format(*ratio) in text(lab.c.readout)


def test_the_line_of_python_does_the_same(lab, P):
    import curvtools.data, curvtools.kfac, curvtools.plots, curvtools.recite, curvtools.widgets
    names = {**P, **vars(curvtools.plots), **vars(curvtools.recite), **vars(curvtools.kfac), **vars(curvtools.widgets)}
    run = lambda: exec(lab.line, names)
    run()
    assert names["basis"].keys() == lab.basis.keys() and all(torch.equal(names["basis"][k].lam, lab.basis[k].lam) for k in lab.basis)
    lab.choose(1, "down"); run()
    assert names["e"].target == lab.eigen.target
    lab.plan(rho=.4, blocks=[0], projections=["up"]); run()
    assert names["edit"].settings == lab.edit.settings
    lab.read(1, tier=4, kind="canary"); run()
    assert names["p"] == lab.passage
    lab.apply(); after = lab.session.checksum(); line = lab.line; lab.undo()
    assert lab.line == "applied.undo()"
    exec(line, names)
    assert checksum(P["model"], lab.session.targets) == after
    exec(lab.line, names)
    assert lab.session.checksum() == lab.session.original


def test_undo_is_bit_exact(lab, P):
    m, before = P["model"], state(P["model"])
    rng = random.Random(0)
    for _ in range(6):                                           # any sequence of edits on edits, then undo
        lab.plan(rho=rng.choice([0, .3, .9, 1]), blocks=rng.sample([0, 1, 2], rng.randint(1, 3)))
        lab.apply()
        if rng.random() < .5: lab.undo(); assert same(state(m), before)
    if lab.session.active: lab.undo()
    assert same(state(m), before) and "same as at the start" in text(lab.c.weights)
    with pytest.raises(RuntimeError, match="nothing to undo"): lab.undo()
    loss = m(input_ids=torch.tensor([[3, 4, 5]]), labels=torch.tensor([[3, 4, 5]])).loss
    loss.backward()                                              # the weights are ordinary tensors still
    assert all(p.requires_grad for p in m.parameters())


def test_an_edit_starts_from_the_original(lab, P):
    lab.plan(rho=.7, blocks=[2]).apply(); one = lab.session.checksum()
    lab.plan(rho=.3, blocks=[0, 1, 2]).apply()
    lab.plan(rho=.7, blocks=[2]).apply()
    assert lab.session.checksum() == one
    lab.undo()


def test_both_continuations(lab, P):
    p = lab.read(2).passage
    before = continuation(P["model"], p)
    lab.plan(rho=.1, blocks=[0, 1, 2]).apply()
    with_edit = lab.session.checksum()
    lab.session.texts.clear()                                    # both must be found while the edit is in place
    a, b = lab.session.continuations(p)
    assert a == before == p.suffix and b == continuation(P["model"], p) != a
    assert lab.session.checksum() == with_edit
    lab.turn(0)
    assert "recited: all 6 tokens" in text(lab.c.text) and "first differs at token" in text(lab.c.text)
    lab.undo()
    assert "edited" not in text(lab.c.text)


def test_an_error_in_a_callback_is_shown_and_the_panel_lives_on(lab, P, monkeypatch):
    import curvtools.widgets as w
    before = state(P["model"])
    def broken(*a, **kw): raise RuntimeError(f"no luck {EVIL}")
    with monkeypatch.context() as mp:
        mp.setattr(w, "perplexity", broken)
        lab.plan(rho=.2).c.apply.click(); lab.wait()
        assert "apply and measure failed. RuntimeError: no luck <script>" in text(lab.c.status)
        assert "<details>" in lab.c.status.value and "Traceback" in lab.c.status.value and "<script" not in lab.c.status.value
        assert same(state(P["model"]), before) and not lab.session.active and "Weights: original" in text(lab.c.weights)
        with pytest.raises(RuntimeError, match="no luck"): lab.apply()        # the method raises
        mp.setattr(w, "kept_region", broken)
        lab.c.rho.value = .3
        assert "rho failed. RuntimeError" in text(lab.c.status)
    lab.c.rho.value = .4
    assert "rho: done" in text(lab.c.status) and "at rho 0.4" in lab.c.region.value
    lab.c.apply.click(); lab.wait()
    assert lab.session.active
    lab.undo()


def test_a_failing_measurement_takes_the_edit_back(P):
    s = Session(**P); s.load()
    before, n = state(P["model"]), []
    def step(name):
        if name.startswith("edited"): raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): s.apply(s.basis.keep(rho=.5), step=step)
    assert same(state(P["model"]), before) and not s.active and "edited" not in s.readings


def test_cancel_while_collecting(P):
    before, flags = state(P["model"]), [p.requires_grad for p in P["model"].parameters()]
    class Slow(Windows):
        def __iter__(self):
            for b in super().__iter__(): time.sleep(.1); yield b
    slow = Slow(P["clean"].ids, batch_size=1)
    lab = Lab(**dict(P, clean=slow), tokens=10**9)
    lab.session.sample["heldout"] = None
    assert lab.c.apply.disabled and lab.c.rho.disabled and not lab.c.cancel.disabled
    while lab.c.bar.value < 2: time.sleep(.01)
    t0 = time.time(); lab.c.cancel.click()
    with pytest.raises(RuntimeError, match="no curvature.*cancelled after.*load"): lab.wait(30)
    assert time.time() - t0 < 5 and "cancelled" in text(lab.c.status) and "⚠" not in text(lab.c.status)
    assert same(state(P["model"]), before) and [p.requires_grad for p in P["model"].parameters()] == flags
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in P["model"].modules())
    assert "cancelled" in lab.snapshot().html
    lab.session.clean = P["clean"]
    lab.load().wait(60)
    assert "curvature: done" in text(lab.c.status) and not lab.c.apply.disabled


def test_busy_is_said_and_nothing_is_lost(lab):
    go, started = threading.Event(), threading.Event()
    measured = lab.session.measure
    def slow(*a, **kw): started.set(); go.wait(30); return measured(*a, **kw)
    lab.session.measure = slow
    lab.c.apply.click(); started.wait(30)
    t0 = time.time()
    lab.c.rho.value = .33                                        # does not wait for the worker ...
    assert time.time() - t0 < 5 and "Busy (apply and measure)" in text(lab.c.status)
    lab.c.undo.click(); lab.c.apply.click(); lab.c.prev.click()
    assert "Busy" in text(lab.c.status) and "at rho 0.9:" in lab.c.region.value
    go.set(); lab.wait(60)
    assert "at rho 0.33" in lab.c.region.value                   # ... and is caught up with
    assert lab.session.active and lab.applied_as.startswith("rho 0.9")   # what was applied is what was asked for at the click
    del lab.session.measure
    lab.undo()


def test_callbacks_on_two_threads(lab, P):
    before, errors = state(P["model"]), []
    def play(seed):
        rng = random.Random(seed)
        try:
            for _ in range(8):
                torch.set_grad_enabled(True)
                rng.choice([lambda: setattr(lab.c.rho, "value", rng.randint(0, 100) / 100), lambda: setattr(lab.c.block, "value", rng.randint(0, 2)),
                            lambda: setattr(lab.c.index, "value", rng.randint(1, 4)), lab.c.next.click, lab.c.next_text.click, lab.apply, lab.c.undo.click,
                            lambda: setattr(lab.c.kind, "value", rng.choice(["", "natural", "canary"]))])()
        except RuntimeError as e:
            errors.append(e)
    threads = [threading.Thread(target=play, args=(i,)) for i in range(3)]
    for t in threads: t.start()
    for t in threads: t.join(120)
    assert not any(t.is_alive() for t in threads) and not errors
    lab.wait(60)
    assert "failed" not in text(lab.c.status) or "nothing to undo" in text(lab.c.status)
    name, rho = lab.eigen.target.name, lab.c.rho.value           # the pictures are those of the controls
    for w in (lab.c.spectrum, lab.c.mass, lab.c.region): assert name in w.value
    assert f"at rho {rho:g}:" in lab.c.region.value and f"Passage {lab.c.index.value} of {len(lab.passages)}" in text(lab.c.text)
    if lab.session.active:
        with lab.lock: assert lab.session.readings["edited"]["memorised"].strict == recite(P["model"], P["memorized"], generate=False).strict
        lab.undo()
    assert same(state(P["model"]), before)


def test_callbacks_need_no_grad_mode_of_their_thread(lab):
    seen = []
    lab.c.rho.observe(lambda c: None, "value")
    import curvtools.widgets as w
    f = w._guard(lab, "test", lambda: seen.append(torch.is_inference_mode_enabled()))
    t = threading.Thread(target=f); t.start(); t.join()
    f()
    assert seen == [True, True] and not torch.is_inference_mode_enabled()


def test_text_is_inert(lab):
    lab.read(0)
    p = Passage((5, 5, 6), (5, 7), label=EVIL, source="<img src=x onerror=alert(1)>", kind="<b>")
    lab.session.memorized.append(p)
    lab.read(len(lab.session.memorized) - 1)
    h = lab.c.text.value + lab.snapshot().html
    assert "<script" not in h and "<img src=x" not in h and "&lt;script&gt;" in h and "<b>" not in lab.c.text.value


def test_snapshot_stands_alone(lab, tmp_path):
    lab.plan(rho=.5).apply()
    s = lab.snapshot()
    assert isinstance(s, Snapshot) and s._repr_html_() == s.html
    assert s.html.count("data:image/png;base64,") == 3 and not re.search(r"https?://|<script|src=\"(?!data:)", s.html)
    assert "edited" in s.html and "Would keep" in s.html and lab.session.checksum() in s.html
    assert len(s.html) < 300_000
    assert "charset" in s.save(tmp_path/"lab.html").read_text(encoding="utf-8")
    bundle = lab._repr_mimebundle_()
    assert bundle["text/html"] == s.html and "application/vnd.jupyter.widget-view+json" in bundle
    lab.undo()


def test_what_is_not_given_is_not_shown(P):
    lab = Lab(model=P["model"], clean=P["clean"]).wait(60)
    lab.plan(rho=.5).apply()
    assert "no such passage" in text(lab.c.text)
    lab.undo()
    lab = Lab(model=P["model"], tokenizer=None, memorized=P["memorized"], factors=collect(P["model"], P["clean"], progress=False)).wait(60)
    assert "perplexity" not in text(lab.c.readout) and "unseen" not in text(lab.c.readout) and f" {P['memorized'][0].prefix[1]}" in text(lab.c.text)


def test_refusals(P, lab):
    with pytest.raises(ValueError, match="needs a model"): Lab()
    with pytest.raises(ValueError, match="clean="): Lab(model=P["model"])
    other = Lab(**dict(P, factors=collect(parts(1)["model"], P["clean"], progress=False)))
    with pytest.raises(RuntimeError, match="no curvature"): other.wait(60)
    assert "⚠" in text(other.c.status)
    for f, says in ((lambda: lab.choose(7), "no block 7"), (lambda: lab.choose(projection="q"), "'q'.*gate"), (lambda: lab.plan(rho=-1), "between 0 and 1"), (lambda: lab.plan(blocks=[9]), "no block 9"),
                    (lambda: lab.read(99), "no passage 99"), (lambda: lab.read(which="mine"), "mine"), (lambda: lab.read(tier=3), "no tier 3")):
        with pytest.raises(ValueError, match=says): f()
    lab.c.blocks.value = []
    assert "at least one block" in text(lab.c.preview)
    lab.c.apply.click(); lab.wait()
    assert "choose at least one block" in text(lab.c.status) and not lab.session.active


def test_everything_has_a_name(lab):
    import ipywidgets as W
    for name, w in vars(lab.c).items():
        if isinstance(w, W.DOMWidget) and not isinstance(w, (W.HTML, W.IntProgress)): assert w.description, name
    assert lab.c.rho.continuous_update is False


def test_a_closed_lab_is_let_go(P):
    lab = Lab(**P).wait(60)
    gone = weakref.ref(lab)
    lab.close()
    del lab; gc.collect()
    assert gone() is None


def test_choices_are_even():
    ps = Passages(Passage((i + 1,), (1,), kind=("a", "b")[i % 2]) for i in range(400))
    some = some_of(ps, 200)
    assert len(some) == 200 and 60 < len(some.where(kind="a")) < 140 and some == some_of(ps, 200) and some_of(ps, 400) is ps


def test_a_worker_has_as_many_threads_as_its_caller(P):
    "torch counts threads per thread; with another number sums are rounded differently, and the printed line of Python would not give the Lab's numbers."
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        lab = Lab(**P).wait(120)
        basis = collect(P["model"], P["clean"], targets="mlp", progress=False).eigen(P["model"], progress=False)
        assert all(torch.equal(basis[k].lam, lab.basis[k].lam) for k in lab.basis)
    finally: torch.set_num_threads(threads)
