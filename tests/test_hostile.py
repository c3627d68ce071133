"""Files from outside, damaged in more than 10 000 ways: each is refused with a ValueError or FileNotFoundError that names it, or read as
something consistent; in bounded time and memory, and with no model half edited. HOSTILE=4 makes four times as many."""
import ast
import errno
import gzip
import json
import os
import random
import shutil
import signal
import struct
import subprocess
import sys
import traceback
import zipfile
from pathlib import Path

import pytest
import safetensors.torch
import torch
from safetensors.torch import save_file
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from curvtools import cli
from curvtools.baselines import Moments, gradient_ascent, keep_by, magnitude, second_moments, svd
from curvtools.data import Passage, Passages, load_passages, save_passages
from curvtools.decompose import Basis
from curvtools.edit import Edit
from curvtools.evaluate import NDCG, Perplexity
from curvtools.kfac import Factors, collect
from curvtools.sweep import Cell, Readout, _open_cache, _read_cell, _write_cell
from curvtools.targets import Target
from curvtools.tasks import Item, Items, Responses, load_items, save_items
from curvtools.vision import VisionPlayground, _adamw, _resume, _save_checkpoint, new_vit, read_idx, read_images, write_images
from curvtools.widgets import Lab, Session, _read_state
from curvtools.zoo import playground, train_tokenizer
import hostile as H
import test_widgets
from tiny import V, tiny

ROOT = Path(__file__).parents[1]
TIMES = int(os.environ.get("HOSTILE", "1"))
TABLE = {}                                              # kind -> mutations, refused, read
ids = torch.randint(3, V, (4, 9), generator=torch.Generator().manual_seed(0))


def fuzz(kind, n, folder, how, use, seconds=30., memory=2**30, tell="name"):
    "n mutations of the files in a folder. how: file -> function of (rng, bytes); use(folder) reads it and asserts that what came is consistent."
    good = {f: (folder/f).read_bytes() for f in how}
    files, bad, count = list(how), {}, [0, 0]
    use(folder)                                         # the sample itself is well
    with H.guard(memory):
        for i in range(n := n*TIMES):
            rng = random.Random(f"{kind} {i}"); f = rng.choice(files); data = how[f](rng, good[f])
            (folder/f).write_bytes(data)
            try:
                with H.within(seconds): use(folder)
                count[1] += 1
            except (ValueError, FileNotFoundError) as e:
                count[0] += 1
                if tell == "name" and f not in str(e) and str(folder) not in str(e): bad.setdefault(f"does not name the file: {type(e).__name__}: {str(e)[:90]}", []).append((i, f))
            except (Exception, H.Hang) as e:
                at = traceback.extract_tb(e.__traceback__)
                own = [x for x in at if "curvtools" in x.filename or "test_hostile" in x.filename]
                bad.setdefault(f"{type(e).__name__} in {own[-1].name}:{own[-1].lineno} ({at[-1].name}): {str(e)[:110]!r}", []).append((i, f))
            except BaseException as e:                  # such as a panic of Rust
                if isinstance(e, KeyboardInterrupt): raise
                bad.setdefault(f"{type(e).__name__}: {str(e)[:90]}", []).append((i, f))
            (folder/f).write_bytes(good[f])
    TABLE[kind] = (n, *count)
    use(folder)
    assert not bad, f"{sum(map(len, bad.values()))} of {n}:\n" + "\n".join(f"{len(v):5} x {k}   e.g. {v[:3]}" for k, v in sorted(bad.items(), key=lambda x: -len(x[1]))[:40])


def equal(a, b): return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.reshape(-1).contiguous().view(torch.uint8), b.reshape(-1).contiguous().view(torch.uint8))
def state(m): return {k: v.clone() for k, v in m.state_dict().items()}
def same(a, b): return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)


@pytest.fixture(scope="module")
def model(): return tiny("llama", torch.float32)


@pytest.fixture(scope="module")
def factors(model): return collect(model, [ids], blocks=[1], projections=["up", "down"], progress=False)


@pytest.fixture(scope="module")
def basis(factors, model): return factors.eigen(model, progress=False)


def target_ok(t):
    assert type(t) is Target and type(t.name) is str and t.name and type(t.projection) is str and type(t.role) is str and type(t.bias) is bool
    assert all(type(x) is int for x in (t.block, t.d_out, t.d_in)) and t.d_out > 0 and t.d_in > 0 and t.layout in ("linear", "conv1d")
    for p, rs in t.parts: assert type(p) is str and all(0 <= a <= b <= t.d_out for a, b in rs)


# --- factors, basis, moments

def untouched(path): return b'"crc32"' in path.read_bytes()[:5000]


