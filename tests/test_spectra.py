"Weight spectra: noise has none above its edge, planted directions are found, exponents of known tails come back, and agree with weightwatcher."
import contextlib
import io
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from curvtools import spectra
from curvtools.spectra import (WeightSpectra, bulk_variance, fit_tail, mp_density, mp_middle, mp_support, noise_edge, spectral_row, spectrum_figure, weight_spectrum)
from curvtools.vision import load_vit, new_vit
from tiny import tiny


def eigenvalues(W): return torch.linalg.svdvals(W.double())**2/max(W.shape)
def noise(m, n, seed): return torch.randn(m, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
def pareto(n, alpha, seed=0): return (1 - torch.rand(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))**(-1/(alpha - 1))


# noise

@pytest.mark.parametrize("q", [.05, .25, .7, 1.])
@pytest.mark.parametrize("variance", [.3, 2.])
def test_density_is_one_with_the_right_mean(q, variance):
    a, b = mp_support(q, variance)
    t = (torch.arange(400000, dtype=torch.float64) + .5)*(math.pi/2/400000); x = a + (b - a)*t.sin()**2
    w = mp_density(x, q, variance)*2*(b - a)*t.sin()*t.cos()*(math.pi/2/400000)
    assert abs(float(w.sum()) - 1) < 1e-5 and abs(float((w*x).sum()) - variance) < 1e-5*variance
    assert mp_density(torch.tensor([a/2 - 1e-9, b*1.01]), q, variance).max() == 0


@pytest.mark.parametrize("m,n", [(64, 64), (128, 512), (300, 100)])
def test_variance_and_edge_of_noise(m, n):
    q, got, top, over = min(m, n)/max(m, n), [], [], 0
    for seed in range(60):
        x = eigenvalues(1.7*noise(m, n, seed)); v = bulk_variance(x, q); got.append(v)
        over += bool((x > noise_edge(m, n, v)).any())
        top.append(float(x.max()))
    assert abs(sum(top)/60/mp_support(q, 1.7**2)[1] - 1) < .08                             # the edge of theory, which finite noise reaches from below
    assert abs(sum(got)/60/1.7**2 - 1) < .01 and over <= 4                                # 1 in 100 expected; more than 4 of 60 has a chance of 2e-4


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 5), st.integers(0, 99))
def test_planted_directions_are_counted(k, seed):
    m, n, g = 90, 240, torch.Generator().manual_seed(seed)
    u, v = (torch.linalg.qr(torch.randn(d, 5, generator=g, dtype=torch.float64))[0][:, :k] for d in (m, n))
    W = noise(m, n, seed) + 2.2*(m*n)**.25*1.6*u @ v.T
    x = eigenvalues(W); found = int((x > noise_edge(m, n, bulk_variance(x, m/n))).sum())
    assert k <= found <= k + 1


def test_median_would_do_but_is_noisier_than_the_middle():
    x = [eigenvalues(noise(64, 128, s)) for s in range(80)]
    mid = torch.tensor([bulk_variance(v, .5) for v in x])
    med = torch.tensor([float(v.quantile(.5)) for v in x]); med = med/med.mean()
    assert mid.std() < med.std() and mp_middle(1e-4) == pytest.approx(1, abs=.01)


@pytest.mark.parametrize("q,v", [(0, 1.), (1.2, 1.), (.5, -1.)])
def test_support_refuses(q, v):
    with pytest.raises(ValueError): mp_support(q, v)


# tails

@pytest.mark.parametrize("alpha", [1.5, 2., 3., 4.5])
def test_pure_tail(alpha):
    for seed in range(3):
        t = fit_tail(pareto(3000, alpha, seed))
        assert abs(t.alpha - alpha) < 4*t.error and 1 <= t.xmin and t.distance < .05      # 4 standard errors


def test_tail_above_a_body():
    body = torch.rand(3000, generator=torch.Generator().manual_seed(1), dtype=torch.float64)*4
    t = fit_tail(torch.cat([body, 4*pareto(1500, 2.5, 2)]))
    assert abs(t.alpha - 2.5) < 4*t.error and 3 < t.xmin < 6


def test_naive_loop_agrees():
    x = pareto(120, 2.2, 5).sort().values
    best = None
    for i in range(len(x) - 1):
        tail = x[i:]; a = 1 + len(tail)/sum(math.log(v/x[i]) for v in tail)
        d = max(abs(1 - (v/x[i])**(1 - a) - j/len(tail)) for j, v in enumerate(tail))
        if best is None or d < best[0]: best = d, a, float(x[i])
    t = fit_tail(x)
    assert t.alpha == pytest.approx(float(best[1]), rel=1e-10) and t.xmin == best[2] and t.distance == pytest.approx(float(best[0]), rel=1e-9)


