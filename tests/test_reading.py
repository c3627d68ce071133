"What is read and written: against hand-written hooks, brute force and derivatives."
import re

import pytest
import torch
from hypothesis import given, settings, strategies as st

from curvtools.decompose import Eigen, _orthonormal
from curvtools.plots import band_energy, overlap
from curvtools.reading import Inputs, Reading, Writing, band_overlap, energy_bands, inputs, reading_html, reads, writes, writing_html
from curvtools.targets import block_list, find_targets, weight
from tiny import LMS, tiny, tiny_inputs


class Ids:
    "A tokenizer whose tokens are told apart."
    def decode(self, ids): return "".join(f"<{int(i)}>" for i in ids)


class Evil:
    def decode(self, ids): return "<script>alert(1)</script>" * len(ids)


def toy(target, seed=0):
    g = torch.Generator().manual_seed(seed)
    lam, mu = (torch.rand(n, generator=g, dtype=torch.float64).sort(descending=True).values for n in (target.d_out, target.d_in))
    return Eigen(target, _orthonormal(target.d_out, g), _orthonormal(target.d_in, g), lam, mu)


def target(model, projection, block=-1): return find_targets(model, "all", blocks=block, projections=projection)[0]


def hooked(model, name, **kw):
    out = []
    h = model.get_submodule(name).register_forward_pre_hook(lambda m, a: out.append(a[0].detach()))
    with torch.no_grad(): model(**kw)
    h.remove()
    return out[0] if out[0].dim() == 3 else out[0].view(*kw["input_ids"].shape, -1)      # OPT's MLP is given [B*T, d_in]


@pytest.mark.parametrize("name", LMS)
def test_inputs_are_those_of_a_hook(name):
    m = tiny(name, torch.float32).train()
    ids = tiny_inputs(name, 4, 9)["input_ids"]
    mask = torch.ones_like(ids); mask[1, 6:] = 0
    was = {k: v.clone() for k, v in m.state_dict().items()}
    for t in find_targets(m, "all", blocks=1):
        x = inputs(m, t, [dict(input_ids=ids[:3], attention_mask=mask[:3]), ids[3:, :7]], progress=False)
        assert m.training and all(k.training for k in m.modules()) and not any(k._forward_pre_hooks for k in m.modules())
        m.eval()
        want = torch.cat([hooked(m, t.name, input_ids=ids[:3], attention_mask=mask[:3])[mask[:3].bool()], hooked(m, t.name, input_ids=ids[3:, :7])[0]])
        m.train()
        assert torch.allclose(x.X, want, atol=1e-5) and x.X.dtype == torch.float32
        assert x.where.tolist() == [[w, p] for w, n in enumerate((9, 6, 9, 7)) for p in range(n)]
        assert x.ids.shape == (4, 9) and x.ids[1].tolist() == ids[1, :6].tolist() + [-1] * 3 and x.ids[3, 7:].tolist() == [-1, -1]
    assert all(torch.equal(v, was[k]) for k, v in m.state_dict().items())


def test_inputs_of_images():
    m = tiny("vit", torch.float32)
    px = tiny_inputs("vit", 3, dtype=torch.float32)["pixel_values"]
    t = target(m, "fc1", 0)
    x = inputs(m, t, [dict(pixel_values=px[:2]), dict(pixel_values=px[2:])], progress=False)
    assert torch.allclose(x.X, hooked(m, t.name, pixel_values=px).flatten(0, 1), atol=1e-5)
    assert x.ids is None and x.grid == (2, 2, 1) and x.where[-1].tolist() == [2, 4]
    r = reads(x, torch.eye(16)[0], k=15)
    places = {d["place"] for d in r.to_dicts()}
    assert "image 2, class token" in places and "image 0, patch row 2 of 2, column 1 of 2" in places
    page = reading_html(r, None)
    assert "image 2, class token: x·v" in page and "<span" not in page


