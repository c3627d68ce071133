"""Every function that takes a model, once on the CPU and once on a GPU: the same numbers, the model as it was. Skipped where there is no GPU.

`CURVTOOLS_GPU=card` runs the comparisons on a device that only says it is none (card.py); tests/test_card.py does so. `CURVTOOLS_GPU=cpu` takes the CPU in both places, to try the tests themselves.
Tolerances: float64 products in another order, 1e-8 relative to the largest entry; models that rotate take sines and cosines in float32, whatever their dtype, and those differ in the last digit: 1e-5.
float32, 2e-3, as a GPU sums in other blocks and four layers multiply the difference."""
import dataclasses
import os
from collections.abc import Mapping

import pytest
import torch
from tiny import LMS, MOES, V, tiny, tiny_inputs

if os.environ.get("CURVTOOLS_GPU") == "card": import card                   # before curvtools
from curvtools import baselines, budget, evaluate, fidelity, reading, recite, sharpness, spectra, sweep, tasks, vision
from curvtools.data import Windows
from curvtools.kfac import OuterSum, collect
from curvtools.targets import find_targets, fingerprints

GPU = os.environ.get("CURVTOOLS_GPU", "cuda")
real = torch.cuda.is_available() and GPU == "cuda"
if not (real or GPU in ("cpu", "card")): pytest.skip("needs a GPU", allow_module_level=True)
only = pytest.mark.skipif(not real, reason="needs a GPU itself")
quiet = dict(progress=False)
slow = pytest.mark.skipif(GPU == "card", reason="takes long where every operation goes through Python")
no_forward = pytest.mark.skipif(GPU == "card", reason="no derivatives in forward mode there")


def ids(n=4, T=12, seed=0): return torch.randint(3, V, (n, T), generator=torch.Generator().manual_seed(seed))


def numbers(x, at=""):
    "Everything that can be compared in a result, by where it stands."
    if torch.is_tensor(x): yield at, x.detach().double().cpu() if not x.is_complex() else x
    elif isinstance(x, (bool, int, float)) and not isinstance(x, bool): yield at, torch.tensor(float(x), dtype=torch.float64)
    elif isinstance(x, Mapping): yield from (y for k, v in x.items() for y in numbers(v, f"{at}/{k}"))
    elif isinstance(x, (list, tuple)): yield from (y for k, v in enumerate(x) for y in numbers(v, f"{at}/{k}"))
    elif dataclasses.is_dataclass(x): yield from (y for f in dataclasses.fields(x) if not f.name.startswith("_") for y in numbers(getattr(x, f.name), f"{at}.{f.name}"))
    elif hasattr(x, "rows") and isinstance(x.rows, list): yield from numbers(x.rows, at)


def same(got, want, tol, floor=0.): # floor: what is equal as an absolute number
    a, b = dict(numbers(got)), dict(numbers(want))
    assert a and a.keys() == b.keys(), a.keys() ^ b.keys()
    for k in a:
        assert a[k].shape == b[k].shape, k
        size = float(b[k][b[k].isfinite()].abs().max()) if b[k].isfinite().any() else 0.
        torch.testing.assert_close(a[k], b[k], rtol=tol, atol=max(tol * size, floor), equal_nan=True, msg=lambda m: f"{k}: {m}")


def both(make, f, tol):
    "f on the model here and there: equal, and no weight moved or changed."
    here, there = make(), make().to(GPU)
    before = fingerprints(there, find_targets(there, "all"))
    assert before == fingerprints(here, find_targets(here, "all"))
    got, want = f(there), f(here)
    assert fingerprints(there, find_targets(there, "all")) == before and all(p.device.type == GPU for p in there.parameters())
    same(got, want, tol)


# ---- tiny models in float64: every class, every kind of label

