"""What goes wrong on the way: killed at any moment, disk full, two jobs on one file, NaN, memory that does not suffice. The factors are those of a run without trouble, to the bit where that can be.

CURVTOOLS_KILLS=50 sets how many processes are killed (5 otherwise)."""
import os
import shutil
import subprocess
import sys
import textwrap

import pytest
import torch
from test_kfac import near, pad, sequences, snapshot as look, same
from tiny import V, tiny

import curvtools.kfac as kfac
from curvtools.kfac import collect

TESTS = os.path.dirname(os.path.abspath(__file__))
IDS = torch.randint(3, V, (12, 9), generator=torch.Generator().manual_seed(0))
KW = dict(targets="all", progress=False)


def equal(a, b): return list(a) == list(b) and all(torch.equal(a[n].A, b[n].A) and torch.equal(a[n].G, b[n].G) and a[n].count == b[n].count for n in a) and a.meta == b.meta


def until(k, batches):
    yield from batches[:k]
    raise ConnectionError("gone")


def run(code, *args):
    "A Python program of its own, in the folder of the tests."
    return subprocess.run([sys.executable, "-c", textwrap.dedent(code), *map(str, args)], capture_output=True, text=True, cwd=TESTS, env=dict(os.environ, PYTHONPATH=os.pathsep.join([TESTS, os.path.dirname(TESTS)])))


