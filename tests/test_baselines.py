"""baselines: every order, mask, control and trained edit against brute force, autograd or a second implementation; and what they share."""
import copy, itertools, math
import pytest, torch
from torch import nn
from torch.nn import functional as F
from tiny import tiny, tiny_inputs, V
from curvtools import baselines as B
from curvtools.baselines import (Moments, bsn, ekfac, gradient_ascent, identity_basis, keep_by, magnitude, matched_noise, mix_factors, npo, one_sided, order_scores, random_directions,
                                 random_pairs, second_moments, svd, union)
from curvtools.data import Passage, Passages
from curvtools.edit import Edit, Masked, Plan, Replaced
from curvtools.kfac import Factors, collect
from curvtools.targets import find_targets, fingerprint, weight

ids = lambda n, T=9, seed=0: torch.randint(3, V, (n, T), generator=torch.Generator().manual_seed(seed))
_made = {}
def made(name="llama", dtype=torch.float64):
    "Model, factors, basis, identity basis; made once, and every test leaves the model as it was."
    if (name, dtype) not in _made:
        m = tiny(name, dtype); f = collect(m, [ids(4, 12)], targets="mlp", progress=False)
        _made[name, dtype] = m, f, f.eigen(progress=False, model=m), identity_basis(f, m)
    return _made[name, dtype]
def state(m): return {k: v.detach().clone().contiguous().view(-1).view(torch.uint8) for k, v in m.state_dict().items()}
def same(a, b): return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
@pytest.fixture(autouse=True)
def untouched():
    before = {k: (state(v[0]), [p.requires_grad for p in v[0].parameters()], [x.training for x in v[0].modules()]) for k, v in _made.items()}
    yield
    for k, (s, grads, modes) in before.items():
        m = _made[k][0]
        assert same(state(m), s) and [p.requires_grad for p in m.parameters()] == grads and [x.training for x in m.modules()] == modes, f"a test left {k} changed"

# ---------- masks by score ----------
def test_largest_by_brute_force():
    "Over all subsets of a 3 x 3 matrix: none smaller reaches the share, and the one found holds the largest scores."
    g = torch.Generator().manual_seed(0)
    for trial in range(12):
        s, C = torch.rand(3, 3, generator=g, dtype=torch.float64), torch.randn(3, 3, generator=g, dtype=torch.float64)
        subsets = torch.tensor(list(itertools.product([False, True], repeat=9)))             # [512, 9]
        for share in (.2, .55, .9):
            mask = B._largest(s, "rho", share).flatten(); k = int(mask.sum())
            sums = (subsets * s.flatten()).sum(1)
            assert k == int(subsets.sum(1)[sums >= share * s.sum()].min())
            assert torch.equal(mask.nonzero()[:, 0], s.flatten().topk(k).indices.sort().values)
            by_energy = B._largest(s, "energy", share, C).flatten()
            order = s.flatten().argsort(descending=True); cum = C.flatten()[order].square().cumsum(0)
            assert int(by_energy.sum()) == next(n + 1 for n in range(9) if cum[n] >= share * cum[-1])

def test_largest_ties_ends_and_rows():
    ones = torch.ones(2, 3)
    assert torch.equal(B._largest(ones, "fraction", .5), torch.tensor([[True] * 3, [False] * 3]))      # ties by (i, j)
    assert torch.equal(B._largest(ones, "fraction", 1/3, per="row"), torch.tensor([[True, False, False]] * 2))
    for name in ("rho", "fraction", "energy"):
        assert B._largest(ones, name, 1, ones).all() and not B._largest(ones, name, 0, ones).any()
    assert not B._largest(torch.zeros(2, 2), "rho", .5).any()                                          # nothing to reach
    with pytest.raises(ValueError, match="NaN"): B._largest(torch.tensor([[float("nan")]]), "rho", .5)

@pytest.mark.parametrize("kw", [dict(rho=.7), dict(fraction=.4), dict(energy=.6), dict(rho={0: .5, -1: .9}), dict(rho=1), dict(fraction=0)])
def test_kfac_order_is_basis_keep(kw):
    m, f, b, i = made()
    x, y = keep_by(b, "kfac", **kw), b.keep(**kw)
    assert x.plan.keys() == y.plan.keys() and all(torch.equal(x.plan[k].pairs.dense(), y.plan[k].pairs.dense()) for k in x.plan)
    with x.applied(m): got = state(m)
    with y.applied(m): assert same(got, state(m))

@pytest.mark.parametrize("order", ["obd", "magnitude"])
def test_nested(order):
    m, f, b, i = made(); masks = [keep_by(b, order, rho=r, blocks=[1]).plan for r in (.2, .5, .9)]
    for small, big in zip(masks, masks[1:]):
        for k in small: assert not (small[k].rows & ~big[k].rows).any() and small[k].pairs.kept < big[k].pairs.kept

# ---------- second moments ----------
def batches_with_holes():
    mask = torch.ones(3, 8, dtype=torch.long); mask[0, 5:] = 0; mask[1, :2] = 0
    labels = ids(3, 8, 5); labels[2, 3:5] = -100; labels[0, 4] = -100                                 # a hole, and an end without loss
    return dict(input_ids=ids(3, 8, 5), attention_mask=mask, labels=labels)

