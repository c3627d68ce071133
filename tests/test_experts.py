"""Experts in 3-D parameters: A, G and counts of each against a loop over positions and experts written here, in float64; nothing about the batch changes them; one expert's edit touches one slice.

Tolerance: float64 sums of a few hundred products in another order, 1e-8 relative to the largest entry."""
import json
import math
import signal
import types
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
import transformers as tf
from tiny import MOES, V, tiny
from test_kfac import near, pad, sequences
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

import curvtools.experts as ce
from curvtools.budget import agreement
from curvtools.decompose import Basis
from curvtools.edit import Edit
from curvtools.experts import experts_function, experts_seen, grouped_experts, segment_linear
from curvtools.kfac import Factors, collect
from curvtools.targets import find_targets, fingerprint, weight, write_weight

TOL = 1e-8


def gated(m, z):
    "The gate, written anew: gate and up in turn and clamped in gpt-oss, one after the other elsewhere."
    if not type(m).__name__.startswith("GptOss"): g, u = z.chunk(2); return F.silu(g) * u
    g, u = z[0::2].clamp(max=m.limit), z[1::2].clamp(-m.limit, m.limit)
    return (u + 1) * g * torch.sigmoid(m.alpha * g)


def looped(m, seen, path):
    "A forward that goes through positions and experts one by one; `seen` gets (position, input, output) of every product."
    def product(stack, e, a, t):
        W, b = getattr(m, stack)[e], getattr(m, stack + "_bias", None)
        z = (a @ W if m.is_transposed else W @ a) + (0 if b is None else b[e])
        seen.setdefault(f"{path}.{stack}[{e}]", []).append((t, a.detach(), z))
        return z
    def forward(self, x, index, r):
        return torch.stack([sum(r[t, j] * product("down_proj", e, gated(m, product("gate_up_proj", e, x[t], t)), t) for j, e in enumerate(index[t].tolist())) for t in range(len(x))])
    return types.MethodType(forward, m)


def reference(model, seqs):
    "name -> (A, G, count) of every expert, each sequence for itself and without padding."
    modules = [(n, m) for n, m in model.named_modules() if type(m).__name__.endswith("Experts")]
    sums = {t.name: [torch.zeros(t.d_in, t.d_in).double(), torch.zeros(t.d_out, t.d_out).double(), 0] for t in find_targets(model, "experts")}
    for ids, labels in seqs:
        seen = {}
        try:
            for n, m in modules: m.forward = looped(m, seen, n)
            logits = model(input_ids=ids[None]).logits[0]
        finally:
            for _, m in modules: del m.forward
        loss = sum(F.cross_entropy(logits[t], labels[t + 1]) for t in range(len(ids) - 1) if labels[t + 1] != -100)
        flat = [(n, t, a, z) for n, rows in seen.items() for t, a, z in rows]
        for (n, t, a, _), g in zip(flat, torch.autograd.grad(loss, [z for *_, z in flat], allow_unused=True)):
            if t == len(ids) - 1 or not (labels[t + 1:] != -100).any(): continue
            s = sums[n]; s[0] += torch.outer(a, a); s[2] += 1
            if g is not None: s[1] += torch.outer(g, g)
    return {n: (A / max(k, 1), G / max(k, 1), k) for n, (A, G, k) in sums.items()}


def check(factors, want, tol=TOL):
    assert any(k for *_, k in want.values())
    for n, (A, G, k) in want.items():
        f = factors[n]
        assert f.count == k, n
        if k == 0: assert not f.A.any() and not f.G.any()
        else: assert near(f.A, A, tol) and (near(f.G, G, tol) or G.abs().max() == f.G.abs().max() == 0), n


def state(model):
    return ({n: p.clone() for n, p in model.named_parameters()}, {n: (sorted(m.__dict__), len(m._forward_hooks), m.training) for n, m in model.named_modules()},
            [p.requires_grad for p in model.parameters()], model.config._experts_implementation, sorted(ALL_EXPERTS_FUNCTIONS), dict(ALL_EXPERTS_FUNCTIONS._local_mapping))


def same_state(a, b): return all(torch.equal(x, b[0][n]) for n, x in a[0].items()) and a[1:] == b[1:]


@pytest.fixture(scope="module")
def models(): return {n: tiny(n) for n in MOES}


