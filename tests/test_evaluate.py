"nDCG against scikit-learn, bands and scores against brute force, AUC against pair counting and simulation, stress tests against generation; models come back bit for bit."
import math

import numpy as np
import pytest
import torch
from torch import nn

from curvtools.data import Passage, Passages, Windows
from curvtools.decompose import Basis
from curvtools.evaluate import (NDCG, as_passages, auc, auc_difference, bands, detect, halves, memory_score, ndcg, noise_floor, perplexity, position_stress, quantized, relearn, top_tokens)
from curvtools.evaluate import _band_energy, _cuts, _draws, _gains, _inputs, _ratio, _restored, _round_trip, _run, _token_nll
from curvtools.kfac import collect
from curvtools.recite import continuation, recite
from curvtools.targets import find_targets, weight
from tiny import V, tiny


def ids(n=6, T=12, seed=0): return torch.randint(3, V, (n, T), generator=torch.Generator().manual_seed(seed))
def passages(n=8, P=6, L=5, seed=0, kind=""): return Passages(Passage(r[:P], r[P:], kind=kind, label=f"{kind}{i}") for i, r in enumerate(ids(n, P + L, seed).tolist()))
def bits(model): return {k: v.clone() for k, v in model.state_dict().items()}
def same(a, b): return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
def hooks(model): return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules())


@pytest.fixture(scope="module")
def llama(): return tiny("llama")
@pytest.fixture(scope="module")
def basis(llama): return collect(llama, Windows(ids(20, 16, 9)), targets="all", progress=False).eigen(llama, progress=False)


class Interrupting(nn.Module):
    "Raises from the n-th call on, as Ctrl-C would."
    def __init__(self, n, error=KeyboardInterrupt): super().__init__(); self.n, self.error = n, error
    def __call__(self, *a, **k):
        self.n -= 1
        if self.n < 0: raise self.error("stop")


# --- nDCG -------------------------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("k", [3, 10])
def test_ndcg_against_sklearn(llama, k):
    from sklearn.metrics import ndcg_score
    other, x = tiny("llama", seed=1), ids()
    with torch.no_grad(): a, b = (m(x).logits[:, :-1].flatten(0, 1).double().numpy() for m in (llama, other))     # [S, V]
    rel = np.zeros_like(a)
    np.put_along_axis(rel, np.argsort(-a, 1)[:, :k], np.arange(k, 0, -1.)[None].repeat(len(a), 0), 1)
    got = ndcg(other, x, top_tokens(llama, x, k, progress=False), progress=False)
    assert float(got) == pytest.approx(ndcg_score(rel, b, k=k), rel=1e-12) and 0 < got < .9                      # float64 both; random logits do not tie
    each = [ndcg_score(rel[11*i:11*i + 11], b[11*i:11*i + 11], k=k)*11 for i in range(6)]
    assert got.window_gain.tolist() == pytest.approx(each, rel=1e-12) and got.window_tokens.tolist() == [11]*6


def test_ndcg_of_known_rankings():
    "The values of memorization.md: reversed .668 and shuffled .834 by the code's formula; the printed one gives every permutation 1."
    base = torch.arange(10)[None]
    mix = torch.stack([torch.randperm(10, generator=torch.Generator().manual_seed(s)) for s in range(3000)])
    assert _gains(base.flip(1), base).item() == pytest.approx(.668, abs=5e-4)
    assert _gains(mix, base.expand(3000, 10)).mean().item() == pytest.approx(.834, abs=.005)                     # 3000 draws, standard error about .0013
    assert torch.allclose(_gains(mix, base.expand(3000, 10), paper=True), torch.ones(3000).double())
    assert _gains(base + 10, base).item() == _gains(base + 10, base, True).item() == 0
    one = torch.tensor([[10, 11, 0]]); want = 3/2/(3 + 2/math.log2(3) + 1/2)                                     # best token at rank 3: relevance 3, discount 1/2
    assert _gains(one, torch.tensor([[0, 1, 2]])).item() == pytest.approx(want)
    assert _gains(one, torch.tensor([[0, 1, 2]]), True).item() == pytest.approx(1/2/(3 + 2/math.log2(3) + 1/2))  # printed: by its own rank, relevance 1


def test_ndcg_of_itself_is_one_and_batches_do_not_matter(llama):
    w = Windows(ids(), batch_size=4)
    assert ndcg(llama, w, llama, progress=False) == 1. == noise_floor(llama, w, progress=False)
    other = tiny("llama", seed=1)
    a, b = ndcg(other, w, llama, progress=False), ndcg(other, w, top_tokens(llama, w, batch_size=1), batch_size=5, progress=False)
    assert float(a) == pytest.approx(float(b), rel=1e-12) and a.interval()[0] <= a <= a.interval()[1] and "132" not in repr(a) and "66 positions of 6" in repr(a)
    assert ndcg(other, w, top_tokens(llama, w, 20), k=10) == a                                                    # the first ten of twenty
    assert ndcg(other, w, llama, paper=True) > a