@pytest.mark.parametrize("name", [n if n in ("llama", "gpt2") else pytest.param(n, marks=slow) for n in LMS])
@pytest.mark.parametrize("kw", [dict(), dict(labels="data"), dict(mc_samples=3), dict(sums="cpu")], ids=str)
def test_factors(name, kw): both(lambda: tiny(name), lambda m: collect(m, [ids(), ids(3, 9, 1)], "all", **kw, **quiet), 1e-8 if name in ("gpt2", "opt") else 1e-5)


def test_factors_with_every_label(): both(lambda: tiny("llama"), lambda m: collect(m, [ids(2, 4)], "all", labels="exact", **quiet), 1e-5)


@pytest.mark.parametrize("tokens", ["cls", "all"])
def test_factors_of_images(tokens): both(lambda: tiny("vit"), lambda m: collect(m, [tiny_inputs("vit", 5)], "all", tokens=tokens, **quiet), 1e-8)


@pytest.mark.parametrize("name", MOES)
def test_factors_of_experts(name): both(lambda: tiny(name), lambda m: collect(m, [ids(), ids(3, 9, 1)], "experts", **quiet), 1e-5)


def basis(m, **kw): return collect(m, [ids(6, 20)], "all", labels="data", **kw, **quiet).eigen(m, **quiet)


def after(m, edit):
    "The logits under an edit."
    with edit.applied(m), torch.no_grad(): return m(input_ids=ids().to(next(m.parameters()).device)).logits


TINY = dict(
    moments=lambda m: dict(baselines.second_moments(m, basis(m), [ids()], labels="data", **quiet)),
    ekfac=lambda m: dict(baselines.ekfac(m, [ids()], labels="data", **quiet)[1]),
    rows=lambda m: [sharpness.gram(r) for r in sharpness.rows(m, ids(), find_targets(m, "mlp", blocks=[1]), "data", **quiet).values()],
    sharpest=lambda m: [s.value for s in sharpness.sharpest(m, ids(3, 5), find_targets(m, "mlp", blocks=[1]), steps=60, tol=1e-12, **quiet).values()],
    input_curvature=lambda m: sharpness.input_curvature(m, ids(3), h=1e-5, **quiet),
    fisher_block=lambda m: fidelity.fisher_block(m, [ids(3, 6)], (1, "o")),
    ggn_block=lambda m: fidelity.ggn_block(m, [ids(2, 6)], (1, "o")),
    hessian_block=lambda m: fidelity.hessian_block(m, [ids(2, 6)], (1, "o")),
    off_diagonal=lambda m: fidelity.off_diagonal(m, [ids(9)], basis(m)[1, "o"], labels="data"),
    component_curvature=lambda m: fidelity.component_curvature(m, [ids(9)], basis(m)[1, "o"], [(0, 0), (1, 2), (3, 3)], labels="data"),
    fidelity=lambda m: fidelity.fidelity(m, [ids(9, 6)], (1, "o"), components=6, labels="data"),
    fidelity_whole=lambda m: fidelity.fidelity(m, [ids(9, 6)], (1, "o"), labels="data"),
    spectrum=lambda m: [s.values for s in spectra.weight_spectrum(m).values()],
    spectral_row=spectra.spectral_row,
    svd=lambda m: after(m, baselines.svd(m, keep_rank_fraction=.5)),
    magnitude=lambda m: after(m, baselines.magnitude(m, fraction=.5)),
    keep=lambda m: after(m, basis(m).keep(rho=.8)),
    obd=lambda m: after(m, baselines.keep_by(basis(m), "obd", fraction=.5)),
    random=lambda m: after(m, baselines.random_directions(basis(m).keep(rho=.8), model=m)),
    noise=lambda m: after(m, baselines.matched_noise(basis(m).keep(rho=.8), m, seed=1)),
    identity=lambda m: after(m, baselines.identity_basis(collect(m, [ids()], labels="data", **quiet), m).keep(rho=.8)),
    ascent=lambda m: after(m, baselines.gradient_ascent(m, ids(4), ids(4, seed=1), lr=1e-3, epochs=2, **quiet)),
    npo=lambda m: after(m, baselines.npo(m, ids(4), ids(4, seed=1), lr=1e-3, epochs=2, **quiet)),
    bsn=lambda m: after(m, baselines.bsn(m, ids(4), ids(4, seed=1), fraction=.9, epochs=2, **quiet)),
    inputs=lambda m: reading.inputs(m, find_targets(m, "mlp")[0], Windows(ids()), **quiet),
    forecast=lambda m: {k: getattr(budget.forecast(m, (4, 12)), k) for k in ("factors", "flops")},
)


