"""How fast, how large: `python -m benchmarks` from the root of the repository. One table on the screen, all numbers in benchmarks/results.json.

`collect` beside kronfluence, curvlinops (where they are installed) and the hooks of a textbook: same model, same matrices, same tokens, same dtype,
labels sampled, one process, in alternating order; medians, fastest and slowest. First all of them must give the same A and G on the labels of the data.
FLOPs are counted by torch and bytes by the storages alive, each in a pass of its own, so they do not depend on how busy the machine is."""
import argparse
import contextlib
import gc
import json
import os
import platform
import statistics
import sys
import time
import warnings
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from benchmarks import peers
from curvtools.budget import _Meter, _flops, _no_sweep
from curvtools.targets import find_targets

ROOT, START = Path(__file__).parents[1], time.perf_counter()


def seconds(f):
    t = time.perf_counter(); out = f()
    if torch.cuda.is_available(): torch.cuda.synchronize()
    return time.perf_counter() - t, out


def say(*words): print(f"{time.perf_counter() - START:6.0f} s ", *words, file=sys.stderr, flush=True)


def spread(xs): return dict(median=statistics.median(xs), min=min(xs), max=max(xs), n=len(xs))


def gemm_rate(dtype=torch.float32, n=1536, tries=7, device="cpu"):
    "FLOP/s of one matrix product of this machine: the best of several, so that a busy moment does not flatter the shares."
    a, b = torch.randn(n, n, device=device).to(dtype), torch.randn(n, n, device=device).to(dtype)
    a @ b
    return 2 * n**3 / min(seconds(lambda: a @ b)[0] for _ in range(tries))


def has_bf16(): return bool(torch.cuda.is_available() or getattr(torch.cpu, "_is_avx512_bf16_supported", bool)() or getattr(torch.cpu, "_is_amx_tile_supported", bool)())


def cpu_name():
    with contextlib.suppress(OSError, StopIteration):
        return next(l.split(":")[1].strip() for l in open("/proc/cpuinfo") if l.startswith("model name"))
    return platform.processor() or platform.machine()


def versions(*names):
    out = {}
    for n in names:
        with contextlib.suppress(PackageNotFoundError): out[n] = version(n)
    return out


def machine():
    return dict(cpu=cpu_name(), cores=os.cpu_count(), threads=torch.get_num_threads(), load=list(os.getloadavg()), capability=torch.backends.cpu.get_cpu_capability(), bf16=has_bf16(),
                gemm_float32=gemm_rate(), gemm_bfloat16=gemm_rate(torch.bfloat16) if has_bf16() else None, python=platform.python_version(),
                versions=versions("torch", "transformers", "kronfluence", "curvlinops-for-pytorch"))


# ---- models: (model, batches of ids, blocks)

