"""Per-item Fisher quantities against matrices made by autograd (float64, relative 1e-8: rounding alone), input curvature against exact Hessians, and what is refused."""
import math

import pytest
import torch
from tiny import tiny, tiny_inputs
from curvtools.data import Passage, Passages, Windows, image_batches
from curvtools.kfac import collect
from curvtools.sharpness import along, cancelling, cosines, gram, input_curvature, lanczos, matched, own, rows, sharpest, top, trace
from curvtools.targets import find_targets


def near(a, b, rel=1e-8):
    a, b = (torch.as_tensor(x, dtype=torch.float64) for x in (a, b))
    return a.shape == b.shape and (a - b).abs().max() <= rel*b.abs().max()


def passages(n=3, P=4, L=3, seed=0):
    g = torch.Generator().manual_seed(seed)
    return Passages(Passage(r[:P], r[P:]) for r in torch.randint(3, 37, (n, P + L), generator=g).tolist())


def weight_of(model, name):
    m = model.get_submodule(name)
    return m.weight, type(m).__name__ == "Conv1D"


def gradients(model, name, logits, picks):
    "Rows -grad log p [len(picks), d_out*d_in] of one item by autograd; picks: (position, class)."
    W, turned = weight_of(model, name)
    W.requires_grad_(True)
    l = logits().log_softmax(-1)
    out = [torch.autograd.grad(-l[t, c], W, retain_graph=True)[0] for t, c in picks]
    W.requires_grad_(False)
    return torch.stack([(o.T if turned else o).flatten() for o in out]), l.detach().exp()


def fisher(model, name, logits, weights=None):
    "The item's Fisher block by the definition."
    with torch.no_grad(): S, V = logits().shape
    picks = [(t, c) for t in range(S) for c in range(V)]
    if weights == "uniform":                                          # the same Jacobian, every class alike
        W, turned = weight_of(model, name); W.requires_grad_(True)
        z = logits(); z = z - z.mean(-1, keepdim=True)
        R = torch.stack([(g.T if turned else g).flatten() for g in (torch.autograd.grad(z[t, c], W, retain_graph=True)[0] for t, c in picks)])
        W.requires_grad_(False)
        return R.T @ R/V
    R, p = gradients(model, name, logits, picks)
    return R.T @ (R*p.flatten()[:, None])


def suffix_logits(model, p):
    return lambda: model(input_ids=torch.tensor([p.ids])).logits[0, len(p.prefix) - 1:-1]


def dense(d):
    "Explicit directions [N, k, d_out*d_in]."
    return torch.einsum("nkto,nti->nkoi", d.g, d.a).flatten(2)


def target_of(name):
    model = tiny(name); model.requires_grad_(False)
    return model, find_targets(model, "mlp", blocks=[1])[-1].name


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "gemma3", "gpt_neox"])
@pytest.mark.parametrize("labels", ["exact", "uniform"])
def test_text_against_autograd(name, labels):
    model, n = target_of(name); ps = passages()
    F = torch.stack([fisher(model, n, suffix_logits(model, p), labels) for p in ps])
    w, E = torch.linalg.eigh(F)
    r = rows(model, ps, n, labels, progress=False)[n]
    t = top(r, 2)
    assert near(t.value, w.flip(1)[:, :2]) and near(trace(r), F.diagonal(dim1=1, dim2=2).sum(1))
    assert near(torch.linalg.eigvalsh(gram(r).flatten(0, 1).flatten(1))[-1], torch.linalg.eigvalsh(F.sum(0))[-1])
    assert near((dense(t.direction)[:, 0]*E[:, :, -1]).sum(1).abs(), torch.ones(3))
    s = sharpest(model, ps, n, labels, steps=80, tol=1e-13, progress=False)[n]
    assert near(s.value, t.value[:, :1]) and near((dense(s.direction)[:, 0]*E[:, :, -1]).sum(1).abs(), torch.ones(3), 1e-6)