@settings(max_examples=20, deadline=None)
@given(st.floats(1e-6, 1e6), st.integers(0, 50))
def test_alpha_knows_no_units(scale, seed):
    a, b = fit_tail(pareto(200, 2.3, seed)), fit_tail(scale*pareto(200, 2.3, seed))
    assert a.alpha == pytest.approx(b.alpha, rel=1e-6) and b.xmin == pytest.approx(scale*a.xmin, rel=1e-6)


@pytest.mark.parametrize("bad", [torch.ones(30), torch.rand(4), -torch.rand(40), torch.full((20,), math.nan), torch.cat([torch.rand(20), torch.tensor([math.inf])])])
def test_tail_refuses(bad):
    with pytest.raises(ValueError, match="at least ten different"): fit_tail(bad)


# models

@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3", "vit"])
def test_every_matrix_of_a_model(name):
    model = tiny(name)
    s = weight_spectrum(model)
    assert isinstance(s, WeightSpectra) and all(torch.equal(v.values, v.values.sort(descending=True).values) for v in s.values())
    for n, v in s.items():
        W = model.get_submodule(n).weight.double()
        assert float(v.values.sum())*max(W.shape) == pytest.approx(float(W.detach().square().sum()), rel=1e-10)
        assert v.stable_rank == pytest.approx(float(W.square().sum()/torch.linalg.matrix_norm(W, 2)**2), rel=1e-10) and 1 <= v.stable_rank <= len(v.values)
    assert n in repr(s) and "alpha" in s._repr_html_() and set(s.to_dicts()[0]) >= {"alpha", "spikes", "stable_rank"}
    assert list(weight_spectrum(model, "mlp", blocks=[-1])) == [n for n, v in s.items() if v.target.block == 2 and v.target.role == "mlp"]
    assert set(spectral_row(model)) == {"alpha", "stable", "spikes"}


def test_training_makes_spikes():
    pg = load_vit()
    old, new = weight_spectrum(new_vit(seed=3)), weight_spectrum(pg.model)
    assert sum(s.spikes for s in old.values()) <= 3 and all(s.spikes >= 1 for s in new.values())


def test_figure_and_bad_weights():
    m = new_vit(hidden=32, blocks=1, mlp=64, heads=2)
    s = next(iter(weight_spectrum(m).values()))
    fig = spectrum_figure(s)
    assert len(fig.axes) == 2 and fig._repr_png_()[:4] == b"\x89PNG"
    for bad in (0., math.nan):
        m.vit.layers[0].mlp.fc1.weight.data[:] = bad
        with pytest.raises(ValueError, match="fc1: the weight holds NaN or infinity, or is all zero"): weight_spectrum(m)


def test_alpha_agrees_with_weightwatcher():
    with contextlib.redirect_stdout(io.StringIO()): ww = pytest.importorskip("weightwatcher")
    model = load_vit().model
    with contextlib.redirect_stdout(io.StringIO()): d = ww.WeightWatcher(model=model).analyze(min_evals=10, svd_method="accurate")
    theirs, ours = dict(zip(d.longname, d.alpha)), weight_spectrum(model)
    assert set(ours) <= set(theirs)
    for n, s in ours.items(): assert s.alpha == pytest.approx(theirs[n], rel=1e-3), n


@pytest.mark.parametrize("shape", [(128, 128), (512, 128)])
@pytest.mark.parametrize("k", [1, 5, 20])
def test_planted_directions_are_counted(shape, k):
    m = new_vit(hidden=128, blocks=1, mlp=512); g = torch.Generator().manual_seed(k)
    for layer in (m.vit.layers[0].attention.q_proj, m.vit.layers[0].mlp.fc1):
        if tuple(layer.weight.shape) != shape: continue
        u, v = (torch.linalg.qr(torch.randn(n, k, generator=g))[0] for n in shape)
        layer.weight.data.copy_(.02*(torch.randn(shape, generator=g) + u @ torch.diag((shape[0]**.5 + shape[1]**.5)*torch.linspace(1.5, 5, k)) @ v.T))
    assert next(s for s in weight_spectrum(m).values() if (s.target.d_out, s.target.d_in) == shape).spikes == k
