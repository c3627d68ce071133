"""What is to be measured on a GPU: `python -m benchmarks.gpu` (an H200, or any other that is named in the output). NO GPU FIGURE HAS BEEN MEASURED YET.

The whole test suite there once; tokens/s and share of the peak of `collect` on a random model of the shape of OLMo-2-7B, with the targets of the paper
(gate, up and down of blocks 23 to 25 together), in bfloat16 with sums in float32; the same with more labels a position; products of strips of a covariance;
and eigh at 4096 and 11008 in float32 and float64. `--tiny --device cpu` runs the same lines on a small model and any processor; a test does."""
import argparse
import json
import platform
import subprocess
import sys
import time
import warnings
from pathlib import Path

import torch

from benchmarks.run import ROOT, gemm_rate, seconds, spread, versions
from curvtools import kfac
from curvtools.budget import forecast
from curvtools.targets import find_targets

BLOCKS, PROJECTIONS = [23, 24, 25], ["gate", "up", "down"]
PEAK = dict(H200=989e12, H100=989e12, A100=312e12)                            # bfloat16 without sparsity, from the data sheets


def model_7b(device, tiny=False):
    "A Llama of the shape of OLMo-2-7B with random weights, made on the device in bfloat16."
    from transformers import LlamaConfig, LlamaForCausalLM
    shape = dict(vocab_size=512, hidden_size=64, intermediate_size=160, num_hidden_layers=26, num_attention_heads=4) if tiny else dict(vocab_size=100352, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32)
    torch.manual_seed(0)
    with torch.device(device): model = LlamaForCausalLM(LlamaConfig(**shape, max_position_embeddings=4096, dtype=torch.bfloat16)).to(torch.bfloat16)
    return model.eval()


def peak_rate(device):
    "The data sheet's, where the card is known; else the product that was measured."
    name = torch.cuda.get_device_name() if device == "cuda" else platform.machine()
    return next((v for k, v in PEAK.items() if k in name), None), gemm_rate(torch.bfloat16, 256 if device == "cpu" else 8192, device=device)


def collecting(model, shape, rounds, device, samples=(1, 2)):
    "tokens/s, share of the peak, bytes: the first pass warms up."
    sheet, product = peak_rate(device)
    ids = torch.randint(0, model.config.vocab_size, shape, generator=torch.Generator().manual_seed(0))
    targets, rows = find_targets(model, "mlp", BLOCKS, PROJECTIONS), {}
    for k in samples:
        once = lambda: kfac.collect(model, [ids] * 2, targets, mc_samples=k, progress=False)
        once()
        if device == "cuda": torch.cuda.reset_peak_memory_stats(); held = torch.cuda.memory_allocated()
        t = spread([seconds(once)[0] for _ in range(rounds)])
        flops, n = 2 * forecast(model, shape, targets, mc_samples=k).flops, 2 * ids[:, 1:].numel()
        rate = flops / t["median"]
        rows[k] = dict(seconds=t, tokens_per_s=n / t["median"], flops=flops, share_of_product=rate / product, share_of_sheet=sheet and rate / sheet, hours_20M=20e6 * t["median"] / n / 3600,
                       peak=torch.cuda.max_memory_allocated() - held if device == "cuda" else None)
    return rows


def strips(sizes, rows, device, rounds=5):
    "One covariance in 1, 2, 4 and 8 strips, and whether a product of bfloat16 into float32 is taken: seconds, error against float64."
    out = {}
    for d in sizes:
        x = torch.randn(rows, d, device=device).bfloat16(); want = x.double().T @ x.double()
        for s in (1, 2, 4, 8):
            def f(total):
                for i in range(0, d, -(-d // s)): kfac._product(total[i:i - (-d // s), i:], x[:, i:i - (-d // s)].T, x[:, i:])
                return total
            new = lambda: torch.zeros(d, d, device=device)
            got = f(new())
            out[f"{d}/{s}"] = dict(seconds=spread([seconds(lambda: f(got.clone()))[0] for _ in range(rounds)]), error=((got - want).triu().norm() / want.triu().norm()).item())
    return out


def ladder(sizes, device):
    "eigh of a covariance of falling spectrum: seconds and residual by precision; the error's name where the device refuses."
    out = {}
    for d in sizes:
        x = torch.randn(2 * d, d, device=device) * torch.arange(1, d + 1, device=device) ** -.5
        for dtype in (torch.float32, torch.float64):
            M = (x.T @ x / len(x)).to(dtype)
            try: t, (w, Q) = seconds(lambda: torch.linalg.eigh(M)); out[f"{d}/{str(dtype)[6:]}"] = dict(seconds=t, residual=((Q.T @ M @ Q - w.diag()).norm() / M.norm()).item())
            except RuntimeError as e: out[f"{d}/{str(dtype)[6:]}"] = dict(error=type(e).__name__ + ": " + str(e)[:200])
            if device == "cuda": torch.cuda.empty_cache()
    return out


def suite():
    "The tests, on the machine with the GPU."
    r = subprocess.run([sys.executable, "-m", "pytest", "-q"], cwd=ROOT, capture_output=True, text=True)
    return dict(returncode=r.returncode, last=r.stdout.strip().splitlines()[-1:])


def main(argv=None):
    warnings.filterwarnings("ignore")
    p = argparse.ArgumentParser("python -m benchmarks.gpu", description=__doc__.splitlines()[0])
    p.add_argument("--device", default="cuda"); p.add_argument("--tiny", action="store_true"); p.add_argument("--no-suite", action="store_true")
    p.add_argument("--rounds", type=int, default=3); p.add_argument("--out", type=Path, default=ROOT/"benchmarks"/"gpu.json")
    a = p.parse_args(argv)
    if a.device == "cuda" and not torch.cuda.is_available(): raise SystemExit("there is no GPU here; --tiny --device cpu runs the same lines on a small model")
    sizes = [64, 160] if a.tiny else [4096, 11008]
    r = dict(device=torch.cuda.get_device_name() if a.device == "cuda" else a.device, tiny=a.tiny, versions=versions("torch", "transformers"), date=time.strftime("%Y-%m-%d"))
    r["collect"] = collecting(model_7b(a.device, a.tiny), (2, 33) if a.tiny else (16, 513), 1 if a.tiny else a.rounds, a.device)
    r["strips"], r["eigh"] = strips(sizes, 128 if a.tiny else 8192, a.device), ladder(sizes, a.device)
    r["tests"] = None if a.no_suite else suite()
    a.out.write_text(json.dumps(r, indent=1) + "\n")
    print(f"{r['device']}{' (tiny model)' if a.tiny else ''}")
    for k, x in r["collect"].items(): print(f"{k} label{'s' * (k > 1)} a position: {x['tokens_per_s']:,.0f} tokens/s, {x['flops']/x['seconds']['median']/1e12:.3g} TFLOP/s, {x['share_of_product']:.0%} of a measured product" + (f", {x['share_of_sheet']:.0%} of the data sheet" if x["share_of_sheet"] else "") + f"; 20 M tokens in {x['hours_20M']:.2f} h")
    for k, x in r["strips"].items(): print(f"x^T x, size/strips {k}: {x['seconds']['median']*1e3:.2f} ms, error {x['error']:.0e}")
    for k, x in r["eigh"].items(): print(f"eigh {k}: " + (f"{x['seconds']:.2f} s, residual {x['residual']:.0e}" if "seconds" in x else x["error"]))
    if r["tests"]: print("tests:", *r["tests"]["last"])


if __name__ == "__main__": main()