def test_images_against_autograd():
    model = tiny("vit"); model.requires_grad_(False)
    x = tiny_inputs("vit", 4)["pixel_values"]
    for n in ("vit.layers.1.mlp.fc1", "vit.layers.0.attention.v_proj", "classifier"):
        F = torch.stack([fisher(model, n, lambda: model(pixel_values=i[None]).logits) for i in x])
        r = rows(model, image_batches(x), n, progress=False)[n]
        assert near(top(r).value[:, 0], torch.linalg.eigvalsh(F)[:, -1])
        assert near(sharpest(model, image_batches(x), n, tol=1e-13, progress=False)[n].value, top(r).value)
        D, rest = dense(top(r).direction[[0, 1]])[:, 0], F[2:].mean(0)
        assert near(along(top(r).direction[[0, 1]], r[[2, 3]])[:, 0], ((D @ rest)*D).sum(1)/(rest.trace()/len(rest)))
        assert near(cancelling(r, [4])[0]["ratio"], torch.linalg.eigvalsh(F.mean(0))[-1]/torch.linalg.eigvalsh(F)[:, -1].mean())
        u = F/F.diagonal(dim1=1, dim2=2).sum(1)[:, None, None]
        assert near(cancelling(r, [4], unit=True)[0]["ratio"], torch.linalg.eigvalsh(u.mean(0))[-1]/torch.linalg.eigvalsh(u)[:, -1].mean())


def test_the_population_is_that_of_collect():
    "K-FAC's A and G are means over positions of what the rows hold: the same numbers, collected by other code (float32 sums there)."
    model = tiny("vit"); x = tiny_inputs("vit", 12)["pixel_values"]; n = "vit.layers.1.mlp.fc1"
    f = collect(model, image_batches(x), targets=n, labels="exact", tokens="all", progress=False)[n]
    r = rows(model, image_batches(x), n, progress=False)[n]
    T = r.a.shape[1]
    assert near(f.A, torch.einsum("nti,ntj->ij", r.a, r.a)/(12*T), 1e-6) and near(f.G, torch.einsum("nmto,nmtp->op", r.g, r.g)/(12*T), 1e-6)
    d = top(r).direction; D = dense(d)[:, 0]
    assert near(along(d, f, relative=False)[:, 0], ((D @ torch.kron(f.G, f.A).double())*D).sum(1), 1e-6)


def test_samples_are_right_on_average():
    "The trace from drawn labels lies within four standard errors of the exact one, for each of three passages."
    model, n = target_of("llama"); ps = passages()
    exact = trace(rows(model, ps, n, progress=False)[n])
    r = rows(model, ps, n, "sample", draws=600, progress=False)[n]
    one = own(r).diagonal(dim1=1, dim2=2)*600                                  # each draw's estimate
    assert ((one.mean(1) - exact).abs() < 4*one.std(1)/math.sqrt(600)).all()
    assert torch.equal(r.g, rows(model, ps, n, "sample", draws=600, batch_size=3, progress=False)[n].g) or near(r.g, rows(model, ps, n, "sample", draws=600, batch_size=1, progress=False)[n].g)
    assert not near(r.g, rows(model, ps, n, "sample", draws=600, seed=1, progress=False)[n].g, 1e-2)


def test_data_labels_give_the_items_own_gradient():
    model, n = target_of("llama"); ps = passages(2)
    r = rows(model, ps, n, "data", progress=False)[n]
    for k, p in enumerate(ps):
        R, _ = gradients(model, n, suffix_logits(model, p), list(enumerate(p.suffix)))
        assert near(dense(r)[k, 0], R.sum(0)) and near(r.loss[k], -suffix_logits(model, p)().log_softmax(-1)[range(3), list(p.suffix)].sum().detach())


