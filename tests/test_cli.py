"The command line: the effect on the bundled model, each command on a folder, each kind of bad input, and nothing half-written."
import dataclasses
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from html.parser import HTMLParser

import pytest
import torch

import curvtools.cli
import curvtools.kfac
import curvtools.zoo
from curvtools.cli import Demo, _html_table, demo, load_model, main, report
from curvtools.data import Passage, Passages, save_passages
from curvtools.zoo import playground

CLI = [sys.executable, "-m", "curvtools.cli"]


def shell(*args, **kw):
    env = dict(os.environ, HF_HUB_OFFLINE="1", PYTHONWARNINGS="ignore")
    return subprocess.run([*CLI, *map(str, args)], capture_output=True, text=True, env=env, timeout=570, **kw)


# --- help -----------------------------------------------------------------------------------------------------------------------

def test_help_answers_in_under_a_second():
    took = []
    for _ in range(3):   # the best of three, so that a busy machine does not decide
        start = time.perf_counter(); r = shell("--help"); took.append(time.perf_counter() - start)
        assert r.returncode == 0 and all(c in r.stdout for c in ("demo", "collect", "edit", "recite", "evaluate", "lab"))
    assert min(took) < 1, took


def test_help_imports_nothing_heavy():
    code = """import sys
from curvtools.cli import main
try: main(sys.argv[1:])
except SystemExit: pass
heavy = {"torch", "transformers", "datasets", "numpy", "matplotlib", "safetensors", "ipywidgets"} & set(sys.modules)
assert not heavy, heavy"""
    for args in (["--help"], ["demo", "--help"], ["collect", "--help"], ["lab", "--help"], ["lab", "/absent"], ["--version"], []):
        r = subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True)
        assert r.returncode == 0, r.stderr


@pytest.mark.parametrize("name, parts, want", [
    ("recite", ["m", "p.jsonl", "--json", "--prefix 3"], dict(model="m", passages="p.jsonl", json=True, prefix=3, suffix=None, batch_size=32)),
    ("recite", ["m", "--json", "--batch-size 2"], dict(model="m", passages=None, json=True, batch_size=2)),
    ("edit", ["m", "f", "--rho .5", "--out x"], dict(model="m", factors="f", rho=.5, out="x", blocks=None)),
    ("evaluate", ["m", "--length 9", "--json"], dict(model="m", length=9, json=True, text=None)),
    ("collect", ["m", "--seed 1", "--out x"], dict(model="m", seed=1, out="x", labels="sample")),
    ("lab", ["here", "--voila", "--no-browser"], dict(folder="here", voila=True, no_browser=True)),
    ("lab", ["--voila", "--no-browser"], dict(folder=".", voila=True, no_browser=True)),
])
def test_the_order_of_options_and_arguments_does_not_matter(name, parts, want):
    plain = lambda words: [w for w in words if w[0] != "-"]   # these keep their order among themselves
    for order in itertools.permutations(parts):
        if plain(order) != plain(parts): continue
        a = vars(curvtools.cli._parser().parse_args([name, *" ".join(order).split()]))
        assert {k: a[k] for k in want} == want, order


def test_two_dashes_end_a_list():
    a = curvtools.cli._parser().parse_args("evaluate --text a b -- m".split())
    assert (a.model, a.text) == ("m", ["a", "b"])


# --- the effect -----------------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    "`curvtools demo --json`, as a user runs it, in an empty folder."
    folder = tmp_path_factory.mktemp("demo")
    return shell("demo", "--json", "--out", "r.html", cwd=folder), folder


def test_demo_prints_json_alone(ran):
    r, _ = ran
    rows = json.loads(r.stdout)   # nothing else is on standard output
    assert [x["method"] for x in rows] == ["baseline", "kfac", "svd", "random"]
    for x in rows:
        assert {"method", "strict", "loose", "lev", "ppl", "kept"} <= x.keys()
        assert all(0 <= x[k] <= 1 for k in ("strict", "loose", "lev", "kept")) and x["ppl"] > 1
        for k in ("strict", "loose", "lev", "ppl"): assert x[f"{k}_interval"][0] <= x[k] <= x[f"{k}_interval"][1]
    assert "collect" in r.stderr or "curvature on" in r.stderr


