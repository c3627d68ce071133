"""edit: the new weight against the dense formula, exact undo in any order, refusals, faults, files; and the baselines."""
import copy, json
from fractions import Fraction
import pytest, torch
from hypothesis import HealthCheck, given, settings, strategies as st
from tiny import tiny, tiny_inputs
from curvtools import edit as edit_module, targets as targets_module
from curvtools.baselines import random_basis, svd
from curvtools.decompose import Basis, Eigen, Staircase
from curvtools.edit import Applied, Edit, Plan, edited_weight, keep
from curvtools.kfac import collect
from curvtools.targets import find_targets, fingerprint, weight

KINDS = [("llama", torch.float32), ("llama", torch.bfloat16), ("gpt2", torch.float32), ("phi3", torch.bfloat16), ("phi3", torch.float32), ("gpt2", torch.float16)]
_made = {}
def made(name="llama", dtype=torch.float32):
    "A tiny model with its basis, made once; every test leaves it as it found it."
    if (name, dtype) not in _made:
        m = tiny(name, dtype)
        f = collect(tiny(name, torch.float32) if dtype != torch.float64 else m, [tiny_inputs(name, 4, 12)], targets="mlp", progress=False)
        f.fingerprints = {k: fingerprint(m, x.target) for k, x in f.items()}    # factors in float32, of the rounded model's weights
        _made[name, dtype] = m, f.eigen(progress=False, model=m)
    return _made[name, dtype]
def state(m): return {k: v.detach().clone().contiguous().view(-1).view(torch.uint8) for k, v in m.state_dict().items()}   # bytes
def same(a, b): return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
@pytest.fixture
def llama():
    m, b = made(); before = state(m)
    yield m, b
    assert same(state(m), before), "a test left the model edited"

# ---------- the new weight ----------
@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3"])
def test_dense_formula(name):
    "float64 model, float64 formula with the same stored vectors: 1e-12 is rounding of a few hundred products."
    m, b = made(name, torch.float64)
    e = b.keep(rho=.7)
    old = {k: weight(m, p.target).clone() for k, p in e.plan.items()}
    with e.applied(m):
        for k, p in e.plan.items():
            U, V, M = p.eigen.UG.double(), p.eigen.UA.double(), p.staircase.dense()
            want = old[k] - U @ ((U.T @ old[k] @ V) * ~M) @ V.T
            assert (weight(m, p.target) - want).abs().max() < 1e-12 and not torch.equal(want, old[k])
            assert p.target.layout == ("conv1d" if name == "gpt2" else "linear")

def test_removes_what_it_says():
    "In exact orthonormal bases the kept coefficients stay and the others become 0."
    g = torch.Generator().manual_seed(0)
    Q = lambda n: torch.linalg.qr(torch.randn(n, n, generator=g, dtype=torch.float64))[0]
    W, U, V, s = torch.randn(6, 4, generator=g, dtype=torch.float64), Q(6), Q(4), Staircase(torch.tensor([4, 2, 2, 1, 0, 0]), 4)
    C = U.T @ edited_weight(W, U, V, s) @ V
    assert torch.allclose(C, (U.T @ W @ V) * s.dense(), atol=1e-14)

@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounded_once(dtype):
    m, b = made("llama", dtype if dtype == torch.bfloat16 else torch.float32)
    e = b[1, "up"]; W = weight(m, e.target).to(dtype); s = e.mask(rho=.6)
    assert torch.equal(edited_weight(W, e.UG, e.UA, s), edited_weight(W.float(), e.UG, e.UA, s).to(dtype))

@pytest.mark.parametrize("name,dtype", KINDS)
def test_full_mask_is_bit_identical_and_undo_exact(name, dtype):
    m, b = made(name, dtype); before = state(m)
    everything = b.keep(rho=1)
    for _ in range(2):
        with everything.applied(m): assert same(state(m), before)
    h = b.keep(rho=.5).apply(m)
    changed = [k for k, v in state(m).items() if not torch.equal(v, before[k])]
    assert sorted(changed) == sorted(k + ".weight" for k in b) and h.active
    h.undo(); assert same(state(m), before)