KILLER = """
    import os, pathlib, random, signal, sys, time, torch
    from tiny import V, tiny
    from curvtools.kfac import Factors, collect
    folder, kills, random_ = pathlib.Path(sys.argv[1]), int(sys.argv[2]), random.Random(int(sys.argv[3]))
    torch.set_num_threads(1)
    model, data = tiny("llama", torch.float32), list(torch.randint(3, V, (240, 24), generator=torch.Generator().manual_seed(0)).split(4))
    data[7] = data[3]                                                      # rows that come again: the counter of rows matters
    path, out = folder/"run.safetensors", folder/"out.safetensors"
    def work(snapshot): collect(model, data, "all", progress=False, snapshot=snapshot, every=200, seed=5).save(out)
    def child():                                                           # forked before anything is computed, killed by its number
        pid = os.fork()
        if pid: return pid
        try: work(path)
        finally: os._exit(0 if out.exists() else 1)
    pid = os.fork()
    if not pid: work(None); os.rename(out, folder/"straight.safetensors"); os._exit(0)
    start = time.time(); assert os.waitpid(pid, 0)[1] == 0; whole = time.time() - start
    want, done, finished, writing, early, ended = Factors.load(folder/"straight.safetensors"), 0, 0, 0, 0, False
    while done < kills or not ended:                                       # the last one comes to its end, and clears away what was left
        pid, ended = child(), False
        if done < kills:
            time.sleep(random_.random() * whole * .6)
            os.kill(pid, signal.SIGKILL); _, status = os.waitpid(pid, 0)
            if os.WIFSIGNALED(status): done += 1; writing += any(folder.glob("run.safetensors.*.tmp")); early += not path.exists(); continue
        else: _, status = os.waitpid(pid, 0)
        assert status == 0, status
        got = Factors.load(out); finished += 1; ended = True
        assert got.meta == want.meta and all(torch.equal(got[n].A, want[n].A) and torch.equal(got[n].G, want[n].G) and got[n].count == want[n].count for n in want)
        out.unlink(); path.unlink()                                        # from the start again
    print(f"{done} kills, {writing} of them while a snapshot was written, {early} before the first; {finished} runs came to their end, each bit-identical; left: {sorted(p.name for p in folder.iterdir())}")
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_at_any_moment(tmp_path, capsys):
    r = run(KILLER, tmp_path, os.environ.get("CURVTOOLS_KILLS", 5), 0)
    assert r.returncode == 0, r.stderr[-2000:]
    with capsys.disabled(): print("\n" + r.stdout.strip())
    assert ".tmp" not in r.stdout.split("left:")[1]


def test_what_was_done_is_not_done_again(tmp_path, monkeypatch):
    model, p, calls = tiny("llama"), tmp_path/"s", []
    one = kfac._one_batch
    monkeypatch.setattr(kfac, "_one_batch", lambda *a: (calls.append(1), one(*a))[1])
    with pytest.raises(ConnectionError) as e: collect(model, until(4, IDS.split(2)), snapshot=p, every=2 * 2 * 9, **KW)   # a snapshot every second batch
    assert e.value.partial.meta["batches"] == 4
    calls.clear(); got = collect(model, IDS.split(2), snapshot=p, every=36, **KW); assert len(calls) == 2
    assert equal(got, collect(model, IDS.split(2), **KW))
    calls.clear(); assert equal(collect(model, iter(IDS.split(2)), snapshot=p, **KW), got) and not calls      # finished: the same call returns at once
    more = [*IDS.split(2), IDS[:3]]
    calls.clear(); assert equal(collect(model, more, snapshot=p, **KW), collect(model, more, **KW)) and len(calls) == 1 + len(more)


def test_only_its_own_run_goes_on(tmp_path):
    model, p, data = tiny("llama"), tmp_path/"s", IDS.split(2)
    with pytest.raises(ConnectionError): collect(model, until(3, data), snapshot=p, every=1, labels="data", **KW)
    raw = p.read_bytes()
    edited = tiny("llama"); edited.model.embed_tokens.weight.data[0, 0] += 1           # no target, and still another model
    relabelled = [dict(input_ids=b, labels=torch.where(b == b[0, 1], -100, b)) for b in data]
    for m, kw, match in ((edited, {}, "another model"), (model, dict(seed=1), "another seed: 0 and not 1"), (model, dict(labels="sample"), "another labels"), (model, dict(targets="mlp"), "another targets"),
                         (model, dict(blocks=[1]), "another targets"), (model, dict(chunk=7), "another chunk"), (tiny("llama", torch.float32), {}, "another"), (model, dict(batches=data[::-1]), "other data"),
                         (model, dict(batches=relabelled), "other data"), (model, dict(batches=IDS.split(3)), "other data|has only"), (model, dict(batches=data[:2]), "only 2")):
        with pytest.raises(ValueError, match=match) as e: collect(m, **(dict(batches=data, labels="data", snapshot=p) | KW | kw))
        assert getattr(e.value, "partial", None) is None and p.read_bytes() == raw
    for cut in (raw[:100], raw[:-9]):
        p.write_bytes(cut)
        with pytest.raises(ValueError, match="complete safetensors"): collect(model, data, snapshot=p, labels="data", **KW)
    for kw in (dict(every=0), dict(on_nan="drop")):
        with pytest.raises(ValueError): collect(model, data, **kw, **KW)


def test_two_jobs_on_one_file(tmp_path):
    model, p = tiny("llama"), tmp_path/"s"
    def other():
        yield IDS[:2]
        with pytest.raises(RuntimeError, match="belongs to another collect"): collect(tiny("llama"), IDS.split(2), snapshot=p, **KW)
        yield IDS[2:]
    assert collect(model, other(), snapshot=p, **KW).meta["batches"] == 2
    collect(model, iter([IDS[:2], IDS[2:]]), snapshot=p, **KW)                                   # free again


def test_the_disk_is_full(tmp_path, monkeypatch):
    model, p, data, save, times = tiny("llama"), tmp_path/"s", IDS.split(2), kfac.save_tensors, []
    def full(path, *a):
        times.append(path)
        if len(times) > 2: raise OSError(28, "No space left on device")
        save(path, *a)
    monkeypatch.setattr(kfac, "save_tensors", full); before = look(model)
    with pytest.raises(OSError, match=r"No space left.*one before it is in place.*snapshot=") as e: collect(model, data, snapshot=p, every=1, **KW)
    assert e.value.errno == 28 and e.value.filename == str(p) and e.value.partial.meta["batches"] == 3 and same(before, look(model))
    monkeypatch.undo()
    assert equal(e.value.partial, collect(model, data[:3], **KW)) and equal(collect(model, data, snapshot=p, **KW), collect(model, data, **KW))


FULL = """
    import os, pathlib, sys, torch
    from tiny import V, tiny
    from curvtools.kfac import collect
    model, data = tiny("llama", torch.float32), torch.randint(3, V, (10, 24)).split(2)
    p = pathlib.Path(sys.argv[1])/"run.safetensors"
    try: collect(model, data[:1], "all", progress=False, snapshot=p)
    except OSError: sys.exit(9)
    free = os.statvfs(p.parent).f_bavail * os.statvfs(p.parent).f_frsize
    (p.parent/"filler").write_bytes(b"x" * (free - p.stat().st_size // 2))      # room for half a snapshot
    try: collect(model, data, "all", progress=False, snapshot=p, every=1)
    except OSError as e:
        print(e); (p.parent/"filler").unlink()
        assert e.partial.meta["batches"] == 2 and not list(p.parent.glob("*.tmp"))
        a, b = collect(model, data, "all", progress=False, snapshot=p), collect(model, data, "all", progress=False)
        assert all(torch.equal(a[n].G, b[n].G) for n in a); print("gone on")
"""


def test_a_disk_that_is_really_full(tmp_path):
    "A file system of 1 MB, where we may mount one."
    if not shutil.which("unshare"): pytest.skip("no unshare here")
    r = subprocess.run(["unshare", "-rm", "sh", "-c", f"mount -t tmpfs -o size=1m none {tmp_path} || exit 77; exec {sys.executable} - {tmp_path}"], capture_output=True, text=True, input=textwrap.dedent(FULL),
                       cwd=TESTS, env=dict(os.environ, PYTHONPATH=os.pathsep.join([TESTS, os.path.dirname(TESTS)])))
    if r.returncode == 77 or "unshare" in r.stderr: pytest.skip("no mount allowed here")
    assert r.returncode == 0, r.stderr[-2000:]
    assert "run.safetensors" in r.stdout and "in place" in r.stdout and "gone on" in r.stdout, r.stdout


@pytest.mark.parametrize("where", ["embedding", "logits"])
def test_a_batch_with_nan_is_skipped(where, tmp_path):
    model = tiny("llama")
    bad = torch.full((2, 9), 5)
    if where == "embedding": model.model.embed_tokens.weight.data[5] = torch.inf; good = IDS.masked_fill(IDS == 5, 6)
    else: model.model.embed_tokens.weight.data[5] = 1e307 * torch.ones(16); good = IDS.masked_fill(IDS == 5, 6)   # overflows in a sum, not in a row
    data = [good[:4], bad, good[4:8], bad, good[4:]]
    got, want = collect(model, data, on_nan="skip", **KW), collect(model, [data[0], data[2], data[4]], **KW)
    assert got.meta.pop("skipped") == 2 and equal(got, want)
    with pytest.raises(FloatingPointError, match='batch 2.*on_nan="skip"'): collect(model, data, **KW)
    with pytest.raises(ValueError, match="all 1 batches give NaN"): collect(model, [bad], on_nan="skip", **KW)
    p = tmp_path/"s"
    with pytest.raises(ConnectionError): collect(model, until(3, data), on_nan="skip", snapshot=p, every=1, **KW)
    again = collect(model, data, on_nan="skip", snapshot=p, **KW)
    assert "2 batches with NaN or infinity skipped" in repr(again)
    assert again.meta.pop("skipped") == 2 and equal(again, want)


def too_much(model, positions, where):
    "From more than `positions` in a batch on, memory runs out: in block `where`, on the way up or down. Returns the sizes that were tried."
    tried = []
    def hook(m, args, out):
        n = out.shape[0] * out.shape[1]; tried.append(n)
        def strike(g=None):
            if n > positions: raise torch.OutOfMemoryError(f"simulated: {n} positions")
        if where[0] == "up": strike()
        elif out.requires_grad: out.register_hook(strike)
    model.model.layers[where[1]].mlp.down_proj.register_forward_hook(hook)
    return tried


@pytest.mark.parametrize("where", [("up", 0), ("up", 2), ("down", 0), ("down", 1), ("down", 2)])
def test_memory_runs_out(where):
    "Half the rows, and half again: no token lost, none twice, in no sum; the same labels."
    seqs = sequences((9, 6, 11, 4, 11, 9, 3), (0,) * 7)
    data = [pad(seqs), pad(seqs[:4], "left"), pad(seqs[2:])]
    for b in data: b.pop("labels")
    want = collect(tiny("llama"), data, **KW)
    model = tiny("llama"); tried = too_much(model, 25, where)
    got = collect(model, data, **KW)
    for n in want: assert near(got[n].A, want[n].A) and near(got[n].G, want[n].G) and got[n].count == want[n].count, n
    assert sum(t > 25 for t in tried) == 2                                       # 70 and 30; no more than 15 from then on, in later batches too
    small = collect(tiny("llama"), [{k: v[i:i + 2] for k, v in b.items()} for b in data for i in range(0, len(b["input_ids"]), 2)], **KW)
    for n in want: assert near(got[n].A, small[n].A) and near(got[n].G, small[n].G)


def test_one_window_alone_does_not_fit():
    model = tiny("llama"); too_much(model, 9, ("up", 1)); before = look(model)
    with pytest.raises(torch.OutOfMemoryError, match="one window of 27 tokens.*shorter.*blocks.*chunk"): collect(model, [IDS.repeat(1, 3)], **KW)
    assert same(before, look(model))


def test_halving_goes_into_the_snapshot(tmp_path):
    "A run that goes on keeps the size of pieces, so that rounding is the same too."
    data = IDS.repeat(1, 3).split(6)
    def limited(): m = tiny("llama", torch.float32); too_much(m, 60, ("up", 1)); return m
    want = collect(limited(), data, **KW)
    with pytest.raises(ConnectionError): collect(limited(), until(1, data), snapshot=tmp_path/"s", every=1, **KW)
    assert equal(collect(limited(), data, snapshot=tmp_path/"s", **KW), want)


def test_stopping_when_halves_agree(tmp_path):
    "Even and odd batches add up to the whole; the run ends where they agree, and a run that is taken up ends there too."
    model = tiny("llama"); data = torch.randint(3, V, (64, 33), generator=torch.Generator().manual_seed(0)).split(2)
    whole, never = collect(model, data, **KW), collect(model, data, stop=1e-9, **KW)
    for n in whole: assert near(never[n].A, whole[n].A) and near(never[n].G, whole[n].G) and never[n].count == whole[n].count
    assert .5 < never.meta.pop("agreement") < 1.1 and never.meta == whole.meta
    soon = collect(model, data, stop=.5, **KW)
    assert soon.meta["batches"] == 2 and soon.meta["agreement"] > .5                       # 4 x 24 tokens, to an even number of batches
    p, kw = tmp_path/"s", dict(stop=.3, every=1) | KW
    want = collect(model, data, **kw); assert want.meta["batches"] < len(data)
    with pytest.raises(ConnectionError) as e: collect(model, until(3, data), snapshot=p, **kw)
    assert e.value.partial.meta["batches"] == 3
    def no_further(): yield from data[:want.meta["batches"]]; raise AssertionError
    for batches in (data, no_further(), data): assert equal(collect(model, batches, snapshot=p, **kw), want)
    for bad in ("soon", 0, 1., -.1):
        with pytest.raises(ValueError, match="converged"): collect(model, data, stop=bad, **KW)
    skipping = collect(model, data, stop=.5, on_nan="skip", **KW); assert equal(skipping, soon)


def test_ctrl_c_keeps_all_whole_batches(tmp_path):
    "However rarely snapshots are written, one is at a Ctrl-C, and the same call goes on from there, to the bit."
    import signal
    model, p, batches = tiny("llama"), tmp_path/"s", IDS.split(2)
    def stopped():
        for i, b in enumerate(batches):
            if i == 4: signal.raise_signal(signal.SIGINT)
            yield b
    with pytest.raises(KeyboardInterrupt): collect(model, stopped(), snapshot=p, every=10**9, **KW)
    assert kfac.load_tensors(p, kfac._SNAPSHOT)[1]["state"]["read"] == 4
    assert equal(collect(model, batches, snapshot=p, every=10**9, **KW), collect(model, batches, **KW))


@pytest.mark.parametrize("twice", [True, False])
def test_a_batch_that_is_in_the_sums_in_part_is_not_handed_out(twice):
    "After a second Ctrl-C, or an error on the way down, `A` has seen rows that `G` has not."
    import signal
    model, n = tiny("llama"), [0]
    def stop(m, args, out):
        n[0] += args[0].shape[1] > 5
        if n[0] == 2 and twice: signal.raise_signal(signal.SIGINT); signal.raise_signal(signal.SIGINT)
        if n[0] == 2: raise RuntimeError("boom")
    model.model.layers[2].mlp.down_proj.register_forward_hook(stop)
    with pytest.raises(KeyboardInterrupt if twice else RuntimeError) as e: collect(model, IDS.split(6), on_interrupt="return", **KW)
    assert e.value.partial is None


def test_a_snapshot_of_another_wiring_is_refused(tmp_path):
    "The same weights in a model that computes something else."
    p = tmp_path/"s"; collect(tiny("gpt2"), IDS.split(4), snapshot=p, **KW)
    other = tiny("gpt2"); other.config.layer_norm_epsilon = other.transformer.ln_f.eps = .1
    with pytest.raises(ValueError, match="another config"): collect(other, IDS.split(4), snapshot=p, **KW)
    with pytest.raises(ValueError, match="is a folder: name a file in it"): collect(other, IDS.split(4), snapshot=tmp_path, **KW)


BAD = [("state", None), ("state", {}), *[("state", {k: v}) for k, v in [("read", "1"), ("most", "a"), ("most", 0), ("skipped", 3), ("skipped", ["x"]), ("checks", 7), ("checks", [[1]]), ("n", .5), ("n", -1), ("done", True), ("all", 3)]],
       ("counts", {}), ("counts", -9), ("counts", float("nan")), ("whose", []), ("sum", (1, 1)), ("sum", torch.float16), ("times", -1), ("keys", torch.int32)]

@pytest.mark.parametrize("what,bad", BAD, ids=str)
def test_a_snapshot_that_nobody_wrote_is_refused(what, bad, tmp_path):
    "With a checksum that is right."
    p = tmp_path/"s"; collect(tiny("gpt2"), IDS.split(4), snapshot=p, **KW)
    tensors, d = kfac.load_tensors(p, kfac._SNAPSHOT); first = next(iter(d["counts"]))
    if what == "sum": tensors[first] = tensors[first][:1, :1] if isinstance(bad, tuple) else tensors[first].to(bad)
    elif what in tensors: tensors[what] = tensors[what].to(bad) if isinstance(bad, torch.dtype) else tensors[what] * bad
    elif what == "counts" and bad != {}: d["counts"][first] = bad
    else: d[what] = dict(d[what], **bad) if what == "state" and bad else bad
    kfac.save_tensors(p, kfac._SNAPSHOT, tensors, d)
    with pytest.raises(ValueError, match="is damaged"): collect(tiny("gpt2"), IDS.split(4), snapshot=p, **KW)


def test_an_image_with_nan_is_skipped():
    model = tiny("vit"); good, bad = (torch.randn(3, 3, 8, 8, dtype=torch.float64) for _ in range(2)); bad[1, 0, 0, 0] = torch.nan
    with pytest.raises(FloatingPointError, match='on_nan="skip"'): collect(model, [dict(pixel_values=good), dict(pixel_values=bad)], **KW)
    for order in ((good, bad), (bad, good)):
        f = collect(model, [dict(pixel_values=x) for x in order], on_nan="skip", **KW)
        assert f.meta["skipped"] == 1 and all(torch.equal(f[n].A, x.A) and torch.equal(f[n].G, x.G) for n, x in collect(model, [dict(pixel_values=good)], **KW).items())


@pytest.mark.parametrize("where", ["note", "check"])
def test_a_second_ctrl_c_after_the_sums(where, tmp_path, monkeypatch):
    "The batch is in the sums and not yet in the counters: no snapshot of that is written, and nothing is counted twice."
    import signal
    model, p, batches = tiny("llama"), tmp_path/"s", IDS.split(2); real, n = getattr(kfac._Run, where), [0]
    def twice(self, *args):
        n[0] += 1
        if n[0] == 4: signal.raise_signal(signal.SIGINT); signal.raise_signal(signal.SIGINT)
        return real(self, *args)
    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt) as e:
        m.setattr(kfac._Run, where, twice); collect(model, batches, snapshot=p, every=32, **KW)
    assert e.value.partial is None and kfac.load_tensors(p, kfac._SNAPSHOT)[1]["state"]["read"] < 4
    assert equal(collect(model, batches, snapshot=p, every=32, **KW), collect(model, batches, **KW))


def test_a_snapshot_outlives_saving_the_model(tmp_path):
    "save_pretrained writes class and dtype into the configuration."
    model, p, batches = tiny("llama"), tmp_path/"s", IDS.split(2)
    with pytest.raises(ConnectionError): collect(model, until(3, batches), snapshot=p, every=1, **KW)
    model.save_pretrained(tmp_path/"m")
    assert equal(collect(model, batches, snapshot=p, every=1, **KW), collect(model, batches, **KW))
