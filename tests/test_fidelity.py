"The exact blocks: against brute force, finite differences and each other; what must hold for every approximation; bad input."
import math

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from curvtools.baselines import second_moments
from curvtools.decompose import Eigen, _orthonormal
from curvtools.fidelity import (agreement_figure, component_curvature, directions, edits_figure, ekfac_block, fidelity, fisher_block, ggn_block, hessian_block, judge, keep_order,
                                kfac_block, log_r2, off_diagonal, same_kept, spearman, stability, stability_figure, stability_table)
from curvtools.kfac import collect
from curvtools.targets import Target, find_targets, weight, write_weight
from tiny import V, tiny, tiny_inputs

TEXT = ["llama", "gpt2", "qwen3"]


def data(name, n=3, length=6, seed=0):
    b = tiny_inputs(name, n, length, seed=seed)
    if name == "vit": b["labels"] = torch.randint(5, (n,), generator=torch.Generator().manual_seed(seed))
    return [b]


def one(model, projection): return find_targets(model, "all", blocks=1, projections=projection)[0]


def rel(a, b): return float((a - b).norm()/b.norm())


def param(model, t): return model.get_submodule(t.name).weight


def flat(t, g): return (g if t.layout == "linear" else g.T).reshape(-1)


def brute(model, batch, t):
    "Fisher by one autograd call a scored position and class: mean over labels of the squared gradient of log p."
    out, n = 0, 0
    for k in range(len(next(iter(batch.values())))):
        x = {key: v[k:k + 1] for key, v in batch.items() if key != "labels"}
        if "input_ids" in x: x["input_ids"] = x["input_ids"][:, :-1]
        logp = model(**x).logits.flatten(0, -2).log_softmax(-1)                  # [S, V]
        n += len(logp) if "input_ids" in x else 5
        for row in logp:
            for lp in row:
                v = flat(t, torch.autograd.grad(lp, param(model, t), retain_graph=True)[0])
                out = out + lp.detach().exp()*torch.outer(v, v)
    return out/n


@pytest.mark.parametrize("name,projection", [("vit", "fc1"), ("vit", "v"), ("llama", "down"), ("llama", "q"), ("gpt2", "fc1"), ("qwen3", "k")])
def test_fisher_is_the_loop_and_the_ggn(name, projection):
    model = tiny(name); t, b = one(model, projection), data(name, 2, 4)
    want = brute(model, b[0], t)
    got = fisher_block(model, b, t)
    assert rel(got, want) < 1e-8
    assert rel(ggn_block(model, b, t), want) < 1e-8
    assert rel(hessian_block(model, b, t, "exact"), want) < 1e-8


@pytest.mark.parametrize("name,projection", [("vit", "fc2"), ("llama", "gate"), ("gpt2", "o")])
def test_hessian_is_the_difference_of_gradients(name, projection):
    model = tiny(name); t, b = one(model, projection), data(name)
    H = hessian_block(model, b, t)
    x = {k: v for k, v in b[0].items() if k != "labels"}
    y = b[0]["labels"] if name == "vit" else x["input_ids"][:, 1:].flatten()
    if name != "vit": x["input_ids"] = x["input_ids"][:, :-1]
    n, W0, g = len(y)*(5 if name == "vit" else 1), weight(model, t).clone(), torch.Generator().manual_seed(1)
    def grad(W):
        write_weight(model, t, W)
        return flat(t, torch.autograd.grad(nn.functional.cross_entropy(model(**x).logits.flatten(0, -2), y, reduction="sum"), param(model, t))[0])
    for _ in range(4):
        v = torch.randn(W0.shape, generator=g, dtype=torch.float64); h = 1e-5
        fd = (grad(W0 + h*v) - grad(W0 - h*v))/(2*h*n)
        assert rel(H@v.flatten(), fd) < 1e-6
    write_weight(model, t, W0)
    assert torch.equal(H, H.T)