# ---------- any sequence ----------
@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.sampled_from(KINDS), st.lists(st.tuples(st.sampled_from(["apply", "undo", "redo", "refuse"]), st.integers(0, 5)), max_size=14))
def test_any_sequence(kind, moves):
    "Apply, undo and redo on several edits, allowed or refused, against a stack of byte snapshots."
    m, b = made(*kind)
    edits = [b.keep(rho=.5), b.keep(fraction=.3, blocks=[1]), b.random(1).keep(rho=.7, blocks=[0, -1]), svd(m, keep_rank_fraction=.5, blocks=[2]),
             b.keep(energy=.5), b.keep(rho={0: .9, 2: .1})]
    first, stack, undone = state(m), [], []            # stack: (handle, bytes before, bytes after)
    for what, n in moves:
        now = state(m)
        if what == "apply":
            h = edits[n].apply(m, stack=bool(stack)); stack.append((h, now, state(m))); undone = []
        elif what == "undo" and stack:
            h, before, after = stack.pop(); h.undo(); undone.append((h, before, after))
            assert same(state(m), before) and not h.active
        elif what == "redo" and undone:
            h, before, after = undone.pop(); h.redo(); stack.append((h, before, after))
            assert same(state(m), after) and h.active
        elif what == "refuse" and len(stack) > 1:
            k = n % (len(stack) - 1); h = stack[k][0]  # not the last one: refused if a later edit changed one of its targets
            touched = any(not torch.equal(stack[k][2][name + ".weight"], now[name + ".weight"]) for name in h.edit.plan)
            if touched:
                with pytest.raises(RuntimeError, match="undo the later edit first"): h.undo()
                assert same(state(m), now) and h.active
    while stack: stack.pop()[0].undo()
    assert same(state(m), first)

def test_undo_twice_and_redo_twice(llama):
    m, b = llama
    h = b.keep(rho=.5).apply(m)
    with pytest.raises(RuntimeError, match="applied already"): h.redo()
    h.undo()
    with pytest.raises(RuntimeError, match="nothing to undo"): h.undo()
    assert "undone" in repr(h)

def test_other_change_blocks_undo_and_redo(llama):
    m, b = llama
    h = b.keep(rho=.5, blocks=[0]).apply(m)
    w = m.model.layers[0].mlp.up_proj.weight; edited = w.detach().clone()
    with torch.no_grad(): w.mul_(2)
    with pytest.raises(RuntimeError, match="layers.0.mlp.up_proj.*undo the later edit"): h.undo()
    with torch.no_grad(): w.copy_(edited)
    h.undo()
    original = w.detach().clone()
    with torch.no_grad(): w.mul_(2)
    with pytest.raises(RuntimeError, match="no longer"): h.redo()
    with torch.no_grad(): w.copy_(original)

# ---------- inside `applied` ----------
@pytest.mark.parametrize("exc", [ValueError, KeyboardInterrupt, SystemExit, GeneratorExit])
def test_exception_inside(llama, exc):
    m, b = llama; before = state(m)
    with pytest.raises(exc):
        with b.keep(rho=.3).applied(m): raise exc()
    assert same(state(m), before)

def test_anything_inside(llama):
    "Another edit on top that is never undone, a training step, an undo by hand: the bytes come back."
    m, b = llama; before, e = state(m), b.keep(rho=.3)
    with e.applied(m): b.random().keep(rho=.5).apply(m, stack=True)
    assert same(state(m), before)
    with e.applied(m), torch.no_grad(): m.model.layers[1].mlp.up_proj.weight.add_(1)
    assert same(state(m), before)
    with e.applied(m) as h: h.undo()
    assert same(state(m), before) and not h.active
    with e.applied(m):
        with e.applied(m, stack=True): pass
    assert same(state(m), before)

def test_inference_mode_and_requires_grad(llama):
    m, b = llama
    with torch.inference_mode(), b.keep(rho=.3).applied(m): pass
    h = b.keep(rho=.3).apply(m)
    with torch.inference_mode(): h.undo()
    assert all(p.requires_grad for p in m.parameters())