@pytest.mark.parametrize("name", MOES)
def test_factors_equal_a_loop_over_experts(models, name):
    model, seqs = models[name], sequences(prompts=(0, 3, 5, 0))
    want, kw = reference(model, seqs), dict(targets="experts", labels="data", progress=False)
    before = state(model)
    one = collect(model, [pad([s]) for s in seqs], **kw)                                       # one by one
    check(one, want)
    for batches in ([pad(seqs)], [pad(seqs, "left")], [pad(seqs[2:], "left", 14, 5), pad(seqs[:2], "right", 12, 7)]):   # sizes, order, side and content of padding
        check(collect(model, batches, **kw), want)
    assert same_state(before, state(model))
    n, k = sum(len(i) - 1 for i, _ in seqs), model.config.num_experts_per_tok
    for counts in experts_seen(one).counts.values(): assert sum(counts.values()) == n * k
    blocks = {t.block for t in find_targets(model, "experts")}
    assert blocks == ({1, 2} if name == "qwen3_moe" else {0, 1, 2})


@pytest.mark.parametrize("name", MOES)
def test_sampled_labels_and_mixed_targets(models, name):
    model, seqs = models[name], sequences()
    clean = [dict(d, labels=d["input_ids"].masked_fill(d["attention_mask"] == 0, -100)) for d in (pad([s]) for s in seqs)]
    kw = dict(progress=False, seed=3)
    want = collect(model, clean, targets="experts", **kw)
    mixed = collect(model, [{k: v for k, v in pad(seqs, "left", 15).items() if k != "labels"}], targets=["attention", "experts"], **kw)
    plain = collect(model, clean, targets="attention", **kw)
    for n in want: assert mixed[n].count == want[n].count and (near(mixed[n].A, want[n].A) and near(mixed[n].G, want[n].G) if want[n].trace else not mixed[n].trace), n
    for n in plain: assert mixed[n].count == plain[n].count == 26 and near(mixed[n].A, plain[n].A) and near(mixed[n].G, plain[n].G)
    other = collect(model, clean, targets="experts", progress=False, seed=4)
    assert any(not near(other[n].G, want[n].G, 1e-3) for n in want if want[n].count) and [f.count for f in other.values()] == [f.count for f in want.values()]
    sub = collect(model, clean, targets="*.2.*.down_proj[1]", **kw)                             # one matrix alone gives the same
    (n, f), = sub.items()
    assert n.endswith("2.mlp.experts.down_proj[1]") and near(f.A, want[n].A, 1e-12) and near(f.G, want[n].G, 1e-12)


@pytest.mark.parametrize("name", MOES)
def test_exact_labels_are_the_average_over_sampled_ones(models, name, monkeypatch):
    "G with labels=\"exact\" against the sum over labels of p(label) g g^T, for the single position of a pair of tokens. The routers' own float32, in which a scaled gradient rounds otherwise, is taken out."
    softmax, real = F.softmax, torch.Tensor.float
    monkeypatch.setattr(F, "softmax", lambda x, dim=None, _stacklevel=3, dtype=None: softmax(x, dim))
    monkeypatch.setattr(torch.Tensor, "float", lambda x: x if x.is_floating_point() else real(x))
    model, ids = models[name], torch.tensor([[5, 9]])
    got = collect(model, [ids], targets="experts", labels="exact", progress=False)
    with torch.no_grad(): p = model(ids[:, :1]).logits[0, 0].softmax(-1)
    want = {}
    for y in range(V):
        for n, (A, G, k) in reference(model, [(ids[0], torch.tensor([5, y]))]).items(): want[n] = (A, want.get(n, (0, 0, 0))[1] + p[y] * G, k)
    check(got, want)
    assert experts_seen(got).rows[0]["never"] == len(experts_seen(got).counts[got[next(iter(got))].target.block, "down"]) - model.config.num_experts_per_tok