@pytest.mark.parametrize("f", [lambda m, x, n, b: rows(m, x, n, batch_size=b, progress=False)[n], lambda m, x, n, b: sharpest(m, x, n, batch_size=b, tol=1e-12, steps=60, progress=False)[n].direction])
def test_batches_and_lengths_do_not_matter(f):
    "Passages of several lengths, in any batch: items come back in their order, padding is zero."
    model, n = target_of("llama")
    ps = Passages([*passages(2, 4, 3), *passages(2, 6, 2, 1), *passages(1, 4, 3, 2)])
    a = f(model, ps, n, 8)
    for b in (1, 2):
        other = f(model, ps, n, b)
        assert near(gram(a).diagonal(dim1=0, dim2=2).diagonal(dim1=0, dim2=1).sum(1), gram(other).diagonal(dim1=0, dim2=2).diagonal(dim1=0, dim2=1).sum(1))
        assert near(a.loss, other.loss) and near(a.a, other.a)
    one = f(model, ps[2:3], n, 1)
    assert near(trace(one), trace(a[[2]]), 1e-7)


def test_windows_with_padding():
    "Left and right padding, and labels of -100, change nothing."
    model, n = target_of("llama")
    ids = torch.randint(3, 37, (1, 6), generator=torch.Generator().manual_seed(3))
    plain = trace(rows(model, [ids], n, progress=False)[n])
    for side in (0, 1):
        pad = torch.zeros(1, 2, dtype=torch.long); parts = [pad, ids] if side == 0 else [ids, pad]; mask = [torch.zeros(1, 2, dtype=torch.long), torch.ones(1, 6, dtype=torch.long)]
        b = dict(input_ids=torch.cat(parts, 1), attention_mask=torch.cat(mask if side == 0 else mask[::-1], 1))
        assert near(trace(rows(model, [b], n, progress=False)[n]), plain)
        assert near(sharpest(model, [b], n, steps=80, tol=1e-12, progress=False)[n].value, top(rows(model, [ids], n, progress=False)[n]).value)
    assert len(rows(model, Windows(ids.repeat(3, 1)), n, "data", progress=False)[n]) == 3


def test_lanczos():
    g = torch.Generator().manual_seed(0)
    S = torch.randn(5, 40, 40, generator=g, dtype=torch.float64); S = S @ S.mT
    apply = lambda u: torch.einsum("bij,bj->bi", S, u)
    u = torch.randn(5, 40, generator=g, dtype=torch.float64)
    value, vec, bound = lanczos(apply, u, 40, 1e-12)
    w = torch.linalg.eigvalsh(S)
    assert near(value, w[:, -1], 1e-10) and near(apply(vec), value[:, None]*vec, 1e-6)
    value, _, bound = lanczos(apply, u, 6, 0.)                                 # stopped early: some eigenvalue lies within the bound
    assert ((w - value[:, None]).abs().min(1).values <= bound).all() and bound.min() > 1e-6
    one = torch.zeros(2, 6, 6, dtype=torch.float64); one[:, 0, 0] = 3.         # rank one: ends after two steps, no nan
    value, vec, _ = lanczos(lambda u: torch.einsum("bij,bj->bi", one, u), torch.ones(2, 6, dtype=torch.float64), 6, 0.)
    assert near(value, torch.tensor([3., 3.]).double()) and vec.isfinite().all()