@pytest.mark.parametrize("at", range(1, 10))
@pytest.mark.parametrize("exc", [RuntimeError, KeyboardInterrupt])
def test_failing_write_restores(llama, monkeypatch, at, exc):
    "The write of any one of nine targets fails, once: apply, undo and redo leave the model as it was before the call."
    m, b = llama; real, left = edit_module.write_weight, [10**9]
    def write(model, target, W):
        left[0] -= 1
        if left[0] == 0: real(model, target, W * 2); raise exc("disk on fire")    # half-done, too
        real(model, target, W)
    monkeypatch.setattr(edit_module, "write_weight", write)
    before, e = state(m), b.keep(rho=.5)
    for go in (lambda: e.apply(m), lambda: e.applied(m).__enter__()):
        left[0] = at
        with pytest.raises(exc): go()
        assert same(state(m), before)
    h = e.apply(m); edited = state(m); left[0] = at
    with pytest.raises(exc): h.undo()
    assert same(state(m), edited) and h.active
    h.undo(); left[0] = at
    with pytest.raises(exc): h.redo()
    assert same(state(m), before) and not h.active
    ctx = e.applied(m); ctx.__enter__(); left[0] = at
    with pytest.raises(exc): ctx.__exit__(None, None, None)
    assert same(state(m), before)

# ---------- refusals ----------
def test_interrupted_after_the_write(llama, monkeypatch):
    "Ctrl-C between the write and the handle: nobody could undo, so the weights must be the old ones; a handle stays usable."
    import curvtools.edit as module
    model, basis = llama
    before, edit, calls = state(model), basis.keep(rho=.5), []
    handle = edit.apply(model).undo()
    real = module.fingerprints
    def interrupted(m, targets):
        calls.append(targets)
        if not same(before, state(m)): raise KeyboardInterrupt             # the first look after the weights have changed
        return real(m, targets)
    monkeypatch.setattr(module, "fingerprints", interrupted)
    for f in (lambda: edit.apply(model), handle.redo):
        with pytest.raises(KeyboardInterrupt): f()
        assert same(before, state(model))
    monkeypatch.setattr(module, "fingerprints", real)
    assert calls and not handle.active and handle.redo().active and same(before, state(handle.undo().model))


def test_refuses_another_model(llama):
    m, b = llama; e = b.keep(rho=.5); other = tiny("llama", torch.float32, seed=3); before = state(other)
    with pytest.raises(ValueError, match="another model, or an edit is applied.*stack=True.*force=True"): e.apply(other)
    with pytest.raises(ValueError, match="another model"):
        with e.applied(other): raise AssertionError("must not be reached")
    assert same(state(other), before)
    with e.applied(other, force=True): assert not same(state(other), before)
    assert same(state(other), before)
    for x in (tiny("gpt2", torch.float32), tiny("qwen3", torch.float32)):
        with pytest.raises(ValueError): e.apply(x, force=x.config.model_type == "gpt2")   # no such module, whatever is forced

def test_refuses_another_shape(llama):
    import transformers as tf
    m, b = llama
    small = tf.LlamaForCausalLM(tf.LlamaConfig(vocab_size=37, hidden_size=16, intermediate_size=20, num_hidden_layers=3, num_attention_heads=4))
    with pytest.raises(ValueError, match="mlp.gate_proj"): b.keep(rho=.5).apply(small, force=True)

def test_refuses_an_edit_on_an_edit(llama):
    m, b = llama; e, f = b.keep(rho=.5), b.keep(rho=.8)
    h = e.apply(m); now = state(m)
    with pytest.raises(ValueError, match="an edit is applied"): f.apply(m)
    with pytest.raises(ValueError, match="an edit is applied.*this very one"): e.apply(m)
    assert same(state(m), now)
    g = f.apply(m, stack=True); assert not same(state(m), now)
    g.undo(); assert same(state(m), now)
    h.undo()

def test_last_target_refused_nothing_written(llama):
    m, b = llama; w = m.model.layers[2].mlp.down_proj.weight; old = w.detach().clone()
    with torch.no_grad(): w[0, 0] += 1
    before = state(m)
    with pytest.raises(ValueError, match="layers.2.mlp.down_proj"): b.keep(rho=.5).apply(m)
    assert same(state(m), before)
    with torch.no_grad(): w.copy_(old)

