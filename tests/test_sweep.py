"Sweeps: every number is that of the plain functions, nothing is computed twice, nothing is left behind, and what cannot work is refused."
import dataclasses
import json
import math
import os
import signal
import threading
from functools import partial

import numpy as np
import pytest
import torch
from tiny import tiny

from curvtools.data import Passage, Passages, Windows
from curvtools.decompose import Basis
from curvtools.edit import keep, planned
from curvtools.evaluate import ndcg, perplexity, top_tokens
from curvtools.kfac import collect
from curvtools.recite import recite, wilson
from curvtools.sweep import (Cell, Measure, Method, Readout, Sweep, _crossing, _from_dict, _log_odds, _read_off, _to_dict, choose_blocks, contenders, content_key,
                             coupling, readout, sweep)
from curvtools.targets import find_targets, fingerprint, weight
from curvtools.baselines import random_directions

G = torch.Generator().manual_seed(0)
ids = lambda n, T=20: torch.randint(3, 37, (n, T), generator=G)
PS = lambda n, P=12: Passages(Passage(r[:P], r[P:]) for r in ids(n).tolist())


@pytest.fixture(scope="module")
def model(): return tiny("llama", torch.float32)

@pytest.fixture(scope="module")
def basis(model): return collect(model, ids(24).split(8), targets="all", progress=False).eigen(model, progress=False)

@pytest.fixture(scope="module")
def sets(): return dict(passages=dict(a=PS(6), b=PS(5)), windows=dict(w=Windows(ids(7), batch_size=4)))

@pytest.fixture(scope="module")
def two(basis): return {"K-FAC": Method(partial(keep, basis), "rho", (.95, .8)), "chance": Method(partial(keep, basis.random(0)), "rho", (.95, .8), control=True)}

def prints(model): return {t.name: fingerprint(model, t) for t in find_targets(model, "all")}


# --- measures ---

def test_measure_is_the_ratio_of_sums_and_its_rate_interval_is_wilsons():
    m = Measure("x", [1, 0, 1, 1], [1, 1, 1, 1], rate=True)
    assert m.value == .75 and m.interval() == wilson(3, 4)
    assert Measure("x", [1., 2.], [4., 2.], exp=True).value == pytest.approx(math.exp(3/6))

def test_bootstrap_of_a_measure_covers():
    "A ratio of two dependent sums whose true value is known: the 95 % interval holds it in 90 to 98.5 % of 400 simulations."
    rng, hit = np.random.default_rng(0), 0
    for k in range(400):
        den = rng.gamma(4, 1, 60); num = .3*den + rng.normal(0, 1, 60)     # E num / E den = .3
        lo, hi = Measure("x", num, den).interval(draws=400, seed=k); hit += lo <= .3 <= hi
    assert .90 <= hit/400 <= .985, hit/400

def test_readout_says_what_the_functions_say(model, basis, sets):
    top = {"w": top_tokens(model, sets["windows"]["w"], progress=False)}
    before = readout(model, **sets, progress=False)
    with basis.keep(rho=.8).applied(model):
        after = readout(model, **sets, top=top, progress=False)
        r, p, n = recite(model, sets["passages"]["a"], progress=False), perplexity(model, sets["windows"]["w"], progress=False), ndcg(model, sets["windows"]["w"], top["w"], progress=False)
    m = after.measures(before)
    assert m["a.strict"].value == r.strict and m["a.loose"].value == r.loose and m["a.lev"].value == pytest.approx(r.lev)
    assert m["a.right"].value == pytest.approx(r.tokens_right) and m["a.extractable"].value == r.extractable()[0]
    assert m["w.ppl"].value == pytest.approx(float(p), rel=1e-12) and m["w.ndcg"].value == pytest.approx(float(n), rel=1e-12)
    assert m["w.ppl_ratio"].value == pytest.approx(p.ratio(before.text["w"])[0], rel=1e-12)
    assert m["a.strict"].interval() == r.interval("strict")