@pytest.mark.parametrize("name,block,projection", [("vit", 1, "fc1"), ("vit", 0, "q"), ("llama", 2, "down")])
def test_an_independent_library_agrees(name, block, projection):
    "GGN and Hessian of curvlinops, where it is installed. (It cannot differentiate SiLU twice, so of Llama a matrix with none after it.)"
    other = pytest.importorskip("curvlinops")
    model = tiny(name); b = data(name, 3, 5); t, = find_targets(model, "all", blocks=block, projections=projection)
    x = b[0]["pixel_values"] if name == "vit" else b[0]["input_ids"][:, :-1]
    y = b[0]["labels"] if name == "vit" else b[0]["input_ids"][:, 1:].flatten()
    class Logits(nn.Module):
        def __init__(self): super().__init__(); self.inner = model
        def forward(self, x): return self.inner(x).logits.flatten(0, -2)
    for p in model.parameters(): p.requires_grad_(False)
    net, n = Logits(), y.numel()*(5 if name == "vit" else 1); W = param(model, t).requires_grad_()
    with sdpa_kernel(SDPBackend.MATH):
        for mine, theirs in ((ggn_block, other.GGNLinearOperator), (hessian_block, other.HessianLinearOperator)):
            M = theirs(net, nn.CrossEntropyLoss(reduction="sum"), [W], [(x, y)], num_data=len(y), batch_size_fn=len)
            assert rel(mine(model, b, t), (M@torch.eye(W.numel(), dtype=torch.float64)).detach()/n) < 1e-8


@pytest.mark.parametrize("name", ["vit", "llama"])
def test_padding_and_masked_labels_do_not_count(name):
    model = tiny(name); t = one(model, "fc1" if name == "vit" else "up")
    if name == "vit": whole = data(name, 5); parts = [{k: v[:2] for k, v in whole[0].items()}, {k: v[2:] for k, v in whole[0].items()}]
    else:
        ids = tiny_inputs(name, 3, 7)["input_ids"]; short = ids[:, :5]; mask = torch.ones_like(ids); mask[:, 5:] = 0
        whole, parts = [dict(input_ids=short)], [dict(input_ids=ids[:1], attention_mask=mask[:1]), dict(input_ids=ids[1:], attention_mask=mask[1:])]
    for f in (fisher_block, ggn_block, hessian_block): assert rel(f(model, parts, t), f(model, whole, t)) < 1e-10


@pytest.mark.parametrize("name,projection", [("vit", "fc1"), ("vit", "q"), ("llama", "down"), ("gpt2", "fc2")])
@pytest.mark.parametrize("seed", [0, 1])
def test_ekfac_is_never_further_than_kfac(name, projection, seed):
    model = tiny(name, seed=seed); t, b = one(model, projection), data(name, 4, 5, seed)
    factors = collect(model, b, [t], labels="exact", tokens="all", progress=False); basis = factors.eigen()
    K = kfac_block(factors, t)
    for per in ("position", "sequence"):
        F = fisher_block(model, b, t, per=per)
        E = ekfac_block(basis[t.name], second_moments(model, basis, b, per=per, labels="exact", tokens="all", progress=False))
        assert (F - E).norm() <= (F - K).norm()*(1 + 1e-6)
        Q = directions(basis[t.name])
        assert rel((Q.T@E@Q).diagonal(), (Q.T@F@Q).diagonal()) < 1e-5


class Net(nn.Module):
    "One linear map of one token: the logits are W x."
    def __init__(self, W):
        super().__init__()
        self.layers = nn.ModuleList([nn.ModuleDict(dict(fc1=nn.Linear(*W.shape[::-1], bias=False), fc2=nn.Linear(len(W), len(W), bias=False)))])
        for p, w in zip(self.parameters(), (W, torch.eye(len(W)))): p.data = w.double()
        self.config = None
    def forward(self, pixel_values):
        from types import SimpleNamespace
        return SimpleNamespace(logits=self.layers[0]["fc2"](self.layers[0]["fc1"](pixel_values.flatten(1))))


