"""The forecast against what is then measured: FLOPs within 2 %, factors to the byte, the peak of the process within 10 %.

For the last, glibc must give freed memory back at once (it may keep tens of MB otherwise), so the measurement is a process of its own."""
import os
import subprocess
import sys
import textwrap

import pytest
import torch
from test_flops import models
from tiny import V, tiny, tiny_inputs

from curvtools.budget import _flops, forecast
from curvtools.kfac import Forecast, available_memory, collect

TESTS = os.path.dirname(os.path.abspath(__file__))


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("select,block", [("mlp", 3), ("all", 0)])
def test_flops_and_factors(name, select, block):
    model, ids = models()[name], torch.randint(0, 512, (8, 129), generator=torch.Generator().manual_seed(0))
    before = [p.detach().clone() for p in model.parameters()], [p.requires_grad for p in model.parameters()]
    f = forecast(model, (8, 129), select, blocks=[block])
    with _flops() as counted: got = collect(model, [ids], select, blocks=[block], progress=False)
    assert abs(f.flops / counted.get_total_flops() - 1) < .02
    assert f.factors == sum({m.data_ptr(): m.nbytes for x in got.values() for m in (x.A, x.G)}.values())
    assert all(map(torch.equal, before[0], model.parameters())) and before[1] == [p.requires_grad for p in model.parameters()]


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt_neox", "opt", "vit"])
def test_other_models(name):
    model, x = tiny(name, torch.float32), tiny_inputs(name, 24 if name == "vit" else 4, 20, dtype=torch.float32)
    f = forecast(model, [x], "all"); shape = tuple(next(iter(x.values())).shape)
    with _flops() as counted: collect(model, [x], "all", progress=False)
    assert .8 < f.flops / counted.get_total_flops() < 1.02                      # so small that the look at the wiring counts
    assert f == forecast(model, shape, "all") == forecast(model, [x, {k: v[:2] for k, v in x.items()}], "all")


def test_a_model_without_weights():
    import transformers as tf
    real = models()["llama"]
    with torch.device("meta"): meta = tf.LlamaForCausalLM(real.config)
    assert forecast(meta, (4, 65), "all") == forecast(real, (4, 65), "all")
    assert forecast(meta, (8, 65)).flops == pytest.approx(2 * forecast(meta, (4, 65)).flops, rel=1e-5)   # positions are rotated once for all rows


PEAK = """
    import gc, sys, torch
    from transformers import LlamaConfig, LlamaForCausalLM
    from curvtools.budget import forecast
    from curvtools.kfac import collect
    B, chunk = map(int, sys.argv[1:])
    model = LlamaForCausalLM(LlamaConfig(vocab_size=8192, hidden_size=512, intermediate_size=1408, num_hidden_layers=4, num_attention_heads=8, max_position_embeddings=512)).eval()
    said = forecast(model, (B, 257), chunk=chunk).peak
    collect(model, [torch.randint(0, 8192, (1, 5))], progress=False); gc.collect()                # everything is loaded now
    stat = lambda key: int(next(l for l in open("/proc/self/status") if l.startswith(key)).split()[1]) * 1024
    base = stat("VmRSS"); open("/proc/self/clear_refs", "w").write("5")
    collect(model, [torch.randint(0, 8192, (B, 257))], progress=False, chunk=chunk)
    print(said, stat("VmHWM") - base)
"""


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux")
@pytest.mark.parametrize("batch,chunk", [(4, 256), (4, 2048)])
def test_peak_memory(batch, chunk):
    r = subprocess.run([sys.executable, "-c", textwrap.dedent(PEAK), str(batch), str(chunk)], capture_output=True, text=True, env=dict(os.environ, MALLOC_MMAP_THRESHOLD_="262144", OMP_NUM_THREADS="1", PYTHONPATH=os.path.dirname(TESTS)))
    assert r.returncode == 0, r.stderr[-2000:]
    said, measured = map(int, r.stdout.split()[-2:])
    print(f"forecast {said/2**20:.1f} MB, measured {measured/2**20:.1f} MB")
    assert abs(said / measured - 1) < .1, (said, measured)


def test_what_cannot_fit(monkeypatch):
    import curvtools.kfac as kfac
    model, ids = tiny("llama"), torch.randint(3, V, (4, 20))
    for big, knob in (((9, 1, 1), "blocks="), ((1, 9, 1), "windows smaller"), ((1, 1, 9), "chunk=")):
        with pytest.raises(MemoryError, match=knob): Forecast(*big, 1).check(10)
        Forecast(*big, 1).check(11); Forecast(*big, 1).check(None)
    assert available_memory("cpu") is None or available_memory("cpu") > 2**20
    free = []
    monkeypatch.setattr(kfac, "available_memory", lambda device: free[0])
    free[:] = [2**17]; collect(model, [ids], progress=False)                     # the batch does not fit, one window does
    free[:] = [2**14]
    with pytest.raises(MemoryError, match="windows smaller"): collect(model, [ids], progress=False)


def test_bad_forecasts():
    model = tiny("llama")
    for bad, error, match in (((4, 1), ValueError, "two tokens"), ((4,), ValueError, "shape"), (iter([torch.ones(1, 4)]), TypeError, "no stream")):
        with pytest.raises(error, match=match): forecast(model, bad)
    with pytest.raises(ValueError, match="exact"): forecast(model, (4, 9), labels="exact")
    with pytest.raises(ValueError, match="mlp"): forecast(model, (4, 9), "mpl")