def test_factors(factors, tmp_path):
    factors.save(path := tmp_path/"f.safetensors"); want = {n: (f.A.clone(), f.G.clone(), f.count, f.target) for n, f in factors.items()}; n = [0]
    def use(folder):
        fs = Factors.load(path); n[0] += 1
        for k, f in fs.items():
            target_ok(f.target); assert k == f.target.name and f.A.shape == (f.target.d_in,)*2 and f.G.shape == (f.target.d_out,)*2
            assert f.A.dtype in (torch.float32, torch.float64) and f.G.dtype in (torch.float32, torch.float64) and 0 < f.count < float("inf") and not isinstance(f.count, bool)
        assert len(fs) and isinstance(fs.meta, dict) and fs.tokens > 0
        repr(fs), fs._repr_html_()
        if untouched(path): assert {k: f.target for k, f in fs.items()} == {k: w[3] for k, w in want.items()} and all(equal(f.A, want[k][0]) and equal(f.G, want[k][1]) and f.count == want[k][2] for k, f in fs.items())
        if n[0] % 8 == 0:
            try: b = fs.eigen(progress=False)
            except ValueError as e: assert "NaN or infinity" in str(e); return
            except RuntimeError as e: assert "no usable eigenpairs" in str(e); return
            repr(b.keep(rho=.5))
    fuzz("factors", 2000, tmp_path, {"f.safetensors": H.safetensors}, use)


def basis_ok(b):
    for k, e in b.items():
        target_ok(e.target); assert k == e.target.name and e.UG.shape == (e.target.d_out,)*2 and e.UA.shape == (e.target.d_in,)*2
        assert e.lam.shape == e.UG.shape[:1] and e.mu.shape == e.UA.shape[:1]
        for x in (e.UG, e.UA, e.lam, e.mu): assert x.is_floating_point() and bool(torch.isfinite(x).all())
        for w in (e.lam, e.mu): assert bool((w >= 0).all()) and bool((w[1:] <= w[:-1]).all())
    assert isinstance(b.meta, dict); repr(b), b._repr_html_()


def test_basis(basis, tmp_path):
    basis.save(path := tmp_path/"b.safetensors")
    def use(folder):
        b = Basis.load(path); basis_ok(b)
        if untouched(path): assert b.keys() == basis.keys() and all(equal(getattr(b[k], x), getattr(e, x)) for k, e in basis.items() for x in ("UG", "UA", "lam", "mu"))
        repr(b.keep(rho=.5))
    fuzz("basis", 1500, tmp_path, {"b.safetensors": H.safetensors}, use)


def test_moments(basis, model, tmp_path):
    second_moments(model, basis, [ids], progress=False).save(path := tmp_path/"m.safetensors")
    def use(folder):
        m = Moments.load(path); repr(m)
        try: e = keep_by(basis, "ekfac", rho=.5, moments=m)
        except ValueError: return                       # of another basis, or not of all targets
        assert 0 < e.kept <= 1
    fuzz("moments", 500, tmp_path, {"m.safetensors": H.safetensors}, use)


# --- recipes, and what they do to a model

def recipes(basis, model):
    yield "staircase", basis.keep(rho=.6), ("recipe.json", "basis.safetensors")
    yield "mask", magnitude(model, fraction=.5, blocks=[1], projections=["up", "down"]), ("recipe.json", "tensors.safetensors")
    yield "mixed", basis.keep(rho=.6, projections=["up"]) | gradient_ascent(model, ids, ids, lr=1e-2, epochs=1, targets="attention", blocks=[0], projections=["q"], progress=False), ("recipe.json", "basis.safetensors", "tensors.safetensors")
    yield "svd", svd(model, keep_rank_fraction=.5, blocks=[1], projections=["down"]), ("recipe.json", "basis.safetensors")


