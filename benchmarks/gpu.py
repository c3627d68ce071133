"""What is to be measured on a GPU: `python -m benchmarks.gpu` (an H200, or any other that is named in the output). What was measured is in gpu.json.

The whole test suite there once; tokens/s and share of the peak of `collect` on a random model of the shape of OLMo-2-7B, with the targets of the paper
(gate, up and down of blocks 23 to 25 together), in bfloat16 with sums in float32; the same with more labels a position; products of strips of a covariance;
this library beside the others in float32, and in bfloat16, on two smaller models; and eigh at 4096 and 11008 in float32 and float64. `--tiny --device cpu` runs the same lines on a small model and any processor; a test does."""
import argparse
import json
import platform
import re
import subprocess
import sys
import time
import warnings
from pathlib import Path

import torch

from benchmarks import peers
from benchmarks.run import ROOT, SHAPE_1B, agreement, gemm_rate, halfway, llama, seconds, spread, versions
from curvtools import kfac
from curvtools.budget import forecast
from curvtools.targets import find_targets

BLOCKS, PROJECTIONS = [23, 24, 25], ["gate", "up", "down"]
PARTS = ["collect", "beside", "strips", "eigh", "compiled", "tests"]
PEAK = dict(H200=989e12, H100=989e12, A100=312e12)                            # bfloat16 without sparsity, from the data sheets


def model_7b(device, tiny=False):
    "A Llama of the shape of OLMo-2-7B with random weights, made on the device in bfloat16."
    shape = dict(vocab_size=512, hidden_size=64, intermediate_size=160, num_hidden_layers=26, num_attention_heads=4) if tiny else dict(vocab_size=100352, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32)
    return llama(device, torch.bfloat16, **shape, max_position_embeddings=4096)


def peak_rate(device):
    "The data sheet's, where the card is known; else the product that was measured."
    name = torch.cuda.get_device_name() if device == "cuda" else platform.machine()
    return next((v for k, v in PEAK.items() if k in name), None), gemm_rate(torch.bfloat16, 256 if device == "cpu" else 8192, device=device)


def collecting(model, shape, rounds, device, samples=(1, 2), compiled=False):
    "Of the model as it is, with one label a position and with more; or with the blocks beneath the targets compiled."
    ids = torch.randint(0, model.config.vocab_size, shape, generator=torch.Generator().manual_seed(0))
    targets = find_targets(model, "mlp", BLOCKS, PROJECTIONS)
    for block in model.model.layers[:BLOCKS[0]] if compiled else []: block.compile(backend="inductor" if device == "cuda" else "eager")
    return {f"{k} label{'s' * (k > 1)}" + ", blocks beneath compiled" * compiled: passes(model, ids, targets, k, rounds, device, look=k == 1) for k in samples}


def passes(model, ids, targets, k, rounds, device, few=2, many=8, look=False):
    "tokens/s, share of the peak, bytes. A further token, from calls with few and with many batches, as a call costs something once; the first pass warms up."
    (sheet, product), size = peak_rate(device), ids[:, 1:].numel()
    once = lambda n: kfac.collect(model, [ids] * n, targets, mc_samples=k, progress=False)
    once(few)
    if device == "cuda": torch.cuda.reset_peak_memory_stats(); held = torch.cuda.memory_allocated()
    pairs = [(seconds(lambda: once(few))[0], seconds(lambda: once(many))[0]) for _ in range(rounds)]
    a, b = (spread(x) for x in zip(*pairs))
    token = spread([(y - x) / size / (many - few) for x, y in pairs])
    row = dict(few=a, many=b, seconds_a_token=token, once=a["median"] - few * size * token["median"], tokens_per_s=1 / token["median"], hours_20M=20e6 * token["median"] / 3600, peak=torch.cuda.max_memory_allocated() - held if device == "cuda" else None)
    if look: row["profile"] = kernels(lambda: once(many), b["median"], device)
    want = forecast(model, tuple(ids.shape), targets, mc_samples=k); flops = want.flops / size
    return row | dict(flops_a_token=flops, share_of_product=flops / token["median"] / product, share_of_sheet=sheet and flops / token["median"] / sheet, peak_forecast=want.peak)