def test_a_passage_that_comes_twice_counts_once_in_the_interval(model):
    ps = PS(3); r = readout(model, ps + ps, progress=False)
    assert r["passages.right"].n == 3 and r["passages.right"].value == pytest.approx(readout(model, ps, progress=False)["passages.right"].value)

def test_readout_survives_json(model, sets):
    r = readout(model, **sets, progress=False); s = _from_dict(json.loads(json.dumps(_to_dict(r))))
    assert {k: (m.value, m.interval()) for k, m in r.measures(r).items()} == {k: (m.value, m.interval()) for k, m in s.measures(r).items()}


# --- content keys ---

def test_keys_follow_content_not_identity(model, basis):
    t = torch.arange(6.)
    assert content_key(t) == content_key(t.clone()) != content_key(t + 1)
    assert content_key(t) != content_key(t.double()) and content_key(t) != content_key(t.view(2, 3))
    assert content_key([1, 2]) != content_key([12]) and content_key("1") != content_key(1) and content_key([[1], 2]) != content_key([1, [2]])
    assert content_key(dict(a=1)) != content_key(dict(b=1))
    again = collect(model, ids(8).split(4), targets="all", progress=False).eigen(model, progress=False)
    assert content_key(basis) != content_key(again)

def test_keys_of_functions_hold_their_code_and_what_they_carry():
    def make(k): return lambda x: x*k
    assert content_key(make(2)) == content_key(make(2)) != content_key(make(3))
    f, g = (lambda x: x + 1), (lambda x: x + 2)
    assert content_key(f) != content_key(g)
    assert content_key(partial(f, 1)) != content_key(partial(f, 2)) != content_key(partial(f, x=2))

def test_keys_of_edits(model, basis):
    a = basis.keep(rho=.8)
    assert content_key(a) == content_key(basis.keep(rho=.8)) != content_key(basis.keep(rho=.81)) != content_key(random_directions(a))

def test_what_has_no_content_is_refused():
    for x in (open, object(), threading.Lock()):
        with pytest.raises(TypeError, match="no content"): content_key(x)


# --- sweep ---

def test_cells_hold_what_readout_says_and_the_model_is_left_alone(model, basis, sets, two):
    before = prints(model); s = sweep(model, two, **sets, progress=False)
    assert prints(model) == before and [(c.method, c.strength) for c in s.cells] == [("K-FAC", .95), ("K-FAC", .8), ("chance", .95), ("chance", .8)]
    e = basis.keep(rho=.8)
    with e.applied(model) as h:
        r = readout(model, **sets, progress=False)
        change = math.sqrt(sum((h.edited[k] - h.original[k]).double().square().sum() for k in h.original)/sum(w.double().square().sum() for w in h.original.values()))
    c = s.cells[1]
    assert c.kept == e.kept and c.change == pytest.approx(change, rel=1e-6)
    for k, m in r.measures(s.base.readout).items(): assert c.readout.measures(s.base.readout)[k].value == pytest.approx(m.value, rel=1e-12), k
    assert c.energy == pytest.approx(sum(p.energy_share*float(weight(model, p.target).double().square().sum()) for p in e.plan.values())/sum(float(weight(model, p.target).double().square().sum()) for p in e.plan.values()), rel=1e-4)

def test_nothing_is_computed_twice(model, basis, sets, two, tmp_path, monkeypatch):
    s = sweep(model, two, **sets, folder=tmp_path, progress=False)
    assert s.computed == 4
    import curvtools.sweep as S
    monkeypatch.setattr(S, "readout", lambda *a, **k: pytest.fail("measured again")); monkeypatch.setattr(S, "top_tokens", lambda *a, **k: pytest.fail("measured again"))
    t = sweep(model, two, **sets, folder=tmp_path, progress=False)
    assert t.computed == 0 and t.rows == s.rows
    monkeypatch.undo()
    more = dict(two, **{"K-FAC": dataclasses.replace(two["K-FAC"], strengths=(.95, .9, .8))})
    assert sweep(model, more, **sets, folder=tmp_path, progress=False).computed == 1
    assert sweep(model, two, **dict(sets, windows=dict(w=Windows(ids(7)))), folder=tmp_path, progress=False).computed == 4   # other text