@pytest.mark.parametrize("what", [pytest.param(k, marks=no_forward) if k in ("ggn_block", "component_curvature", "fidelity", "fidelity_whole") else k for k in TINY])
def test_tiny(what): both(lambda: tiny("gpt2"), TINY[what], 1e-4 if what == "input_curvature" else 1e-6)       # a difference of gradients, divided by h


# ---- the playground in float32: what is measured before and after an edit

@pytest.fixture(scope="module")
def pond():
    from curvtools.zoo import playground
    here, there = playground(), playground(); there.model.to(GPU)
    return here, there


def cut(pg): return collect(pg.model, pg.clean[:128], labels="data", **pg.plan["collect"], **quiet).eigen(pg.model, **quiet)
def some(pg, n=12): return pg.memorized.where(min_tier=64)[:n]


POND = dict(
    recite=lambda pg: recite.recite(pg.model, some(pg), **quiet),
    sampled=lambda pg: recite.recite(pg.model, some(pg), temperature=.8, generate=False, **quiet),
    mine=lambda pg: len(recite.mine(pg.model, [p.ids for p in some(pg)], prefix=16, suffix=16, **quiet)),
    perplexity=lambda pg: [float(evaluate.perplexity(pg.model, pg.heldout[:16], paper=p, **quiet)) for p in (False, True)],
    ndcg=lambda pg: float(evaluate.ndcg(pg.model, pg.heldout[:8], evaluate.top_tokens(pg.model, pg.heldout[:8], **quiet), **quiet)),
    bands=lambda pg: evaluate.bands(pg.model, cut(pg), some(pg), pg.unseen[:8], bases=("curvature", "singular"), **quiet),
    memory_score=lambda pg: evaluate.memory_score(pg.model, cut(pg), some(pg), **quiet),
    position_stress=lambda pg: evaluate.position_stress(pg.model, some(pg, 4), extend=(1,), shorten=(2,), offset=(4,), filler=pg.clean.ids[:4].long(), **quiet),
    relearn=lambda pg: evaluate.relearn(pg.model, some(pg, 8), steps=(0, 5), **quiet),
    respond=lambda pg: tasks.respond(pg.model, pg.tokenizer, pg.tasks[::100], **quiet),
    answers=lambda pg: tasks.answers(pg.model, pg.tokenizer, pg.tasks[::100], **quiet),
    readout=lambda pg: {k: m.value for k, m in sweep.readout(pg.model, some(pg), pg.heldout[:8], pg.tasks[::200], pg.tokenizer, **quiet).measures().items()},
    edited=lambda pg: edited(pg),
    coupling=lambda pg: sweep.coupling(pg.model, cut(pg), some(pg, 6), pg.unseen[:6], draws=1, **quiet),
)


def edited(pg):
    with pg.edit(cut(pg)).applied(pg.model): return [float(evaluate.perplexity(pg.model, pg.heldout[:16], **quiet)), recite.recite(pg.model, some(pg), generate=False, **quiet)]


@pytest.mark.parametrize("what", [pytest.param(k, marks=slow) if k in ("bands", "memory_score", "edited", "coupling", "readout", "relearn") else k for k in POND])
def test_playground(what, pond):
    here, there = pond
    before = fingerprints(there.model, find_targets(there.model, "all"))
    same(POND[what](there), POND[what](here), .1 if what == "relearn" else 2e-3, 1e-4)     # margins of logits may be ties; Adam's first steps take the sign of a gradient that may be all rounding
    assert fingerprints(there.model, find_targets(there.model, "all")) == before