def test_the_effect(ran):
    "What the project claims of its bundled model, measured by the command that a newcomer runs first."
    r, _ = ran
    base, kfac, svd, random = json.loads(r.stdout)
    assert base["strict"] >= .90 and base["strict_unseen"] <= .02, "it must recite what it memorised, and only that"
    assert kfac["strict"] <= .02
    assert kfac["ppl"] <= 1.02 * base["ppl"]
    assert random["ppl"] >= 1.2 * base["ppl"] and random["kept"] == kfac["kept"]
    assert svd["strict"] <= .05   # matched by teacher forcing; generation may differ on a tie
    assert r.returncode == 0 and "FAIL" not in r.stderr and "undo restores every byte: yes" in r.stderr


class Tags(HTMLParser):
    "All tags of a page with their attributes, as a browser would see them."
    def __init__(self, html): super().__init__(); self.tags = []; self.feed(html); self.close()
    def handle_starttag(self, tag, attrs): self.tags.append((tag, dict(attrs)))


def self_contained(html):
    assert len(html.encode()) < 2_000_000 and html.startswith("<!doctype html>") and html.endswith("</html>")
    assert not re.search(r"https?://|url\(|@import", html)
    for tag, attrs in Tags(html).tags:
        assert tag not in ("script", "link", "iframe", "object", "embed", "base", "form", "x"), tag
        assert not any(k.startswith("on") or k in ("href", "srcset", "action") for k in attrs), (tag, attrs)
        if "src" in attrs: assert tag == "img" and attrs["src"].startswith("data:image/png;base64,") and attrs["alt"]


def test_the_report(ran):
    _, folder = ran
    assert [p.name for p in folder.iterdir()] == ["r.html"]
    html = (folder/"r.html").read_text()
    self_contained(html)
    assert html.count("<img") == 4 and html.count("PASS") == 6
    for word in ("random directions", "95 %", "Provenance", "fingerprint", "What this does not show", "unedited", "natural", "canary", "seed"): assert word in html, word


# --- a small playground, for everything that need not be true of the real one ---------------------------------------------------

@pytest.fixture(scope="module")
def small():
    "The bundled tokenizer and text, an untrained model of three narrow blocks: quick, and it recites nothing."
    from transformers import LlamaConfig, LlamaForCausalLM
    pg = playground()
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(pg.tokenizer), hidden_size=24, intermediate_size=40, num_hidden_layers=3, num_attention_heads=2,
        max_position_embeddings=128, tie_word_embeddings=True, bos_token_id=None, eos_token_id=pg.tokenizer.eos_token_id, pad_token_id=pg.tokenizer.pad_token_id)).eval()
    evil = Passage(pg.memorized[-1].prefix, pg.memorized[-1].suffix, source="<script>alert(1)</script>", label='"><img src=x onerror=alert(1)>', kind="<b>kind</b>", tier=64)
    return dataclasses.replace(pg, model=model, clean=pg.clean[:4], heldout=pg.heldout[:4], memorized=Passages([evil, *pg.memorized.where(min_tier=64)[:5], *pg.memorized.where(tier=4)[:2]]), unseen=pg.unseen[:4],
                               plan=dict(collect=dict(targets="all", projections=["q", "k", "up"]), keep=[dict(rho=.9, blocks=[1, 2], projections=["q", "k"]), dict(rho=.95, blocks=[1], projections=["up"])]))


def test_a_failed_gate_is_said_and_is_exit_code_1(small, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(curvtools.zoo, "playground", lambda *a: small); monkeypatch.chdir(tmp_path)
    before = {k: v.clone() for k, v in small.model.state_dict().items()}
    assert main(["demo"]) == 1
    out = capsys.readouterr().out
    assert "FAIL  the model recites what it memorised" in out and "A gate FAILED" in out and "PASS  undo" in out
    assert "FAIL" in (tmp_path/"curvtools-report.html").read_text()
    assert all(torch.equal(v, before[k]) for k, v in small.model.state_dict().items())


def test_report_escapes_what_comes_from_data(small, tmp_path):
    d = demo(small, tokens=256, log=lambda *a: None)
    for r in d.recited["baseline"].rows[:1]: r["strict"] = True   # so that the page shows this passage
    html = report(d, tmp_path/"r.html").read_text()
    self_contained(html)
    assert "alert(1)" in html and ("b", {}) not in Tags(html).tags
    assert "<x>" not in _html_table(["<x>"], [["<x>", ("<x>", "<x>")]], "<x>")


def test_the_demo_leaves_the_model_when_stopped(small, monkeypatch):
    before = {k: v.clone() for k, v in small.model.state_dict().items()}
    def log(text):
        if "random directions" in str(text): raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): demo(small, tokens=256, log=log)
    assert all(torch.equal(v, before[k]) for k, v in small.model.state_dict().items())