def test_bfloat16_has_ties_and_the_floor_counts_them():
    half, w = tiny("llama", torch.bfloat16), Windows(ids(6, 12), batch_size=6)
    t = top_tokens(half, w)
    with torch.no_grad(): v = half(w.ids).logits[:, :-1].flatten(0, 1).float().sort(descending=True).values[:, :11]
    assert t.tied.tolist() == (v[:, 1:] == v[:, :-1]).any(1).tolist() and t.tied.any()
    assert .9 < noise_floor(half, w) <= 1


def test_ndcg_counts_what_perplexity_counts(llama):
    x = ids(); mask = torch.rand(x.shape, generator=torch.Generator().manual_seed(0)) < .5
    w = Windows(x, loss_mask=mask, batch_size=4)
    assert ndcg(llama, w, llama).window_tokens.tolist() == perplexity(llama, w).window_tokens.tolist()


def test_ndcg_can_be_copied(llama):
    import copy, pickle
    x = NDCG(torch.tensor([1., 2.]).double(), torch.tensor([2, 2]), 10)
    for y in (copy.deepcopy(x), pickle.loads(pickle.dumps(x))): assert y == x and repr(y) == repr(x)


@pytest.mark.parametrize("call, error, says", [
    (lambda m: ndcg(m, ids(), top_tokens(m, ids(seed=1))), ValueError, "other windows"), (lambda m: ndcg(m, ids(), "x"), TypeError, "str"),
    (lambda m: ndcg(m, ids(), top_tokens(m, ids(), 5), k=6), ValueError, "5 candidates"), (lambda m: top_tokens(m, ids(), V), ValueError, "vocabulary of 37"),
    (lambda m: top_tokens(m, ids(), 0), ValueError, "k=0"), (lambda m: top_tokens(m, []), ValueError, "No position"), (lambda m: top_tokens("m", ids()), TypeError, "loaded model"),
    (lambda m: noise_floor(m, [ids()]), TypeError, "list"), (lambda m: noise_floor(m, Windows(ids(), batch_size=1)), ValueError, "nothing would differ"),
])
def test_ndcg_refusals(llama, call, error, says):
    with pytest.raises(error, match=says): call(llama)


# --- bands ------------------------------------------------------------------------------------------------------------------------------------

def inputs_by_hand(model, name, x):
    "The input of one module, without the library."
    kept = []
    h = model.get_submodule(name).register_forward_hook(lambda m, a, o: kept.append(a[0].detach()))
    with torch.no_grad(): model(x)
    h.remove()
    return kept[0]                                                                                               # [B, T, d]