@pytest.mark.parametrize("data, error", [([], ValueError), (torch.empty(0, 5).long(), ValueError), (dict(input_ids=[[1, 2]]), TypeError), ([torch.full((1, 4), 99)], ValueError)])
def test_bad_data_is_refused(data, error):
    m = tiny("llama", torch.float32)
    with pytest.raises(error): inputs(m, target(m, "up"), data, progress=False)
    assert not any(k._forward_pre_hooks for k in m.modules())


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 10**6), st.integers(1, 9), st.integers(1, 6), st.integers(0, 5))
def test_reads_is_brute_force(seed, k, windows, width):
    g = torch.Generator().manual_seed(seed)
    T = 7
    ids = torch.randint(0, 50, (windows, T), generator=g); ids[0, 5:] = -1
    where = (ids >= 0).nonzero()
    X, v = torch.randn(len(where), 4, generator=g), torch.randn(4, generator=g)
    r, y = reads(Inputs(X, where, ids), v, k, width), X @ v
    best = {}
    for n, (w, _) in enumerate(where.tolist()):
        if w not in best or abs(y[n]) > abs(y[best[w]]): best[w] = n
    want = sorted(best.values(), key=lambda n: -abs(y[n]))[:k]
    assert [(d["window"], d["position"]) for d in r.most] == [tuple(where[n].tolist()) for n in want]
    assert [d["value"] for d in r.most] == [float(y[n]) for n in want]
    assert sorted(abs(d["value"]) for d in r.least) == y.abs().sort().values[:k].tolist()
    e = y.double().square()
    assert r.rms == pytest.approx(float(e.mean().sqrt())) and r.share == pytest.approx(float(e.sort(descending=True).values[:k].sum() / e.sum()))
    for d in r.most + r.least:
        assert d["ids"][d["at"]] == ids[d["window"], d["position"]] and d["at"] <= width and min(d["ids"]) >= 0 and len(d["ids"]) <= width + 5


def test_reads_refuses():
    x = Inputs(torch.zeros(2, 3), torch.zeros(2, 2).long(), torch.zeros(1, 2).long())
    with pytest.raises(ValueError, match="width 3"): reads(x, torch.ones(4))
    with pytest.raises(ValueError, match="1 or more"): reads(x, torch.ones(3), k=0)
    assert reads(x, torch.ones(3)).share == 0                    # nothing is read


def slope(model, t, u, ids):
    "Derivative of the last logits along u added behind t in the last block, with the final norm's scale held: [V]."
    last = model.get_submodule(min((n for n, _ in model.named_modules() if n.split(".")[-1] in ("norm", "ln_f", "final_layer_norm")), key=lambda n: n.count(".")))
    held = {}
    def stream(step):
        def add(m, a, out): return out + step * u
        def norm(m, a, out): held.setdefault("in", a[0]); return norm_at(m, a[0], held["in"])
        hs = [model.get_submodule(t.name).register_forward_hook(add), last.register_forward_hook(norm)]
        with torch.no_grad(): y = model(input_ids=ids).logits[0, -1]
        for h in hs: h.remove()
        return y
    def norm_at(m, x, fixed):                                    # the norm with the scale of another input
        centre = isinstance(m, torch.nn.LayerNorm)
        f = fixed - fixed.mean(-1, keepdim=True) * centre
        scale = f.square().mean(-1, keepdim=True).sqrt()
        held["scale"] = scale[0, -1]
        w = 1 + m.weight if type(m).__name__.startswith("Gemma") else m.weight
        return (x - x.mean(-1, keepdim=True) * centre) / scale * w + (m.bias if centre else 0)
    a, b = stream(0.), stream(1e-3)
    return (b - a) / 1e-3 * held["scale"]


@pytest.mark.parametrize("name, projection", [(n, p) for n in ("llama", "qwen2", "qwen3", "mistral", "phi3") for p in ("down",)] + [("gpt2", "fc2"), ("gpt_neox", "fc2"), ("opt", "fc2"), ("gpt_neox", "o")])
def test_writes_is_the_slope_of_the_logits(name, projection):
    m = tiny(name)
    t = target(m, projection)
    e = toy(t)
    want = slope(m, t, e.UG[:, 3].double(), tiny_inputs(name, 1)["input_ids"])
    w = writes(m, Ids(), e, 3, k=6)
    assert [x for _, x in w.up] == pytest.approx(want.sort(descending=True).values[:6].tolist(), abs=2e-4)
    assert [x for _, x in w.down] == pytest.approx(want.sort().values[:6].tolist(), abs=2e-4)
    assert w.up[0][0] == f"<{int(want.argmax())}>"