@pytest.mark.parametrize("which", ["staircase", "mask", "mixed", "svd"])
def test_recipes(which, basis, model, tmp_path):
    _, edit, files = next(r for r in recipes(basis, model) if r[0] == which)
    with edit.applied(model): pass                      # so that the recipe knows its result
    edit.save(tmp_path); before, n = state(model), [0]
    forged = {x: (tmp_path/x).read_bytes() for x in files if x != "recipe.json"}
    def use(folder):
        try: e = Edit.load(folder); n[0] += 1
        finally:                                        # what a forger changed in the tensors
            for x, b in forged.items():
                if (folder/x).read_bytes() != b and recut.get(x): (folder/x).write_bytes(b)
            recut.clear()
        repr(e), e._repr_html_(), e.kept, e._title()
        for k, p in e.plan.items(): target_ok(p.target); assert k == p.target.name
        for kw in (dict(), dict(force=True)):
            try: h = e.apply(model, **kw)
            except ValueError: assert same(state(model), before); continue
            now, done = state(model), set()
            for k, p in e.plan.items():                 # whole: each target holds what its plan writes, and nothing else changed
                name = f"{k}.weight"; done.add(name); W = before[name]
                assert equal(now[name], p.new_weight(W).to(W.dtype))
            assert all(equal(now[k], before[k]) for k in before if k not in done)
            h.undo(); assert same(state(model), before)
    recut = {}
    def forge(change):
        def f(rng, b):
            name = rng.choice(list(forged)); recut[name] = True
            (tmp_path/name).write_bytes(change(rng, H.unsigned(forged[name])))
            from curvtools.edit import _digest
            r = json.loads(b); r["basis" if name.startswith("basis") else "tensors"]["blake2b"] = _digest(tmp_path/name)
            return json.dumps(r).encode()
        return f
    deep = forge(lambda rng, b: H.tensors(rng, b) if rng.random() < .5 else H.meta(rng, b))
    how = {f: H.safetensors for f in files} | {"recipe.json": lambda rng, b: deep(rng, b) if rng.random() < .35 else H.as_json(rng, b)}
    try: fuzz(f"recipe, {which}", 600, tmp_path, how, use)
    finally: model.load_state_dict(before)


# --- passages, questions

PS = Passages([Passage((3, 4, 5), (6, 7), "book", "first", "natural", 4, 3), Passage((8, 9), (10,), kind="canary"), Passage((1, 2), (3, 4), tier=64)])


def passages_ok(ps):
    for p in ps:
        assert type(p) is Passage and p.prefix and p.suffix and all(type(i) is int and 0 <= i < 2**31 for i in p.ids)
        assert all(type(x) is str for x in (p.source, p.label, p.kind)) and all(type(x) is int and abs(x) < 2**63 for x in (p.tier, p.count))
        torch.tensor(p.ids)
    repr(ps), ps.where(min_tier=4)


def test_passages(tmp_path):
    save_passages(PS, path := tmp_path/"p.jsonl")
    def use(folder): ps = load_passages(path); passages_ok(ps); assert len(ps)
    fuzz("passages, ids", 1200, tmp_path, {"p.jsonl": H.as_lines}, use)


def test_passages_of_text(tmp_path):
    tok = train_tokenizer(["the quick brown fox jumps over the lazy dog. "*20], 300); path = tmp_path/"p.jsonl"
    path.write_text("\n".join(json.dumps(d) for d in (dict(prefix="the quick ", suffix="brown fox", tier=4), dict(text="the lazy dog jumps over the quick brown fox"), dict(ids=list(range(12)), label="x"))))
    def use(folder): passages_ok(load_passages(path, tok, prefix=3, suffix=2))
    fuzz("passages, text", 600, tmp_path, {"p.jsonl": H.as_lines}, use)


def test_items(tmp_path):
    save_items([Item("closed-book", "tier 4", "Where is it? In", " Rome.", (" Rome.", " Oslo."), 4), Item("arithmetic", "2-digit +", "1 + 2 =", " 3.")], path := tmp_path/"t.jsonl")
    def use(folder):
        its = load_items(path); repr(its)
        for it in its:
            assert all(type(x) is str for x in (it.family, it.stratum, it.prompt, it.answer, *it.choices)) and type(it.choices) is tuple and type(it.tier) is int and 0 <= it.tier
            assert not it.choices or it.answer in it.choices
        its.where(family="arithmetic")
    fuzz("questions", 900, tmp_path, {"t.jsonl": H.as_lines}, use)


# --- images