def test_cancelling_and_cosines():
    eye = torch.eye(16)[:, None, :, None]
    assert [round(c["ratio"]*c["n"], 9) for c in cancelling(eye, (1, 2, 8, 16))] == [1.]*4
    assert all(c["low"] <= c["ratio"] <= c["high"] and c["floor"] - 1e-9 <= c["ratio"] <= 1 + 1e-9 for c in cancelling(torch.cov(torch.randn(16, 5))[:, None, :, None], (1, 4, 16)))
    big = torch.ones(16); big[0] = 1e6                                          # one item rules: raw hardly falls, at unit trace all are alike
    K = torch.diag(big)[:, None, :, None]
    assert cancelling(K, (16,))[0]["ratio"] > .99 and near(cancelling(K, (16,), unit=True)[0]["ratio"], 1/16)
    model = tiny("vit"); x = tiny_inputs("vit", 4)["pixel_values"]; n = "vit.layers.1.mlp.fc1"
    r = rows(model, image_batches(x), n, progress=False)[n]; d = top(r, 2).direction; Q = dense(d)
    pairs = [(i, j) for i in range(4) for j in range(i + 1, 4)]
    assert near(cosines(d), torch.stack([torch.linalg.svdvals(Q[i] @ Q[j].T) for i, j in pairs]), 1e-6)
    assert cosines(d[[0]], d[[1, 2, 3]]).shape == (3, 2) and near(cosines(d[[0]], d[[0]]), torch.ones(1, 2), 1e-6)


def test_matched():
    x, y = torch.tensor([0., 1., 2., 9.]), torch.tensor([.1, 1.15, 2.3, 2.05])
    i, j = matched(x, y, .2)
    assert sorted(zip(i.tolist(), j.tolist())) == [(0, 0), (1, 1), (2, 3)]
    assert len(set(matched(torch.zeros(3), torch.zeros(2))[1].tolist())) == 2
    with pytest.raises(ValueError, match="No pair is within tol=0.2"): matched(x, y + 100)


@pytest.mark.parametrize("name", ["vit", "llama", "gpt2"])
def test_input_curvature(name):
    "Trace of the exact Hessian within four standard errors, and the mean square of |Hv| within 10 % of the trace of its square (1500 draws)."
    model = tiny(name); model.requires_grad_(False); model.set_attn_implementation("eager")
    if name == "vit":
        x, y = tiny_inputs("vit", 2)["pixel_values"], torch.tensor([1, 3]); items = image_batches(x, y)
        loss = lambda v, k: torch.nn.functional.cross_entropy(model(pixel_values=v.view(1, *x.shape[1:])).logits, y[k:k + 1])
        at = [i.flatten() for i in x]
    else:
        items = passages(2, 2, 2)
        e = [model.get_input_embeddings()(torch.tensor(p.ids)) for p in items]; at = [i.flatten() for i in e]
        loss = lambda v, k: torch.nn.functional.cross_entropy(model(inputs_embeds=v.view(1, *e[0].shape)).logits[0, 1:-1], torch.tensor(items[k].suffix), reduction="sum")
    H = [torch.autograd.functional.hessian(lambda v: loss(v, k), a) for k, a in enumerate(at)]
    c = input_curvature(model, items, h=1e-5, draws=1500, progress=False)
    tr, sq = torch.stack([h.trace() for h in H]), torch.stack([h.pow(2).sum() for h in H])
    assert ((c.trace - tr).abs() < 4*c.trace_error).all() and near(c.square/sq, torch.ones(2), .1)
    assert near(c.loss, torch.stack([loss(a, k) for k, a in enumerate(at)]).detach())
    assert near(input_curvature(model, items, draws=3, batch_size=1, progress=False).score, input_curvature(model, items, draws=3, progress=False).score, 1e-6)
    assert (c.score <= c.square.sqrt() + 1e-12).all() and "2 items" in repr(c)


@pytest.mark.parametrize("f", [lambda m, x: rows(m, x, progress=False), lambda m, x: sharpest(m, x, progress=False), lambda m, x: input_curvature(m, x, progress=False)])
def test_the_model_is_left_as_found(f):
    model = tiny("llama").train(); before = {k: v.clone() for k, v in model.state_dict().items()}
    list(model.parameters())[3].requires_grad_(False); flags = [p.requires_grad for p in model.parameters()]
    f(model, passages(2, 2, 2))
    boom = model.model.layers[2].mlp.register_forward_hook(lambda *a: (_ for _ in ()).throw(RuntimeError("boom")))
    with pytest.raises(RuntimeError, match="boom"): f(model, passages(2, 2, 2))
    boom.remove()
    assert model.training and flags == [p.requires_grad for p in model.parameters()] and all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not any(m._forward_hooks for m in model.modules()) and all(p.grad is None for p in model.parameters())