@slow
def test_image_playground():
    from curvtools.zoo import playground
    here, there = playground("vit"), playground("vit"); there.model.to(GPU)
    def f(pg):
        b = collect(pg.model, vision.image_batches(vision.pixels(pg.images[:200])), labels="exact", tokens="all", **quiet).eigen(pg.model, **quiet)
        scores = lambda: {k: getattr(pg.scores(), k).value for k in ("memorised", "recovered", "clean", "validation")}
        with b.keep(rho=.8).applied(pg.model): cut = scores()
        return [scores(), cut, vision.image_shares(pg.model, b, vision.pixels(pg.images[:50]))]
    same(f(there), f(here), 1e-2)                                            # an image at the border of two classes may fall to the other side


def test_the_lab():
    "Clicks on a model that lives there: the same measurements, and undone to the byte."
    from test_widgets import parts, spec

    from curvtools.widgets import Session
    def f(device):
        P = parts(); P["model"].to(device); s = Session(**P).load()
        before = s.checksum(); seen = s.apply(spec(.6)).seen; s.undo()
        assert s.checksum() == before
        return {k: m.value for k, m in seen.measures().items()}
    same(f(GPU), f("cpu"), 1e-3)


# ---- what only a GPU does

def middle(layers=6, **kw):
    from transformers import LlamaConfig, LlamaForCausalLM
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**dict(vocab_size=32000, hidden_size=1024, intermediate_size=4096, num_hidden_layers=layers, num_attention_heads=8, max_position_embeddings=512) | kw)).to(GPU).eval()


def words(n, T, top=32000): return torch.randint(0, top, (n, T), generator=torch.Generator().manual_seed(0))
def off(a, b): return float((a - b).norm() / b.norm())


@only
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_products_in_a_lower_precision_are_summed_in_float32(dtype, monkeypatch):
    "4,096 rows of 16-bit numbers against float64, 1e-5; without a copy of the rows in float32."
    x = torch.randn(4096, 512, device=GPU).to(dtype); s, calls, real = OuterSum(512, device=GPU), [], torch.addmm
    monkeypatch.setattr(torch, "addmm", lambda *a, **kw: calls.append(kw) or real(*a, **kw))
    s.add(x)
    assert off(s.full().double(), x.double().T @ x.double()) < 1e-5 and len(calls) == 4 and all(k["out_dtype"] == torch.float32 for k in calls)


@only
def test_a_model_on_two_devices():
    "The last block on the CPU, the rest and the head on the GPU."
    accelerate = pytest.importorskip("accelerate")
    model = accelerate.dispatch_model(tiny("llama"), {"model.embed_tokens": 0, "model.rotary_emb": 0, "model.layers.0": 0, "model.layers.1": 0, "model.layers.2": "cpu", "model.norm": 0, "lm_head": 0})
    same(collect(model, [ids()], "all", **quiet), collect(tiny("llama"), [ids()], "all", **quiet), 1e-5)