def gradients_by_autograd(m, t, b):
    "d(summed loss) / d(W of one position) for every position that counts, by giving each position a weight of its own: [n, d_out, d_in], and the row of each."
    out, own, seen = [], {}, {}
    def hook(mod, args, y):
        x = args[0].detach(); D = torch.zeros(*x.shape[:2], t.d_out, t.d_in, dtype=x.dtype, requires_grad=True); own["D"] = D
        return y + torch.einsum("bsoi,bsi->bso", D, x)
    for row in range(len(b["input_ids"])):
        real = b["attention_mask"][row].bool(); x, y = b["input_ids"][row][real][None], b["labels"][row][real][None]
        h = m.get_submodule(t.name).register_forward_hook(hook)
        z = m(input_ids=x).logits; h.remove()
        F.cross_entropy(z[0, :-1], y[0, 1:], ignore_index=-100, reduction="sum").backward(inputs=[own["D"]])
        last = max(i for i in range(1, y.shape[1]) if y[0, i] != -100)                                # positions up to here feed a loss
        out.append(own["D"].grad[0, :last])
    return out

@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("per", ["position", "sequence"])
def test_moments_against_autograd(name, per):
    "Padding left and right and masked labels. float64 sums of a few dozen terms; 1e-9 relative is rounding."
    m, f, b, _ = made(name); batch = batches_with_holes()
    got = second_moments(m, b, [batch], per=per, labels="data", progress=False)
    for t in find_targets(m, "mlp", blocks=[0, 2]):
        e, gs = b[t.name], gradients_by_autograd(m, t, batch)
        n, gs = sum(map(len, gs)), gs if per == "position" else [g.sum(0, keepdim=True) for g in gs]
        C = e.UG.double().T @ torch.cat(gs) @ e.UA.double()                                          # [n, d_out, d_in]
        want = C.square().sum(0) / n
        assert (got[t.name] - want).norm() < 1e-9 * want.norm()
        assert (got[t.name] - torch.outer(e.lam, e.mu)).norm() > .01 * want.norm()                   # and it is not the product again

@pytest.mark.parametrize("labels", ["sample", "data", "exact"])
def test_moments_of_one_position_are_the_product(labels):
    "With a single position a is fixed, so K-FAC's product is exact: the labels must be those that collect draws."
    m, f, b, _ = made(); one = [ids(1, 2, 3)]
    kw = dict(labels=labels, seed=7, progress=False)
    got, f1 = second_moments(m, b, one, **kw), collect(m, one, targets="mlp", **kw)
    for k, e in b.items():
        U, Q = e.UG.double(), e.UA.double()
        want = torch.outer((U.T @ f1[k].G.double() @ U).diagonal(), (Q.T @ f1[k].A.double() @ Q).diagonal())
        assert (got[k] - want).norm() < 1e-9 * want.norm()

def test_moments_do_not_depend_on_the_batch():
    m, f, b, _ = made(); x = ids(6, 9, 4)
    for per in ("position", "sequence"):
        a, c, d = (second_moments(m, b, x.split(n), per=per, seed=s, progress=False) for n, s in ((1, 0), (6, 0), (6, 1)))
        for k in a: assert (a[k] - c[k]).norm() < 1e-9 * a[k].norm() < (a[k] - d[k]).norm()

def test_moments_bring_the_diagonal_closer_to_the_fisher():
    "George et al. 2018: in the Frobenius norm Λ is the best diagonal in this basis, so any other is farther, the product included."
    m, f, b, _ = made(); x = ids(4, 12)
    t = find_targets(m, "mlp", blocks=[1])[0]; e = b[t.name]
    batch = dict(input_ids=x, labels=x, attention_mask=torch.ones_like(x))
    v = torch.cat(gradients_by_autograd(m, t, batch)).flatten(1)                                    # [n, d_out d_in]
    fisher, K = v.T @ v / len(v), torch.kron(e.UG.double(), e.UA.double())
    L = second_moments(m, b, [batch], labels="data", progress=False)[t.name]
    far = lambda D: float((fisher - K @ torch.diag(D.flatten()) @ K.T).norm())
    assert far(L) < far(torch.outer(e.lam, e.mu))
    assert far(L) < min(far(L * 1.02), far(L * .98))

def test_moments_know_their_basis(tmp_path):
    m, f, b, i = made(); M = second_moments(m, b, [ids(2)], progress=False)
    for other in (i, b.random(0)):
        with pytest.raises(ValueError, match="another basis"): keep_by(other, "ekfac", rho=.8, moments=M)
    M.save(tmp_path/"m.safetensors"); again = Moments.load(tmp_path/"m.safetensors")
    x, y = (keep_by(b, "ekfac", rho=.8, moments=z) for z in (M, again))
    assert all(torch.equal(x.plan[k].rows, y.plan[k].rows) for k in x.plan) and "per position" in repr(again)
    with pytest.raises(ValueError, match='per must be'): second_moments(m, b, [ids(2)], per="token")
    with pytest.raises(ValueError, match="no data"): second_moments(m, b, [], progress=False)
    with pytest.raises(ValueError, match="another model"): second_moments(tiny("llama", seed=3), b, [ids(2)], progress=False)