def test_what_is_refused():
    vit, lm = tiny("vit"), tiny("llama"); x = tiny_inputs("vit", 3)["pixel_values"]; y = torch.tensor([0, 1, 2])
    for items, match in ((image_batches(torch.randn(2, 3, 9, 9).double()), "9 x 9 pixels .* reads 8 x 8"), (image_batches(x[:, :1]), "1 channels"), (image_batches(x*1e3), "no standardised images"),
                         (image_batches(x, torch.tensor([0, 1, 5])), "label 5 is not a class"), (image_batches(x, torch.tensor([0, 1, -7])), "label -7")):
        for f in (rows, sharpest):
            with pytest.raises(ValueError, match=match): f(vit, items, "vit.layers.1.mlp.fc1", progress=False)
    with pytest.raises(ValueError, match="needs a label for every image"): rows(vit, image_batches(x), labels="data", progress=False)
    with pytest.raises(ValueError, match="needs a label for every image"): input_curvature(vit, image_batches(x), progress=False)
    with pytest.raises(ValueError, match="labels='gold'"): rows(vit, image_batches(x), labels="gold")
    with pytest.raises(ValueError, match="others have rows"): sharpest(vit, image_batches(x), labels="sample")
    with pytest.raises(ValueError, match="draws=0"): rows(vit, image_batches(x), labels="sample", draws=0)
    with pytest.raises(ValueError, match="draws=1"): input_curvature(vit, image_batches(x, y), draws=1)
    lm.config.max_position_embeddings = 200
    with pytest.raises(ValueError, match=r"4,366 rows an item here \(118 scored positions x 37"): rows(lm, [torch.randint(3, 37, (1, 119))], "model.layers.0.mlp.up_proj", progress=False)
    with pytest.raises(ValueError): rows(lm, Passages([]), progress=False)
    with pytest.raises((ValueError, TypeError)): rows(lm, None, progress=False)
    with pytest.raises(ValueError, match="nothing selected|no "): rows(lm, passages(), "nonsense", progress=False)
    n, other = "vit.layers.1.mlp.fc1", "vit.layers.1.mlp.fc2"
    r = rows(vit, image_batches(x), [n, other], progress=False)
    with pytest.raises(ValueError, match="two matrices"): gram(r[n], r[other])
    with pytest.raises(ValueError, match="directions are of .*fc1.*is of .*fc2"): along(top(r[n]).direction, r[other])
    with pytest.raises(ValueError, match="k=6, but an item has 5 rows"): top(r[n], 6)
    with pytest.raises(ValueError, match="counts ask for 8 items and there are 3"): cancelling(r[n], (8, 16))
    with pytest.raises(ValueError, match="no pair"): cosines(top(r[n]).direction[[0]])



def test_counts_that_mean_nothing_are_named():
    K = torch.eye(4, dtype=torch.float64).view(4, 1, 4, 1)
    for kw in (dict(counts=()), dict(counts=(0,)), dict(counts=(-1, 2)), dict(draws=0), dict(counts=(9,))):
        with pytest.raises(ValueError, match="counts"): cancelling(K, **kw)
    assert [r["n"] for r in cancelling(K, counts=(1, 2, 9))] == [1, 2]
    with pytest.raises(ValueError, match="steps=0"): sharpest(tiny("llama"), passages(), steps=0)


def test_images_as_a_tensor():
    m, x = tiny("vit"), tiny_inputs("vit", 3)["pixel_values"]
    a, b = (rows(m, y, "mlp", labels="uniform", progress=False) for y in (x, image_batches(x)))
    assert all(torch.equal(a[n].g, b[n].g) for n in b)