def playground(tokens):
    from curvtools.zoo import playground
    pg = playground()
    ids = torch.cat([b["input_ids"] if isinstance(b, dict) else b for b in pg.clean])
    rows = max(2, tokens // (ids.shape[1] - 1))
    return pg.model, list(ids[:rows].split(max(1, rows // 2))), None


def smol(tokens):
    "SmolLM2-135M: the folder named by CURVTOOLS_SMOL, or the one that `smollm` fetches."
    from transformers import AutoModelForCausalLM
    from curvtools.cli import smollm
    model = AutoModelForCausalLM.from_pretrained(os.environ.get("CURVTOOLS_SMOL") or smollm(), dtype=torch.float32).eval()
    return model, random_ids(model, tokens), range(23, 30)


SHAPE_1B = dict(vocab_size=49152, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32, num_key_value_heads=8, max_position_embeddings=2048, tie_word_embeddings=True)


def llama(device="cpu", dtype=torch.float32, **shape):
    "A Llama of random weights; only its shape matters."
    from transformers import LlamaConfig, LlamaForCausalLM
    torch.manual_seed(0)
    with torch.device(device): return LlamaForCausalLM(LlamaConfig(**shape, dtype=dtype)).to(dtype).eval()


def random_1b(tokens):
    "1.07 thousand million weights."
    return llama(**SHAPE_1B), random_ids(None, tokens, 49152), [14, 15]


def random_ids(model, tokens, vocab=None, length=128):
    "Windows of random tokens, in one batch: a pass costs the same whatever they are."
    return [torch.randint(0, vocab or model.config.vocab_size, (max(1, tokens // length), length + 1), generator=torch.Generator().manual_seed(0))]


MODELS = dict(playground=(playground, 4096, 7), smol=(smol, 1024, 5), random_1b=(random_1b, 256, 5))   # how made, tokens, rounds


# ---- collect

def apart(x, y): return ((x.to(y.device) - y).norm() / y.norm()).item()          # kronfluence keeps its factors on the CPU


def halfway(got, want): return {s: statistics.median(apart(got[k][i], want[k][i]) for k in want) for i, s in enumerate("AG")}   # the median over the matrices


def agreement(ways, model, batches, targets):
    "Largest relative difference of A and of G from this library's, with the labels of the data."
    want, out = peers.curvtools(model, batches, targets, "data"), {}
    for name, f in ways.items():
        got = f(model, batches, targets, "data")
        out[name] = dict(A=max(apart(got[k][0], want[k][0]) for k in want), G=max(apart(got[k][1], want[k][1]) for k in want))
    return out


def cost(f, model, batches, targets):
    "FLOPs, and the most bytes beyond the model."
    with _flops() as c: f(model, batches, targets)
    gc.collect()
    with _no_sweep(), _Meter([*model.parameters(), *model.buffers()]) as m: f(model, batches, targets)
    return c.get_total_flops(), m.peak


def compare(name, tokens, rounds, until=float("inf")):
    "All ways on one model."
    make, usual, most = MODELS[name]
    model, batches, blocks = make(tokens or usual)
    targets, ways, rate = find_targets(model, "mlp", blocks=blocks), peers.available(), gemm_rate()
    n = sum(b[:, 1:].numel() for b in batches)
    few = [b[:2, :65] for b in batches[:1]]
    say(f"{name}: do all give the same numbers?")
    out = dict(model=name, parameters=sum(p.numel() for p in model.parameters()), matrices=len(targets), blocks=len({t.block for t in targets}), positions=n, dtype=str(model.dtype), agree=agreement(ways, model, few, targets), rows={})
    for k, f in ways.items():
        say(f"{name}: FLOPs and bytes of {k}")
        flops, peak = cost(f, model, batches, targets)
        out["rows"][k] = dict(flops=flops, peak=peak)
    times, order = {k: [] for k in ways}, list(ways)
    for r in range(rounds or most):
        if r and time.time() > until: break
        say(f"{name}: round {r + 1} of {rounds or most}")
        for k in order[r % len(order):] + order[:r % len(order)]: gc.collect(); times[k].append(seconds(lambda: ways[k](model, batches, targets))[0])
    for k, row in out["rows"].items():
        t = spread(times[k])
        row |= dict(seconds=t, tokens_per_s=n / t["median"], share=row["flops"] / t["median"] / rate)
    own = times["curvtools"]
    for k, row in out["rows"].items(): row["ratio"] = spread([b / a for a, b in zip(own, times[k])])      # within a round
    say(f"{name}: profile, several labels, bfloat16")
    out["profile"] = profile(model, batches, targets)
    out["mc"] = more_samples(model, batches, targets)
    if name == "random_1b": out["further"] = further({k: f for k, f in ways.items() if k in ("curvtools", "kronfluence")}, model, batches, targets)
    if name != "random_1b" or has_bf16(): out["bfloat16"] = lower(model, batches, [few[0][:1, :33]], targets, own)   # emulated, more would take minutes
    return out, model


def further(ways, model, batches, targets, times=4, rounds=2):
    "Seconds that a further token costs, where a call's fixed costs do not count: from as many rows, and from `times` as many, in turn."
    more = [b.repeat(times, 1) for b in batches]
    n = sum(b[:, 1:].numel() for b in more) * (1 - 1 / times)
    out = {k: [] for k in ways}
    for _ in range(rounds):
        for k, f in ways.items(): gc.collect(); out[k].append((seconds(lambda: f(model, more, targets))[0] - seconds(lambda: f(model, batches, targets))[0]) / n)
    return {k: spread(v) for k, v in out.items()}


def profile(model, batches, targets, most=8):
    "Where `collect` spends its time: share of every operation that takes a hundredth or more."
    from torch.profiler import profile
    with profile() as p: peers.curvtools(model, batches, targets)
    took = {e.key: e.self_cpu_time_total for e in p.key_averages()}
    return {k.removeprefix("aten::"): v / sum(took.values()) for k, v in sorted(took.items(), key=lambda x: -x[1])[:most] if v > .01 * sum(took.values())}


def more_samples(model, batches, targets, ks=(1, 2, 4)):
    "FLOPs of several labels from one forward pass, by the rehearsal."
    from curvtools.budget import forecast
    return {k: forecast(model, tuple(batches[0].shape), targets, mc_samples=k).flops for k in ks}


def lower(model, batches, few, targets, own):
    "The model in bfloat16: how far its factors are off, and how long it takes where the processor multiplies such numbers."
    import copy
    want, m = peers.curvtools(model, few, targets, "data"), copy.deepcopy(model).bfloat16()
    got = peers.curvtools(m, few, targets, "data")
    out = halfway(got, want)
    if has_bf16(): t = [seconds(lambda: peers.curvtools(m, batches, targets))[0] for _ in own]; out |= dict(seconds=spread(t), ratio=spread([a / b for a, b in zip(own, t)]))
    return out


# ---- the rest of the road

def road(model, batches, blocks, passages=16, steps=48, rounds=3):
    "Eigen, mask, apply and undo, and strict against generation, each as median and spread of seconds."
    from curvtools.kfac import collect
    factors, out = collect(model, batches, "mlp", blocks=blocks, progress=False), {}
    time_of = lambda f: spread([seconds(f)[0] for _ in range(rounds)])
    out["eigen, float64"] = time_of(lambda: factors.eigen(model, progress=False))
    out["eigen, float32"] = time_of(lambda: factors.eigen(model, dtype=torch.float32, progress=False))
    basis = factors.eigen(model, dtype=torch.float32, progress=False)
    out["mask at a rho"] = time_of(lambda: basis.keep(rho=.8))
    edit = basis.keep(rho=.8)
    out["apply and undo"] = time_of(lambda: edit.apply(model).undo())
    return dict(out, **reciting(model, batches, passages, steps, rounds), blocks=len({f.target.block for f in factors.values()}), matrices=len(factors))


def reciting(model, batches, passages, steps, rounds):
    "One teacher-forced pass against a step for each token, on the same passages."
    from curvtools.data import Passage, Passages
    from curvtools.recite import recite
    ids = torch.cat(list(batches)).repeat(passages, 1)[:passages]
    half = ids.shape[1] - steps
    p = Passages([Passage(prefix=r[:half].tolist(), suffix=r[half:].tolist()) for r in ids])
    return {"strict, one pass": spread([seconds(lambda: recite(model, p, generate=False, progress=False))[0] for _ in range(rounds)]), f"strict, {steps} steps": spread([seconds(lambda: recite(model, p, progress=False))[0] for _ in range(rounds)])}


# ---- out

def table(results):
    lines = []
    for r in results["models"]:
        lines.append(f"\n{r['model']}: {r['parameters']/1e6:,.0f} M parameters, {r['matrices']} matrices in {r['blocks']} blocks, {r['positions']:,} positions, {r['dtype']}")
        lines.append(f"{'':<14}{'tokens/s':>10}{'s (fastest to slowest)':>26}{'time / own':>24}{'TFLOP':>9}{'of GEMM':>9}{'peak MB':>9}{'A off':>9}{'G off':>9}")
        for k, x in r["rows"].items():
            s, q, a = x["seconds"], x["ratio"], r["agree"][k]
            took, times = f"{s['median']:.2f} ({s['min']:.2f} to {s['max']:.2f})", f"{q['median']:.2f} ({q['min']:.2f} to {q['max']:.2f})"
            lines.append(f"{k:<14}{x['tokens_per_s']:>10,.0f}{took:>26}{times:>24}{x['flops']/1e12:>9.3f}{x['share']:>9.0%}{x['peak']/1e6:>9,.0f}{a['A']:>9.0e}{a['G']:>9.0e}")
        if b := r.get("bfloat16"): lines.append(f"in bfloat16: A off by {b['A']:.1e}, G by {b['G']:.1e} (medians over the matrices); " + (f"{b['ratio']['median']:.2f} x the speed of float32" if "ratio" in b else "this processor has no bfloat16 products, so not timed"))
        lines.append("time of collect by operation: " + ", ".join(f"{k} {v:.0%}" for k, v in r["profile"].items()))
        if q := r.get("further"): lines.append("a further token, without what a call costs once: " + ", ".join(f"{k} {v['median']*1e3:.1f} ms ({v['min']*1e3:.1f} to {v['max']*1e3:.1f})" for k, v in q.items()))
        f = r["mc"]; lines.append("FLOPs of more labels a position: " + ", ".join(f"{k} cost {v / f[min(f)]:.2f} x" for k, v in f.items()))
    for name, r in results["road"].items():
        lines.append(f"\n{name}: {r['matrices']} matrices in {r['blocks']} blocks")
        lines += [f"{k:<24}{v['median']:>9.3f} s ({v['min']:.3f} to {v['max']:.3f}, n={v['n']})" for k, v in r.items() if isinstance(v, dict)]
    return "\n".join(lines)


def run(models=tuple(MODELS), tokens=None, rounds=None, minutes=8.):
    end, results = time.time() + 60 * minutes, dict(machine=machine(), models=[], road={})
    for i, name in enumerate(models):
        share = time.time() + (end - time.time()) / (len(models) - i)             # of the time left
        got, model = compare(name, tokens, rounds, share)
        results["models"].append(got)
        if name != "random_1b":
            _, batches, blocks = MODELS[name][0](256) if name == "playground" else (None, random_ids(model, 256), [-1])
            say(f"{name}: the rest of the road")
            results["road"][name] = road(model, batches, blocks)
        del model; gc.collect()
    return results


def main(argv=None):
    warnings.filterwarnings("ignore")
    p = argparse.ArgumentParser("python -m benchmarks", description=__doc__.splitlines()[0])
    p.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    p.add_argument("--tokens", type=int, help="of each model; by default as in MODELS")
    p.add_argument("--rounds", type=int, help="timed passes of each way; by default as in MODELS")
    p.add_argument("--minutes", type=float, default=8, help="after which no further round begins")
    p.add_argument("--out", type=Path, default=ROOT/"benchmarks"/"results.json")
    a = p.parse_args(argv)
    results = run(a.models, a.tokens, a.rounds, a.minutes)
    a.out.write_text(json.dumps(results, indent=1) + "\n")
    m = results["machine"]
    print(f"{m['cpu']}, {m['cores']} cores, {m['threads']} threads, load {m['load'][0]:.1f} at the start, {m['gemm_float32']/1e9:.0f} GFLOP/s in float32 products; {m['versions']}")
    print(table(results))


if __name__ == "__main__": main()