@pytest.mark.parametrize("labels", ["sample", "data"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_ekfac_in_one_pass_is_two_passes(name, labels):
    "Same basis, same moments, to rounding of float64; half the forward passes."
    m = tiny(name, torch.float64); x = [ids(3, 9, 1), ids(2, 6, 2), ids(1, 7, 3)]; kw = dict(labels=labels, seed=5, progress=False)
    two_b = collect(m, x, targets="mlp", **kw).eigen(m, progress=False); two = second_moments(m, two_b, x, **kw)
    before = state(m); calls = []; h = m.base_model.register_forward_hook(lambda *_: calls.append(1))
    b, M = ekfac(m, x, **kw); h.remove()
    assert len(calls) <= len(x) + 5 and same(before, state(m)) and not any(k._forward_hooks for k in m.modules())   # the batches, and the looks at the wiring
    for k in two: assert torch.equal(b[k].UA, two_b[k].UA) and (M[k] - two[k]).norm() < 1e-12 * two[k].norm()
    assert keep_by(b, "ekfac", rho=.8, moments=M).plan.keys() == b.keys()

def test_ekfac_holds_no_more_than_it_may():
    "The rows that are held fit, are the same positions in A and G, and give an estimate of the moments without bias."
    m = tiny("llama", torch.float64); x = ids(40, 26, 4).split(5)
    b, full = ekfac(m, x, labels="data", progress=False)
    rows = 40 * 25; width = sum(len(e.lam) for e in b.values()) + sum({id(e.UA): len(e.mu) for e in b.values()}.values())
    assert full.meta["rows"] == full.meta["of"] == rows
    last = None
    for part in (2, 4, 8):
        _, M = ekfac(m, x, memory=8 * width * rows // part, labels="data", progress=False)
        n = M.meta["rows"]
        assert abs(n - rows / part) < 6 or abs(n - rows / part / 2) < 6                              # evenly spread: a half, or half of that
        k = next(iter(M)); rec = float((M[k].sum() - full[k].sum()) / full[k].sum())
        assert abs(rec) < 4 / n ** .5 and 8 * width * n <= 8 * width * rows // part and (last is None or n <= last); last = n
    assert f"from {n:,} of 1,000 positions" in repr(M)

def test_ekfac_keeps_rows_together_where_memory_runs_out():
    "A batch that is cut in the middle of its backward pass: some sums hold it already, the others get it in halves."
    m = tiny("llama", torch.float64); x = [ids(4, 9, 1), ids(4, 9, 2)]; kw = dict(labels="data", progress=False)
    _, want = ekfac(m, x, **kw); fails = [True]
    def short(g):
        if g.shape[0] == 4 and len(fails) < 3: fails.append(True); raise torch.OutOfMemoryError("out of memory")
    first = find_targets(m, "mlp")[0].name                                                          # the last one on the way down
    h = m.get_submodule(first).register_full_backward_hook(lambda mod, gi, go: short(go[0]))
    try: _, got = ekfac(m, x, **kw)
    finally: h.remove()
    assert len(fails) > 1
    for k in want: assert (got[k] - want[k]).norm() < 1e-12 * want[k].norm()

def test_ekfac_of_images():
    m = tiny("vit", torch.float64); x = [tiny_inputs("vit", 3)]
    for tokens in ("cls", "all"):
        kw = dict(tokens=tokens, progress=False); b, M = ekfac(m, x, **kw); two = second_moments(m, b, x, **kw)
        for k in two: assert (M[k] - two[k]).norm() < 1e-12 * two[k].norm()

def test_ekfac_refuses():
    m, x = made()[0], [ids(2)]
    with pytest.raises(ValueError, match="collect and second_moments"): ekfac(m, x, labels="exact")
    with pytest.raises(ValueError, match='"sample" or "data"'): ekfac(m, x, labels="gold")
    with pytest.raises(ValueError, match="memory=0"): ekfac(m, x, memory=0)
    with pytest.raises(ValueError, match="no data"): ekfac(m, [], progress=False)

# ---------- orders and bases ----------
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_identity_basis_zeroes_entries(name):
    "Kept entries bit for bit, the others 0, chosen by G_ii A_jj."
    m, f, b, i = made(name); e = i.keep(fraction=.6)
    old = {k: weight(m, p.target).clone() for k, p in e.plan.items()}
    with e.applied(m):
        for k, p in e.plan.items():
            new, h = weight(m, p.target), torch.outer(f[k].G.diagonal(), f[k].A.diagonal())
            gone = new != old[k]
            assert not new[gone].any() and int(gone.sum()) == p.pairs.total - p.pairs.kept and h[gone].max() <= h[~gone].min()
    assert i.meta["basis"] == "identity" and i.bound and len({id(x.UA) for x in i.values()}) < len(i) or name == "gpt2"

def test_wanda_and_obd_by_hand():
    m, f, b, i = made(); name, e = next(iter(b.items())); t = e.target; x = ids(4, 12)
    caught = []
    h = m.get_submodule(t.name).register_forward_hook(lambda mod, a, y: caught.append(a[0].detach())); m(input_ids=x[:, :-1]); h.remove()
    score = weight(m, t).abs() * caught[0].flatten(0, 1).norm(dim=0)                                 # Sun et al.: |W_ij| |a_j|
    w = keep_by(i, "wanda", fraction=.5, blocks=[t.block], projections=[t.projection]); old = weight(m, t).clone()
    with w.applied(m): gone = weight(m, t) != old
    want = score.argsort(1).argsort(1) < t.d_in - round(.5 * t.d_in)
    assert torch.equal(gone, want)
    C = e.UG.double().T @ old @ e.UA.double()
    assert torch.allclose(order_scores(e, "obd"), C.square() * e.lam[:, None] * e.mu, rtol=1e-9)
    M = second_moments(m, b, [x], progress=False)
    assert torch.allclose(order_scores(e, "obd", M), C.square() * M[name], rtol=1e-9)
    for order in ("kfac", "wanda", "magnitude"):
        with pytest.raises(ValueError, match="no use for moments"): order_scores(e, order, M)

def test_magnitude():
    m, f, b, i = made(); e = magnitude(m, fraction=.25); g = magnitude(m, energy=.9, blocks=[-1], projections="up")
    old = {k: weight(m, p.target).clone() for k, p in e.plan.items()}
    with e.applied(m):
        for k, p in e.plan.items():
            new = weight(m, p.target); gone = new == 0
            assert torch.equal(new[~gone], old[k][~gone]) and int((~gone).sum()) == round(.25 * gone.numel()) and old[k].abs()[gone].max() < old[k].abs()[~gone].min()
    (k, p), = g.plan.items(); s = old[k].square().flatten().sort(descending=True).values.cumsum(0)
    assert p.pairs.kept == int((s < .9 * s[-1]).sum()) + 1 and abs(p.energy_share - float(s[p.pairs.kept - 1] / s[-1])) < 1e-12
    with magnitude(m, fraction=1).applied(m): assert all(torch.equal(weight(m, p.target), old[k]) for k, p in e.plan.items())
    with pytest.raises(ValueError, match="exactly one of fraction, energy"): magnitude(m)

@pytest.mark.parametrize("side", ["output", "input"])
def test_one_sided_is_a_projector(side):
    "W' = P W or W P. The vectors are float32, so P is a projector to about 1e-6."
    m, f, b, i = made()
    for kw in (dict(rho=.6), dict(fraction=.5), dict(energy=.6)):
        e = one_sided(b, side, **kw, blocks=[0]); old = {k: weight(m, p.target).clone() for k, p in e.plan.items()}
        with e.applied(m):
            for k, p in e.plan.items():
                x, U = (p.eigen.lam, p.eigen.UG) if side == "output" else (p.eigen.mu, p.eigen.UA)
                if "rho" in kw: n = next(j for j in range(len(x) + 1) if x[:j].sum() >= .6 * x.sum())
                elif "fraction" in kw: n = round(.5 * len(x))
                else: n = next(j for j in range(len(x) + 1) if (U[:, :j].double().T @ (old[k] if side == "output" else old[k].T)).square().sum() >= .6 * old[k].square().sum())
                P = U[:, :n].double() @ U[:, :n].double().T
                want = P @ old[k] if side == "output" else old[k] @ P
                assert (weight(m, p.target) - want).norm() < 1e-5 * old[k].norm() and 0 < n < len(x)
    with one_sided(b, side, rho=1).applied(m) : pass
    with pytest.raises(ValueError, match="side must be"): one_sided(b, "left", rho=.5)

# ---------- chance ----------
def every_edit():
    m, f, b, i = made(); M = second_moments(m, b, [ids(2)], progress=False); kw = dict(epochs=1, batch_size=4, progress=False, blocks=[0, 1])
    return dict(svd=svd(m, keep_rank_fraction=.5), ekfac=keep_by(b, "ekfac", rho=.8, moments=M), obd=keep_by(b, "obd", fraction=.5), wanda=keep_by(i, "wanda", fraction=.5),
        identity=i.keep(rho=.8), magnitude=magnitude(m, fraction=.5), side=one_sided(b, "input", fraction=.5), pairs=random_pairs(b.keep(rho=.8)), noise=matched_noise(b.keep(rho=.8), m),
        directions=magnitude(m, fraction=.5).random(1), bsn=bsn(m, ids(4), ids(4, seed=1), fraction=.9, **kw), ascent=gradient_ascent(m, ids(4), ids(4, seed=1), lr=1e-3, **kw),
        npo=npo(m, ids(4), ids(4, seed=1), lr=1e-3, **kw), union=union(keep_by(b, "obd", fraction=.3), b.keep(fraction=.3)))

def test_what_all_edits_share(tmp_path):
    "Apply changes, undo restores the bytes, a file gives the same bytes again, a control exists, the table prints."
    m = made()[0]; before = state(m)
    for name, e in every_edit().items():
        h = e.apply(m); after = state(m); h.undo()
        assert not same(after, before) and same(state(m), before), name
        again = Edit.load(e.save(tmp_path/name))
        assert [type(p) for p in again.plan.values()] == [type(p) for p in e.plan.values()] and again.method == e.method
        with again.applied(m): assert same(state(m), after), name
        assert repr(again._title()) == repr(e._title()) and (again.kept == e.kept or math.isnan(e.kept)), name
        c = e.random(3, m)
        with c.applied(m): assert not same(state(m), after) and not same(state(m), before), name
        assert e.method in repr(e) and "<table" in e._repr_html_()
        with pytest.raises(ValueError, match="another model"): e.apply(tiny("llama", seed=5))

def test_joining_kinds(tmp_path):
    m, f, b, i = made(); before = state(m)
    e = b.keep(rho=.8, blocks=[0]) | magnitude(m, fraction=.5, blocks=[1]) | npo(m, ids(2), ids(2, seed=1), lr=1e-3, epochs=1, blocks=[2], progress=False)
    assert [type(p) for p in e.plan.values()] == [Plan] * 3 + [Masked] * 3 + [Replaced] * 3 and math.isnan(e.kept) and "replaces 3 weights" in repr(e)
    with e.applied(m): after = state(m)
    with Edit.load(e.save(tmp_path)).applied(m): assert same(state(m), after)
    (tmp_path/"tensors.safetensors").write_bytes(b"x")
    with pytest.raises(ValueError, match="truncated, or not the tensors"): Edit.load(tmp_path)
    (tmp_path/"tensors.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="tensors is missing"): Edit.load(tmp_path)
    with pytest.raises(ValueError, match="no mask|no set of pairs"): random_pairs(e)
    with pytest.raises(ValueError, match="pass the unedited model"): e.random(0)

def test_random_pairs():
    m, f, b, i = made(); e = b.keep(rho=.7); a, c, d = (random_pairs(e, s) for s in (0, 0, 1))
    for k, p in e.plan.items():
        assert a.plan[k].pairs.kept == p.pairs.kept and a.plan[k].eigen is p.eigen and torch.equal(a.plan[k].rows, c.plan[k].rows) and not torch.equal(a.plan[k].rows, d.plan[k].rows)
    n, k, p = 400, *next(iter(e.plan.items()))
    share = torch.stack([random_pairs(e, s).plan[k].rows[0].double().mean() for s in range(n)])      # of the first row, the steepest
    sd = math.sqrt(e.kept * (1 - e.kept) / p.target.d_in / n)
    assert abs(float(share.mean()) - p.pairs.fraction) < 5 * sd * 1.5                                # 5 standard errors, and some for the other target's share

def test_random_directions():
    m, f, b, i = made(); e = b.keep(rho=.7); r = e.random(0)
    for k, p in e.plan.items():
        assert torch.equal(r.plan[k].rows, p.rows) and torch.equal(r.plan[k].eigen.lam, p.eigen.lam)
        Q = r.plan[k].eigen.UG.double(); assert (Q.T @ Q - torch.eye(len(Q))).abs().max() < 1e-6     # float32 vectors
    assert r.plan["model.layers.0.mlp.gate_proj"].eigen.UA is r.plan["model.layers.0.mlp.up_proj"].eigen.UA
    t = npo(m, ids(2), ids(2, seed=1), lr=1e-2, epochs=1, blocks=[1], progress=False); c = random_directions(t, 0, m)
    for k, p in t.plan.items():
        W = weight(m, p.target); a, d = (torch.linalg.svdvals(x.plan[k].W - W) for x in (t, c))
        assert torch.allclose(a, d, atol=1e-5 * float(a[0])) and not torch.allclose(t.plan[k].W, c.plan[k].W, atol=1e-4)

@pytest.mark.parametrize("replace", [False, True])
def test_matched_noise(replace):
    m, f, b, i = made()
    for e in (b.keep(rho=.7), keep_by(b, "obd", fraction=.5), magnitude(m, fraction=.5)):
        n = matched_noise(e, m, seed=2, replace=replace)
        for k, p in e.plan.items():
            W = weight(m, p.target); gone = W - p.new_weight(W); start = W - gone if replace else W
            N = n.plan[k].W - start
            assert abs(float(N.norm() / gone.norm()) - 1) < 1e-9
            C = N if p.eigen is None else p.eigen.UG.double().T @ N @ p.eigen.UA.double()
            assert C[p.pairs.dense()].abs().max() < 1e-6 * float(C.norm())                           # none where the edit keeps
    wide = matched_noise(b.keep(rho=.7), m, confined=False)
    k, p = next(iter(b.keep(rho=.7).plan.items())); C = p.eigen.UG.double().T @ (wide.plan[k].W - weight(m, p.target)) @ p.eigen.UA.double()
    assert C[p.pairs.dense()].abs().max() > .01 * float(C.norm())
    with pytest.raises(ValueError, match="confined=False"): matched_noise(wide, m)
    with pytest.raises(ValueError, match="another model"): matched_noise(b.keep(rho=.7), tiny("llama", seed=3))

# ---------- BSN ----------
class _Straight(torch.autograd.Function):
    "Mask with a straight-through gradient, as the reference code of BSN has it."
    @staticmethod
    def forward(ctx, s, drop):
        m = s.clone(); _, idx = s.flatten().sort(); flat = m.flatten(); flat[idx[:drop]] = 0; flat[idx[drop:]] = 1
        return flat.view_as(s)
    @staticmethod
    def backward(ctx, g): return g, None
class _MaskedLinear(nn.Module):
    def __init__(self, W, bias, S, drop): super().__init__(); self.W, self.bias, self.S, self.drop = W, bias, nn.Parameter(S), drop
    def forward(self, x): return F.linear(x, self.W * _Straight.apply(self.S.abs(), self.drop).to(self.W), self.bias)

@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_bsn_against_a_second_implementation(name):
    "Modules with an autograd.Function of their own, both streams whole in every step; the masks must be the same set."
    m = made(name)[0]; forget, retain, frac = ids(4, 9, 1), ids(5, 9, 2), .9
    got = bsn(m, forget, retain, fraction=frac, lr=.3, loss_weight=.2, epochs=6, batch_size=8, seed=3, progress=False)
    ref, g, layers = copy.deepcopy(m).requires_grad_(False), torch.Generator().manual_seed(3), {}
    for t in find_targets(m, "mlp"):
        S = (torch.rand(t.d_out, t.d_in, generator=g) * 2 - 1) / math.sqrt(t.d_in)
        numel, old = t.d_out * t.d_in, ref.get_submodule(t.name)
        layers[t.name] = _MaskedLinear(weight(m, t), old.bias, S, numel - round(frac * numel)); ref.set_submodule(t.name, layers[t.name])
    opt = torch.optim.SGD([l.S for l in layers.values()], lr=.3, momentum=.9, weight_decay=5e-4)
    ce = lambda x: torch.stack([F.cross_entropy(ref(input_ids=r[None]).logits[0, :-1], r[1:]) for r in x])
    first = {k: (l.S.abs().flatten().sort().indices[:l.drop]).tolist() for k, l in layers.items()}
    for _ in range(6): opt.zero_grad(); (-.8 * ce(forget).clamp(max=math.log(V)).mean() + .2 * ce(retain).mean()).backward(); opt.step()
    moved = 0
    for k, l in layers.items():
        want = l.S.abs().flatten().sort().indices[:l.drop]
        assert (~got.plan[k].rows).flatten().nonzero()[:, 0].tolist() == sorted(want.tolist())
        moved += len(set(want.tolist()) - set(first[k]))
    assert moved > 10                                                                                # training did choose

class _Toy(nn.Module):
    "Next token = W onehot(token): one entry of W for each association."
    def __init__(self, V=8):
        super().__init__(); self.emb, self.layers = nn.Embedding(V, V), nn.ModuleList([nn.ModuleDict(dict(mlp=nn.ModuleDict(dict(fc1=nn.Linear(V, V, bias=False)))))] )
        with torch.no_grad(): self.emb.weight.copy_(torch.eye(V)); self.layers[0]["mlp"]["fc1"].weight.copy_(6 * torch.eye(V).roll(1, 0))   # i -> i + 1
    def get_input_embeddings(self): return self.emb
    def forward(self, input_ids, attention_mask=None, use_cache=None): return type("Out", (), dict(logits=self.layers[0]["mlp"]["fc1"](self.emb(input_ids))))

def test_bsn_finds_the_entry():
    "Only W[1, 0] serves the pair 0 -> 1. With 40 of 64 entries to go, it is among them and the seven others that serve a pair are not; of random masks 1 in 1500 is like that."
    m = _Toy(); forget, retain = torch.tensor([[0, 1]] * 3), torch.tensor([[i, i + 1] for i in range(1, 7)] + [[7, 0]])
    serve = torch.eye(8).roll(1, 0).bool(); one = torch.zeros(8, 8, dtype=torch.bool); one[1, 0] = True
    kw = dict(fraction=24/64, targets="all", loss_weight=.5, lr=.05, epochs=60, batch_size=8, progress=False)
    kept = next(iter(bsn(m, forget, retain, **kw).plan.values())).rows
    assert torch.equal(kept & serve, serve & ~one)
    kept = next(iter(bsn(m, retain, forget, **kw).plan.values())).rows
    assert torch.equal(kept & serve, one)                                                            # and with the roles swapped the other way round

def test_bsn_ceiling_stops_the_push():
    m = made()[0]; W = {t: weight(m, t) for t in find_targets(m, "mlp", blocks=[0])}
    S = {t: torch.randn(w.shape).requires_grad_() for t, w in W.items()}; kept = {t: w.numel() // 2 for t, w in W.items()}
    b = B._stack([(x, x) for x in ids(3)], "cpu")
    losses = B._bsn_step(m, W, S, kept, b, b, 0., ceiling=.01)
    assert losses[0] > .01 and all(not s.grad.any() for s in S.values())
    B._bsn_step(m, W, S, kept, b, b, 0., ceiling=100.); assert all(s.grad.any() for s in S.values())

def test_bsn_exact_count_and_both_streams():
    "One passage among many texts: every step sees it, no loss is NaN, and exactly the asked number goes."
    m = made()[0]; e = bsn(m, ids(1), ids(40, seed=1), fraction=.9985, epochs=3, batch_size=4, blocks=[1], progress=False)
    for p in e.plan.values(): assert p.pairs.total - p.pairs.kept == p.pairs.total - round(.9985 * p.pairs.total)
    with bsn(m, ids(1), ids(2), fraction=1, epochs=1, progress=False).applied(m): pass

# ---------- training ----------
def log_prob(m, x): return sum(torch.log_softmax(m(input_ids=x[None]).logits[0, t], -1)[x[t + 1]] for t in range(len(x) - 1))

@pytest.mark.parametrize("method", ["ascent", "npo"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_training_against_a_plain_loop(method, name):
    "The same AdamW on a copy of the model, losses written out with log-probabilities. float64; 1e-7 allows for Adam's division by small gradients."
    m = made(name)[0]; forget, retain = ids(3, 7, 1), ids(4, 7, 2)
    kw = dict(lr=1e-2, epochs=4, batch_size=8, retain_weight=.7, blocks=[1], progress=False)
    got = gradient_ascent(m, forget, retain, ceiling=5., **kw) if method == "ascent" else npo(m, forget, retain, beta=.3, **kw)
    c = copy.deepcopy(m).requires_grad_(False); ts = find_targets(c, "mlp", blocks=[1])
    ps = [c.get_submodule(t.name).weight.requires_grad_() for t in ts]; opt = torch.optim.AdamW(ps, lr=1e-2, weight_decay=.01)
    ref = [float(log_prob(m, x).detach()) for x in forget]
    for _ in range(4):
        lp = torch.stack([log_prob(c, x) for x in forget])
        push = -(-lp / 6).clamp(max=5.).mean() if method == "ascent" else -(2 / .3) * torch.log(torch.sigmoid(-.3 * (lp - torch.tensor(ref, dtype=lp.dtype)))).mean()
        loss = push + .7 * torch.stack([-log_prob(c, x) / 6 for x in retain]).mean()
        opt.zero_grad(); loss.backward(); opt.step()
    for t in ts:
        assert (got.plan[t.name].W - weight(c, t)).abs().max() < 1e-7 and got.plan[t.name].change > 1e-3
    assert list(got.plan) == [t.name for t in ts]

def test_training_does_what_it_says():
    m = made()[0]; forget, retain = ids(3, 9, 1), ids(6, 9, 2); mean = lambda x: float(-sum(log_prob(m, r).detach() for r in x) / x.numel())
    f0, r0 = mean(forget), mean(retain)
    e = npo(m, Passages([Passage(tuple(x[:4].tolist()), tuple(x[4:].tolist())) for x in forget]), [retain], lr=1e-2, epochs=15, progress=False)
    with e.applied(m): assert mean(forget) > f0 + .1 and mean(retain) < r0
    free = gradient_ascent(m, forget, retain, retain_weight=0, ceiling=float("inf"), lr=1e-2, epochs=15, progress=False)
    with free.applied(m): assert mean(forget) > math.log(V) + 1 and mean(retain) > r0                # unbounded ascent breaks everything
    assert free.settings["ceiling"] == float("inf")

def test_float32_masters_add_up_in_bfloat16():
    "Fifty steps of 2e-5 are far below what bfloat16 can resolve one by one; together they are not."
    m = tiny("llama", torch.float32).bfloat16(); e = gradient_ascent(m, ids(3), ids(3, seed=1), lr=2e-5, epochs=50, batch_size=4, blocks=[0], progress=False)
    assert all(p.W.dtype == torch.bfloat16 and 1e-5 < p.change < 1e-2 for p in e.plan.values())

@pytest.mark.parametrize("what", [bsn, gradient_ascent, npo])
def test_interrupted(what, monkeypatch):
    m = made()[0]; before, flags = state(m), [p.requires_grad for p in m.parameters()]; real, n = B._nll, [0]
    def nll(*a):
        n[0] += 1
        if n[0] == 9: raise KeyboardInterrupt
        return real(*a)
    monkeypatch.setattr(B, "_nll", nll); m.train()
    try:
        with pytest.raises(KeyboardInterrupt) as e: what(m, ids(3), ids(3, seed=1), epochs=50, progress=False)
        assert same(state(m), before) and flags == [p.requires_grad for p in m.parameters()] and m.training
    finally: m.eval()
    if what is not bsn: assert isinstance(e.value.partial, Edit) and not any(p._forward_hooks for p in m.modules())

def test_bad_training_data():
    m = made()[0]
    for f in (bsn, gradient_ascent, npo):
        for bad, good, error, match in (([], ids(2), ValueError, "forget is empty"), (ids(2), Passages(), ValueError, "retain is empty"), ("text", ids(2), TypeError, "windows"),
                                        (ids(2) + V, ids(2), ValueError, "outside the model's vocabulary"), (ids(2, 80), ids(2), ValueError, "longer than the model's context"),
                                        ([dict(input_ids=ids(2), labels=torch.full((2, 9), -100))], ids(2), ValueError, "2 of 2 sequences have no token")):
            with pytest.raises(error, match=match): f(m, bad, good, progress=False)
        with pytest.raises(ValueError, match="epochs must be"): f(m, ids(2), ids(2), epochs=0)
        with pytest.raises(ValueError, match="batch_size must be"): f(m, ids(2), ids(2), batch_size=1.5)
    with pytest.raises(ValueError, match="beta"): npo(m, ids(2), ids(2), beta=0)
    with pytest.raises(ValueError, match="fraction must lie"): bsn(m, ids(2), ids(2), fraction=99)
    with pytest.raises(ValueError, match="loss_weight must lie"): bsn(m, ids(2), ids(2), loss_weight=2)
    with pytest.raises(FloatingPointError, match="lower lr"): gradient_ascent(m, ids(2), ids(2), lr=1e300, ceiling=float("inf"), epochs=5, progress=False)

def test_padding_and_labels_in_training_data():
    b = batches_with_holes(); rows = B._sequences([b], "forget", made()[0]); m = made()[0]
    assert [len(i) for i, _ in rows] == [5, 6, 8]
    with torch.no_grad(): nll, k = B._nll(m, {}, B._stack(rows, "cpu"))
    for n, c, (i, y) in zip(nll, k, rows):
        z = m(input_ids=i[None]).logits[0]; want = F.cross_entropy(z[:-1], y[1:], ignore_index=-100, reduction="sum")
        assert abs(float(n - want.detach())) < 1e-9 and int(c) == int((y[1:] != -100).sum())

# ---------- domains ----------
def test_factors_plus_alpha_times_factors(tmp_path):
    m, f, b, i = made(); x, y = ids(3, 9, 1), ids(2, 7, 2); a, d = (collect(m, [z], targets="mlp", progress=False) for z in (x, y))
    s = a + .5 * d
    for k in s:
        for M in "AG":
            want = (getattr(a[k], M) * a[k].count + .5 * getattr(d[k], M) * d[k].count) / (a[k].count + .5 * d[k].count)
            assert torch.allclose(getattr(s[k], M), want, rtol=1e-10, atol=1e-12)
        assert s[k].count == a[k].count + .5 * d[k].count
        assert torch.allclose((a + 2 * d)[k].G, ((a + d) + d)[k].G, rtol=1e-10, atol=1e-14) and torch.equal((a + 0 * d)[k].A, a[k].A)   # twice as much is the same data twice
        mixed = mix_factors(a, d, .5)
        assert torch.allclose(mixed[k].A, (a[k].A + .5 * d[k].A) / 1.5, rtol=1e-10) and torch.allclose(mixed[k].G, (a[k].G + .5 * d[k].G) / 1.5, rtol=1e-10, atol=1e-14)
    s.save(tmp_path/"f.safetensors"); assert Factors.load(tmp_path/"f.safetensors").meta["merged"] == [a.meta["data"], f"0.5 x {d.meta['data']}"]
    assert s.eigen(m, progress=False).keep(rho=.5).kept > 0 and "positions" in repr(s)
    for bad in (-1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="weighted by a number"): bad * d
    with pytest.raises(TypeError): "2" * d
    with pytest.raises(TypeError): d * d

def test_union():
    m, f, b, i = made(); x, y = keep_by(b, "obd", fraction=.3), b.keep(fraction=.3); u = union(x, y)
    for k in u.plan: assert torch.equal(u.plan[k].pairs.dense(), x.plan[k].pairs.dense() | y.plan[k].pairs.dense())
    v = union(one_sided(b, "output", fraction=.3), one_sided(b, "input", fraction=.3))
    assert all(type(p) is Plan and (p.rows[1:] <= p.rows[:-1]).all() for p in v.plan.values())       # two staircases make one
    assert abs(v.kept - (1 - .7 ** 2)) < .03 and "union" in repr(v)
    for other, match in ((i.keep(fraction=.3), "different bases"), (b.random(0).keep(fraction=.3), "different bases"), (b.keep(fraction=.3, blocks=[1]), "same targets"),
                         (magnitude(m, fraction=.3), "different bases"), (matched_noise(y, m), "needs two masks")):
        with pytest.raises(ValueError, match=match): union(y, other)


def test_mixing_with_what_is_no_factors():
    with pytest.raises(TypeError, match="must be Factors.*not NoneType"): mix_factors(None, None)


def test_ekfac_names_what_it_cannot_do():
    m = tiny("llama"); mlp = m.model.layers[1].mlp; f = mlp.forward
    mlp.forward = lambda x: f(f(x))
    with pytest.raises(RuntimeError, match="runs more than once in a pass.*second_moments"): ekfac(m, [ids(4)], progress=False)
    with pytest.raises(ValueError, match="memory=8 bytes hold the rows of not one position"): ekfac(tiny("llama"), [ids(1, 3)], memory=8, progress=False)
    assert repr(ekfac(tiny("llama"), [ids(8)], memory=30000, progress=False)[1]).count("positions") == 1