def test_idx(tmp_path):
    x = torch.randint(0, 256, (5, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    write_images(x, torch.arange(5).byte(), tmp_path, "train")
    a, b = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"; plain = gzip.decompress((tmp_path/f"{a}.gz").read_bytes())
    def lie(rng, raw):
        "Another number of dimensions, other sizes."
        k = rng.choice((0, 1, 2, 3, 4, 60, 70, 255)); sizes = [rng.choice((0, 1, 1, 4, 5, 255, 2**16, 2**31, 2**32 - 1)) for _ in range(k)]
        return b"\0\0\x08" + bytes([k]) + b"".join(struct.pack(">I", s) for s in sizes) + raw[16:][:rng.choice((0, 1, 80))]
    def packed(rng, b):
        way = rng.random()
        if way < .4: return H.raw(rng, b)
        if way < .9: return gzip.compress(lie(rng, plain) if way < .7 else H.raw(rng, plain), 1)
        return gzip.compress(plain, 1) + rng.choice((b"", bytes(9), gzip.compress(plain), b"\x1f\x8b"))
    def use(folder):
        x, y = read_images(folder, "train")
        assert x.dtype == torch.uint8 and x.ndim == 3 and y.dtype == torch.int64 and y.shape == x.shape[:1]
    fuzz("images, gzip", 500, tmp_path, {f"{a}.gz": packed, f"{b}.gz": packed}, use)
    (tmp_path/a).write_bytes(plain); (tmp_path/b).write_bytes(gzip.decompress((tmp_path/f"{b}.gz").read_bytes()))
    fuzz("images, plain", 500, tmp_path, {n: lambda rng, b: H.raw(rng, b) if rng.random() < .6 else lie(rng, plain) for n in (a, b)}, use)


def test_a_small_archive_does_not_fill_the_memory(tmp_path):
    path = tmp_path/"bomb.gz"                           # 256 MB of zeros in 250 kB, whose header promises one byte; and one that promises more than is there
    head = lambda n: b"\0\0\x08\x01" + struct.pack(">I", n)
    for h in (head(1), head(2**32 - 1)):
        with gzip.open(path, "wb", 1) as f:
            f.write(h)
            for _ in range(256): f.write(bytes(2**20))
        with H.guard(2**26), H.within(20), pytest.raises(ValueError, match="bomb.gz"): read_idx(path)


# --- sweeps

def a_cell():
    out = dict(group=[0, 1, 1], strict=[1, 0, 0], loose=[1, 0, 1], lev=[0., .5, 1.], right=[4, 2, 0], L=[4, 4, 4], logp=[-1., -5.5, -30.])
    r = Responses(["a", "b"], ["logic"]*2, ["x", "y"], [0, 4], torch.tensor([True, False]), torch.tensor([.5, 2.]).double(), torch.tensor([1, 2]), torch.tensor([.5, .25]).double(), {})
    return Cell("K-FAC", .8, [1, 2], False, .5, .1, Readout(dict(passages=out), dict(heldout=Perplexity(torch.tensor([9., 8.]).double(), torch.tensor([5, 5]), 6)),
                dict(heldout=NDCG(torch.tensor([4., 3.]).double(), torch.tensor([5, 5]), 10)), r), .2, "abc")


def test_cells(tmp_path):
    _write_cell(a_cell(), tmp_path); _open_cache(tmp_path, "weights")
    def use(folder):
        assert _open_cache(folder, "weights") == folder
        c = _read_cell(folder/"abc.json"); repr(c), repr(c.readout), c.energy
        assert c.key == "abc" and all(type(x) in (int, float) for x in (c.kept, c.change, c.seconds)) and type(c.method) is str and type(c.control) is bool
        for m in c.readout.measures().values(): m.value, m.n
    fuzz("sweep cells", 900, tmp_path, {"abc.json": H.as_json}, use)
    fuzz("sweep.json", 200, tmp_path, {"sweep.json": H.as_json}, use)


# --- states of a Lab

@pytest.fixture(scope="module")
def session():
    s = Session(**test_widgets.parts(), passages=2, tokens=32).load()
    return s


def test_lab_states(session, tmp_path):
    lab = Lab(session); session.apply(test_widgets.spec(.5), control=False); lab.wait()
    (path := tmp_path/"lab.json").write_text(json.dumps(lab.state)); before = state(session.model); lab.session.goto(0); plain = state(session.model); lab.close()
    def use(folder): s = _read_state(path); assert isinstance(s["panels"], dict) and isinstance(s["history"], list) and 0 <= s["at"] <= len(s["history"]); json.dumps(s)
    fuzz("Lab states, read", 800, tmp_path, {"lab.json": H.as_json}, use, tell="state")
    s = session
    def restore(folder):
        s.states[1:], s.at, s.back[:], s.ahead[:] = [], 0, [], []
        try: lab = Lab.from_state(path, playground=s)
        except BaseException: assert same(state(s.model), plain), "left edited"; raise
        try: assert same(state(s.model), plain) == (s.now.edit is None); s.goto(0)
        finally: lab.close()
        assert same(state(s.model), plain)
    def tree(rng, b): return H.dump(rng, H.tree(rng, json.loads(b))).encode("utf-8", "surrogatepass")
    fuzz("Lab states, restored", 20, tmp_path, {"lab.json": tree}, restore, seconds=60, tell="state")


# --- playgrounds

def small_vit(folder):
    m = new_vit(hidden=8, blocks=1, mlp=8, heads=2, seed=0); g = torch.Generator().manual_seed(0); n = 6
    m.config.save_pretrained(folder); save_file({k: p.detach().clone() for k, p in m.state_dict().items()}, folder/"model.safetensors", metadata=dict(format="pt"))
    save_file(dict(images=torch.randint(0, 256, (n, 28, 28), dtype=torch.uint8, generator=g), noised=torch.arange(n).byte(), true=torch.arange(n).byte(), heldout=torch.tensor([4, 5]).int()), folder/"data.safetensors")
    (folder/"training.json").write_text(json.dumps(dict(classes=[f"c{i}" for i in range(10)], plan=dict(collect=dict(targets="mlp"), keep=[dict(rho=.9)]), log=[dict(epoch=1, loss=.5)], trained_on=4)))


def st_only(rng, b): return H.raw(rng, b) if rng.random() < .4 else H.tensors(rng, b)


def test_vit_folders(tmp_path):
    small_vit(tmp_path)
    def use(folder):
        pg = playground("vit", folder); repr(pg)
        n = len(pg.images); assert type(pg) is VisionPlayground and pg.images.dtype == torch.uint8 and pg.images.ndim == 3 and pg.noised.shape == pg.true.shape == (n,)
        assert pg.heldout.ndim == 1 and bool(((pg.heldout >= 0) & (pg.heldout < n)).all()) and isinstance(pg.plan, dict) and isinstance(pg.log, list)
        assert int(pg.noised.max()) < pg.model.config.num_labels; pg.memorized, pg.clean
    fuzz("ViT folder", 500, tmp_path, {"config.json": H.as_json, "model.safetensors": st_only, "data.safetensors": st_only, "training.json": H.as_json}, use)


def small_lm(folder):
    tok = train_tokenizer(["the quick brown fox jumps over the lazy dog. "*20], 270); tok.save_pretrained(folder)
    c = LlamaConfig(vocab_size=len(tok), hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=64, tie_word_embeddings=True, eos_token_id=0, pad_token_id=1, bos_token_id=None)
    m = LlamaForCausalLM(c); c.save_pretrained(folder); GenerationConfig(eos_token_id=0, pad_token_id=1).save_pretrained(folder)
    for name in ("model", "twin"): save_file({k: p.detach().bfloat16() for k, p in m.named_parameters()}, folder/f"{name}.safetensors", metadata=dict(format="pt"))
    g = torch.Generator().manual_seed(0)
    save_file(dict(clean=torch.randint(3, 200, (4, 8), generator=g).short(), heldout=torch.randint(3, 200, (3, 8), generator=g).short()), folder/"data.safetensors")
    save_passages([*PS, Passage((5, 6), (7,), kind="noised", tier=4)], folder/"passages.jsonl")
    save_items([Item("logic", "x", "If so, then", " yes.", (" yes.", " no."))], folder/"tasks.jsonl")
    (folder/"training.json").write_text(json.dumps(dict(plan=dict(collect=dict(targets="mlp"), keep=[dict(rho={"0": .9})]), log=[dict(step=1)])))


def test_lm_folders(tmp_path):
    small_lm(tmp_path)
    def use(folder):
        pg = playground("lm", folder); repr(pg)
        assert isinstance(pg.plan, dict) and isinstance(pg.log, list) and pg.clean.ids.max() < pg.model.config.vocab_size and pg.heldout.ids.max() < pg.model.config.vocab_size
        passages_ok(pg.memorized); assert all(max(p.ids) < pg.model.config.vocab_size for p in pg.memorized + pg.unseen)
    how = {f: H.as_json for f in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "training.json")} | \
          {f: st_only for f in ("model.safetensors", "twin.safetensors", "data.safetensors")} | {f: H.as_lines for f in ("passages.jsonl", "tasks.jsonl")}
    fuzz("LM folder", 500, tmp_path, how, use)


def test_checkpoints_of_training(tmp_path):
    kw = dict(hidden=8, blocks=1, mlp=8, heads=2)
    def fresh(): m = new_vit(seed=0, **kw); return m, _adamw(m, 1e-3, .1)
    m, opt = fresh(); x = torch.randn(2, 1, 28, 28)
    m(pixel_values=x).logits.sum().backward(); opt.step()
    settings = dict(seed=0, lr=1e-3); _save_checkpoint(tmp_path/"checkpoint.safetensors", m, opt, dict(settings=settings, epoch=1, step=1, minutes=.1, log=[dict(epoch=1, memorised=.1)]))
    m, opt = fresh(); before = state(m)
    def use(folder):
        try: d = _resume(folder/"checkpoint.safetensors", m, opt, settings)
        except BaseException: assert same(state(m), before), "half loaded"; raise
        assert isinstance(d["log"], list) and isinstance(d["minutes"], (int, float))
        m.load_state_dict(before); opt.state.clear()
    fuzz("training checkpoints", 500, tmp_path, {"checkpoint.safetensors": H.safetensors}, use)


# --- the command line

def test_command_line(factors, model, tmp_path, monkeypatch, capsys):
    tok = train_tokenizer(["a b c d e f g"], 260)
    monkeypatch.setattr(cli, "_open", lambda a: (model, tok, None)); before = state(model)
    factors.save(tmp_path/"f.safetensors"); save_passages([Passage((3, 4), (5, 6)), Passage((7, 8), (9,))], tmp_path/"p.jsonl")
    out = tmp_path/"out"
    class Refused(ValueError): pass
    def use(folder):
        codes = []
        for argv in (["recite", "m", str(folder/"p.jsonl"), "--json"], ["edit", "m", str(folder/"f.safetensors"), "--rho", ".5", "--out", str(out)]):
            codes.append(cli.main(argv)); said = capsys.readouterr()
            assert codes[-1] in (0, 2) and "Traceback" not in said.err and same(state(model), before)
            if codes[-1] == 2: assert said.err.startswith(f"curvtools {argv[0]}: ") and (argv[0] != "edit" or not out.exists())
            assert not list(folder.glob(".out*"))
        if out.exists(): Edit.load(out); shutil.rmtree(out)
        if 2 in codes: raise Refused(str(folder))
    fuzz("command line", 250, tmp_path, {"f.safetensors": H.safetensors, "p.jsonl": H.as_lines}, use, seconds=60)


def test_arguments(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = ["collect", "edit", "recite", "evaluate", "--out", "--rho", "--tokens", "--text", "--prefix", "--blocks", "--seed", "--json", "--gguf-file", "playground\0", "../../x", "/etc/passwd", "-1", "nan", "1e999", "9"*5000, "", "a\0b", "²", "None", "@file", "%s"]
    n, r = 500*TIMES, 0
    with H.guard():
        for i in range(n):
            rng = random.Random(i); argv = [rng.choice(words[:4]), rng.choice(("./none", "/etc/passwd", "../../x", "")), *(rng.choice(words) for _ in range(rng.randrange(1, 8)))]
            with H.within(60):
                try: code = cli.main(argv)
                except SystemExit as e: code = e.code
            assert code == 2, argv; r += 1
            assert "Traceback" not in capsys.readouterr().err
    assert not list(tmp_path.iterdir()); TABLE["arguments"] = (n, r, 0)


# --- names

def test_names_that_lead_elsewhere_are_refused(basis, model, session, tmp_path):
    for kind in ("../lm", "lm/../vit", "/etc", "..", "lm\0", ""):
        with pytest.raises(ValueError, match="bundled"): playground(kind)
    edit = basis.keep(rho=.5); edit.save(tmp_path/"e"); edit.save(tmp_path/"other"); r = json.loads((tmp_path/"e"/"recipe.json").read_text())
    for name in ("../other/basis.safetensors", str(tmp_path/"other"/"basis.safetensors"), "x/../basis.safetensors", "./basis.safetensors", "..", "recipe.json", "basis.safetensors\0", ["basis.safetensors"], 3):
        r["basis"]["file"] = name; (tmp_path/"e"/"recipe.json").write_text(json.dumps(r))
        with pytest.raises(ValueError, match="names a file"): Edit.load(tmp_path/"e")
    c = a_cell(); _write_cell(c, tmp_path); d = json.loads((tmp_path/"abc.json").read_text())
    for key in ("../abc", "/abc", "abd"):
        (tmp_path/"abc.json").write_text(json.dumps(dict(d, key=key)))
        with pytest.raises(ValueError, match="another key"): _read_cell(tmp_path/"abc.json")
    for name in ("../m.gguf", "/m.gguf", "a/../../m.gguf"):
        with pytest.raises(ValueError, match="does not lie in"): cli.load_model(tmp_path, gguf_file=name)
    with pytest.raises(ValueError, match="no name for a file"): cli._check_out("a\0b")
    save_passages([Passage((3, 4), (5,), source="../../a", label="/etc/passwd", kind="../x")], tmp_path/"p.jsonl")
    inner = tmp_path/"in"/"here"; lab = Lab(session)                # its passages have markup and slashes for names
    try:
        for k, p in lab.panels.items():
            if lab.show(k).wait(60).figures: p.export(inner)
    finally: lab.close()
    made = {x for x in tmp_path.rglob("*") if x.suffix in (".png", ".svg", ".csv")}
    assert made and all(x.parent == inner for x in made) and {x.name for x in tmp_path.iterdir()} == {"e", "other", "abc.json", "p.jsonl", "in"}


# --- code that could run what it reads

def suspects(name, source):
    "Ways to run or to unpickle what is in a file."
    tree = ast.parse(source); bad = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "yaml", "jsonpickle"}
    for n in ast.walk(tree):
        if isinstance(n, ast.Import) and (x := {a.name.split(".")[0] for a in n.names} & bad): yield name, n.lineno, min(x)
        if isinstance(n, ast.ImportFrom) and (n.module or "").split(".")[0] in bad: yield name, n.lineno, n.module
        if not isinstance(n, ast.Call): continue
        f = n.func; of = ast.unparse(f)
        if of in ("eval", "exec", "compile", "__import__", "os.system", "os.popen", "builtins.eval", "builtins.exec"): yield name, n.lineno, of
        if isinstance(f, ast.Attribute) and f.attr in ("load", "loads", "unsafe_load") and of.split(".")[0] in bad | {"torch", "np", "numpy", "pd"}: yield name, n.lineno, of
        if of.endswith(("read_pickle", "import_module", "hub.load")): yield name, n.lineno, of
        for k in n.keywords:
            if k.arg in ("allow_pickle", "trust_remote_code", "shell") and ast.unparse(k.value) != "False": yield name, n.lineno, f"{k.arg}={ast.unparse(k.value)}"


def code_of(name, data):
    "Python in a file: a module, or the cells of a notebook."
    if name.endswith(".py"): return data.decode()
    lines = lambda c: "".join(c["source"]) if isinstance(c["source"], list) else c["source"]
    return "\n".join("".join(x for x in lines(c).splitlines(True) if not x.startswith(("%", "!"))) for c in json.loads(data)["cells"] if c["cell_type"] == "code")


def check_files(files):
    found = [x for n, b in files if n.endswith((".py", ".ipynb")) for x in suspects(n, code_of(n, b))]
    assert not found, found
    odd = [n for n, _ in files if Path(n).suffix.lower() in (".pkl", ".pickle", ".pt", ".pth", ".bin", ".ckpt", ".npy", ".npz", ".joblib", ".h5", ".so", ".pyd", ".yaml", ".yml")]
    assert not odd, odd


def test_the_grep_finds():
    for s in ("import pickle", "from _pickle import loads", "eval(x)", "exec(x)", "torch.load(f)", "np.load(f, allow_pickle=True)", "yaml.load(f)", "f(trust_remote_code=True)", "import shelve, marshal", "run(x, shell=True)", "pd.read_pickle(f)"): assert list(suspects("x", s)), s
    assert not list(suspects("x", "model.eval(); re.compile('x'); json.loads(s); f(trust_remote_code=False); torch.compile(m)"))


def test_no_pickle_in_the_package(): check_files([(str(p), p.read_bytes()) for p in (ROOT/"curvtools").rglob("*") if p.is_file() and "__pycache__" not in p.parts])


def test_no_pickle_in_the_wheel(tmp_path):
    "Built from a copy of the tree, without a network."
    for n in ("curvtools", "setup.py", "pyproject.toml", "settings.ini", "README.md", "LICENSE", "MANIFEST.in"):
        (shutil.copytree if (ROOT/n).is_dir() else shutil.copy)(ROOT/n, tmp_path/n, **(dict(ignore=shutil.ignore_patterns("__pycache__")) if (ROOT/n).is_dir() else {}))
    pytest.importorskip("setuptools", minversion="77")
    p = subprocess.run([sys.executable, "-c", f"from setuptools.build_meta import build_wheel; build_wheel({str(tmp_path/'dist')!r})"], cwd=tmp_path, capture_output=True, text=True)
    assert p.returncode == 0, p.stderr[-2000:]
    wheel, = (tmp_path/"dist").glob("*.whl")
    with zipfile.ZipFile(wheel) as z: files = [(n, z.read(n)) for n in z.namelist()]
    assert any(n == "curvtools/kfac.py" for n, _ in files) and any(n.endswith("lm/model.safetensors") for n, _ in files)
    check_files(files)
    assert all(not n.startswith("/") and ".." not in Path(n).parts for n, _ in files)


# --- an edit that is interrupted

def methods(model, factors, basis):
    from curvtools import baselines as B
    kw = dict(blocks=[1], projections=["up", "down"]); t = dict(kw, epochs=1, progress=False)
    own = B.identity_basis(factors, model)
    yield from dict(keep=basis.keep(rho=.6), random=basis.keep(rho=.6).random(0), obd=keep_by(basis, "obd", rho=.6), wanda=keep_by(own, "wanda", fraction=.6), one_sided=B.one_sided(basis, rho=.6), svd=svd(model, keep_rank_fraction=.5, **kw),
        magnitude=magnitude(model, fraction=.6, **kw), pairs=B.random_pairs(basis.keep(rho=.6), 0), noise=B.matched_noise(basis.keep(rho=.6), model, 0), union=B.union(basis.keep(rho=.3), basis.keep(fraction=.4)),
        bsn=B.bsn(model, ids, ids, fraction=.6, **t), ascent=gradient_ascent(model, ids, ids, lr=1e-2, **t), npo=B.npo(model, ids, ids, lr=1e-2, **t)).items()


class Broken:
    "The nth copy into a tensor writes half of it and then fails; so do the `more` ones after it."
    def __init__(self, monkeypatch, n, how, more=0):
        self.n, self.seen, real = n, 0, torch.Tensor.copy_
        def copy_(t, v, *a, **kw):
            self.seen += 1
            if not n <= self.seen <= n + more: return real(t, v, *a, **kw)
            if t.dim(): real(t[:max(1, len(t)//2)], v[:max(1, len(t)//2)])
            if how is signal.SIGINT: signal.raise_signal(signal.SIGINT); return real(t, v, *a, **kw)
            raise how("in the middle")
        monkeypatch.setattr(torch.Tensor, "copy_", copy_)


def test_an_interrupted_edit_is_whole_or_nothing(model, factors, basis):
    before, done = state(model), 0
    for name, edit in methods(model, factors, basis):
        with edit.applied(model): edited = state(model)
        assert same(state(model), before) and not same(edited, before), name
        for how in (OSError, MemoryError, KeyboardInterrupt, signal.SIGINT):
            for n in range(1, 1 + len(edit.plan)):
                what = KeyboardInterrupt if how is signal.SIGINT else how; done += 3
                with pytest.MonkeyPatch.context() as m:
                    Broken(m, n, how)
                    with pytest.raises(what): edit.apply(model)
                assert same(state(model), before), (name, how, n)
                with pytest.MonkeyPatch.context() as m:
                    Broken(m, n, how)
                    with pytest.raises(what):
                        with edit.applied(model): pass
                assert same(state(model), before), (name, how, n)
                h = edit.apply(model)
                with pytest.MonkeyPatch.context() as m:
                    Broken(m, n, how)
                    with pytest.raises(what): h.undo()
                assert same(state(model), edited if h.active else before), (name, how, n)
                if h.active: h.undo()
                assert same(state(model), before)
        with pytest.MonkeyPatch.context() as m:             # while the block is left: put back all the same
            with pytest.raises(OSError):
                with edit.applied(model): Broken(m, 1, OSError)
        assert same(state(model), before), name
        with pytest.MonkeyPatch.context() as m:             # nothing can be written any more: said, and the other weights are put back
            with pytest.raises(RuntimeError, match="could not be put back"):
                with edit.applied(model): Broken(m, 1, OSError, 2)
        first, *rest = edit.plan
        assert all(equal(v, before[k]) for k, v in state(model).items() if k != f"{first}.weight"); model.load_state_dict(before)
    TABLE["interrupted edits"] = (done, done, 0)


def test_a_full_disk_while_saving(model, basis, factors, tmp_path, monkeypatch):
    before, edit = state(model), basis.keep(rho=.6) | magnitude(model, fraction=.5, blocks=[0], projections=["gate"])
    edit.save(tmp_path/"old"); old = {p.name: p.read_bytes() for p in (tmp_path/"old").iterdir()}
    def full(*a, **kw): raise OSError(errno.ENOSPC, "No space left on device")
    tries = [("os.fsync", os, "fsync"), ("os.replace", os, "replace"), ("save_file", safetensors.torch, "save_file")]
    for what, place, name in tries:
        for n in range(4):                                  # at the first, second ... time
            real, seen = getattr(place, name), [0]
            def sometimes(*a, **kw):
                seen[0] += 1
                return full() if seen[0] > n else real(*a, **kw)
            with monkeypatch.context() as m:
                m.setattr(place, name, sometimes); out = tmp_path/f"{name}{n}"
                for save in (lambda: edit.save(out), lambda: edit.save(tmp_path/"old"), lambda: edit.save_pretrained(model, out/"model"), lambda: factors.save(out/"f.safetensors")):
                    seen[0] = 0
                    try: save()
                    except OSError as e: assert e.errno == errno.ENOSPC
                    assert same(state(model), before), (what, n)
            for p in tmp_path.rglob("*.tmp"): raise AssertionError(f"{p} is left")
            for f in (out, out/"model", tmp_path/"old"):    # complete, or refused
                try: got = Edit.load(f)
                except (ValueError, FileNotFoundError): continue
                with got.applied(model): pass
                assert same(state(model), before)
            for p in out.rglob("f.safetensors"): Factors.load(p)
            for k, b in old.items(): (tmp_path/"old"/k).write_bytes(b)


def test_the_table(capfd, request):
    "The counts, for the log."
    rows = [*TABLE.items(), ("all", tuple(map(sum, zip(*TABLE.values()))) if TABLE else (0, 0, 0))]
    with capfd.disabled(): print("\n" + "\n".join([f"{'hostile files':<24}{'mutations':>10}{'refused':>9}{'read':>7}"] + [f"{k:<24}{n:>10,}{a:>9,}{b:>7,}" for k, (n, a, b) in rows]))
    if len(TABLE) > 15: assert rows[-1][1][0] >= 10_000