def test_nan_names_the_first_target():
    m, b = copy.deepcopy(made()[0]), made()[1]
    with torch.no_grad(): m.model.layers[1].mlp.up_proj.weight[3, 2] = float("nan"); m.model.layers[2].mlp.up_proj.weight[3, 2] = float("nan")
    with pytest.raises(ValueError, match="layers.1.mlp.up_proj: the weight holds NaN"): b.keep(rho=.5).apply(m, force=True)
    with pytest.raises(ValueError, match="layers.1.mlp.up_proj: the weight holds NaN"): svd(m)

def test_float16_overflow_is_refused():
    "Removing part of a large float16 weight can exceed 65504: refused by name, nothing written."
    m = copy.deepcopy(made("llama", torch.float32)[0]).half()
    t = find_targets(m, "mlp", blocks=[0], projections=["up"])[0]
    g = torch.Generator().manual_seed(0)
    with torch.no_grad(): weight(m, t).copy_(torch.where(torch.rand(24, 16, generator=g) < .5, -1., 1.) * 65000)
    Q = lambda n: torch.linalg.qr(torch.randn(n, n, generator=g))[0]
    e = Eigen(t, Q(24), Q(16), torch.ones(24).double(), torch.ones(16).double(), fingerprint=fingerprint(m, t))
    before = state(m)
    with pytest.raises(ValueError, match="up_proj: the edited weight overflows torch.float16"): Edit({t.name: Plan(t, e, torch.full((24,), 8))}).apply(m)
    assert same(state(m), before)

def test_one_parameter_twice():
    m = tiny("llama", torch.float32); m.model.layers[1].mlp.up_proj.weight = m.model.layers[0].mlp.up_proj.weight
    with pytest.raises(ValueError, match="layers.1.mlp.up_proj and model.layers.0.mlp.up_proj are the same parameter"): made()[1].keep(rho=.5).apply(m, force=True)

def test_made_by_hand(llama):
    m, b = llama
    for e in (hand := Basis([Eigen(e.target, e.UG, e.UA, e.lam, e.mu) for e in b.values()])).values(): assert e.fingerprint is None
    with pytest.raises(ValueError, match="do not say which weights.*force=True"): hand.keep(rho=.5).apply(m)
    with hand.keep(rho=.5).applied(m, force=True): forced = state(m)
    with b.keep(rho=.5).applied(m): assert same(state(m), forced)
    assert "-" in repr(hand.keep(rho=.5)).splitlines()[2]               # energy is not known without a model

# ---------- plans ----------
def test_selection(llama):
    m, b = llama; names = lambda e: list(e.plan)
    assert names(b.keep(rho=.5)) == list(b) and names(keep(b, fraction=.5)) == list(b)
    assert names(b.keep(rho=.5, blocks=[-1])) == names(b.keep(rho=.5, blocks=2)) == [k for k in b if "layers.2" in k]
    assert names(b.keep(rho=.5, projections="up", blocks=[0, 1])) == ["model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj"]
    e = b.keep(rho={0: .9, -1: Fraction(1, 10)}, projections=["gate"])
    assert names(e) == ["model.layers.0.mlp.gate_proj", "model.layers.2.mlp.gate_proj"]
    assert torch.equal(e.plan["model.layers.2.mlp.gate_proj"].rows, b[2, "gate"].mask(rho=Fraction(1, 10)).rows)
    assert e.settings == {"rho": {"0": .9, "-1": .1}, "blocks": [0, -1], "projections": ["gate"]}
    one = collect(m, [tiny_inputs("llama", 2, 8)], blocks=[0, 1], progress=False).eigen()
    with pytest.raises(ValueError, match="no target in block -1"): one.keep(rho=.5, blocks=[-1])    # -1 is the model's last block, not the basis'
    assert not one.keep(rho=.5, blocks=[-2]).plan.keys() - {k for k in one if "layers.1" in k}

@pytest.mark.parametrize("kw,error", [
    (dict(), "exactly one of rho, fraction, energy"), (dict(rho=.5, fraction=.5), "exactly one"), (dict(rho=1.01), "rho must lie between 0 and 1"),
    (dict(rho=-1e-9), "rho must"), (dict(rho=float("nan")), "rho must"), (dict(fraction=2), "fraction must"), (dict(energy=-1), "energy must"),
    (dict(rho=.5, blocks=[3]), r"no target in block 3; there are blocks \[0, 1, 2\]"), (dict(rho=.5, blocks=[-4]), "no target in block -4"),
    (dict(rho=.5, projections=["q"]), "no target has the projection 'q'; there are"), (dict(rho=.5, blocks=[]), "nothing selected"),
    (dict(rho={}), "empty"), (dict(rho={0: .5}, blocks=[0, 1]), "no strength is given for block 1"), (dict(rho={0: 1.5}), "rho must"), (dict(rho={7: .5}), "no target in block 7")])