@only
def test_factors_in_bfloat16():
    "Medians within 5 % of float32, with the labels of the data."
    model, b = middle(), [words(4, 129)]
    want = collect(model, b, labels="data", **quiet); got = collect(model.bfloat16(), b, labels="data", **quiet)
    for side in "AG": assert sorted(off(getattr(got[n], side), getattr(want[n], side)) for n in want)[len(want) // 2] < .05, side
    assert all(f.A.dtype == f.G.dtype == torch.float32 for f in got.values())


@only
@pytest.mark.parametrize("name", MOES)
def test_grouped_products_in_bfloat16(name):
    "The grouped product of the card against a loop over segments, both in bfloat16: 2 %, in the factors too."
    from curvtools import experts
    m = tiny(name, torch.bfloat16).to(GPU); f = lambda: collect(m, [ids(), ids(3, 9, 1)], "experts", labels="data", **quiet)
    got, fast = f(), experts._fast
    experts._fast = lambda *a: False
    try: want = f()
    finally: experts._fast = fast
    assert [f.count for f in got.values()] == [f.count for f in want.values()]
    assert all(off(got[n].A, want[n].A) < .02 for n in want if want[n].count) and sorted(off(got[n].G, want[n].G) for n in want if want[n].trace)[len(want) // 2] < .02


@only
def test_batches_are_halved_when_the_card_is_full():
    "A card that is let have little: the same factors as with all of it, from the same positions."
    model = middle(2); b = [words(64, 257)]
    want = collect(model, b, labels="data", **quiet)
    torch.cuda.empty_cache(); most = torch.cuda.memory_allocated() + 2**30; total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(most / total)
    try: got = collect(model, b, labels="data", **quiet)
    finally: torch.cuda.set_per_process_memory_fraction(1.)
    assert all(got[n].count == want[n].count == 64 * 256 and off(got[n].A, want[n].A) < 1e-4 and off(got[n].G, want[n].G) < 1e-4 for n in want)


@only
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_forecast(dtype):
    "Within 10 % of the most the card held, beyond the model; cuBLAS keeps up to 64 MB for itself."
    model = middle().to(dtype); b = [words(16, 257)]
    held = torch.cuda.memory_allocated(); torch.cuda.reset_peak_memory_stats()
    collect(model, b, **quiet)
    got, want = torch.cuda.max_memory_allocated() - held, budget.forecast(model, (16, 257)).peak
    assert abs(got - want) < .1 * got + 2**26, (got, want)


@only
def test_an_interrupted_run_goes_on(tmp_path):
    model, b = middle(2), [words(4, 65, 32000 - i) for i in range(6)]
    def broken():
        yield from b[:4]
        raise KeyboardInterrupt
    want = collect(model, b, **quiet)
    with pytest.raises(KeyboardInterrupt): collect(model, broken(), snapshot=tmp_path/"s", every=256, **quiet)
    got = collect(model, b, snapshot=tmp_path/"s", every=256, **quiet)
    assert all(off(got[n].G, want[n].G) < 1e-6 and off(got[n].A, want[n].A) < 1e-6 for n in want)


@only
def test_eigenvectors_in_float32():
    "Found there in float32 and checked, beside float64: the same pairs to 1 in 1,000 kept."
    f = collect(middle(1), [words(16, 257)], projections=["up"], **quiet)
    a, b = f.eigen(dtype=torch.float32, **quiet), f.eigen(**quiet)
    for n in a:
        assert a[n].residual_A < 1e-5 and a[n].residual_G < 1e-5
        x, y = (s.keep(rho=.8).plan[n].pairs.dense() for s in (a, b))
        assert (x != y).sum() < 1e-3 * x.numel()


@only
def test_one_process_under_nccl(tmp_path):
    "A model cut up by FSDP2 on the card, sums added up by NCCL."
    import subprocess
    import sys
    script = tmp_path/"one.py"
    script.write_text("""
import sys; sys.path.insert(0, sys.argv[1])
import torch, torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from curvtools.kfac import collect
from curvtools.scale import Peers, _add_up
from tiny import tiny
dist.init_process_group("cpu:gloo,cuda:nccl"); torch.cuda.set_device(0)
ids = torch.randint(3, 37, (4, 12), generator=torch.Generator().manual_seed(0))
m = tiny("llama").cuda(); want = collect(m, [ids], "all", progress=False)
for block in m.model.layers: fully_shard(block)
got = collect(fully_shard(m), [ids], "all", progress=False)
x = torch.ones(3, device="cuda"); _add_up(x)
assert all((got[n].A - want[n].A).abs().max() < 1e-9 and (got[n].G - want[n].G).abs().max() < 1e-9 for n in want) and x.tolist() == [1, 1, 1]
dist.destroy_process_group(); print("equal")
""")
    r = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1", str(script), os.path.dirname(__file__)], capture_output=True, text=True, timeout=300)
    assert "equal" in r.stdout, r.stderr[-3000:]