def kernels(f, took, device, most=12):
    "Share of the device's time by operation, of those that take a hundredth or more; `idle`: of the seconds that f takes otherwise, those in which it did nothing."
    from torch.profiler import ProfilerActivity, profile
    kinds = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device == "cuda")
    with profile(activities=kinds) as p: seconds(f)
    of = lambda e: getattr(e, "self_device_time_total" if device == "cuda" else "self_cpu_time_total")
    each = {e.key: of(e) for e in p.key_averages() if e.key.startswith("aten::") and of(e)}
    busy = sum(each.values())
    return {k.removeprefix("aten::"): v / busy for k, v in sorted(each.items(), key=lambda x: -x[1])[:most] if v > .01 * busy} | dict(idle=max(0., 1 - busy / 1e6 / took))


def beside(how, shape, many, blocks, rounds, device):
    "This library and the others on one model in float32, and this library on the same model in bfloat16, in turn: seconds, time / that of kronfluence (the textbook's where it is not installed), bytes, largest difference of A and G."
    import copy
    model = llama(device, **how); ids = torch.randint(0, model.config.vocab_size, shape, generator=torch.Generator().manual_seed(0)).to(device)
    targets, ways, low = find_targets(model, "mlp", blocks), peers.available(), copy.deepcopy(model).bfloat16()
    agree = agreement(ways, model, [ids[:2, :65]], targets)
    agree["bfloat16"] = halfway(*(peers.curvtools(m, [ids[:2]], targets, "data") for m in (low, model)))
    runs = {k: (lambda f=f: f(model, [ids] * many, targets)) for k, f in ways.items()} | dict(bfloat16=lambda: peers.curvtools(low, [ids] * many, targets))
    times, peak, names = {k: [] for k in runs}, {}, list(runs)
    for r in range(rounds + 1):                                              # the first warms up
        for k in names[r % len(names):] + names[:r % len(names)]:
            if device == "cuda": torch.cuda.empty_cache(); torch.cuda.reset_peak_memory_stats(); held = torch.cuda.memory_allocated()
            t = seconds(runs[k])[0]
            if device == "cuda": peak[k] = torch.cuda.max_memory_allocated() - held
            if r: times[k].append(t)
    base = times["kronfluence" if "kronfluence" in times else "textbook"]
    return {k: dict(seconds=spread(t), faster=spread([b / a for a, b in zip(t, base)]), peak=peak.get(k), positions=many * ids[:, 1:].numel(), **agree[k]) for k, t in times.items()}


SMOL = dict(vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3, tie_word_embeddings=True)      # SmolLM2-135M's
SMALL = dict(vocab_size=512, hidden_size=64, intermediate_size=160, num_hidden_layers=2, num_attention_heads=4)


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
    torch.linalg.eigh(torch.eye(64, device=device))                          # loads the solver
    for d in sizes:
        x = torch.randn(2 * d, d, device=device) * torch.arange(1, d + 1, device=device) ** -.5
        for dtype in (torch.float32, torch.float64):
            M = (x.T @ x / len(x)).to(dtype)
            try: t, (w, Q) = seconds(lambda: torch.linalg.eigh(M)); out[f"{d}/{str(dtype)[6:]}"] = dict(seconds=t, residual=((Q.T @ M @ Q - w.diag()).norm() / M.norm()).item())
            except RuntimeError as e: out[f"{d}/{str(dtype)[6:]}"] = dict(error=type(e).__name__ + ": " + str(e)[:200])
            if device == "cuda": torch.cuda.empty_cache()
    return out


def suite(log, *which):
    "The tests, on the machine with the GPU: those of it first, then all. Every outcome is in `log` as it comes, so that a run that is cut short has said what it found."
    runs = [which] if which else [("tests/test_gpu.py", "tests/test_scale.py", "tests/test_experts.py"), ("tests",)]
    with open(log, "w") as f: codes = [subprocess.run([sys.executable, "-m", "pytest", "-vv", "-rfE", "--tb=short", "-p", "no:cacheprovider", *r], cwd=ROOT, stdout=f, stderr=subprocess.STDOUT).returncode for r in runs]
    said = log.read_text().splitlines()
    return dict(returncodes=codes, last=[x.strip("= ") for x in said if re.search(r"\d+ (passed|failed|error)", x) and " in " in x], bad=sorted({x.split(" - ")[0] for x in said if re.match("(FAILED|ERROR) .*::", x)}))


