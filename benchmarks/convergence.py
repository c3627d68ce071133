"""How many tokens the same edit needs: `python -m benchmarks.convergence --text BOOKS --held OTHERS` from the root of the repository. All numbers in benchmarks/convergence.json.

Windows of all texts in turn; even and odd batches apart; at every doubling of the tokens, one edit from all of them. How far do the halves agree on what is kept,
how like is what the edit takes out to what it takes out with the most tokens (cosine), and what does it cost on other texts (perplexity, bootstrap over windows)?
The control: random directions, the same fraction kept. Sums are saved at each doubling, and the same call goes on where it was."""
import argparse
import itertools
import json
import os
from pathlib import Path

import torch

from benchmarks.run import ROOT, say, versions
from curvtools.budget import agreement
from curvtools.kfac import Factors, collect

BATCH, LENGTH = 2, 512                                                       # windows a batch, tokens a window


def windows_of(path, tokenizer, skip=5000):
    "Windows of one text, [LENGTH + 1] each, after its title pages."
    ids = tokenizer(Path(path).read_text(encoding="utf-8", errors="replace")[skip:])["input_ids"]
    return [ids[i:i + LENGTH + 1] for i in range(0, len(ids) - LENGTH, LENGTH)]


def in_turn(texts): return [w for ws in itertools.zip_longest(*texts) for w in ws if w is not None]


def halves_at(model, data, n, keep, before, **kw):
    "Factors of even and odd batches of the first n: those before, and what has come."
    paths = [keep/f"{n}-{half}.safetensors" for half in ("even", "odd")]
    if all(p.exists() for p in paths): return [Factors.load(p) for p in paths]
    start, old = before or (0, None)
    new = [collect(model, data[start + k:n:2], progress=False, **kw) for k in (0, 1)]
    halves = new if old is None else [a + b for a, b in zip(old, new)]
    for h, p in zip(halves, paths): h.save(p)
    return halves


@torch.no_grad()
def losses(model, rows): return torch.cat([torch.nn.functional.cross_entropy(model(b[:, :-1], use_cache=False).logits.transpose(1, 2), b[:, 1:], reduction="none").mean(1) for b in rows])   # [windows]


def price(edit, model, held, base, draws=2000):
    "Perplexity after over before: its value, and a 95 % bootstrap interval over windows."
    with edit.applied(model): d = losses(model, held) - base
    boot = d[torch.randint(len(d), (draws, len(d)), generator=torch.Generator().manual_seed(0))].mean(1)
    return [float(x) for x in (d.mean().exp(), *boot.quantile(torch.tensor([.025, .975])).exp())]


def taken_out(edit, model):
    "The change of every weight."
    start = {n: model.get_submodule(n).weight.detach().clone() for n in edit.plan}
    with edit.applied(model): return {n: w - model.get_submodule(n).weight.detach() for n, w in start.items()}


def cosine(a, b):
    dot = lambda x, y: sum(float((x[n] * y[n]).sum()) for n in x)
    return dot(a, b) / (dot(a, a) * dot(b, b))**.5


def study(model, data, held, keep, rho, least, **kw):
    "One row for each doubling of the batches from `least` tokens on, the last first; what there is after each."
    sizes, before = [2**k for k in range(1, len(data).bit_length()) if least <= 2**k * BATCH * LENGTH and 2**k <= len(data)], None
    for n in sizes:
        before = n, halves_at(model, data, n, keep, before, **kw)
        say(f"{n * BATCH * LENGTH:,} tokens collected")
    rows, last, base = [], None, losses(model, held)
    for n in reversed(sizes):
        even, odd = halves_at(model, data, n, keep, None, **kw)
        say(f"{n * BATCH * LENGTH:,} tokens: eigen")
        basis = (even + odd).eigen(model, dtype=torch.float32, progress=False)
        edit = basis.keep(rho=rho); out = taken_out(edit, model); last = last or out
        row = dict(tokens=n * BATCH * LENGTH, kept=edit.kept, agreement=min(agreement(even, odd, rho), agreement(odd, even, rho)), cosine=cosine(out, last), price=price(edit, model, held, base))
        if n == sizes[-1]: row["random"] = [price(basis.random(seed).keep(fraction=edit.kept), model, held, base) for seed in range(3)]
        rows.append(row); say(row)
        yield dict(perplexity=float(base.mean().exp()), windows=len(base), rows=rows[::-1])


def main(argv=None):
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from curvtools.cli import smollm
    p = argparse.ArgumentParser("python -m benchmarks.convergence", description=__doc__.splitlines()[0])
    p.add_argument("--text", nargs="+", required=True, help="text files to collect on")
    p.add_argument("--held", nargs="+", required=True, help="other text files, for the perplexity")
    p.add_argument("--model", help="folder of a causal model; by default SmolLM2-135M")
    p.add_argument("--blocks", nargs="+", type=int, default=list(range(23, 30)))
    p.add_argument("--rho", type=float, default=.95)
    p.add_argument("--tokens", type=int, default=131_072)
    p.add_argument("--least", type=int, default=4_096, help="tokens of the first row")
    p.add_argument("--keep", type=Path, default=ROOT/".cache"/"convergence", help="folder for the sums")
    p.add_argument("--out", type=Path, default=ROOT/"benchmarks"/"convergence.json")
    a = p.parse_args(argv)
    folder = a.model or os.environ.get("CURVTOOLS_SMOL") or smollm()
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    rows = in_turn([windows_of(t, tokenizer) for t in a.text])[:a.tokens // LENGTH]
    held = torch.tensor(in_turn([windows_of(t, tokenizer)[:4] for t in a.held])).split(BATCH)
    say(f"{len(rows)} windows of {len(a.text)} texts, {sum(map(len, held))} of {len(a.held)} others")
    meta = dict(model="smol" if not a.model else Path(a.model).name, blocks=a.blocks, rho=a.rho, text=[Path(t).stem for t in a.text], held=[Path(t).stem for t in a.held], versions=versions("torch", "transformers"))
    for got in study(model, torch.tensor(rows).split(BATCH), held, a.keep, a.rho, a.least, targets="mlp", blocks=a.blocks):
        a.out.write_text(json.dumps(dict(meta, **got), indent=1) + "\n")


if __name__ == "__main__": main()