@pytest.mark.parametrize("name, final", [("gemma3", "model.norm"), ("olmo2", "model.norm")])
def test_norms_behind_a_block_are_passed(name, final):
    m = tiny(name)
    t, gain = target(m, "down", 1), (lambda n: 1 + n.weight) if name == "gemma3" else (lambda n: n.weight)
    e = toy(t)
    u = e.UG[:, 2].double() * gain(block_list(m)[1][1].post_feedforward_layernorm) * gain(m.get_submodule(final))
    assert [x for _, x in writes(m, Ids(), e, 2, 3).up] == pytest.approx((m.lm_head.weight @ u).sort(descending=True).values[:3].tolist(), abs=1e-3)


def test_neurons_go_through_down():
    m = tiny("llama")
    for p in ("gate", "up"):
        e = toy(target(m, p, 1)); u = e.UG[:, 4].double()
        w = writes(m, Ids(), e, 4, 5)
        assert [n for n, _ in w.neurons] == u.abs().argsort(descending=True)[:5].tolist() and w.neurons[0][1] == pytest.approx(float(u[w.neurons[0][0]]))
        y = m.lm_head.weight @ (m.model.norm.weight * (weight(m, target(m, "down", 1)) @ u))
        assert [x for _, x in w.up] == pytest.approx(y.sort(descending=True).values[:5].tolist(), abs=1e-3)
    w = writes(m := tiny("phi3"), Ids(), toy(target(m, "gate_up", 1)), 0, 5)
    assert len(w.parts) == 5 and set(w.parts) <= {"gate", "up"} and max(n for n, _ in w.neurons) < 24


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_grouped_queries(name):
    m = tiny(name)                                               # 4 query heads, 2 key-value heads
    for p, n in (("q", 4), ("k", 2)):
        w = writes(m, Ids(), toy(target(m, p, 0)), 1)
        assert len(w.heads) == n and sum(s for _, s in w.heads) == pytest.approx(1, abs=1e-5) and not w.up
    t, o = target(m, "v", 0), target(m, "o", 0)
    e = toy(t); u = e.UG[:, 1].double()
    w = writes(m, Ids(), e, 1, 3)
    d = t.d_out // 2
    assert dict(w.heads)[1] == pytest.approx(float(u[d:].square().sum()), abs=1e-5) and "2 key-value heads, each for 2 of 4" in w.note
    W = weight(m, o)                                             # [D, 4 d]: query heads 0, 1 use head 0; 2, 3 head 1
    y = m.lm_head.weight @ (m.model.norm.weight * sum(W[:, q*d:(q + 1)*d] @ u[q//2*d:(q//2 + 1)*d] for q in range(4)))
    assert [x for _, x in w.up] == pytest.approx(y.sort(descending=True).values[:3].tolist(), abs=1e-3)


@pytest.mark.parametrize("name", ["phi3", "gpt2", "gpt_neox"])
def test_fused_heads(name):
    m = tiny(name); t = target(m, "qkv", 0); e = toy(t)
    heads = dict(writes(m, Ids(), e, 0).heads)
    assert sum(heads.values()) == pytest.approx(1, abs=1e-5)
    rows = t.rows("k"); n = 2 if name == "phi3" else 4
    assert heads["k 1"] == pytest.approx(float(e.UG[rows, 0].view(n, -1)[1].square().sum()), abs=1e-6) and len([h for h in heads if h[0] == "k"]) == n


def test_image_models_name_classes():
    m = tiny("vit").requires_grad_(False); e = toy(target(m, "fc2")); n = m.vit.layernorm; u = e.UG[:, 0].double()
    y = m.classifier.weight @ (n.weight * (u - u.mean()))
    w = writes(m, list("abcde"), e, 0, 5)
    assert dict(w.up) == pytest.approx({c: float(x) for c, x in zip("abcde", y)}, abs=1e-3)
    assert writes(m, None, e, 0).up[0][0].startswith("LABEL_")
    assert len(writes(m, None, toy(target(m, "q")), 0).heads) == 4


def test_no_head_is_said():
    m = tiny("vit").vit; w = writes(m, None, toy(target(m, "fc2")), 0)
    assert not w.up and "no head" in w.note and "no head" in repr(w) and "no head" in writing_html(w)


def test_writes_refuses():
    m = tiny("llama"); e = toy(target(m, "down"))
    for i in (-1, 16): pytest.raises(IndexError, writes, m, Ids(), e, i)
    pytest.raises(ValueError, writes, m, Ids(), e, 0, 0)
    head = find_targets(m, "lm_head")[0]
    with pytest.raises(ValueError, match="not known"): writes(m, Ids(), toy(head), 0)


def test_text_stays_text():
    row = dict(window=0, position=1, value=-2., ids=[3, 4], at=1)
    pages = [reading_html(Reading([row], [row], .5, 1., 2), Evil()), writing_html(Writing("a<script>", "down", 0, [("<script>x", 1.)], [("<b>", -1.)], note="<i>"))]
    for p in pages: assert not re.search("<script|<b>|<i>", p) and "&lt;script&gt;" in p
    assert "the token that is read" in pages[0] and "-2" in pages[0]
    assert "<script" not in Reading([row], [row], .5, 1., 2).to_dicts(Evil())._repr_html_()


def test_overlap_of_the_same_and_of_chance():
    t = find_targets(tiny("llama"), "mlp", blocks=0, projections="up")[0]
    t = t.__class__(**{**t.__dict__, "d_out": 200, "d_in": 120})
    a, b = toy(t), toy(t, 1)
    for r in band_overlap(a, a): assert r["overlap"] == pytest.approx(1, abs=1e-4) == r["single"] and r["single_chance"] < 1
    for r in band_overlap(a, b): assert r["overlap"] == pytest.approx(r["chance"], abs=.06)
    turned = toy(t); turned.UA = torch.cat([a.UA[:, :60] @ _orthonormal(60, torch.Generator().manual_seed(5)), a.UA[:, 60:]], 1)
    r = band_overlap(a, turned, ((0, .5), (.5, 1)))[0]           # the same space, other directions
    assert r["overlap"] == pytest.approx(1, abs=1e-4) and r["single"] == pytest.approx(r["single_chance"], abs=.05)
    assert band_overlap(a, b) == band_overlap(a, b) and len(overlap(band_overlap(a, b)).axes) == 2
    with pytest.raises(ValueError, match="compared"): band_overlap(a, toy(find_targets(tiny("llama"), "mlp")[0]))
    for bad in (((0, 0),), ((0, .001),), ((.5, 1.2),), ((-.1, .5),)): pytest.raises(ValueError, band_overlap, a, b, bad)


@pytest.mark.parametrize("n", [1, 2, 10, 50])
def test_energy_adds_up(n):
    m = tiny("llama", torch.float32); e = toy(target(m, "down"))
    import weakref; e._model, e._force = weakref.ref(m), True
    rows = energy_bands(e, n)
    assert sum(r["mass"] for r in rows) == pytest.approx(1) and sum(r["energy"] for r in rows) == pytest.approx(1)
    assert sum(r["pairs"] for r in rows) == e.C.numel() and rows[0]["lo"] == 0 and rows[-1]["hi"] == 1 and all(r["pairs"] > 0 for r in rows)
    first = e.mask(fraction=rows[0]["hi"]).dense()
    assert rows[0]["energy"] == pytest.approx(float(e.C[first].square().sum() / weight(m, e.target).square().sum()), rel=1e-4)
    assert band_energy(rows).axes[0].get_ylabel()


def test_energy_refuses():
    e = toy(target(tiny("llama"), "down"))
    with pytest.raises(RuntimeError, match="bind"): energy_bands(e)