def test_kfac_is_exact_where_its_assumption_holds():
    "One token; gradients that do not depend on the input: W = 0 gives all inputs the same probabilities, so G and A are independent and F = G ⊗ A."
    model = Net(torch.zeros(4, 9)); x = torch.randn(30, 1, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    b = [dict(pixel_values=x)]; t = find_targets(model, "*fc1")[0]
    factors = collect(model, b, [t], labels="exact", tokens="all", progress=False)
    assert rel(kfac_block(factors, t).double(), fisher_block(model, b, t)) < 1e-8
    model.layers[0]["fc1"].weight.data.normal_(generator=torch.Generator().manual_seed(1))
    factors = collect(model, b, [t], labels="exact", tokens="all", progress=False)
    assert rel(kfac_block(factors, t).double(), fisher_block(model, b, t)) > .05                 # and not where it does not


@pytest.mark.parametrize("name,projection", [("vit", "fc2"), ("llama", "up"), ("gpt2", "fc1")])
def test_components_are_the_diagonal_of_the_blocks(name, projection):
    model = tiny(name); t, b = one(model, projection), data(name, 4, 5)
    e = collect(model, b, [t], labels="exact", tokens="all", progress=False).eigen()[t.name]
    pairs = [(0, 0), (1, 3), (t.d_out - 1, t.d_in - 1), (5, 2)]
    Q = directions(e)[:, [i*t.d_in + j for i, j in pairs]]
    F, H = fisher_block(model, b, t), hessian_block(model, b, t)
    size = float((Q*(F@Q)).sum(0).max())
    for kind, M in (("ggn", F), ("fisher", F), ("hessian", H)):
        assert (component_curvature(model, b, e, pairs, kind, labels="exact") - (Q*(M@Q)).sum(0)).abs().max() < 1e-6*size
    drawn = fisher_block(model, b, t, "sample", seed=3)
    assert rel(component_curvature(model, b, e, pairs, "fisher", labels="sample", seed=3), (Q*(drawn@Q)).sum(0)) < 1e-5


def test_off_diagonal_mass_in_expectation():
    "Over many draws of items, the estimate is the exact value; the naive one from few items is far above."
    g = torch.Generator().manual_seed(0)
    from curvtools.fidelity import _apart
    L = torch.randn(6, 6, generator=g, dtype=torch.float64)*torch.linspace(1, .1, 6, dtype=torch.float64)[:, None]
    F = L@L.T; want = 1 - F.diagonal().square().sum()/F.square().sum(); num = den = 0
    for _ in range(3000):
        x = torch.randn(10, 6, generator=g, dtype=torch.float64)@L.T
        w = torch.ones(10, dtype=torch.float64)
        num += _apart(x.square()@x.square().T, w); den += _apart((x@x.T).square(), w)
    assert abs(1 - num/den - want) < .02
    model = tiny("llama", torch.float32); t = one(model, "up"); b = data("llama", 20, 6)
    e = collect(model, b, [t], progress=False).eigen()[t.name]
    r = off_diagonal(model, b, e)
    assert r["low"] <= r["off"] <= r["high"] <= 1 and -1 <= r["cosine"] and r["n"] == 20
    two = [{k: v[:7] for k, v in b[0].items()}, {k: v[7:] for k, v in b[0].items()}]
    assert abs(off_diagonal(model, two, e)["off"] - r["off"]) < 1e-4


@pytest.mark.parametrize("name", ["vit", "llama"])
def test_the_model_is_left_as_found(name):
    model = tiny(name, torch.float32).train(); t, b = one(model, "q"), data(name, 8)
    for p in model.parameters(): p.requires_grad_(p.dim() > 1)
    was, flags = {k: v.clone() for k, v in model.state_dict().items()}, [p.requires_grad for p in model.parameters()]
    fidelity(model, b, t); fidelity(model, b, t, components=8)
    assert model.training and flags == [p.requires_grad for p in model.parameters()] and all(p.grad is None for p in model.parameters())
    assert all(torch.equal(v, was[k]) for k, v in model.state_dict().items()) and not any(m._forward_hooks for m in model.modules())
    assert model.config._attn_implementation == "sdpa"


@settings(max_examples=25, deadline=None)
@given(st.integers(3, 200), st.floats(.01, 100), st.integers(0, 99))
def test_scores_of_agreement(n, c, seed):
    x = torch.rand(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + .01
    r, s, k = log_r2(c*x, x)
    assert math.isclose(r, 1, abs_tol=1e-9) and math.isclose(s, c, rel_tol=1e-9) and k == n
    assert math.isclose(spearman(x, c*x), 1) and math.isclose(spearman(x, -x), -1) and same_kept(x, x**3, .4) == 1


def test_fidelity_prints_and_plans():
    model = tiny("vit", torch.float32); b = data("vit", 12); r = fidelity(model, b, (1, "fc1"), fraction=.3)
    assert [x["name"] for x in r.rows][:3] == ["Fisher", "GGN", "Hessian"] and r["GGN"]["distance"] < 1e-3 and "by chance 0.30" in repr(r)
    e = keep_order([r], "K-FAC", .5); W = weight(model, r.target).clone()
    own = collect(model, b, [r.target], labels="exact", tokens="all", progress=False).eigen().keep(fraction=.5)
    with e.applied(model): a = weight(model, r.target).clone()
    with own.applied(model): assert torch.allclose(a, weight(model, r.target), atol=1e-6)
    assert torch.equal(weight(model, r.target), W)
    no_labels = fidelity(model, [{"pixel_values": b[0]["pixel_values"]}], (1, "fc1"), hessian=False)
    assert [x["name"] for x in no_labels.rows] == ["Fisher", "GGN", "K-FAC", "EK-FAC", "EK-FAC, item by item", "K-FAC, random directions"]
    text = fidelity(tiny("llama", torch.float32), data("llama", 9), (1, "q"), components=[(0, 0), (1, 2), (3, 3), (4, 1)])
    assert text.pairs[1] == (1, 2) and "off-diagonal mass" in repr(text) and text.diagonals["K-FAC"].shape == (4,)


def test_bad_input_is_named():
    big = tiny("vit", torch.float32); b = data("vit", 8); t = Target("vit.layers.0.fc1", 0, "fc1", "mlp", 512, 128)
    e = Eigen(t, torch.eye(512), torch.eye(128), torch.ones(512), torch.ones(128))
    with pytest.raises(ValueError, match=r"512 x 128.*65,536 x 65,536.*32\.0 GB.*components="): directions(e)
    with pytest.raises(ValueError, match="no projection 'up'"): fisher_block(big, b, (1, "up"))
    with pytest.raises(ValueError, match="no target matches"): ggn_block(big, b, "nowhere.fc9")
    with pytest.raises(ValueError, match="means 6 matrices"): hessian_block(big, b, "mlp")
    with pytest.raises(ValueError, match="labels must be one of"): fisher_block(big, b, (1, "fc1"), labels="gold")
    with pytest.raises(ValueError, match='labels must be "data"'): hessian_block(big, b, (1, "fc1"), labels="sample")
    with pytest.raises(ValueError, match="per must be"): fisher_block(big, b, (1, "fc1"), per="token")
    with pytest.raises(ValueError, match="7 items are too few"): fidelity(big, data("vit", 7), (1, "fc1"))
    with pytest.raises(ValueError, match="2 items are too few"): off_diagonal(big, data("vit", 2), collect(big, b, (1, "fc1") and ["*layers.1*fc1*"], progress=False).eigen().popitem()[1])
    with pytest.raises(ValueError, match="no data"): fidelity(big, [], (1, "fc1"))
    with pytest.raises(ValueError, match='needs "labels"'): hessian_block(big, [dict(pixel_values=b[0]["pixel_values"])], (1, "fc1"))
    with pytest.raises(IndexError, match=r"\(0, 99\)"): fidelity(big, b, (1, "fc1"), components=[(0, 0), (0, 99), (1, 1)])
    with pytest.raises(ValueError, match="at least 3"): fidelity(big, b, (1, "fc1"), components=1)
    with pytest.raises(ValueError, match="no component"): fidelity(big, b, (1, "fc1"), components=[])
    r = fidelity(big, b, (1, "fc1"), components=4)
    with pytest.raises(ValueError, match="only 4 components"): keep_order([r], "K-FAC", .5)
    with pytest.raises(ValueError, match="kind must be"): component_curvature(big, b, r.eigen, r.pairs, "trace")
    with pytest.raises(ValueError, match="one threshold"): judge("x", 0, 0, 0)
    with pytest.raises(ValueError, match="must be a number, or a list"): fidelity(big, b, (1, "fc1"), components="all")
    for fraction in (0, 1, 2):
        with pytest.raises(ValueError, match="fraction=.* between 0 and 1"): fidelity(big, b, (1, "fc1"), fraction=fraction)
    with pytest.raises(KeyError, match="no 'KFAC'; there are GGN"): r["KFAC"]


def test_wrong_labels_are_named():
    big = tiny("vit", torch.float32); x = data("vit", 8)[0]["pixel_values"]; y = torch.arange(8) % 5
    for bad, says in ((y[:3], r"\[3\] labels for 8 images"), (y + 1, "labels from 1 to 5, and the model has classes 0 to 4"), (y - 1, "labels from -1 to 3")):
        for f in (lambda b: hessian_block(big, b, (1, "fc1")), lambda b: fisher_block(big, b, (1, "fc1"), "data"), lambda b: fidelity(big, b, (1, "fc1"))):
            with pytest.raises(ValueError, match=says): f([dict(pixel_values=x, labels=bad)])
    lm = tiny("llama", torch.float32)
    with pytest.raises(ValueError, match="token id 99 is outside"): fidelity(lm, torch.full((9, 5), 99), (1, "q"))
    with pytest.raises(ValueError, match="no label counts"): fidelity(lm, [dict(input_ids=torch.full((9, 5), 7), labels=torch.full((9, 5), -100))], (1, "q"))


def test_a_basis_of_another_model_is_refused():
    big, other, b = tiny("vit", torch.float32), tiny("vit", torch.float32, seed=1), data("vit", 8)
    t = one(big, "fc1"); factors = collect(big, b, [t], labels="exact", progress=False); e = factors.eigen()[t.name]
    for f in (lambda: component_curvature(other, b, e, [(0, 0)]), lambda: off_diagonal(other, b, e), lambda: fidelity(other, b, t, factors=factors), lambda: fidelity(other, b, t, factors=factors, components=4)):
        with pytest.raises(ValueError, match="not the weights the factors were made from"): f()
    with pytest.raises(KeyError, match="no target .*fc2"): fidelity(big, b, (1, "fc2"), factors=factors)
    with pytest.raises(ValueError, match="is not a target of this model"): fidelity(tiny("llama", torch.float32), data("llama", 9), t)
    with pytest.raises(ValueError, match=r"factors.eigen\(\) makes one"): stability(factors, factors)
    with pytest.raises(ValueError, match="no matrix in common"): stability(factors.eigen(), collect(big, b, [one(big, "fc2")], labels="exact", progress=False).eigen())


def test_stability_of_itself_and_of_chance():
    model = tiny("vit", torch.float32); bands = dict(bands=((0, .25), (.25, 1)))
    a, b = (collect(model, data("vit", 20, seed=s), "all", labels="exact", tokens="all", progress=False).eigen() for s in (0, 1))
    from curvtools.decompose import random_basis
    rows = {r["case"]: r for r in stability_table(dict(itself=(a, a), data=(a, b), chance=(a, random_basis(a))), **bands) if r["side"] == "A" and r["band"].startswith("top")}
    assert rows["itself"]["lift"] == 1 and rows["itself"]["n"] == 18 and abs(rows["chance"]["lift"]) < .15
    assert rows["chance"]["high"] < rows["data"]["low"] <= rows["data"]["lift"] <= rows["data"]["high"] < 1
    assert "data" in [t.get_text() for t in stability_figure(dict(data=(a, b)), **bands).legends[0].get_texts()]
    with pytest.raises(ValueError, match="no cases"): stability_figure({})


def test_figures_say_what_they_show():
    model = tiny("vit", torch.float32); b = data("vit", 12); r = fidelity(model, b, (1, "fc1"), ggn=False)
    assert "GGN" not in r.diagonals and "Hessian" in r.diagonals
    fig = agreement_figure(r, ("K-FAC", "Hessian"))
    assert [ax.texts[0].get_text().split("\n")[0] for ax in fig.axes] == ["K-FAC", "Hessian"] and fig.axes[0].get_title() == "block 1 fc1"
    with pytest.raises(KeyError, match="no 'KFAC'"): agreement_figure([r], ("KFAC",))
    with pytest.raises(ValueError, match="nothing to draw"): agreement_figure([])
    rows = [dict(order=o, kept=k, forgot=(k, k - .1, k + .1), price=2 - k) for o in ("exact", "K-FAC") for k in (.5, 1)]
    fig = edits_figure(rows, "forgot", "price", log=("price",), lines=dict(price=1.))
    assert [ax.get_ylabel() for ax in fig.axes] == ["forgot", "price"] and fig.axes[1].get_yscale() == "log" and fig.axes[0].get_yscale() == "linear"
    assert [t.get_text() for t in fig.legends[0].get_texts()] == ["exact", "K-FAC"]
    with pytest.raises(ValueError, match="no rows"): edits_figure([], "forgot", "price")
    with pytest.raises(KeyError, match="prise"): edits_figure(rows, "forgot", "prise")


@pytest.mark.parametrize("name", ["vit", "llama"])
def test_sampled_components_of_halves_that_differ_in_size(name):
    "The exact row is the curvature over all positions, however the batches are cut; moments and labels are those that were asked for."
    model, parts = tiny(name, torch.float32), [data(name, n, seed=i)[0] for i, n in enumerate((8, 3, 1))]
    t, some = one(model, "q"), [(0, 0), (1, 2), (3, 3), (4, 1), (9, 7)]
    for labels, seed in (("data", 0), ("sample", 0), ("sample", 3), *([("exact", 0)] if name == "vit" else [])):
        r = fidelity(model, parts, t, components=some, labels=labels, tokens="all", hessian=False, seed=seed)
        torch.testing.assert_close(r.diagonals["GGN = Fisher, all labels"], component_curvature(model, parts, r.eigen, some), rtol=1e-9, atol=0)
        i, j = zip(*some); e = r.eigen
        own = second_moments(model, collect(model, parts, [t], labels=labels, tokens="all", seed=seed, progress=False).eigen(model, progress=False), parts, labels=labels, tokens="all", seed=seed, progress=False)
        torch.testing.assert_close(r.diagonals["EK-FAC"], own.of(e)[list(i), list(j)].double(), rtol=1e-4, atol=0)
    whole = [fidelity(model, parts, t, labels="sample", hessian=False, ggn=False, seed=s, factors=collect(model, parts, [t], progress=False)).diagonals["EK-FAC"] for s in (0, 0, 1)]
    assert torch.equal(*whole[:2]) and not torch.equal(*whole[1:])