def test_an_interrupted_sweep_goes_on_where_it_was(model, basis, sets, two, tmp_path):
    before, n = prints(model), []
    def slow(rho):
        n.append(rho)
        if len(n) == 2: raise KeyboardInterrupt
        return basis.keep(rho=rho)
    methods = {"slow": Method(slow, "rho", (.95, .9, .8))}
    key = content_key                                              # the counter in the closure would change the key: a fixed one instead
    import curvtools.sweep as S
    with pytest.MonkeyPatch.context() as mp:
        mp.setattr(S, "content_key", lambda *xs: key(*[x for x in xs if x is not slow]))
        with pytest.raises(KeyboardInterrupt) as e: sweep(model, methods, **sets, folder=tmp_path, progress=False)
        assert [c.strength for c in e.value.partial.cells] == [.95] and prints(model) == before
        s = sweep(model, methods, **sets, folder=tmp_path, progress=False)
    assert s.computed == 2 and n == [.95, .9, .9, .8]

def test_a_grid_of_blocks(model, basis, sets):
    s = sweep(model, {"K-FAC": Method(partial(keep, basis), "rho", (.9,))}, **sets, blocks=[[0], [1, 2]], ndcg=False, generate=False, progress=False)
    assert [c.blocks for c in s.cells] == [[0], [1, 2]] and len(s.curves()) == 2
    assert {t.target.block for t in s.edit(s.cells[1]).plan.values()} == {1, 2}

def test_an_edit_brings_its_control(model, basis, sets):
    s = sweep(model, basis.keep(rho=.8), **sets, ndcg=False, generate=False, progress=False)
    assert [(c.method, c.control) for c in s.cells] == [("kfac", False), ("kfac, random directions", True)]
    assert s.cells[0].kept == s.cells[1].kept

def test_all_contenders_run_and_undo(model, basis, sets):
    factors, before = collect(model, ids(24).split(8), targets="all", progress=False), prints(model)
    b = factors.eigen(model, progress=False)
    ms = {k: dataclasses.replace(m, strengths=m.strengths[-1:]) for k, m in contenders(model, b, factors, None, sets["passages"]["a"], ids(8), blocks=[1], epochs=1).items()}
    with pytest.raises(ValueError, match="no method 'EK-FAC'"): contenders(model, b, strengths={"EK-FAC": (.8,)})
    s = sweep(model, ms, **sets, ndcg=False, generate=False, progress=False)
    assert prints(model) == before and {"K-FAC", "OBD", "identity", "Wanda", "SVD", "BSN", "NPO", "gradient ascent", "magnitude", "random directions", "random pairs", "matched noise", "output side", "input side"} == set(ms)
    assert [c.control for c in s.cells if "random" in c.method or "noise" in c.method] == [True]*3
    assert all(set(s.edit(c).plan) <= {t.name for t in find_targets(model, "all", blocks=[1])} for c in s.cells)


# --- matched axes ---

def test_crossing_and_reading_off_by_hand():
    x = torch.tensor([[1., 1.], [.6, .9], [.2, .8]]).double(); y = torch.tensor([[1., 1.], [2., 2.], [4., 4.]]).double()
    i, w = _crossing(x, .4)
    assert i.tolist() == [1, -1] and w[0].item() == pytest.approx(.5) and _read_off(y, i, w)[0].item() == pytest.approx(3.) and math.isnan(_read_off(y, i, w)[1])
    up, _ = _crossing(torch.tensor([[1.], [1.01], [1.1]]).double(), 1.02)
    assert up.tolist() == [1]

