"""How long a person waits for the Lab, on the bundled model: `python tests/bench_lab.py`. Medians of several tries; absolute times are those of the machine it names.

Limits (issue of the Lab): opening < 5 s, another block < 300 ms, edited weights at a new rho < 100 ms, quick readout (strict on 100 passages, perplexity on 4096 tokens) < 1 s."""
import os
import platform
import statistics
import time

import torch

from curvtools.all import Lab, Session, playground


def timed(f):
    t = time.perf_counter(); f()
    return time.perf_counter() - t


def main(tries=9):
    pg = playground()
    Lab(pg).wait().close()                                       # imports and caches
    labs = []
    opening = [timed(lambda: labs.append(Lab(pg).wait())) for _ in range(3)]
    lab = labs.pop()
    e, ed, s = lab.explorer, lab.editor, lab.session
    blocks = sorted({t.block for t in s.targets})
    for b in blocks: e.choose(b)                                 # each matrix seen once: its curve and texts are kept
    block = [timed(lambda: e.choose(blocks[k % len(blocks)])) for k in range(tries)]
    first = []
    for k in range(tries):
        for key in [k for k in s.cache if isinstance(k, tuple)] + ["inputs"]: s.cache.pop(key, None)
        first.append(timed(lambda: e.choose(blocks[k % len(blocks)])))
    rho = []
    spec = dict(method="K-FAC", knob="rho", blocks=[1, 2], projections=["q", "k", "v", "o"])
    for k in range(tries):
        rho.append(timed(lambda: s.basis.keep(rho=.8 + .01*k, blocks=[1, 2]).apply(pg.model).undo()))
    quick = [timed(lambda: s.look(quick=True)) for _ in range(tries)]
    s.sample["passages"]["memorised"] = pg.memorized[:100]        # a full hundred
    hundred = [timed(lambda: s.look(quick=True)) for _ in range(tries)]
    full = [timed(lambda: s.apply(dict(spec, strength=.8 + .01*k))) for k in range(3)]
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, Python {platform.python_version()}, torch {torch.__version__}")
    for name, xs, limit in (("open the Lab", opening, 5), ("another block, seen before", block, .3), ("another block, first time", first, None), ("a new rho: plan, write and take back 8 matrices", rho, .1),
                            ("quick readout, 80 passages", quick, 1), ("quick readout, 100 passages, 4096 tokens", hundred, 1), ("apply with nDCG, 240 questions, control", full, None)):
        m = statistics.median(xs)
        print(f"{name:<50} {1000*m:7.0f} ms  (n={len(xs)}, {1000*min(xs):.0f} to {1000*max(xs):.0f})" + ("" if limit is None else f"  limit {1000*limit:.0f}: {'ok' if m < limit else 'MISSED'}"))


if __name__ == "__main__": main()