def test_bad_plans(llama, kw, error):
    with pytest.raises(ValueError, match=error): llama[1].keep(**kw)

def test_blocks_in_any_form_are_recorded_and_saved(llama, tmp_path):
    "A numpy block was not JSON, so the edit could not be saved; a generator was used up before the recipe noted it."
    import numpy as np
    _, b = llama
    for i, blocks in enumerate((np.array([0, 1]), torch.tensor([0, 1]), (x for x in (0, 1)), [np.int64(0), 1], range(2))):
        e = b.keep(rho=.7, blocks=blocks)
        assert {p.target.block for p in e.plan.values()} == {0, 1} and e.settings["blocks"] == [0, 1]
        assert Edit.load(e.save(tmp_path/str(i))).settings == e.settings
    assert b.keep(rho=.7, blocks=np.int64(1)).settings["blocks"] == 1
    e = b.keep(rho={np.int64(1): .5}); assert Edit.load(e.save(tmp_path/"d")).settings == e.settings
    with pytest.raises(ValueError, match="two strengths for one block"): b.keep(rho={-1: .5, b.meta["n_blocks"] - 1: .9})


def test_negative_blocks_need_the_model(llama):
    m, b = llama
    alone = Basis([Eigen(e.target, e.UG, e.UA, e.lam, e.mu) for e in b.values()])
    for kw in (dict(rho=.5, blocks=[-1]), dict(rho={-1: .5})):
        with pytest.raises(ValueError, match=r"block -1 counts from the end.*basis.bind\(model\) first"): alone.keep(**kw)
        assert "layers.2" in next(iter(alone.bind(m, force=True).keep(**kw).plan)); del alone.meta["n_blocks"]

def test_numbers_of_a_plan(llama):
    m, b = llama; before = state(m)
    e = b.keep(rho=.8)
    kept, total = sum(int(p.staircase.dense().sum()) for p in e.plan.values()), sum(p.rows.numel() * p.target.d_in for p in e.plan.values())
    assert e.kept == kept / total and same(state(m), before)             # planning changes nothing
    lines = repr(e).splitlines()
    assert lines[0].startswith("Edit kfac (rho=0.8): keeps") and len(lines) == 2 + 9 + 1 and f"{kept:,}" in lines[-1] and "<table" in e._repr_html_()
    with pytest.raises(ValueError, match="at least one target"): Edit({})

def test_stale_coefficients_are_not_shown(llama):
    m, _ = llama; b = collect(m, [tiny_inputs("llama", 2, 8)], progress=False).eigen()
    with b.keep(rho=.5).applied(m):
        assert b.keep(rho=.5).plan["model.layers.0.mlp.up_proj"].energy_share is None
        with pytest.raises(ValueError, match="an edit is applied"): b.keep(energy=.5)
    assert b.keep(rho=.5).plan["model.layers.0.mlp.up_proj"].energy_share > 0

def test_join(llama):
    m, b = llama
    up, gate = b.keep(rho=.9, projections="up"), b.random().keep(rho=.5, projections="gate")
    e = up | gate
    assert e.method == "kfac+random" and list(e.plan) == list(up.plan) + list(gate.plan)
    with e.applied(m): both = state(m)
    with up.applied(m), gate.applied(m): assert same(state(m), both)
    with pytest.raises(ValueError, match="both edits change"): up | up

# ---------- files ----------
@pytest.mark.parametrize("name,dtype", KINDS)
def test_save_load_apply_is_bit_equal(tmp_path, name, dtype):
    m, b = made(name, dtype); e = b.keep(rho=.6, blocks=[1, 2]) | svd(m, blocks=[0], keep_rank_fraction=.4)
    with e.applied(m): edited = state(m)
    f = Edit.load(e.save(tmp_path/"a"/"edit"))
    assert f.method == e.method and f.settings == e.settings and f.kept == e.kept and f.result == e.result and list(f.plan) == list(e.plan)
    with f.applied(m): assert same(state(m), edited)
    r = json.loads((tmp_path/"a"/"edit"/"recipe.json").read_text())
    assert r["versions"]["torch"] and r["targets"][0]["fingerprint"] == e.plan[r["targets"][0]["name"]].eigen.fingerprint
    assert sorted(p.name for p in (tmp_path/"a"/"edit").iterdir()) == ["basis.safetensors", "recipe.json"]