def fake(strict, nll, n=200, method="m", control=False, seed=0):
    "A cell whose passages are recited with a given probability and whose windows cost a given loss."
    rng = np.random.default_rng(seed); k = round(strict*n)
    d = dict(group=list(range(n)), strict=[1]*k + [0]*(n - k), loose=[None]*n, lev=[None]*n, right=[10*(i < k) for i in range(n)], L=[10]*n, logp=[-1.]*n)
    from curvtools.evaluate import Perplexity
    noise = torch.as_tensor(rng.normal(0, .3, 80))
    return Cell(method, nll, None, control, .5, nll, Readout({"s": d}, {"w": Perplexity(100*(2 + nll) + noise, torch.full((80,), 100), 101)}))

def test_matched_reads_off_prices_and_differences():
    base = fake(1., 0.); base.method, base.strength, base.change = "unedited", None, 0
    s = Sweep(base, [fake(.5, .02, method="K-FAC"), fake(.1, .04, method="K-FAC"), fake(.5, .05, method="SVD", seed=1), fake(.1, .09, method="SVD", seed=2)])
    a, b = s.matched(at=.3, show=["w.ppl_ratio"])
    assert a["w.ppl_ratio"][0] == pytest.approx(math.exp(.03), rel=2e-3) and b["w.ppl_ratio"][0] == pytest.approx(math.exp(.07), rel=2e-3)
    d = b["w.ppl_ratio - reference"]; assert d[1] <= d[0] <= d[2] and d[1] > 0 and d[0] == pytest.approx(math.exp(.07) - math.exp(.03), rel=.05)
    assert "SVD: costs more" in s.verdict(.3)[0]
    assert math.isnan(s.matched(at=.01, show="w.ppl_ratio")[0]["w.ppl_ratio"][0]) and "never reaches" in s.verdict(.01)[0]
    assert s.matched(on="w.ppl_ratio", at=math.exp(.03), show="s.strict")[0]["s.strict"][0] == pytest.approx(.3, abs=.02)

def test_best_and_pareto_never_take_a_control_for_a_method():
    base = fake(1., 0.); base.method, base.strength, base.change = "unedited", None, 0
    good, dear, luck = fake(.2, .01, method="K-FAC"), fake(.0, .2, method="K-FAC"), fake(.1, .005, method="chance", control=True)
    s = Sweep(base, [good, dear, luck])
    assert s.best(1.02) is good and s.best(2.) is dear
    with pytest.raises(ValueError, match="cheapest"): s.best(1.)
    assert s.pareto(controls=False) == [good, dear] and s.pareto() == [luck, dear]


def test_matched_on_the_kept_share_and_without_windows(model, basis, sets, two):
    s = sweep(model, two, **sets, ndcg=False, generate=False, progress=False)
    k = (s.cells[0].kept + s.cells[1].kept)/2
    a, b = s.matched(on="kept", at=k, show=["w.ppl_ratio", "energy"])
    lo, hi = sorted(c.readout.measures(s.base.readout)["w.ppl_ratio"].value for c in s.cells[:2])
    assert lo <= a["w.ppl_ratio"][0] <= hi and b["control"] and a["energy"][1] == a["energy"][2]
    bare = sweep(model, two, sets["passages"], generate=False, progress=False)
    with pytest.raises(ValueError, match="measured no windows"): bare.best()
    assert len(bare.rows) == 5 and repr(bare)

def test_strengths_by_block_survive_the_disk(model, basis, sets, tmp_path):
    m = {"K-FAC": Method(partial(keep, basis), "rho", ({0: .9, 1: .8},))}
    for _ in range(2): s = sweep(model, m, **sets, folder=tmp_path, ndcg=False, generate=False, progress=False)
    assert s.computed == 0 and s.edit(s.cells[0]).kept == s.cells[0].kept
    with pytest.raises(TypeError, match="plain"): Method(keep, "rho", (object(),))


# --- refusals ---