def main(argv=None):
    warnings.filterwarnings("ignore")
    p = argparse.ArgumentParser("python -m benchmarks.gpu", description=__doc__.splitlines()[0])
    p.add_argument("--device", default="cuda"); p.add_argument("--tiny", action="store_true"); p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--parts", nargs="+", default=PARTS, choices=PARTS, help="the others stay in --out as they are, if it is of the same device")
    p.add_argument("--tests", nargs="*", default=[], help="of the part tests: only these files")
    p.add_argument("--out", type=Path, default=ROOT/"benchmarks"/"gpu.json")
    a = p.parse_args(argv); d, rounds = a.device, 1 if a.tiny else a.rounds
    if d == "cuda" and not torch.cuda.is_available(): raise SystemExit("there is no GPU here; --tiny --device cpu runs the same lines on a small model")
    r = dict(device=torch.cuda.get_device_name() if d == "cuda" else d, tiny=a.tiny, versions=versions("torch", "transformers", "kronfluence", "curvlinops-for-pytorch"), date=time.strftime("%Y-%m-%d"), products=dict(float32=gemm_rate(n=256 if a.tiny else 8192, device=d), bfloat16=peak_rate(d)[1]))
    before = json.loads(a.out.read_text()) if a.out.exists() else {}
    if (before.get("device"), before.get("tiny")) == (r["device"], r["tiny"]): r = before | r
    sizes, shapes = ([64, 160], dict(small=(SMALL, (2, 33), 2, None))) if a.tiny else ([4096, 11008], {"SmolLM2-135M's shape": (SMOL, (64, 257), 6, range(23, 30)), "1.07 thousand million": (SHAPE_1B, (64, 257), 1, [14, 15])})
    seven = lambda **kw: collecting(model_7b(d, a.tiny), (2, 33) if a.tiny else (16, 513), rounds, d, **kw)
    do = dict(collect=seven, compiled=lambda: seven(samples=[1], compiled=True), beside=lambda: {k: beside(*how, rounds, d) for k, how in shapes.items()},
              strips=lambda: strips(sizes, 128 if a.tiny else 8192, d), eigh=lambda: ladder(sizes, d), tests=lambda: suite(a.out.with_suffix(".log"), *a.tests))
    for name in a.parts: r[name] = do[name](); a.out.write_text(json.dumps(r, indent=1) + "\n")      # a later part may fail
    print(report(r))


def report(r):
    "What was measured, in lines."
    lines = [r["device"] + " (tiny model)" * r["tiny"] + f": {r['products']['bfloat16']/1e12:.4g} TFLOP/s in products of bfloat16, {r['products']['float32']/1e12:.3g} of float32"]
    say = lambda ms: f"{ms['median']*1e3:.1f} ms ({ms['min']*1e3:.1f} to {ms['max']*1e3:.1f})"
    for k, x in (r.get("collect", {}) | r.get("compiled", {})).items():
        lines.append(f"{k}: {x['tokens_per_s']:,.0f} tokens/s, {x['flops_a_token']*x['tokens_per_s']/1e12:.3g} TFLOP/s, {x['share_of_product']:.0%} of a measured product" + (f", {x['share_of_sheet']:.0%} of the data sheet" if x["share_of_sheet"] else "") + f"; 20 M tokens in {x['hours_20M']:.2f} h; {x['once']:.2f} s a call")
        if "profile" in x: lines.append("  of the device's time: " + ", ".join(f"{o} {v:.0%}" for o, v in x["profile"].items()))
        if x["peak"]: lines.append(f"  {x['peak']/1e9:.2f} GB at the peak, forecast {x['peak_forecast']/1e9:.2f}")
    for name, rows in r.get("beside", {}).items():
        lines.append(name)
        lines += [f"  {k:<14}{say(x['seconds']):>32}{x['positions']/x['seconds']['median']:>11,.0f} tokens/s{x['faster']['median']:>6.2f} x ({x['faster']['min']:.2f} to {x['faster']['max']:.2f})" + (f"{x['peak']/1e9:>7.2f} GB" if x["peak"] else "") + f", A off {x['A']:.0e}, G {x['G']:.0e}" for k, x in rows.items()]
    lines += [f"x^T x, size/strips {k}: {say(x['seconds'])}, error {x['error']:.0e}" for k, x in r.get("strips", {}).items()]
    lines += [f"eigh {k}: " + (f"{x['seconds']:.2f} s, residual {x['residual']:.0e}" if "seconds" in x else x["error"]) for k, x in r.get("eigh", {}).items()]
    if "tests" in r: lines += [f"tests: {x}" for x in r["tests"]["last"] + r["tests"]["bad"]]
    return "\n".join(lines)


if __name__ == "__main__": main()