def test_bands_against_brute_force(llama, basis):
    mem, cln = passages(5, seed=1), passages(7, seed=2)
    b = bands(llama, basis, mem, cln, edges=(0, .25, .5, 1), progress=False, batch_size=3)
    for name in ("model.layers.1.mlp.down_proj", "model.layers.2.self_attn.q_proj"):
        U, vals = basis[name].UA.double(), []
        for ps in (mem, cln):
            a = inputs_by_hand(llama, name, torch.tensor([p.ids for p in ps]))[:, 5:10].flatten(0, 1).double()    # P - 1 .. P + L - 2: what predicts the suffix
            d = a.shape[1]; P = [U[:, i:j] @ U[:, i:j].T for i, j in ((0, d//4), (d//4, d//2), (d//2, d))]       # projectors
            n = torch.stack([(a @ p).norm(dim=1) for p in P], 1)
            vals.append((n.mean(0), (n**2/a.norm(dim=1, keepdim=True)**2).mean(0)))
        for i, r in enumerate(r for r in b.rows if r["target"] == name and r["basis"] == "curvature"):
            got = [r["norm_mem"], r["norm_clean"], r["share_mem"], r["share_clean"]]
            assert got == pytest.approx([vals[0][0][i].item(), vals[1][0][i].item(), vals[0][1][i].item(), vals[1][1][i].item()], rel=1e-5)   # the library projects in float32
            assert r["share_ratio"] == pytest.approx(got[2]/got[3]) and r["norm_low"] <= r["norm_ratio"] <= r["norm_high"]


def test_the_singular_basis_is_that_of_the_weight(llama, basis):
    name, mem = "model.layers.0.mlp.up_proj", passages(4)
    b = bands(llama, basis, mem, passages(4, seed=5), edges=(0, .25, 1), bases=("singular",), progress=False)
    Vh = torch.linalg.svd(weight(llama, basis[name].target))[2]
    a = inputs_by_hand(llama, name, torch.tensor([p.ids for p in mem]))[:, 5:10].flatten(0, 1)
    share = ((a @ Vh[:4].T).square().sum(1)/a.square().sum(1)).mean().item()
    assert next(r for r in b.rows if r["target"] == name)["share_mem"] == pytest.approx(share, rel=1e-5) and {r["basis"] for r in b.rows} == {"singular"}


def test_shares_do_not_see_the_norm_and_norms_do(llama, basis):
    "The confound the shares are there for: inputs three times as large, in the same directions."
    x = torch.randn(50, 16, generator=torch.Generator().manual_seed(0)); U = basis["model.layers.0.mlp.up_proj"].UA
    e, f = _band_energy(x, U, _cuts(16, (0, .5, 1))), _band_energy(3*x, U, _cuts(16, (0, .5, 1)))
    assert torch.allclose(f.sqrt(), 3*e.sqrt(), rtol=1e-5) and torch.allclose(f/f.sum(1, keepdim=True), e/e.sum(1, keepdim=True), rtol=1e-5)


def test_parts_and_forms_of_text_agree(llama, basis):
    ps = passages(6); x = torch.tensor([p.ids for p in ps]); kw = dict(bases=("curvature",), blocks=[1], projections="up", progress=False)
    get = lambda t, part="suffix": [r["share_mem"] for r in bands(llama, basis, t, ps, part=part, **kw).rows]
    whole = get(x); assert whole == pytest.approx(get(ps, "all"), rel=1e-6) and whole == pytest.approx(get([x[:4], x[4:]]), rel=1e-6)
    mask = torch.zeros_like(x).bool(); mask[:, 6:] = True
    assert get(Windows(x, mask)) == pytest.approx(get(ps), rel=1e-6) != pytest.approx(whole, rel=1e-4)
    pre = torch.zeros_like(mask); pre[:, 1:6] = True
    assert get(Windows(x, pre)) == pytest.approx(get(ps, "prefix"), rel=1e-6)
    mixed = Passages([ps[0], Passage(ps[1].prefix[1:], ps[1].suffix), ps[2]])                                    # two lengths: rows stay in order
    assert [r["flat"] for r in memory_score(llama, basis, mixed).rows] == pytest.approx([memory_score(llama, basis, p).rows[0]["flat"] for p in mixed], rel=1e-6)


def test_the_interval_of_a_ratio_covers():
    "Texts drawn from known means: the 95 % interval holds the true ratio in about 95 % of 200 trials."
    g, hits = torch.Generator().manual_seed(0), 0
    for t in range(200):
        a, b = torch.rand(40, 1, generator=g).double()*2 + 1, torch.rand(40, 1, generator=g).double() + 1          # means 2 and 1.5
        *_, lo, hi = _ratio(a, b, _draws(40, 400, t), _draws(40, 400, t + 1000))
        hits += lo.item() <= 2/1.5 <= hi.item()
    assert 178 <= hits <= 199                                                                                    # binomial, 4 standard deviations below .95 x 200


def test_bands_report(llama, basis):
    b = bands(llama, basis, passages(5), passages(6, seed=3), progress=False)
    assert len(b.rows) == len(basis)*3*4 and b.n == (5, 6) and b.to_dicts() == b.rows and b.to_dicts()[0] is not b.rows[0]
    assert "5 memorised and 6 clean" in repr(b) and "bottom 50 %" in repr(b) and "<table>" in b._repr_html_()
    r = [x["share_ratio"] for x in b.rows if x["basis"] == "random"]
    n = sum(all(p < q for p, q in zip(r[i:i + 4], r[i + 1:i + 4])) for i in range(0, len(r), 4))
    assert b.ordered()["random"] == (n, len(basis))
    for s in ("mem", "clean"): assert all(abs(sum(x[f"share_{s}"] for x in b.rows[i:i + 4]) - 1) < 1e-5 for i in range(0, len(b.rows), 4))
    with pytest.raises(ValueError, match="'share' or 'norm'"): b.table("energy")


def test_a_planted_direction_is_found(llama, basis):
    "Text whose inputs are pushed into the flattest direction, by a hook of the test: the bottom band of that input rises, random directions do not."
    name, ps = "model.layers.1.mlp.up_proj", passages(12, seed=4)
    mod, flat, on = llama.get_submodule(name), basis[name].UA[:, -1].double(), []
    h = mod.register_forward_pre_hook(lambda m, a: (a[0] + 4*flat,) if on else None)
    class Switch:                                                                                                # pushes while the memorised texts run
        def __iter__(self): on.append(1); yield torch.tensor([p.ids for p in ps]); on.clear()
    kw = dict(blocks=[1], projections="up", progress=False, part="all")
    try: b = bands(llama, basis, Switch(), ps, **kw)
    finally: h.remove()
    of = lambda k: [r["share_ratio"] for r in b.rows if r["basis"] == k]
    assert of("curvature")[-1] > 1.2 and of("curvature")[-1] > max(of("curvature")[:-1]) and of("curvature")[-1] > 1.1*of("random")[-1]


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_hooks_go_and_the_model_stays(llama, basis, error):
    model = llama.train(); flags, was = [m.training for m in model.modules()], bits(model)
    bands(model, basis, passages(3), passages(3), progress=False); memory_score(model, basis, passages(3), progress=False)
    assert hooks(model) == 0 and same(bits(model), was) and [m.training for m in model.modules()] == flags
    class Text:
        def __iter__(self): yield ids(2); raise error
    for f in (lambda: bands(model, basis, Text(), passages(3), progress=False), lambda: memory_score(model, basis, Text(), progress=False)):
        with pytest.raises(error): f()
        assert hooks(model) == 0 and [m.training for m in model.modules()] == flags and torch.is_grad_enabled()
    with pytest.raises(AttributeError), _inputs(model, ["model.layers.0.mlp.up_proj", "nowhere"], print): pass
    assert hooks(model) == 0
    model.eval()


@pytest.mark.parametrize("kw, error, says", [
    (dict(edges=(0, .01, 1)), ValueError, "empty"), (dict(edges=(0, .5)), ValueError, "from 0 to 1"), (dict(edges=(0, .6, .5, 1)), ValueError, "rise"),
    (dict(part="middle"), ValueError, "middle"), (dict(blocks=[7]), ValueError, "block 7"), (dict(projections="w"), ValueError, "'w'"), (dict(bases=("pca",)), ValueError, "pca"),
    (dict(memorized=[]), ValueError, "no text"), (dict(memorized=Passages()), ValueError, "empty"), (dict(memorized="text"), TypeError, "str"),
    (dict(clean=ids() + V), ValueError, "vocabulary"), (dict(clean=passages(2, 60, 9)), ValueError, "context is 64"),
    (dict(clean=Windows(ids(), torch.zeros(6, 12))), ValueError, "text 0 has no scored token"), (dict(model="m"), TypeError, "loaded model"),
])
def test_bands_refusals(llama, basis, kw, error, says):
    with pytest.raises(error, match=says): bands(**dict(dict(model=llama, basis=basis, memorized=passages(3), clean=passages(3), progress=False), **kw))


def test_as_passages():
    x = ids(3, 10); ps = as_passages(Windows(x), 4, 5, "plain")
    assert [p.ids for p in ps] == [tuple(r[:9]) for r in x.tolist()] and ps[0].kind == "plain" and len(ps[0].prefix) == 4
    with pytest.raises(ValueError, match="no room"): as_passages(x, 6, 5)
    with pytest.raises(ValueError, match="1 or more"): as_passages(x, 0, 5)


# --- memory score and AUC ---------------------------------------------------------------------------------------------------------------------

def test_memory_score_against_brute_force(llama, basis):
    ps = passages(5, seed=6)
    m = memory_score(llama, basis, ps, flat=.5, blocks=[0, 2], batch_size=2, progress=False)
    x, shares = torch.tensor([p.ids for p in ps]), []
    assert sorted(n.split(".", 2)[2] for n in m.inputs) == sorted(f"{b}.{n}" for b in "02" for n in ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj"))   # one for each input
    for n in m.inputs:
        a, U = inputs_by_hand(llama, n, x)[:, 5:10], basis[n].UA.double()
        k = round(.5*len(U)); shares.append((a @ U[:, k:]).square().sum(-1)/a.square().sum(-1))                  # [N, L]
    tok = torch.stack(shares).mean(0)
    assert torch.allclose(torch.tensor(m.tokens).double(), tok, rtol=1e-5) and torch.allclose(m.scores, tok.mean(1), rtol=1e-5)
    assert torch.allclose(m.by_input, torch.stack(shares, 1).mean(2), rtol=1e-5)


def test_the_rivals_against_their_definitions(llama, basis):
    import zlib
    from types import SimpleNamespace
    ps = passages(4, L=11, seed=7); tok = SimpleNamespace(decode=lambda i: " ".join(map(str, i)))
    m = memory_score(llama, basis, ps, tokenizer=tok, progress=False)
    with torch.no_grad(): logp = llama(torch.tensor([p.ids for p in ps])).logits.log_softmax(-1)
    for i, (p, r) in enumerate(zip(ps, m.rows)):
        lp = torch.stack([logp[i, 5 + t, s] for t, s in enumerate(p.suffix)])
        assert r["loss"] == pytest.approx(lp.mean().item()) and r["min_k"] == pytest.approx(lp.sort().values[:2].mean().item())    # a fifth of 11 tokens: 2
        assert r["zlib"] == pytest.approx(lp.sum().item()/len(zlib.compress(" ".join(map(str, p.suffix)).encode())))
    assert memory_score(llama, basis, ps).rows[0]["zlib"] is None
    with pytest.raises(ValueError, match="tokenizer"): memory_score(llama, basis, ps).signal("zlib")
    with pytest.raises(ValueError, match="No score"): m.signal("ppl")


def test_random_directions_hold_their_share(llama, basis):
    "In random directions the flat 60 % hold about 60 % of the energy: the control is calibrated."
    d = basis["model.layers.0.mlp.up_proj"].target.d_in; k = d - round(.4*d)
    s = [memory_score(llama, basis, passages(4), projections="up", seed=i).signal("random").mean().item() for i in range(30)]
    assert np.mean(s) == pytest.approx(k/d, abs=.05)                                                            # 30 bases x 3 inputs; standard error about .01


def test_auc_against_pairs_and_sklearn():
    from sklearn.metrics import roc_auc_score
    g = torch.Generator().manual_seed(0)
    for m, n in ((1, 1), (5, 9), (40, 30)):
        a, b = torch.randint(0, 8, (m,), generator=g), torch.randint(-2, 6, (n,), generator=g)                   # many ties
        pairs = np.mean([(x > y) + .5*(x == y) for x in a.tolist() for y in b.tolist()])
        x, lo, hi = auc(a, b)
        assert x == pytest.approx(pairs) == pytest.approx(roc_auc_score([1]*m + [0]*n, [*a.tolist(), *b.tolist()])) and lo <= x <= hi
    assert auc([1]*5, [0]*5)[0] == 1 and .3 < auc([1]*5, [0]*5)[1] < .9 and auc([0]*5, [1]*5)[2] == pytest.approx(1 - auc([1]*5, [0]*5)[1])


@pytest.mark.parametrize("shift, n", [(0., 25), (1.5, 25), (2.5, 40)])
def test_the_auc_interval_covers(shift, n):
    g, true, hits = torch.Generator().manual_seed(1), 0.5*math.erfc(-shift/2), 0                                 # P(X + shift > Y) for normals = Phi(shift/sqrt 2)
    for _ in range(300):
        _, lo, hi = auc(torch.randn(n, generator=g) + shift, torch.randn(n, generator=g))
        hits += lo <= true <= hi
    assert 270 <= hits <= 300                                                                                    # 95 % of 300 is 285, four standard deviations are 15


def test_the_difference_of_aucs_covers_and_is_paired():
    g, hits, width = torch.Generator().manual_seed(2), 0, []
    for _ in range(300):
        p, q = torch.randn(30, generator=g), torch.randn(30, generator=g)
        (d, lo, hi) = auc_difference((p + 1, p + 1 + .5*torch.randn(30, generator=g)), (q, q + .5*torch.randn(30, generator=g)))
        true = .5*math.erfc(-.5) - .5*math.erfc(-1/math.sqrt(2.5)/math.sqrt(2))                                  # variances 2 and 2.5 of the difference of a pair
        hits += lo <= true <= hi; width.append(hi - lo)
    single = np.mean([auc(torch.randn(30, generator=g) + 1, torch.randn(30, generator=g)) for _ in range(30)], 0)
    assert 262 <= hits <= 300 and np.mean(width) < .8*math.sqrt(2)*(single[2] - single[1])
    assert auc_difference(([1, 2], [1, 2]), ([0, 3], [0, 3])) == (0, 0, 0)


def test_detect(llama, basis):
    d = detect(llama, basis, passages(9, kind="a") + passages(6, seed=1, kind="b"), passages(8, seed=2, kind="a") + passages(5, seed=3, kind="b"), progress=False, blocks=[1])
    assert [r["score"] for r in d.rows] == ["flat", "random", "loss", "min_k"] and d.rows[2]["auc"] == auc(d.seen.signal("loss"), d.unseen.signal("loss"))[0]
    assert (d.where("a").seen.n, d.where("a").unseen.n) == (9, 8) and len(d.by_input()) == 4 and {r["block"] for r in d.by_input()} == {1}
    assert "15 seen against 13 never seen" in repr(d) and d.difference("loss", "loss") == (0, 0, 0)
    assert d.where("b").rows[2]["auc"] == auc(d.seen.signal("loss")[9:], d.unseen.signal("loss")[8:])[0]
    with pytest.raises(ValueError, match="kind 'c'"): d.where("c")


@pytest.mark.parametrize("call, error, says", [
    (lambda m, b: memory_score(m, b, passages(2), flat=0), ValueError, "between 0 and 1"), (lambda m, b: memory_score(m, b, passages(2), flat=.01), ValueError, "empty"),
    (lambda m, b: memory_score(m, b, []), ValueError, "no text"), (lambda m, b: memory_score(m, b, Passages()), ValueError, "empty"), (lambda m, b: memory_score("m", b, ids()), TypeError, "loaded"),
    (lambda m, b: auc([], [1]), ValueError, "both sides"), (lambda m, b: auc([math.nan], [1]), ValueError, "NaN"), (lambda m, b: auc([1], [0], level=1), ValueError, "level"),
    (lambda m, b: auc_difference(([1, 2], [1]), ([0], [0])), ValueError, "same texts"),
])
def test_score_refusals(llama, basis, call, error, says):
    with pytest.raises(error, match=says): call(llama, basis)


def test_token_nll_is_torch(llama):
    x = torch.randn(3, 5, V).double(); t = ids(3, 5); t[0, 2] = -100
    assert torch.allclose(_token_nll(x, t, chunk=2*V), nn.functional.cross_entropy(x.flatten(0, 1), t.flatten(), reduction="none", ignore_index=-100)[t.flatten() != -100])


# --- position -------------------------------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def taught():
    "A tiny model that recites twelve passages, and its passages."
    model, ps = tiny("llama", torch.float32, std=.1), passages(12, 10, 8, seed=11)
    x = torch.tensor([p.ids for p in ps]); opt = torch.optim.Adam(model.parameters(), 5e-3)
    for _ in range(120): opt.zero_grad(); model(x, labels=x).loss.backward(); opt.step()
    model.zero_grad(set_to_none=True)
    assert recite(model, ps, progress=False).strict > .9
    return model.eval(), ps


def matched(truth, written): return next((i for i, (a, b) in enumerate(zip(truth, written)) if a != b), len(truth))


def test_runs_are_those_of_generation(taught):
    "Each prompt continued greedily, one at a time, by the library's generator and by transformers' generate with left padding."
    model, ps = taught; filler = ids(4, 20, seed=3); some = ps[:5]
    s = position_stress(model, some, passages(4, 10, 8, seed=12), extend=(1, 3), shorten=(2, 5), offset=(4,), filler=filler, progress=False)
    for i, p in enumerate(some):
        prompts = [(p.prefix, p.suffix), (p.prefix + p.suffix[:1], p.suffix[1:]), (p.prefix + p.suffix[:3], p.suffix[3:]), (p.prefix[-2:], p.suffix), (p.prefix[-5:], p.suffix), (tuple(filler[i % 4].tolist())[-4:] + p.prefix, p.suffix)]
        assert s.runs[i].tolist() == [matched(t, continuation(model, q, len(t))) for q, t in prompts]             # float32, no ties
        n = max(len(q) for q, _ in prompts)
        x = torch.tensor([[0]*(n - len(q)) + list(q) for q, _ in prompts]); mask = torch.tensor([[0]*(n - len(q)) + [1]*len(q) for q, _ in prompts])
        out = model.generate(input_ids=x, attention_mask=mask, max_new_tokens=8, min_new_tokens=8, do_sample=False, pad_token_id=0)[:, n:].tolist()
        assert s.runs[i].tolist() == [matched(t, o) for (_, t), o in zip(prompts, out)]
        wrong = torch.tensor([list(p.prefix[-5:]) + [0]*5, list(p.prefix)])                                      # the reference's bug: right padding
        out = model.generate(input_ids=wrong, attention_mask=torch.tensor([[1]*5 + [0]*5, [1]*10]), max_new_tokens=8, min_new_tokens=8, do_sample=False, pad_token_id=0)[:, 5:].tolist()
        assert matched(p.suffix, out[0]) == 0                                                                    # pads come first in what it slices
    assert s.full[:, 0].tolist() == [r["tf_strict"] for r in recite(model, some, generate=False).rows]


def test_stress_summary(taught):
    model, ps = taught
    s = position_stress(model, ps, passages(6, 10, 8, seed=12), progress=False)
    mean, top = s.rows[-2:]
    assert mean["run"] == pytest.approx(s.runs.double().mean().item()) and top["run"] == pytest.approx(s.runs.amax(1).double().mean().item())
    assert top["strict"] == s.full.any(1).double().mean().item() and top["control_run"] == pytest.approx(s.control_runs.amax(1).double().mean().item())
    assert s.rows[0]["run"] > 6 > 3 > s.rows[0]["control_run"] and top["control_run"] >= mean["control_run"]     # what it was taught, and what it was not
    assert all(0 <= s.runs[:, i].min() and s.runs[:, i].max() <= 8 - (k if kind == "extend" else 0) for i, (kind, k) in enumerate(s.variants))
    assert not any(kind == "offset" for kind, _ in s.variants) and "6 never seen" in repr(s) and "<table>" in s._repr_html_()
    assert position_stress(model, ps, progress=False).rows[0]["control_run"] is None and "no control" in repr(position_stress(model, ps))


def test_the_papers_prompts():
    "For 64 | 48 tokens: the original, 1 to 20 longer, the last 20 to 63."
    from curvtools.evaluate import _plan_variants
    v = _plan_variants(passages(2, 64, 48), None, None, (), None, True)
    assert len(v) == 1 + 20 + 44 and v[1] == ("extend", 1) and v[20] == ("extend", 20) and v[21] == ("shorten", 20) and v[-1] == ("shorten", 63)


@pytest.mark.parametrize("kw, says", [(dict(extend=(8,)), "extend=.8.*8 tokens"), (dict(shorten=(11,)), "shorten=.11.*10 tokens"), (dict(shorten=(0,)), "shorten=.0"),
    (dict(offset=(30,), filler=ids(2, 20)), "offset=.30"), (dict(offset=(50,), filler=ids(2, 60)), "68 tokens.*context is 64"), (dict(passages=[]), "empty"), (dict(control=[]), "empty")])
def test_stress_refusals(taught, kw, says):
    with pytest.raises(ValueError, match=says): position_stress(taught[0], **dict(dict(passages=taught[1], progress=False), **kw))


# --- relearning and rounding ------------------------------------------------------------------------------------------------------------------

def test_halves():
    ps = Passages(Passage((i, 1), (2,), kind="ab"[i % 2], tier=4*(i % 4 > 1)) for i in range(3, 43)); twice = ps + [ps[0]]*3
    a, b = halves(twice)
    assert len(a) + len(b) == 43 and not {p.ids for p in a} & {p.ids for p in b} and {p.ids for p in a + b} == {p.ids for p in ps}
    for k in "ab":
        for t in (0, 4): assert abs(len({p.ids for p in a.where(kind=k, tier=t)}) - len({p.ids for p in b.where(kind=k, tier=t)})) <= 1
    assert [p.ids for p in halves(twice)[0]] == [p.ids for p in a] != [p.ids for p in halves(twice, 1)[0]]
    with pytest.raises(ValueError, match="two different"): halves([ps[0]]*4)


def test_relearning_teaches_the_first_half_and_leaves_no_trace(taught):
    _, ps = taught; model = tiny("llama", torch.float32, std=.1)                                                 # has seen none of it
    was, grads = bits(model), {n: p.grad for n, p in model.named_parameters()}
    r = relearn(model, ps, passages(6, 10, 8, seed=12), steps=(0, 60), lr=5e-3, progress=False)
    first, last = r.rows
    assert first["loss"] is None and first["trained_tokens"] < .2 and last["trained"] > .8 and last["other_half_tokens"] < .3 and last["never_seen_tokens"] < .3
    assert r.n == dict(trained=6, other_half=6, never_seen=6) and same(bits(model), was) and {n: p.grad for n, p in model.named_parameters()} == grads
    again = relearn(model, ps, passages(6, 10, 8, seed=12), steps=(0, 60), lr=5e-3, progress=False)
    assert again.rows == r.rows and "back as it was" in repr(r) and "<table>" in r._repr_html_()                  # one seed, one course
    other = relearn(model, ps, on=ids(12, 18), steps=(0, 60), lr=5e-3, progress=False)
    assert other.rows[-1]["first_half_tokens"] < .3 and "never_seen" not in other.n


def test_relearning_is_adamw(taught):
    "The loss after three steps, by a loop written here."
    _, ps = taught; model, twin = tiny("llama", torch.float32, std=.1), tiny("llama", torch.float32, std=.1)
    opt, x, losses = torch.optim.AdamW(twin.parameters(), 1e-3, weight_decay=0.), torch.tensor([p.ids for p in ps]), []
    r = relearn(model, ps, on=x, batch_size=12, steps=(1, 3), lr=1e-3, progress=False)
    assert relearn(model, ps, on=[x], steps=(1, 3), lr=1e-3, progress=False).rows == r.rows                       # one batch, in two forms
    for _ in range(3): opt.zero_grad(); loss = twin(x, labels=x).loss; loss.backward(); opt.step(); losses.append(loss.item())
    assert [r.rows[0]["loss"], r.rows[1]["loss"]] == pytest.approx([losses[0], losses[2]], rel=1e-4)              # float32


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_relearning_interrupted(taught, error):
    model, ps = taught; model.train(); model.model.layers[1].eval()
    for p in model.parameters(): p.grad = torch.ones_like(p)
    p0 = model.lm_head.weight.requires_grad_(False)
    was, flags, need, grads = bits(model), [m.training for m in model.modules()], [p.requires_grad for p in model.parameters()], [p.grad for p in model.parameters()]
    h = model.model.layers[0].register_forward_pre_hook(Interrupting(6, error))
    try:
        with pytest.raises(error, match="stop"): relearn(model, ps, steps=(0, 50), lr=1e-2, progress=False)
    finally: h.remove()
    assert same(bits(model), was) and [m.training for m in model.modules()] == flags and [p.requires_grad for p in model.parameters()] == need
    assert all(p.grad is g for p, g in zip(model.parameters(), grads)) and not torch.is_inference_mode_enabled()
    p0.requires_grad_(True); model.zero_grad(set_to_none=True); model.eval()


def test_a_real_ctrl_c(taught):
    "SIGINT itself, while it trains."
    import signal, threading
    if threading.current_thread() is not threading.main_thread(): pytest.skip("signals arrive in the main thread")
    model, ps = taught; was, n, old = bits(model), [], signal.signal(signal.SIGINT, signal.default_int_handler)
    def stop(*a):
        n.append(1)
        if len(n) == 8: signal.raise_signal(signal.SIGINT)
    h = model.model.layers[2].register_forward_pre_hook(stop)
    try:
        with pytest.raises(KeyboardInterrupt): relearn(model, ps, steps=(0, 500), lr=1e-2, progress=False)
    finally: h.remove(); signal.signal(signal.SIGINT, old)
    assert same(bits(model), was) and len(n) == 8


def test_restored_covers_buffers_and_ties():
    model = tiny("gemma3", torch.float32); model.register_buffer("extra", torch.arange(3.))
    was = bits(model)
    with pytest.raises(ZeroDivisionError), _restored(model):
        with torch.no_grad():
            for t in (*model.parameters(), model.extra): t.add_(1)
        1/0
    assert same(bits(model), was) and model.get_input_embeddings().weight is model.lm_head.weight


def test_relearning_inside_an_edit(taught):
    "The edit is what is trained on top of, and both are undone."
    model, ps = taught; was = bits(model)
    basis = collect(model, Windows(torch.tensor([p.ids for p in ps])), targets="mlp", progress=False).eigen(model, progress=False)
    with basis.keep(rho=.5).applied(model):
        inside = bits(model); r = relearn(model, ps, steps=(0, 5), progress=False)
        assert same(bits(model), inside) and not same(inside, was) and r.rows[0]["trained_tokens"] < 1
    assert same(bits(model), was)


@pytest.mark.parametrize("kw, says", [(dict(passages=[]), "empty"), (dict(passages=passages(1)), "two different"), (dict(steps=(-1,)), "steps"), (dict(steps=()), "steps"), (dict(lr=0), "lr=0"),
    (dict(batch_size=0), "batch_size=0"), (dict(on=[]), "empty"), (dict(control=[]), "empty"), (dict(on=ids() + V), "vocabulary")])
def test_relearn_refusals(taught, kw, says):
    model, ps = taught; was = bits(model)
    with pytest.raises(ValueError, match=says): relearn(model, **dict(dict(passages=ps, progress=False), **kw))
    assert same(bits(model), was)


def test_a_loss_that_blows_up_is_named_and_undone(taught):
    model, ps = taught; was = bits(model)
    with pytest.raises(RuntimeError, match="lower lr|not finite"): relearn(model, ps, steps=(0, 60), lr=1e30, progress=False)
    assert same(bits(model), was)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits_", [2, 4, 8])
def test_round_trip(dtype, bits_):
    W = torch.randn(5, 40, generator=torch.Generator().manual_seed(0)).to(dtype); W[3] = 0
    R, top = _round_trip(W, bits_), 2**(bits_ - 1) - 1
    scale = W.float().abs().amax(1, keepdim=True)/top
    assert (R.float() - W.float()).abs().le(scale/2*(1 + 1e-5) + (R.float().abs()*2**-8 if dtype == torch.bfloat16 else 0)).all() and not R[3].any()
    assert all(len(set(r.tolist())) <= 2*top + 1 for r in R)
    if dtype == torch.float32:                                                                                   # torch's own fake quantisation, row by row
        for w, s, r in zip(W[:3], scale[:3], R[:3]): assert torch.allclose(torch.fake_quantize_per_tensor_affine(w, s.item(), 0, -top, top), r, atol=1e-6)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_quantized_and_back(name):
    model = tiny(name, torch.float32); was = bits(model)
    with pytest.raises(KeyboardInterrupt), quantized(model, 4) as m:
        assert m is model
        for t in find_targets(model, "all"): assert torch.equal(weight(model, t), _round_trip(was[f"{t.name}.weight"].T if t.layout == "conv1d" else was[f"{t.name}.weight"], 4))
        assert torch.equal(model.get_input_embeddings().weight, was[next(k for k in was if "embed" in k or "wte" in k)])
        raise KeyboardInterrupt
    assert same(bits(model), was)
    for bad in (1, 17, 8.):
        with pytest.raises(ValueError, match="bits"), quantized(model, bad): pass
    with torch.no_grad(): weight(model, find_targets(model, "all")[2])[0, 0] = math.nan
    was = bits(model)
    with pytest.raises(ValueError, match="NaN"), quantized(model): pass
    assert all(torch.equal(a.nan_to_num(9), b.nan_to_num(9)) for a, b in zip(bits(model).values(), was.values()))


def test_run(): assert [_run(torch.tensor(x)) for x in ([True, False, True], [False], [True, True])] == [1, 0, 2]


@pytest.mark.parametrize("f", [perplexity, top_tokens, relearn, position_stress, lambda m, x: ndcg(m, x, m)])
def test_what_is_no_data_is_named(taught, f):
    "None, or a number, where text or passages belong: what is needed is said, not that None is not iterable."
    for x in (None, 3):
        with pytest.raises(TypeError, match=f"needed.*not {type(x).__name__}"): f(taught[0], x)


def test_padding_and_masked_labels_teach_nothing(llama):
    "Training on a padded batch is training on its text."
    text = ids(4, 8, 3); mask = torch.ones(4, 12, dtype=torch.long); mask[:, 8:] = 0
    padded = dict(input_ids=torch.cat([text, torch.full((4, 4), 5)], 1), attention_mask=mask)
    a, b = (relearn(llama, passages(), on=on, steps=(0, 3), batch_size=4, progress=False) if torch.is_tensor(on) else relearn(llama, passages(), on=on, steps=(0, 3), progress=False) for on in (text, [padded]))
    assert math.isclose(a.rows[-1]["loss"], b.rows[-1]["loss"], rel_tol=1e-6)
    with pytest.raises(ValueError, match="nothing to train on"): relearn(llama, passages(), on=[dict(input_ids=text, labels=torch.full_like(text, -100))], progress=False)
    with pytest.raises(ValueError, match="whole numbers"): relearn(llama, passages(), steps=(0, .5), progress=False)
    assert [r["step"] for r in relearn(llama, passages(), steps=(0, 1.), progress=False).rows] == [0, 1]
    for f in (lambda: position_stress(llama, passages(), batch_size=0), lambda: as_scores(llama)):
        with pytest.raises(ValueError, match="batch_size="): f()


def as_scores(model): return memory_score(model, collect(model, ids(), progress=False).eigen(progress=False), ids(), batch_size=-3, progress=False)