@pytest.mark.parametrize("name", MOES)
def test_logits_are_those_of_the_loop_of_transformers(models, name):
    model, ids = models[name], torch.randint(3, V, (3, 10), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        want = model(ids).logits
        with experts_function(model, lambda path, m, usual, *a: grouped_experts(m, *a)): got = model(ids).logits
        with experts_function(model, lambda path, m, usual, *a: usual(m, *a)): own = model(ids).logits
        assert (got - want).abs().max() <= 1e-12 * want.abs().max() and torch.equal(own, want) and torch.equal(model(ids).logits, want)
        for how in ("grouped_mm", "batched_mm"):                                                # the model's own way is called as it was
            m = tiny(name, torch.float32); m.set_experts_implementation(how)
            want = m(ids).logits
            with experts_function(m, lambda path, m, usual, *a: usual(m, *a)): assert torch.equal(m(ids).logits, want)
            with experts_function(m, lambda path, m, usual, *a: grouped_experts(m, *a)): assert (m(ids).logits - want).abs().max() < 1e-4 * want.abs().max()
            assert m.config._experts_implementation == how


def test_float32_and_bf16_models_with_grouped_mm():
    ids = torch.randint(3, V, (4, 12), generator=torch.Generator().manual_seed(0))
    want = collect(tiny("mixtral"), [dict(input_ids=ids, labels=ids)], targets="experts", labels="data", progress=False)
    for dtype, tol in ((torch.float32, 1e-4), (torch.bfloat16, .3)):
        m = tiny("mixtral", dtype); m.set_experts_implementation("grouped_mm")
        got = collect(m, [dict(input_ids=ids, labels=ids)], targets="experts", labels="data", progress=False)
        assert m.config._experts_implementation == "grouped_mm" and all(f.A.dtype == f.G.dtype == torch.float32 for f in got.values())
        if dtype == torch.float32: assert all(got[n].count == want[n].count and near(got[n].A.double(), want[n].A, tol) and near(got[n].G.double(), want[n].G, tol) for n in want if want[n].count)
        else: assert all(torch.isfinite(f.G).all() for f in got.values())


def test_segments_have_no_padding_and_the_fast_way_agrees(monkeypatch):
    g = torch.Generator().manual_seed(0)
    x, W, b, ends = torch.randn(7, 16, generator=g), torch.randn(4, 8, 16, generator=g), torch.randn(4, 8, generator=g), [2, 2, 6, 7]
    want = torch.stack([W[e] @ x[i] + b[e] for i, e in enumerate([0, 0, 2, 2, 2, 2, 3])])
    assert torch.allclose(segment_linear(x, W, ends, b), want, atol=1e-5) and torch.allclose(segment_linear(x, W.mT.contiguous(), ends, b, True), want, atol=1e-5)
    assert segment_linear(x[:0], W, [0, 0, 0, 0]).shape == (0, 8)
    monkeypatch.setattr(ce, "_fast", lambda x, W: True)
    y = segment_linear(x.requires_grad_(), W, ends, b)
    assert torch.allclose(y, want, atol=1e-5)
    y.backward(torch.ones(7, 8)); assert torch.allclose(x.grad[2], W[2].sum(0), atol=1e-5)
    assert torch.allclose(segment_linear(x, W.mT.contiguous(), ends, None, True), want - b[[0, 0, 2, 2, 2, 2, 3]], atol=1e-5)


def test_marks_of_nobody_give_nothing(models):
    "An index of E (expert parallelism, masked tokens) stands for no expert."
    m = models["mixtral"].model.layers[0].mlp.experts
    x, index, r = torch.randn(5, 16).double(), torch.tensor([[0, 4], [4, 4], [1, 2], [4, 3], [0, 1]]), torch.rand(5, 2).double()
    with torch.no_grad(): assert torch.allclose(grouped_experts(m, x, index, r), m(x, index.clamp(max=3), r * (index < 4)), atol=1e-12) and not grouped_experts(m, x, index, r)[1].any()


def test_the_model_is_left_as_found_after_an_exception(models):
    model, before = models["mixtral"].train(), None
    before = state(model)
    good = torch.randint(3, V, (2, 9))
    def stream(error):
        yield good
        raise error
    for error in (ValueError("broken stream"), KeyboardInterrupt()):
        with pytest.raises(type(error)) as e: collect(model, stream(error), targets=["experts", "attention"], progress=False)
        assert same_state(before, state(model)) and isinstance(e.value.partial, Factors)
    assert len(collect(model, stream(KeyboardInterrupt()), targets="experts", progress=False, on_interrupt="return")) == 24
    with pytest.raises(RuntimeError, match="boom"):
        def run(*a): raise RuntimeError("boom")
        with experts_function(model, run): model(good)
    assert same_state(before, state(model))
    model.eval()


@pytest.mark.parametrize("name", MOES)
def test_edit_of_one_expert(models, name, tmp_path):
    model, ids = models[name], torch.randint(3, V, (6, 20), generator=torch.Generator().manual_seed(1))
    factors = collect(model, [ids], targets="experts", progress=False)
    basis, before = factors.eigen(), state(model)
    b, e = 2, max(range(4), key=lambda e: factors[2, "down", e].count)
    edit = basis.keep(rho=.7, blocks=[b], projections="gate_up", experts=[e])
    (n, p), = edit.plan.items()
    stack = n.rpartition("[")[0]
    with torch.no_grad(): logits = model(ids).logits
    with edit.applied(model):
        changed = [k for k, v in model.named_parameters() if not torch.equal(v, before[0][k])]
        assert changed == [stack]
        rows = (model.get_parameter(stack) != before[0][stack]).flatten(1).any(1)
        assert rows.nonzero().flatten().tolist() == [e]
        W = weight(model, p.target)
        C = p.eigen.UG.double().T @ before[0][stack][e].reshape_as(W.T if p.target.layout == "expert_t" else W).T.reshape(W.shape) @ p.eigen.UA.double() if p.target.layout == "expert_t" else p.eigen.UG.double().T @ before[0][stack][e] @ p.eigen.UA.double()
        assert near((p.eigen.UG.double().T @ W @ p.eigen.UA.double())[p.pairs.dense()], C[p.pairs.dense()], 1e-5)
        with torch.no_grad(): assert not torch.equal(model(ids).logits, logits)
    assert same_state(before, state(model))
    handle = edit.apply(model); handle.undo(); assert same_state(before, state(model))
    with basis.keep(rho=1).applied(model): assert same_state(before, state(model))             # rho = 1 is the identity, to the bit
    with edit.random(0).applied(model): assert [k for k, v in model.named_parameters() if not torch.equal(v, before[0][k])] == [stack]
    factors.save(tmp_path/"f.safetensors"); basis.save(tmp_path/"b.safetensors"); edit.save(tmp_path/"edit")
    back, base, again = Factors.load(tmp_path/"f.safetensors"), Basis.load(tmp_path/"b.safetensors").bind(model), Edit.load(tmp_path/"edit")
    assert [f.target for f in back.values()] == [f.target for f in factors.values()] and all(torch.equal(back[k].G, factors[k].G) and back[k].count == factors[k].count for k in factors)
    assert list(base) == list(basis) and torch.equal(base[b, "gate_up", e].UG, basis[n].UG) and base[n].target.parts == basis[n].target.parts
    assert json.loads((tmp_path/"edit"/"recipe.json").read_text())["settings"]["experts"] == [e]
    with edit.applied(model): first = model.get_parameter(stack).clone()
    with again.applied(model): assert torch.equal(model.get_parameter(stack), first)
    assert same_state(before, state(model))


def test_parts_of_gate_up(models):
    "gpt-oss holds gate and up in turn, the others one after the other; scaling a part scales what it should."
    for name in MOES:
        model = tiny(name); t = find_targets(model, "experts", projections="gate_up")[1]
        m, z = model.get_submodule(t.name.rpartition(".")[0]), torch.randn(t.d_out).double()
        off = z.clone(); off[t.rows("gate")] = 0
        assert not m._apply_gate(off).any() and m._apply_gate(z).all() and sorted(t.rows("gate") + t.rows("up")) == list(range(t.d_out))
        old = weight(model, t).clone(); prints = [fingerprint(model, u) for u in find_targets(model, "experts")]
        write_weight(model, t, old * 2); assert torch.equal(weight(model, t), old * 2)
        assert [i for i, u in enumerate(find_targets(model, "experts")) if fingerprint(model, u) != prints[i]] == [find_targets(model, "experts").index(t)]


def test_experts_that_saw_nothing_stay(models):
    model, ids = models["qwen3_moe"], torch.tensor([[5, 9, 7]])
    f = collect(model, [ids], targets="experts", progress=False)
    silent = [n for n in f if f[n].count == 0]
    assert silent and "never saw a position" in repr(f) and "nan" not in repr(f)
    basis = f.eigen(); edit = basis.keep(rho=.5)
    assert not set(silent) & set(basis) and f"{len(silent)} of the experts' matrices saw nothing" in repr(basis) and not set(silent) & set(edit.plan)
    with pytest.raises(KeyError, match="routed to this expert"): basis[silent[0]]
    from curvtools.baselines import identity_basis
    assert set(identity_basis(f)) == set(basis)
    more = collect(model, [torch.randint(3, V, (4, 12), generator=torch.Generator().manual_seed(2))], targets="experts", progress=False)
    both, sum_ = f + more, f + f
    assert all(both[n].count == f[n].count + more[n].count and near(both[n].A, more[n].A) for n in silent if more[n].count)
    assert all(sum_[n].count == 0 and not sum_[n].A.any() for n in silent)


# what is refused

def test_experts_that_cannot_be_worked_on_are_listed_and_refused(models):
    def why(change):
        m = tiny("mixtral"); change(m, m.model.layers[1].mlp.experts)
        ts = find_targets(m, "experts")
        assert {t.block for t in ts} == {0, 2}
        with pytest.raises(ValueError, match="Not supported"): find_targets(m, "model.layers.1.mlp.experts.down_proj")
        return dict(ts.unsupported)["model.layers.1.mlp.experts.down_proj"]
    assert "expert parallelism" in why(lambda m, x: setattr(x, "_is_expert_parallel", True))
    assert "quantised" in why(lambda m, x: setattr(x, "down_proj", torch.nn.Parameter(torch.zeros(4, 16, 24, dtype=torch.int8), requires_grad=False)))
    assert "meta" in why(lambda m, x: setattr(x, "down_proj", torch.nn.Parameter(x.down_proj.to("meta"))))
    assert "do not fit" in why(lambda m, x: setattr(x, "down_proj", torch.nn.Parameter(torch.zeros(4, 16, 23).double())))
    assert "one weight with" not in str(find_targets(models["mixtral"], "experts").unsupported)
    m = tiny("mixtral"); m.model.layers[1].mlp.experts.down_proj = m.model.layers[0].mlp.experts.down_proj
    assert {t.block for t in find_targets(m, "experts")} == {2} and "one weight with" in dict(find_targets(m, "experts").unsupported)["model.layers.0.mlp.experts.down_proj"]


def test_a_class_outside_of_the_interface_is_listed():
    class Own(torch.nn.Module):
        def __init__(self): super().__init__(); self.down_proj = torch.nn.Parameter(torch.zeros(4, 16, 24))
    m = tiny("mixtral")
    for l in m.model.layers: l.mlp.experts = Own()
    assert "3-D expert parameter [4, 16, 24]" in dict(find_targets(m, "attention").unsupported)["model.layers.0.mlp.experts.down_proj"]
    with pytest.raises(ValueError, match="3-D expert parameter"): find_targets(m, "experts")


def test_a_module_that_computes_more_than_its_experts_is_refused(models, monkeypatch):
    model, before = models["mixtral"], state(models["mixtral"])
    cls = type(model.model.layers[0].mlp.experts); plain = cls.forward.__wrapped__
    monkeypatch.setattr(cls.forward, "__wrapped__", lambda m, x, i, r: plain(m, x, i, r) + .1 * x)
    with pytest.raises(ValueError, match="computes something else than the sum of its experts"): collect(model, [torch.full((1, 6), 5)], targets="experts", progress=False)
    assert same_state(before, state(model))
    monkeypatch.undo()
    ALL_EXPERTS_FUNCTIONS["mine"] = lambda m, x, i, r: x
    try:
        model.config._experts_implementation_internal = "mine"
        with pytest.raises(ValueError, match="runs its experts with 'mine'"): collect(model, [torch.full((1, 6), 5)], targets="experts", progress=False)
    finally: model.config._experts_implementation_internal = "eager"; del ALL_EXPERTS_FUNCTIONS["mine"]


def test_other_requests_that_make_no_sense(models):
    model, ids = models["mixtral"], torch.full((1, 6), 5)
    basis = collect(model, [ids], targets="experts", progress=False).eigen()
    with pytest.raises(ValueError, match="no target of expert 9 here; there are those of"): basis.keep(rho=.5, experts=[9])
    with pytest.raises(ValueError, match="none of these targets is an expert's"): collect(model, [ids], targets="attention", progress=False).eigen().keep(rho=.5, experts=[0])
    with pytest.raises(ValueError, match="no experts among these factors"): experts_seen(collect(model, [ids], targets="attention", progress=False))
    from curvtools.baselines import second_moments
    with pytest.raises(ValueError, match="only the factors of routed experts"): second_moments(model, basis, [ids], progress=False)
    other = tiny("mixtral", seed=1)
    with pytest.raises(ValueError, match="not the weights"): basis.keep(rho=.5).apply(other)
    with pytest.raises(ValueError, match="should be a matrix of|no module"): basis.keep(rho=.5).apply(tiny("qwen3_moe"))
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize("name", MOES)
def test_what_watches_modules_refuses_experts_in_words(name):
    "What needs a module's inputs says so before anything is done, and names the way out."
    from curvtools.baselines import bsn, ekfac, npo
    from curvtools.evaluate import bands
    from curvtools.reading import inputs
    from curvtools.sharpness import rows
    m = tiny(name); x = torch.randint(3, 30, (8, 6)); ts = find_targets(m, "experts")
    b = collect(m, [x], targets="experts", progress=False).eigen(m, progress=False)
    for f in (lambda: bsn(m, x[:4], x[4:], targets="experts", epochs=1, progress=False), lambda: npo(m, x[:4], x[4:], targets="experts", epochs=1, progress=False),
              lambda: bands(m, b, x[:4], x[4:], progress=False), lambda: inputs(m, ts[0], x[:4]), lambda: rows(m, x[:4], targets="experts", progress=False)):
        with pytest.raises(ValueError, match=r"expert's part of a stacked parameter.*leave the experts out"): f()
    with pytest.raises(ValueError, match="is an expert"): ekfac(m, [x], targets="experts", progress=False)


def test_stop_with_experts_that_nobody_asks():
    "Experts that neither half saw do not count; one that only one half saw keeps the run going."
    m = tiny("mixtral"); x = torch.full((64, 6), 5)                          # one token: two experts of four a block
    f = collect(m, x.split(1), targets="experts", progress=False, stop="converged")
    assert any(v.count == 0 for v in f.values()) and .5 < f.meta["agreement"] <= 1.01
    halves = [{n: SimpleNamespace(A=v.A, G=v.G) for n, v in f.items()} for _ in (0, 1)]
    lone = next(n for n, v in f.items() if v.count)
    halves[1][lone] = SimpleNamespace(A=torch.zeros_like(f[lone].A), G=torch.zeros_like(f[lone].G))
    assert agreement(f, f) > .999 and agreement(*halves) == agreement(*halves[::-1]) == 0


def test_factors_with_silent_experts_are_saved_and_read(tmp_path):
    "An expert to which no position was routed has a count of 0; a plain matrix never has, and not all have."
    f = collect(tiny("qwen3_moe"), [torch.randint(3, V, (1, 2))], "experts", progress=False)
    assert any(x.count == 0 for x in f.values())
    f.save(tmp_path/"f"); g = Factors.load(tmp_path/"f")
    assert [x.count for x in g.values()] == [x.count for x in f.values()] and all(torch.equal(g[n].G, f[n].G) for n in f)
    with pytest.raises(ValueError, match="no position"): (0*f).save(tmp_path/"g")
    assert not (tmp_path/"g").exists()


def test_no_position_for_any_expert_is_an_error():
    model, ids = tiny("qwen3_moe"), [torch.full((1, 2), 3)]
    silent = [x.target for x in collect(model, ids, "experts", progress=False).values() if x.count == 0]
    with pytest.raises(ValueError, match="no position was routed to .* and 1 others: collect on more text"): collect(model, ids, silent[:2], progress=False)


def test_experts_that_saw_nothing_yet_have_not_converged():
    "Two halves without a position agree about nothing; the text goes on."
    model, dull = tiny("qwen3_moe"), torch.full((8, 16), 3)
    silent = [x.target for x in collect(model, [dull], "experts", progress=False).values() if x.count == 0]
    batches = [dull] * 8 + [torch.randint(3, V, (8, 16), generator=torch.Generator().manual_seed(s)) for s in range(4)]
    f = collect(model, batches, silent, stop=.5, progress=False)
    assert any(x.count for x in f.values()) and math.isfinite(f.meta.get("agreement", 0.))