@pytest.mark.parametrize("kw, error, says", [
    (dict(methods={}), ValueError, "no method"), (dict(methods={"x": 3}), TypeError, "Method or an Edit"), (dict(passages=[]), ValueError, "empty"),
    (dict(passages=None, windows=None), ValueError, "nothing to measure"), (dict(passages={"a.b": 1}), ValueError, "full stop"),
    (dict(windows=iter([1])), TypeError, "read again"), (dict(items=[1]), ValueError, "tokenizer")], ids=lambda x: str(x)[:30])
def test_refused_before_anything_runs(model, two, sets, kw, error, says):
    with pytest.raises(error, match=says): sweep(model, **{**dict(methods=two), **sets, **kw}, progress=False)

def test_a_misspelt_knob_is_refused_before_anything_is_measured(model, basis, sets, monkeypatch):
    "Also where blocks are asked of a method that takes none; a function that takes anything passes."
    import curvtools.sweep as module
    monkeypatch.setattr(module, "readout", lambda *a, **kw: pytest.fail("it measured"))
    with pytest.raises(TypeError, match="SVD: .*'rank'.* it takes .*rho"): sweep(model, {"SVD": Method(partial(keep, basis), "rank")}, **sets, progress=False)
    with pytest.raises(TypeError, match="own: .*'blocks'"): sweep(model, {"own": Method(lambda rho: keep(basis, rho=rho))}, **sets, blocks=[[0]], progress=False)
    module._check_call("any", Method(lambda **kw: keep(basis, **kw)), True)

def test_passages_of_another_vocabulary_or_length_are_refused(model, two):
    with pytest.raises(ValueError, match="vocabulary"): sweep(model, two, Passages([Passage((3, 4), (99,))]), progress=False)
    with pytest.raises(ValueError, match="context"): sweep(model, two, Passages([Passage((3,)*60, (4,)*20)]), progress=False)

def test_a_cache_of_other_weights_is_refused(model, basis, sets, two, tmp_path):
    sweep(model, two, **sets, folder=tmp_path, ndcg=False, generate=False, progress=False)
    with basis.keep(rho=.5).applied(model), pytest.raises(ValueError, match="other weights"): sweep(model, two, **sets, folder=tmp_path, progress=False)
    (tmp_path/"sweep.json").write_text("{")
    with pytest.raises(ValueError, match="damaged"): sweep(model, two, **sets, folder=tmp_path, progress=False)

def test_a_damaged_cell_is_named(model, sets, two, tmp_path):
    sweep(model, two, **sets, folder=tmp_path, ndcg=False, generate=False, progress=False)
    f = next(f for f in tmp_path.glob("*.json") if f.name != "sweep.json"); f.write_text(f.read_text()[:100])
    with pytest.raises(ValueError, match=f.stem): sweep(model, two, **sets, folder=tmp_path, ndcg=False, generate=False, progress=False)

def test_the_cell_that_fails_is_named(model, basis, sets):
    with pytest.raises(ValueError, match=r"K-FAC, rho=1.5"): sweep(model, {"K-FAC": Method(partial(keep, basis), "rho", (1.5,))}, **sets, progress=False)
    with pytest.raises(ValueError, match=r"rho=1.5") as e: sweep(model, {"K-FAC": Method(partial(keep, basis), "rho", (.9, 1.5))}, **sets, ndcg=False, generate=False, progress=False)
    assert [c.strength for c in e.value.partial.cells] == [.9]                       # what is finished is not lost
    with pytest.raises(TypeError, match="not an Edit"): sweep(model, {"x": Method(lambda rho: 3)}, **sets, progress=False)

def test_readouts_of_different_items_are_not_compared(model):
    with pytest.raises(ValueError, match="different passages"): readout(model, PS(3), progress=False).measures(readout(model, PS(4), progress=False))
    with pytest.raises(KeyError, match="no measure"): readout(model, PS(3), progress=False)["strict"]


# --- coupling ---

def test_log_odds():
    z, y = torch.randn(2, 5, 11, generator=G, dtype=torch.float64), torch.randint(0, 11, (2, 5), generator=G)
    p = z.softmax(-1).gather(-1, y[..., None])[..., 0]
    assert torch.allclose(_log_odds(z, y), (p/(1 - p)).log(), atol=1e-12)