def test_a_demo_without_a_plan_is_refused(small):
    with pytest.raises(ValueError, match="has no plan: give one"): demo(dataclasses.replace(small, plan={}), log=lambda *a: None)


# --- the commands on a folder ---------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def place(small, tmp_path_factory):
    "A folder with a model folder, text and passages."
    at = tmp_path_factory.mktemp("place")
    small.model.save_pretrained(at/"lm"); small.tokenizer.save_pretrained(at/"lm")
    (at/"text.txt").write_text(small.tokenizer.decode(small.clean.ids.flatten()))
    save_passages(small.memorized, at/"p.jsonl")
    return at


@pytest.fixture
def run(place, monkeypatch, capsys):
    "Run a command in that folder; gives (exit code, stdout, stderr), and checks that no temporary file stays."
    monkeypatch.chdir(place)
    def f(line, *more):
        try: code = main([*line.split(), *more])
        except SystemExit as e: code = e.code
        left = [p for p in place.rglob("*") if ".tmp" in p.name]
        assert not left, left
        return code, *capsys.readouterr()
    return f


def test_collect_edit_recite_evaluate(run, place):
    code, out, _ = run("collect lm --text text.txt --out f.safetensors --length 32 --tokens 512 --blocks -1 --projections gate up --labels data --seed 3")
    assert code == 0 and "16 x 32 = 512 tokens" in out and (place/"f.safetensors").is_file()
    from curvtools.kfac import Factors
    f = Factors.load(place/"f.safetensors")
    assert list(f) == ["model.layers.2.mlp.gate_proj", "model.layers.2.mlp.up_proj"] and f.tokens == 16*31 and (f.meta["labels"], f.meta["seed"]) == ("data", 3)
    code, out, _ = run("edit lm f.safetensors --rho .5 --projections up --out edited")
    assert code == 0 and "1 target" in out and (place/"edited"/"recipe.json").is_file()
    a, b = load_model(place/"lm")[0].state_dict(), load_model(place/"edited")[0].state_dict()
    assert [k for k in a if not torch.equal(a[k], b[k])] == ["model.layers.2.mlp.up_proj.weight"]
    code, out, _ = run("recite edited p.jsonl")
    assert code == 0 and "strict" in out
    code, out, _ = run("recite edited p.jsonl --json")
    rows = json.loads(out)
    assert run("recite edited --json p.jsonl") == (0, out, "") and code == 0 and len(rows) == 8 and {"strict", "loose", "lev", "text"} <= rows[0].keys()
    code, out, _ = run("evaluate lm --text text.txt --length 64")
    assert code == 0 and re.search(r"perplexity \d", out)
    code, out, _ = run("evaluate lm --text text.txt --length 64 --json")
    assert code == 0 and json.loads(out)[0]["ppl"] > 1


def test_the_word_playground(run, small, monkeypatch, place):
    monkeypatch.setattr(curvtools.zoo, "playground", lambda *a: small)
    assert run("collect playground --out pg.safetensors")[0] == 0
    assert run("edit playground pg.safetensors --fraction .2 --out pg-edited")[0] == 0
    code, out, _ = run("recite playground")
    assert code == 0 and "64" in out
    assert run("evaluate playground")[0] == 0


def test_length_and_tokens_apply_to_the_playground(run, small, monkeypatch, place):
    monkeypatch.setattr(curvtools.zoo, "playground", lambda *a: small)
    code, out, _ = run("collect playground --length 50 --tokens 220 --out short.safetensors")
    assert code == 0 and "4 x 50 = 200 tokens" in out
    code, out, _ = run("evaluate playground --length 16 --tokens 300 --json")
    assert code == 0 and (x := json.loads(out)[0])["window"] == 16 and x["windows"] == 18
    code, out, _ = run("evaluate playground --json")
    assert code == 0 and json.loads(out)[0]["window"] == 128


