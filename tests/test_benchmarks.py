"""The benchmark in its smallest form: all implementations give the same factors, and the table says what it should. No time is tested: it means nothing on a shared machine."""
import json
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
if not (ROOT/"benchmarks").is_dir(): pytest.skip("benchmarks are not part of the wheel", allow_module_level=True)
sys.path.insert(0, str(ROOT))
from benchmarks import gpu, peers, run  # noqa: E402


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    "As the command leaves them."
    out = tmp_path_factory.mktemp("bench")/"results.json"
    run.main(["--models", "playground", "--tokens", "256", "--rounds", "1", "--out", str(out)])
    return json.loads(out.read_text())


def test_the_table(results):
    r, = results["models"]
    assert set(r["rows"]) == set(r["agree"]) == set(peers.available()) >= {"curvtools", "textbook"}
    for row in r["rows"].values(): assert {"flops", "peak", "seconds", "tokens_per_s", "share", "ratio"} <= set(row) and row["flops"] > 0 < row["peak"]
    assert set(results["road"]["playground"]) >= {"eigen, float64", "eigen, float32", "mask at a rho", "apply and undo", "strict, one pass", "strict, 48 steps"}
    assert results["machine"]["gemm_float32"] > 0 and results["machine"]["versions"]["torch"]
    text = run.table(results)
    assert all(k in text for k in r["rows"]) and len({len(l) for l in text.splitlines() if "e-" in l and " to " in l}) == 1, "columns are aligned"


def test_the_same_numbers(results):
    "A to 1e-5 and G to 1e-4 of its norm, in float32; a model in bfloat16 within 5 %."
    r, = results["models"]
    for name, e in r["agree"].items(): assert e["A"] < 1e-5 and e["G"] < 1e-4, (name, e)
    assert r["bfloat16"]["A"] < .05 and r["bfloat16"]["G"] < .05, r["bfloat16"]


def test_fewer_flops_and_less_memory_than_the_others(results):
    rows = dict(results["models"][0]["rows"]); own = rows.pop("curvtools")
    for name, r in rows.items(): assert own["flops"] < r["flops"] and own["peak"] < r["peak"], (name, own, r)


def test_peers_leave_the_model_alone():
    from curvtools.targets import find_targets, fingerprint
    from curvtools.zoo import playground
    model = playground().model.train()
    t = find_targets(model, "mlp", blocks=[-1]); ids = torch.randint(0, model.config.vocab_size, (2, 17))
    names, prints = [n for n, _ in model.named_modules()], [fingerprint(model, x) for x in t]
    for name, f in peers.available().items():
        f(model, [ids], t)
        assert model.training and all(p.requires_grad and p.grad is None for p in model.parameters()), name
        assert [n for n, _ in model.named_modules()] == names and [fingerprint(model, x) for x in t] == prints, name
        assert not any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in model.modules()), name


def test_the_script_for_a_gpu_runs_here(tmp_path):
    "Every line of it but the device, in its tiny mode."
    out = tmp_path/"gpu.json"
    gpu.main(["--tiny", "--device", "cpu", "--parts", "collect", "compiled", "beside", "--out", str(out)])
    gpu.main(["--tiny", "--device", "cpu", "--parts", "strips", "eigh", "--out", str(out)])
    r = json.loads(out.read_text())
    assert r["device"] == "cpu" and r["collect"] and r["compiled"] and r["beside"] and r["eigh"] and r["strips"] and "tests" not in r


def test_the_suite_tells_what_failed(tmp_path):
    "And the log holds every outcome."
    (tmp_path/"test_one.py").write_text("def test_right(): pass\ndef test_wrong(): assert 0\n")
    r = gpu.suite(tmp_path/"log", "-n0", "--rootdir", str(tmp_path), str(tmp_path/"test_one.py"))
    assert r["returncodes"] == [1] and len(r["bad"]) == 1 and "test_wrong" in r["bad"][0] and "1 failed, 1 passed" in r["last"][-1]
    assert "test_right PASSED" in (log := (tmp_path/"log").read_text()) and "test_wrong FAILED" in log


def test_tokens_for_the_same_edit(tmp_path, monkeypatch):
    "The study in small: rows from few tokens to many, the sums of an interrupted run taken up, the model as it was."
    from tiny import V, tiny

    from benchmarks import convergence
    monkeypatch.setattr(convergence, "LENGTH", 16)
    model, ids = tiny("llama", torch.float32), torch.randint(3, V, (16, 17), generator=torch.Generator().manual_seed(0))
    before = {n: p.clone() for n, p in model.named_parameters()}
    do = lambda data: list(convergence.study(model, data.split(2), ids[:4].split(2), tmp_path, .5, 64, blocks=[1]))[-1]["rows"]
    first, rows = do(ids[:8]), do(ids)
    assert [r["tokens"] for r in rows] == [64, 128, 256] and [r["tokens"] for r in first] == [64, 128]
    assert abs(rows[-1]["cosine"] - 1) < 1e-6 and all(0 < r["cosine"] < 1 for r in rows[:-1]) and len(rows[-1]["random"]) == 3
    assert all(lo <= v <= hi for r in rows for v, lo, hi in [r["price"]]) and rows[0]["agreement"] == first[0]["agreement"]
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