@pytest.mark.parametrize("name,dtype", [("llama", torch.float32), ("gpt2", torch.float32), ("phi3", torch.bfloat16)])
def test_save_pretrained(tmp_path, name, dtype):
    m, b = made(name, dtype); before, e = state(m), b.keep(rho=.6)
    with e.applied(m): edited = state(m)
    out = e.save_pretrained(m, tmp_path/"model")
    assert same(state(m), before)
    again = type(m).from_pretrained(out, dtype=dtype)
    assert same(state(again), edited)
    with pytest.raises(ValueError, match="an edit is applied"): Edit.load(out).apply(again)
    with Edit.load(out).applied(m): assert same(state(m), edited)
    h = e.apply(m)                                                       # in place already: saved as it is, and left so
    assert same(state(type(m).from_pretrained(e.save_pretrained(m, tmp_path/"two"), dtype=dtype)), edited) and same(state(m), edited)
    h.undo()
    with pytest.raises(ValueError, match="an edit is applied"): b.keep(rho=.5).save_pretrained(again, tmp_path/"three")
    assert not (tmp_path/"three"/"recipe.json").exists()

def test_save_pretrained_fault_leaves_model_and_no_recipe(llama, tmp_path, monkeypatch):
    m, b = llama; e = b.keep(rho=.6); e.save_pretrained(m, tmp_path); before = state(m)
    monkeypatch.setattr(m, "save_pretrained", lambda folder: (_ for _ in ()).throw(OSError("no space left")), raising=False)
    with pytest.raises(OSError): e.save_pretrained(m, tmp_path)
    assert same(state(m), before) and not (tmp_path/"recipe.json").exists()

