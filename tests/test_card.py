"The tests of a GPU on a device that is none (card.py), in a process of its own: does everything stay on its model's device, and do the numbers come out?"
import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
ENV = dict(os.environ, CURVTOOLS_GPU="card", PYTHONPATH=os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")]))


def test_devices_do_not_mix():
    r = subprocess.run([sys.executable, "-m", "pytest", "-n", "0", "-p", "no:cacheprovider", "-rf", "--tb=short", "test_gpu.py"], cwd=HERE, env=ENV, capture_output=True, text=True, timeout=1200)
    assert r.returncode == 0 and " passed" in r.stdout, r.stdout[-8000:] + r.stderr[-2000:]


def test_the_device_is_as_strict_as_a_gpu():
    "A product, a sum in place, `cat` and NumPy refuse what is elsewhere; a number goes anywhere; an index may be on the CPU."
    code = """
import card, torch
from pytest import raises
x, y = torch.randn(3, 4, device="card"), torch.randn(4, 3)
for f in (lambda: x @ y, lambda: x.add_(y.T), lambda: torch.cat([x, y.T]), lambda: y.index_add_(0, torch.tensor([0]), x[:1, :3])):
    with raises(RuntimeError, match="same device"): f()
with raises(Exception): x.numpy()
assert (x * torch.tensor(2.)).device.type == x[torch.tensor([0])].device.type == "card" and (x.cpu() @ y).device.type == "cpu"
m = torch.nn.Linear(4, 2).to("card"); m(x).sum().backward()
assert m.weight.grad.device.type == "card" and torch.allclose(m.weight.grad.cpu(), x.cpu().sum(0).expand(2, 4))
"""
    r = subprocess.run([sys.executable, "-c", code], env=ENV, capture_output=True, text=True)
    assert r.returncode == 0, r.stderr[-2000:]