@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen2"])
def test_effects_are_the_first_order_change_of_the_log_odds(name):
    "One-token suffixes: signs drop out of the square, so one pass must give autograd's number exactly; joint effects of a group too. float64, rel. 1e-9."
    m = tiny(name); b = collect(m, ids(12).split(4), targets="all", progress=False).eigen(m, progress=False)
    ps = Passages(Passage(r[:9], r[9:10]) for r in ids(4).tolist())
    c = coupling(m, b, ps, ps, rhos=(.8, .6), draws=1, progress=False)
    D = {n: weight(m, e.target) - keep(b, rho=.6, blocks=[e.target.block], projections=[e.target.projection]).plan[n].new_weight(weight(m, e.target)) for n, e in b.items()}
    ws = {n: m.get_submodule(n).weight.requires_grad_(True) for n in b}
    want = {n: [] for n in b}
    for p in ps:
        x = torch.tensor([p.ids]); lo = _log_odds(m(input_ids=x[:, :-1]).logits[:, -1:].double(), x[:, -1:]).sum()
        for n, g in zip(ws, torch.autograd.grad(lo, list(ws.values()))):
            g = g if b[n].target.layout == "linear" else g.T
            want[n].append((g.double()*D[n].double()).sum().item())
    for w in ws.values(): w.requires_grad_(False)
    rms = lambda v: math.sqrt(np.mean(np.square(v)))
    for n in b: assert c.group([n], .6)[0] == pytest.approx(rms(want[n]), rel=1e-9)
    three = list(b)[:3]
    assert c.group(three, .6)[0] == pytest.approx(rms(np.sum([want[n] for n in three], 0)), rel=1e-9)

def test_coupling_leaves_the_model_alone(model, basis):
    before, flags = prints(model), [p.requires_grad for p in model.parameters()]
    c = coupling(model, basis, PS(4), PS(4), draws=1, progress=False)
    assert prints(model) == before and flags == [p.requires_grad for p in model.parameters()] and all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks for m in model.modules()) and len(c.rows) == len(basis) and "random" not in repr(c)

def test_choose_blocks_is_confirmed_by_deletion(model, basis):
    "What is chosen does forget at the rho it names, and is the cheapest of those tried; each price is that of perplexity."
    ps = PS(6); ps = Passages(Passage(p.prefix, tuple(model(input_ids=torch.tensor([p.prefix])).logits[0, -1:].argmax(-1).tolist())) for p in ps)   # one token, which it does say
    ws, before = Windows(ids(6)), prints(model)
    c = choose_blocks(model, basis, ps, PS(6), ws, strict=.5, tries=3, rhos=(.9, .6, .3), progress=False)
    with planned(basis, c.plan).applied(model): assert recite(model, ps, generate=False, progress=False).strict <= .5
    assert prints(model) == before
    good = [t for t in c.tried if t["rho"] is not None]
    assert c.plan["keep"][0]["rho"] == min(good, key=lambda t: t["ppl_ratio"][0])["rho"]
    base = perplexity(model, ws, progress=False)
    with basis.keep(rho=good[0]["rho"], blocks=good[0]["blocks"], projections=good[0]["projections"]).applied(model): assert perplexity(model, ws, progress=False).ratio(base)[0] == pytest.approx(good[0]["ppl_ratio"][0])
    with pytest.raises(RuntimeError, match="None of"): choose_blocks(model, basis, ps, PS(6), ws, strict=0., tries=1, rhos=(.999,), steps=1, progress=False)


def test_a_reference_that_is_not_there_is_named():
    base = fake(1., 0.); base.method, base.strength, base.change = "unedited", None, 0
    with pytest.raises(ValueError, match="no method 'nonsense'; there are K-FAC"): Sweep(base, [fake(.5, .02, method="K-FAC")]).matched(at=.3, reference="nonsense")