def test_bad_folders(llama, tmp_path):
    m, b = llama; d = b.keep(rho=.5).save(tmp_path/"e"); recipe = (d/"recipe.json").read_text(); basis = (d/"basis.safetensors").read_bytes()
    with pytest.raises(FileNotFoundError, match="no edit here"): Edit.load(tmp_path/"none")
    def put(**changes): (d/"recipe.json").write_text(json.dumps(json.loads(recipe) | changes))
    for text, error in ((recipe[:200], "truncated or not JSON"), ("[1, 2]", "not a recipe"), ('{"kind": "other"}', "not a recipe"), ('{"kind": "edit", "version": 9}', "version 9"), ('{"kind": "edit", "version": 1}', "not complete: basis")):
        (d/"recipe.json").write_text(text)
        with pytest.raises(ValueError, match=error): Edit.load(d)
    t = json.loads(recipe)["targets"]
    for rows in ([1, 2] + [0] * 22, [17] + [0] * 23, [-1] * 24, [1]):
        put(targets=[dict(t[0], rows=rows), *t[1:]])
        with pytest.raises(ValueError, match="gate_proj are not a staircase"): Edit.load(d)
    put(targets=t[1:])
    with pytest.raises(ValueError, match="same targets"): Edit.load(d)
    put(); (d/"basis.safetensors").write_bytes(basis[:-7])
    with pytest.raises(ValueError, match="truncated, or not the basis"): Edit.load(d)
    b.random().save(d/"basis.safetensors")
    with pytest.raises(ValueError, match="not the basis that recipe.json was written with"): Edit.load(d)
    (d/"basis.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="basis is missing"): Edit.load(d)
    put(basis=dict(file="../../etc/passwd", blake2b=""))                 # a recipe cannot reach outside its folder
    with pytest.raises(ValueError, match="names a file '../../etc/passwd'"): Edit.load(d)

# ---------- baselines ----------
@pytest.mark.parametrize("name,dtype", [("llama", torch.float64), ("gpt2", torch.float64), ("phi3", torch.float32), ("llama", torch.bfloat16)])
def test_svd(name, dtype):
    "Against torch's truncated SVD. The bases are stored in float32: 1e-6 of the largest entry; bfloat16: one rounding."
    m, b = made(name, dtype); before = state(m); old = {k: weight(m, e.target).clone() for k, e in b.items()}
    e = svd(m, keep_rank_fraction=.3)
    assert e.method == "svd" and "of the rank" in repr(e) and e.settings["keep_rank_fraction"] == .3
    with e.applied(m):
        for k, p in e.plan.items():
            U, S, V = torch.linalg.svd(old[k].double(), full_matrices=False); n = round(.3 * len(S))
            want = (U[:, :n] * S[:n]) @ V[:n]
            tol = 1e-2 if dtype == torch.bfloat16 else 5e-6
            assert (weight(m, p.target).double() - want).abs().max() < tol * old[k].abs().max()
            assert p.rows.tolist() == [n] * n + [0] * (p.target.d_out - n)
    ks = [round(.3 * min(t.eigen.target.d_out, t.eigen.target.d_in)) for t in e.plan.values()]
    assert e.kept == pytest.approx(sum(ks) / sum(min(p.target.d_out, p.target.d_in) for p in e.plan.values()))
    with svd(m, keep_rank_fraction=1).applied(m): assert same(state(m), before)
    assert svd(m, keep_rank_fraction=1).kept == 1 and svd(m, keep_rank_fraction=0).kept == 0
    assert same(state(m), before)

def test_svd_arguments(llama, tmp_path):
    m, b = llama
    assert list(svd(m, blocks=[-1], projections=["up"]).plan) == ["model.layers.2.mlp.up_proj"]
    assert {p.target.role for p in svd(m, "attention").plan.values()} == {"attention"}
    for bad in (-.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="keep_rank_fraction must lie between"): svd(m, keep_rank_fraction=bad)
    with pytest.raises(ValueError): svd(m, "nothing.here")
    e = svd(m, keep_rank_fraction=.4); f = Edit.load(e.save(tmp_path))
    assert f.method == "svd" and f.kept == e.kept
    with e.applied(m): a = state(m)
    with f.applied(m): assert same(state(m), a)

def test_random_control(llama):
    m, b = llama; r = random_basis(b, 5).keep(rho=.7)
    assert r.method == "random" and r.kept == b.keep(rho=.7).kept and r.meta["seed"] == 5
    assert all(torch.equal(p.rows, b.keep(rho=.7).plan[k].rows) for k, p in r.plan.items())


@pytest.mark.parametrize("kw,match", [(dict(rho={1: .6, 2: 7}), "rho must lie between 0 and 1, got 7 for block 2"), (dict(rho={1: .6, 2: "a"}), "got 'a' for block 2"), (dict(rho={1: .6, 2: True}), "got True"),
    (dict(rho={"0": .5, 0: .9}), "two strengths for one block"), (dict(rho={1: .6, 77: .9}, blocks=[1]), "given for block 77, which is not among"), (dict(rho=.5, blocks=True), "whole numbers, not True"), (dict(rho=.5, blocks="1"), "whole numbers, not '1'")])
def test_every_part_of_a_dictionary_of_strengths_is_looked_at(kw, match):
    _, b = made()
    with pytest.raises(ValueError, match=match): b.keep(**kw)


def test_strengths_as_json_writes_them():
    _, b = made(); e = b.keep(rho={0: .5, 1: .9})
    assert all(torch.equal(e.plan[n].rows, p.rows) for n, p in b.keep(rho=e.settings["rho"]).plan.items())


def test_ctrl_c_before_the_guard_listens(llama, monkeypatch):
    "It comes when the block ends, before anything is put back."
    import signal
    m, b = llama; real = signal.getsignal
    def ctrl_c(_): monkeypatch.setattr(signal, "getsignal", real); raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        with b.keep(rho=.5).applied(m) as handle: monkeypatch.setattr(signal, "getsignal", ctrl_c)
    assert not handle.active                                                     # the fixture compares the bytes


def test_eigen_of_other_weights(llama):
    m, _ = llama; f = collect(m, [tiny_inputs("llama", 4, 12)], progress=False); other = tiny("llama", torch.float32, seed=1)
    with pytest.raises(ValueError, match="force=True"): f.eigen(other, progress=False)
    assert f.eigen(other, progress=False, force=True).bound