def test_a_tokenizer_from_elsewhere(run, place):
    shutil.copytree(place/"lm", place/"bare")
    for f in place.glob("bare/*token*"): f.unlink()
    code, _, err = run("evaluate bare --text text.txt")
    assert code == 2 and "no tokenizer" in err and "tokenizer.json" in err and "--tokenizer" in err
    assert run("evaluate bare --text text.txt --tokenizer lm")[0] == 0


# --- bad input ------------------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def bad(place):
    "Broken things beside the good ones."
    for name in ("noconfig", "noweights", "pickled", "cut", "nan", "other"): shutil.copytree(place/"lm", place/name)
    (place/"noconfig"/"config.json").unlink()
    (place/"noweights"/"model.safetensors").unlink(); (place/"pickled"/"model.safetensors").rename(place/"pickled"/"pytorch_model.bin")
    data = (place/"lm"/"model.safetensors").read_bytes(); (place/"cut"/"model.safetensors").write_bytes(data[:len(data)//2])
    model, _ = load_model(place/"lm")
    with torch.no_grad(): model.model.layers[2].mlp.up_proj.weight[0, 0] += .5
    model.save_pretrained(place/"other")
    with torch.no_grad(): model.model.layers[0].mlp.down_proj.weight[1, 1] = float("nan")
    model.save_pretrained(place/"nan")
    (place/"foreign.gguf").write_bytes(b"PK\3\4 not it"); (place/"cut.gguf").write_bytes(b"GGUF\3\0\0\0" + bytes(20))
    (place/"empty.txt").write_text(""); (place/"short.txt").write_text("It was"); (place/"latin.txt").write_bytes(b"caf\xe9")
    (place/"empty.jsonl").write_text(""); (place/"bad.jsonl").write_text('{"prefix": [1, 2], "suffix": [3]}\n{"prefix": [1]}\n')
    (place/"long.jsonl").write_text(json.dumps(dict(prefix=[5]*120, suffix=[6]*20))); (place/"far.jsonl").write_text(json.dumps(dict(prefix=[5]*10, suffix=[60000])))
    assert main(["collect", str(place/"lm"), "--text", str(place/"text.txt"), "--out", str(place/"ok.safetensors"), "--blocks", "-1"]) == 0
    data = (place/"ok.safetensors").read_bytes(); (place/"cut.safetensors").write_bytes(data[:1000])
    shutil.copy(place/"lm"/"model.safetensors", place/"notfactors.safetensors")
    (place/"full").mkdir(); (place/"full"/"a").write_text("")
    return place


@pytest.mark.parametrize("line, says", [
    # models
    ("evaluate ./absent --text text.txt", "no folder ./absent"),
    ("evaluate absent-model --text text.txt", "no folder absent-model"),
    ("evaluate text.txt --text text.txt", "text.txt is a file"),
    ("evaluate noconfig --text text.txt", "no config.json"),
    ("evaluate noweights --text text.txt", "no .safetensors file"),
    ("evaluate pickled --text text.txt", "pickled weights are not read"),
    ("evaluate cut --text text.txt", "cut short"),
    ("evaluate absent.gguf --text text.txt", "absent.gguf"),
    ("evaluate foreign.gguf --text text.txt", "not a GGUF file"),
    ("evaluate cut.gguf --text text.txt", "cut short"),
    ("evaluate lm --gguf-file absent.gguf --text text.txt", "absent.gguf"),
    ("collect nan --text text.txt --out x", "model.layers.0.mlp.down_proj"),
    # text
    ("evaluate lm", "--text"),
    ("evaluate lm --text absent.txt", "no file absent.txt"),
    ("evaluate lm --text empty.txt", "empty"),
    ("evaluate lm --text short.txt", "less than one window"),
    ("evaluate lm --text latin.txt", "latin.txt is not UTF-8"),
    ("evaluate lm --text text.txt --length 1", "two tokens"),
    ("evaluate lm --text text.txt --length 0", "--length"),
    ("evaluate lm --text text.txt --length 129", "128"),
    ("collect lm --text text.txt --tokens -5 --out x", "--tokens"),
    ("collect lm --text text.txt --tokens 127 --out x", "--tokens 127 is less than one window of 128"),
    ("collect playground --length 64 --tokens 50 --out x", "--tokens 50 is less than one window of 64"),
    # what cannot apply to the playground
    ("evaluate playground --length 129", "--length 129 is more than the 128"),
    ("evaluate playground --tokenizer /absent --gguf-file absent.gguf", "--tokenizer and --gguf-file cannot apply"),
    ("edit playground ok.safetensors --rho .5 --gguf-file absent.gguf --out x", "--gguf-file cannot apply"),
    ("recite playground --prefix 10 --suffix 3", "--prefix and --suffix cannot apply"),
    ("recite playground --suffix 3", "--suffix cannot apply"),
    # selection
    ("collect lm --text text.txt --out x --targets *.nothing", "nothing"),
    ("collect lm --text text.txt --out x --blocks 7", "7"),
    ("collect lm --text text.txt --out x --projections fc9", "fc9"),
    ("collect lm --text text.txt --out x --labels wrong", "--labels"),
    ("collect lm --text text.txt --out x --labels data --mc-samples 2", "--mc-samples 2 draws labels, and --labels data draws none"),
    ("collect lm --text text.txt --out x --mc-samples 0", "--mc-samples"),
    ("collect lm --text text.txt --out x --stop wrong", "neither converged nor a number between 0 and 1"),
    ("collect lm --text text.txt --out x --stop 1", "between 0 and 1"),
    ("collect lm --text text.txt --out x --every 5", "give --snapshot FILE too"),
    ("collect lm --text text.txt --out x --snapshot ./x", "--snapshot and --out are both x"),
    ("collect lm --text text.txt --out x --snapshot absent/s", "no folder absent"),
    ("collect nan --text text.txt --out x --blocks -1", "leave such batches out with --on-nan skip"),
    ("collect nan --text text.txt --out x --blocks -1 --on-nan skip", "all 1 batches give NaN"),
    # where to
    ("collect lm --text text.txt --out absent/x", "no folder absent"),
    ("collect lm --text text.txt --out full", "is a folder"),
    ("edit lm ok.safetensors --rho .5 --out full", "full exists"),
    ("edit lm ok.safetensors --rho .5 --out absent/x", "no folder absent"),
    ("demo --out absent/r.html", "no folder absent"),
    # edits
    ("edit lm ok.safetensors --out x", "--rho"),
    ("edit lm ok.safetensors --rho 1.5 --out x", "0 to 1"),
    ("edit lm ok.safetensors --rho -1 --out x", "0 to 1"),
    ("edit lm ok.safetensors --rho nan --out x", "0 to 1"),
    ("edit lm ok.safetensors --rho .5 --fraction .5 --out x", "not allowed with"),
    ("edit lm ok.safetensors --rho .5 --blocks 0 --out x", "block"),
    ("edit lm absent.safetensors --rho .5 --out x", "no file absent.safetensors"),
    ("edit lm cut.safetensors --rho .5 --out x", "cut.safetensors is not a complete safetensors file"),
    ("edit lm notfactors.safetensors --rho .5 --out x", "notfactors.safetensors"),
    ("edit lm text.txt --rho .5 --out x", "text.txt is not"),
    ("edit other ok.safetensors --rho .5 --out x", "model.layers.2.mlp.up_proj"),
    # passages
    ("recite lm", "no passages"),
    ("recite lm absent.jsonl", "no file absent.jsonl"),
    ("recite lm empty.jsonl", "no passages"),
    ("recite lm bad.jsonl", "line 2"),
    ("recite lm long.jsonl", "128"),
    ("recite lm far.jsonl", "60000"),
    # the line itself
    ("nonsense", "invalid choice"),
    ("collect lm --text text.txt", "--out"),
    # the Lab
    ("lab absent", "no folder absent"),
    ("lab text.txt", "no folder text.txt"),
    ("lab --wrong", "--wrong"),
])
def test_bad_input(run, bad, line, says):
    there = sorted(p.name for p in bad.iterdir())
    code, out, err = run(line)
    assert code == 2 and "Traceback" not in err + out
    message = err.strip().splitlines()[-1]
    assert message.startswith("curvtools") and says in message, err
    assert sorted(p.name for p in bad.iterdir()) == there, "something was written"


@pytest.fixture(scope="module")
def pickles(bad):
    "Safetensors that lead to a pickle: by the index of the parts, by the config, by an adapter; a repository with such an index; one with nothing else."
    for name in ("byindex", "byconfig", "byadapter", "noindex", "code"): shutil.copytree(bad/"lm", bad/name)
    weights = load_model(bad/"lm")[0].state_dict()
    for name, file in (("byindex", "part.bin"), ("byconfig", "adapter_model.bin"), ("byadapter", "adapter_model.bin")): torch.save(weights, bad/name/file)
    (bad/"byindex"/"model.safetensors").rename(bad/"byindex"/"other.safetensors")
    (bad/"byindex"/"model.safetensors.index.json").write_text(json.dumps(dict(metadata={}, weight_map=dict.fromkeys(weights, "part.bin"))))
    (bad/"noindex"/"model.safetensors.index.json").write_text('["part.bin"]')
    (bad/"byadapter"/"adapter_config.json").write_text(json.dumps(dict(peft_type="LORA", base_model_name_or_path="lm")))
    config = json.loads((bad/"lm"/"config.json").read_text())
    (bad/"byconfig"/"config.json").write_text(json.dumps(config | dict(transformers_weights="adapter_model.bin")))
    (bad/"code"/"config.json").write_text(json.dumps(config | dict(model_type="mine", auto_map=dict(AutoConfig="my.Config", AutoModelForCausalLM="my.Model"))))
    (bad/"code"/"my.py").write_text("raise SystemExit('run')")
    for name, source in (("parts", "byindex"), ("old", "pickled")):
        repo = bad/"hub"/f"models--some--{name}"; (repo/"refs").mkdir(parents=True); (repo/"refs"/"main").write_text("a" * 40)
        shutil.copytree(bad/source, repo/"snapshots"/("a" * 40))
    return bad


@pytest.mark.parametrize("model, says", [("byindex", "weights in part.bin, and pickled"), ("byconfig", "weights in adapter_model.bin, and pickled"), ("byadapter", "weights in adapter_model.bin, and pickled"),
    ("some/parts", "some/parts has weights in part.bin, and pickled"), ("some/old", "some/old has no .safetensors weights, and pickled"), ("pickled", "pickled weights are not read"), ("noindex", "model.safetensors.index.json is no index of weights"), ("code", "such code is not run")])
def test_no_road_leads_to_a_pickle_or_to_code(run, pickles, monkeypatch, model, says):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(pickles/"hub")); monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("torch.load", lambda *a, **kw: pytest.fail("a pickle was read")); monkeypatch.setattr("builtins.input", lambda *a: "y")
    code, _, err = run(f"collect {model} --text text.txt --out x")
    assert code == 2 and says in err and not (pickles/"x").exists(), err


def test_gguf_of_the_folder_and_not_of_the_working_directory(place, monkeypatch):
    (place/"deep").mkdir(); (place/"deep"/"same.gguf").write_bytes(b"GGUF\3\0\0\0" + bytes(20)); (place/"same.gguf").write_bytes(b"GGUF")
    monkeypatch.chdir(place); got = []
    def first(cls, *args, gguf_file=None, **kw): got.append(gguf_file); raise ValueError("stop here")
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", classmethod(first))
    with pytest.raises(ValueError, match="stop here"): load_model("deep", "same.gguf")
    assert got == [str(place/"deep"/"same.gguf")]


def test_gguf_without_the_package(run, bad, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    code, _, err = run("evaluate cut.gguf --text text.txt")
    assert code == 2 and 'pip install "curvtools[gguf]"' in err


@pytest.mark.parametrize("model, more", [("other", ""), ("playground", ""), ("lm", "in bfloat16, and here they are float32")])
def test_factors_of_another_model_are_refused_with_a_way_out(run, bad, monkeypatch, model, more):
    "Before anything is decomposed, and with no argument of Python in the text."
    from curvtools.kfac import Factors
    f = Factors.load(bad/"ok.safetensors")
    if more: f.meta["dtype"] = "torch.bfloat16"; f.fingerprints.update({n: "0" for n in f})
    f.save(bad/"theirs.safetensors")
    with monkeypatch.context() as m:
        m.setattr(Factors, "eigen", lambda *a, **kw: pytest.fail("decomposed"))
        code, _, err = run(f"edit {model} theirs.safetensors --rho .5 --out x")
    assert code == 2 and f"theirs.safetensors does not belong to {model}: model.layers.2.mlp." in err and f"curvtools collect {model}" in err and more in err
    assert "force" not in err and "Undo" not in err and not (bad/"x").exists()
    (bad/"theirs.safetensors").unlink()


def test_debug_shows_the_traceback(run, bad):
    with pytest.raises(FileNotFoundError): run("evaluate ./absent --text text.txt --debug")


def test_errors_reach_the_shell(tmp_path):
    r = shell("evaluate", tmp_path/"absent", "--text", __file__)
    assert r.returncode == 2 and r.stdout == "" and len(r.stderr.strip().splitlines()) == 1 and r.stderr.startswith("curvtools evaluate: there is no folder")


# --- the Lab --------------------------------------------------------------------------------------------------------------------

@pytest.fixture
def served(monkeypatch, tmp_path):
    "The command lines that would have been run, in an empty folder."
    lines = []
    monkeypatch.setattr("curvtools.cli._serve", lambda line: lines.append(line) or 0); monkeypatch.chdir(tmp_path)
    return lines


def test_lab_copies_the_notebook_and_serves_it(served, tmp_path):
    assert main(["lab"]) == 0
    assert served == [[sys.executable, "-m", "jupyterlab", "curvtools-lab.ipynb"]]
    assert [p.name for p in tmp_path.iterdir()] == ["curvtools-lab.ipynb"]
    nb = json.loads((tmp_path/"curvtools-lab.ipynb").read_text())
    assert nb["nbformat"] == 4 and any("Lab(pg)" in "".join(c["source"]) for c in nb["cells"])


def test_lab_uses_a_notebook_that_is_there(served, tmp_path):
    (tmp_path/"class").mkdir(); mine = tmp_path/"class"/"curvtools-lab.ipynb"; mine.write_text("my answers")
    assert main(["lab", "class", "--no-browser", "--", "--port=8890", "--allow-root", "--", "x"]) == 0
    assert mine.read_text() == "my answers" and served[0][2:] == ["jupyterlab", "class/curvtools-lab.ipynb", "--no-browser", "--port=8890", "--allow-root", "--", "x"]
    assert main(["lab", "--voila", "class"]) == 0 and served[1][2:] == ["voila", "class/curvtools-lab.ipynb"]


@pytest.mark.parametrize("args, package", [([], "jupyterlab"), (["--voila"], "voila")])
def test_lab_without_the_server(served, tmp_path, monkeypatch, capsys, args, package):
    monkeypatch.setattr("curvtools.cli.importlib.util.find_spec", lambda name: None)
    assert main(["lab", *args]) == 2
    assert f"pip install {package}" in capsys.readouterr().err and not served and not list(tmp_path.iterdir())


def test_lab_where_a_folder_has_that_name(served, tmp_path, capsys):
    (tmp_path/"curvtools-lab.ipynb").mkdir()
    assert main(["lab"]) == 2 and "is a folder" in capsys.readouterr().err and not served


def test_the_server_decides_about_ctrl_c(monkeypatch):
    class Server:
        asked = 0
        def wait(self):
            self.asked += 1
            if self.asked == 1: raise KeyboardInterrupt
            return 7
    monkeypatch.setattr("curvtools.cli.subprocess.Popen", lambda line: Server())
    assert curvtools.cli._serve(["x"]) == 7


def test_the_server_ends_with_the_command():
    "A real SIGTERM: no server is left behind."
    code = "import sys; from curvtools.cli import _serve; sys.exit(_serve([sys.executable, '-c', 'import os, time; print(os.getpid(), flush=True); time.sleep(300)']))"
    p = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    server = int(p.stdout.readline()); p.terminate()
    assert p.wait(60) == 15
    with pytest.raises(ProcessLookupError): os.kill(server, 0)


# --- cancelling -----------------------------------------------------------------------------------------------------------------

def interrupt(*a, **kw): raise KeyboardInterrupt


@pytest.mark.parametrize("line, where", [
    ("collect lm --text text.txt --out x", "curvtools.kfac.sample_labels"),
    ("collect lm --text text.txt --out x", "safetensors.torch.save_file"),
    ("edit lm ok.safetensors --rho .5 --out x", "curvtools.edit.save_edit"),
    ("edit lm ok.safetensors --rho .5 --out x", "transformers.PreTrainedTokenizerBase.save_pretrained"),
    ("recite lm p.jsonl", "curvtools.recite._greedy"),
])
def test_cancel_leaves_nothing(run, bad, monkeypatch, line, where):
    there = sorted(p.name for p in bad.iterdir())
    monkeypatch.setattr(where, interrupt)
    code, _, err = run(line)
    assert code == 130 and "cancelled" in err and sorted(p.name for p in bad.iterdir()) == there


COLLECT = "collect lm --text text.txt --blocks -1 --length 32 --seed 3 --out"


def test_a_cancelled_collect_goes_on(run, bad, monkeypatch):
    "Ctrl-C while the second snapshot is written; the same command again gives the factors of a run without Ctrl-C, to the bit."
    from curvtools import kfac
    assert run(f"{COLLECT} whole.safetensors")[0] == 0
    weights, real, n = (bad/"lm"/"model.safetensors").read_bytes(), kfac._write_snapshot, []
    def write(*args):
        real(*args); n.append(args[-1]["read"])
        if len(n) == 2: signal.raise_signal(signal.SIGINT)
    monkeypatch.setattr(kfac, "_write_snapshot", write)
    line = f"{COLLECT} again.safetensors --snapshot sums --every 256"
    code, _, err = run(line)
    assert code == 130 and err.strip().splitlines()[-1] == "cancelled; sums keeps what 496 tokens gave; the same command again goes on from there"
    assert sorted({*n}) == [1, 2] and not (bad/"again.safetensors").exists() and (bad/"lm"/"model.safetensors").read_bytes() == weights
    code, _, err = run(line.replace("--seed 3", "--seed 4"))
    assert code == 2 and "sums was made with another seed: 3 and not 4; give the options of then, or give this run another --snapshot" in err
    code, out, _ = run(line)
    assert code == 0 and n[-1] == 2 and "no longer needed: sums" in out
    a, b = (kfac.Factors.load(bad/f"{k}.safetensors") for k in ("whole", "again"))
    assert all(torch.equal(a[k].A, b[k].A) and torch.equal(a[k].G, b[k].G) and a[k].count == b[k].count for k in a) and a.meta == b.meta


@pytest.mark.parametrize("more, says", [
    ("", "cancelled; nothing was written; with --snapshot FILE the next run can be gone on with"),
    ("--snapshot none", "cancelled; none was not written, as no batch was done; the same command again starts anew"),
])
def test_cancel_says_how_to_go_on(run, bad, monkeypatch, more, says):
    monkeypatch.setattr("curvtools.kfac.sample_labels", interrupt)
    code, _, err = run(f"{COLLECT} x {more}")
    assert code == 130 and err.strip().splitlines()[-1] == says and not (bad/"none").exists() and not (bad/"x").exists()


def test_the_snapshot_of_a_process_is_named(bad, monkeypatch):
    shutil.copy(bad/"ok.safetensors", bad/"s.1of2"); monkeypatch.setenv("WORLD_SIZE", "2"); monkeypatch.setenv("RANK", "1")
    a = curvtools.cli._parser().parse_args(["collect", "lm", "--out", "x", "--snapshot", str(bad/"s")])
    assert f"{bad/'s.1of2'} was not written" in curvtools.cli._kept(a)   # it holds no sums


def test_collect_passes_its_options_on(run, bad, monkeypatch):
    got = {}
    def collect(model, w, **kw): got.update(kw); return real(model, w, **kw)
    real = curvtools.kfac.collect
    monkeypatch.setattr("curvtools.kfac.collect", collect)
    code, out, _ = run(f"{COLLECT} opt.safetensors --stop .9 --on-nan skip --mc-samples 2")
    assert code == 0 and (got["stop"], got["on_nan"], got["mc_samples"]) == (.9, "skip", 2) and "snapshot" not in got and re.search(r"--stop: even and odd batches agree to [\d.]+, enough to end", out)
    code, out, _ = run(f"{COLLECT} opt.safetensors --stop converged --tokens 64")
    assert code == 0 and got["stop"] == "converged" and "never compared" in out


def test_too_little_memory_is_one_line(run, bad, monkeypatch):
    monkeypatch.setattr("curvtools.kfac.available_memory", lambda d: 1000)
    code, _, err = run(f"{COLLECT} x")
    assert code == 2 and "curvtools collect: this needs" in err and "give a smaller --length" in err and "Traceback" not in err


def test_a_full_disk_leaves_nothing(run, bad, monkeypatch):
    def full(*a, **kw): raise OSError(28, "No space left on device")
    monkeypatch.setattr("curvtools.edit.save_edit", full)
    there = sorted(p.name for p in bad.iterdir())
    code, _, err = run("edit lm ok.safetensors --rho .5 --out x")
    assert code == 2 and "No space left" in err and sorted(p.name for p in bad.iterdir()) == there
