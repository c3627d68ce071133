"""Two real processes (gloo) against one: equal factors, whatever the shards; and whatever goes wrong ends both with its reason.

All scenes run in one pair of processes, as their imports take longer than all of them together; each scene leaves a file."""
import json
import os
import pathlib
import socket
import subprocess
import sys
import textwrap

import pytest
import torch
from tiny import V, tiny

from curvtools.kfac import Factors, collect
from curvtools.scale import Shard, _dealt, _in_groups, collect_in_groups, eigen_files, shard
from curvtools.targets import find_targets, weight

TESTS = pathlib.Path(__file__).parent
DATA = """
def batches(n=7):
    g = lambda i: torch.Generator().manual_seed(i)
    pad = lambda i: dict(input_ids=torch.randint(3, 37, (3, 9), generator=g(i)), attention_mask=torch.ones(3, 9, dtype=torch.long).tril(6 + i % 3))
    return [torch.randint(3, 37, (2 + i % 3, 8 + i), generator=g(i)) if i % 2 else pad(i) for i in range(n)]
"""
exec(DATA)

SCENES = """
    import json, os, pathlib, sys, torch, torch.distributed as dist
    torch.set_num_threads(1)
    from datetime import timedelta
    from curvtools.baselines import ekfac, second_moments
    from curvtools.budget import forecast
    from curvtools.kfac import collect, _peers
    from curvtools.scale import collect_in_groups, eigen_files, eigen_spread, shard
    from tiny import tiny
    rank = int(os.environ["RANK"]); model, moe = tiny("llama"), tiny("mixtral"); kw = dict(progress=False); box = {}
    words = {}
    def scene(name, f, alone=None):
        if alone not in (None, rank): return
        try: box[name] = f(); box[name].save(f"{name}.{rank}") if hasattr(box[name], "save") else None
        except BaseException as e: words[name] = f"{type(e).__name__}: {e}"; box[name] = getattr(e, "partial", None)
        pathlib.Path(f"words.{rank}").write_text(json.dumps(words))
    def until(k, error, mine=1):
        def stream():
            for i, b in enumerate(shard(batches())):
                if i == k and rank == mine: raise error
                yield b
        return stream()

    scene("not initialised", lambda: collect(model, batches()))
    scene("uninitialised but alone", lambda: collect(model, batches(2), alone=True, **kw))
    dist.init_process_group("gloo", timeout=timedelta(seconds=120))
    scene("all", lambda: collect(model, shard(batches()), "all"))
    scene("data", lambda: collect(model, shard(batches()), labels="data", **kw))
    scene("empty", lambda: collect(model, batches() if rank == 1 else [], **kw))
    scene("nothing", lambda: collect(model, [], **kw))
    scene("experts", lambda: collect(moe, shard(batches()), "experts", **kw))
    scene("stop", lambda: collect(model, shard(batches()), stop=.5, **kw))
    scene("skipped", lambda: collect(model, until(9, None), on_nan="skip", sums="cpu", **kw))
    scene("alone", lambda: collect(model, batches(2), alone=True, **kw), alone=0)
    scene("same", lambda: collect(model, batches(), **kw))
    scene("repeated", lambda: collect(model, shard([batches(2)[1]] * 2), labels="data", **kw))
    scene("seed", lambda: collect(model, shard(batches()), seed=rank, **kw))
    scene("weights", lambda: collect(tiny("llama", seed=rank), shard(batches()), **kw))
    scene("fails", lambda: collect(model, until(1, OSError("the text is gone")), **kw))
    scene("interrupted", lambda: collect(model, until(1, KeyboardInterrupt()), on_interrupt="return", **kw))
    scene("cut", lambda: collect(model, until(2, OSError("down")), snapshot="snap", every=1, **kw))
    scene("resumed", lambda: collect(model, shard(batches()), snapshot="snap", every=1, **kw))
    if rank == 0: pathlib.Path("other.2of3").touch()
    dist.barrier()
    scene("others", lambda: collect(model, shard(batches()), snapshot="other", **kw))
    scene("basis", lambda: eigen_spread(box["all"], progress=False))
    scene("moments", lambda: second_moments(model, box["basis"], shard(batches()), progress=False))
    scene("one pass", lambda: ekfac(model, shard(batches()), targets="all", progress=False)[1])
    scene("groups", lambda: [str(p) for p in collect_in_groups(model, shard(batches()), "groups", 8_000, **kw)])
    scene("groups, kept", lambda: [1/0 for p, q in zip(box["groups"], collect_in_groups(model, shard(batches()), "groups", 8_000, **kw)) if p != str(q)])
    scene("groups, of other data", lambda: collect_in_groups(model, shard(batches()[1:]), "groups", 8_000, **kw))
    scene("files", lambda: eigen_files(box["groups"], "bases"))
    def cut_up():
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard
        m, mesh = tiny("llama"), init_device_mesh("cpu", (2,))               # else it goes to a GPU where there is one
        for block in m.model.layers: fully_shard(block, mesh=mesh)
        return fully_shard(m, mesh=mesh)
    sharded = cut_up()
    scene("fsdp", lambda: collect(sharded, shard(batches()), "all", **kw))
    scene("fsdp, one has nothing", lambda: collect(sharded, batches() if rank == 1 else [], labels="data", **kw))
    scene("fsdp, three labels", lambda: collect(sharded, shard(batches()), mc_samples=3, **kw))
    scene("fsdp, stops", lambda: collect(sharded, shard(batches()), stop=.5, **kw))
    scene("fsdp, moments", lambda: second_moments(sharded, box["basis"], shard(batches()), progress=False))
    def edited():
        kept = [(p, p.requires_grad) for p in sharded.parameters()]
        before = {n: p.full_tensor().clone() for n, p in sharded.named_parameters()}
        plain, edit = tiny("llama"), box["fsdp"].eigen(sharded, progress=False).keep(rho=.5, blocks=[1])
        with edit.applied(sharded), edit.applied(plain, force=True):
            out, want = (m(batches()[1]).logits for m in (sharded, plain)); moved = float((tiny("llama")(batches()[1]).logits - want).abs().max())
        for m in sharded.modules(): m.reshard() if hasattr(m, "reshard") else None
        same = all(torch.equal(p.full_tensor(), before[n]) for n, p in sharded.named_parameters()) and all(p.requires_grad == f for p, f in kept)
        return dict(off=float((out - want).abs().max()), moved=moved, same=same)
    scene("fsdp, edited", edited)
    pathlib.Path(f"edited.{rank}").write_text(json.dumps(box["fsdp, edited"]))
    def trained():                                                               # gradients flow as before a collection
        loss = sharded(batches()[1]).logits.square().mean(); loss.backward(); return {n: p.grad.full_tensor() for n, p in sharded.named_parameters()}
    def plainly(): m = tiny("llama"); m(batches()[1]).logits.square().mean().backward(); return {n: p.grad for n, p in m.named_parameters()}
    scene("fsdp, trains", lambda: 1/0 if any(not torch.allclose(g, plainly()[n], atol=1e-12) for n, g in trained().items()) else None)
    for name, kws in (("exact", dict(labels="exact")), ("skip", dict(on_nan="skip")), ("snapshot", dict(snapshot="no")), ("alone", dict(alone=True)), ("interrupt", dict(on_interrupt="return"))): scene(f"fsdp {name}", lambda: collect(sharded, shard(batches()), **kws, **kw))
    scene("fsdp forecast", lambda: forecast(sharded, (2, 8)))
    def sliced():
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
        return parallelize_module(tiny("llama"), init_device_mesh("cpu", (2,)), {f"model.layers.*.mlp.{p}_proj": way() for p, way in dict(gate=ColwiseParallel, up=ColwiseParallel, down=RowwiseParallel).items()})
    scene("sliced", lambda: collect(sliced(), shard(batches()), **kw))
    dist.distributed_c10d._get_default_store().set_timeout(timedelta(seconds=4))
    if rank == 1: _peers(); os._exit(7)                                      # it was there, and is killed
    scene("killed", lambda: collect(model, shard(batches()), **kw))
"""


def _start(script, n):
    "The script in n processes that can find each other."
    with socket.socket() as s: s.bind(("127.0.0.1", 0)); port = s.getsockname()[1]
    env = dict(os.environ, WORLD_SIZE=str(n), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), OMP_NUM_THREADS="1", PYTHONPATH=os.pathsep.join([str(TESTS.parent), str(TESTS)]))
    return [subprocess.Popen([sys.executable, script.name], cwd=script.parent, env=dict(env, RANK=str(r)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for r in range(n)]


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    "The folder in which two processes have played all scenes."
    at = tmp_path_factory.mktemp("two")
    (at/"scenes.py").write_text(textwrap.dedent(SCENES).replace("words = {}", DATA + "words = {}", 1))
    ps = _start(at/"scenes.py", 2)
    try: said = [p.communicate(timeout=540)[0] for p in ps]
    finally: [p.kill() for p in ps]
    assert [p.returncode for p in ps] == [0, 7], "\n".join(said)[-4000:]
    (at/"said.0").write_text(said[0]); (at/"said.1").write_text(said[1])
    return at


def words(at, name): return [json.loads((at/f"words.{r}").read_text()).get(name, "") for r in range(2)]


def near(a, b, tol=1e-12): return list(a) == list(b) and all(a[n].count == b[n].count and (a[n].A - b[n].A).norm() <= tol * b[n].A.norm() and (a[n].G - b[n].G).norm() <= tol * b[n].G.norm() for n in b)


def both(at, name):
    "What the two got, which must be the same to the bit."
    a, b = (Factors.load(at/f"{name}.{r}") for r in range(2))
    assert all(torch.equal(a[n].A, b[n].A) and torch.equal(a[n].G, b[n].G) for n in a) and a.meta == b.meta
    return a


@pytest.mark.parametrize("name,kw", [("all", dict(targets="all")), ("data", dict(labels="data")), ("empty", {}), ("experts", dict(targets="experts")), ("resumed", {}), ("skipped", {}),
                                     ("fsdp", dict(targets="all")), ("fsdp, one has nothing", dict(labels="data")), ("fsdp, three labels", dict(mc_samples=3))])
def test_equal_to_one_process(two, name, kw):
    got, one = both(two, name), collect(tiny("mixtral" if name == "experts" else "llama"), batches(), progress=False, **kw)
    assert near(got, one) and got.meta["processes"] == 2 and got.meta["batches"] == 7
    own = {n for n in got if got[n].target.projection == "up"}
    assert all(got[n].A is got[n.replace("up_proj", "gate_proj")].A or torch.equal(got[n].A, got[n.replace("up_proj", "gate_proj")].A) for n in own)


def test_float32_to_one_in_a_million():
    "Single precision, in one process: the sums of shards add up as `Peers.reduce` adds them."
    model = tiny("llama", torch.float32)
    one, parts = collect(model, batches(), progress=False), [collect(model, shard(batches(), r, 3), progress=False) for r in range(3)]
    assert near(parts[0] + parts[1] + parts[2], one, 1e-6)


def test_only_process_0_speaks(two):
    said = [(two/f"said.{r}").read_text() for r in range(2)]
    assert said[0].count("collect:") == 1 and "collect:" not in said[1]


def test_stops_by_itself(two):
    got = both(two, "stop")
    assert got.meta["agreement"] <= 2 and got.meta["batches"] <= 7


def test_cut_up_by_fsdp(two):
    "What one process has to stop for the other stops for too; moments; an edit written piece by piece."
    from curvtools.baselines import Moments
    assert both(two, "fsdp, stops").meta["batches"] <= 7
    a, b = Moments.load(two/"fsdp, moments.0"), Moments.load(two/"moments.0")
    assert all(torch.allclose(a[n], b[n], rtol=1e-8) for n in b)
    for r in range(2):
        said = json.loads((two/f"edited.{r}").read_text())
        assert said["off"] < 1e-12 and said["moved"] > 1e-3 and said["same"]


def test_alone(two):
    for name in ("alone.0", "uninitialised but alone.0", "uninitialised but alone.1"): assert near(Factors.load(two/name), collect(tiny("llama"), batches(2), progress=False))


def test_interrupted_in_one_process(two):
    got = both(two, "interrupted")                                           # process 1 stopped after its first batch, 0 went on to its end
    assert near(got, collect(tiny("llama"), [b for i, b in enumerate(batches()) if i in (0, 2, 4, 6, 1)], progress=False))


def test_repeated_rows_are_no_error_in_a_shard(two):
    assert near(both(two, "repeated"), collect(tiny("llama"), [batches(2)[1]] * 2, labels="data", progress=False))


def test_a_row_in_two_processes_has_the_same_draw_twice():
    "What the notebook says about sampled labels: the first occurrence is drawn alike everywhere, the second is not."
    model, b = tiny("llama"), batches(2)[1]
    one, first = collect(model, [b, b], progress=False), collect(model, [b], progress=False)
    n = next(iter(one))
    assert near(first + collect(model, [b], progress=False), first + first) and not torch.allclose(one[n].G, first[n].G)


@pytest.mark.parametrize("name,match", [("not initialised", "init_process_group"), ("nothing", "no process has a batch"), ("same", r"0 and 1 begin with the same batch.*shard"), ("seed", "0 and 1 .*other seed"), ("weights", "other weights"),
                                        ("fails", "the text is gone"), ("cut", "down"), ("others", "of 3 process.*these are 2"), ("sliced", "FSDP2.*device_map"), ("groups, of other data", "other data.*delete it"),
                                        ("fsdp exact", "labels=.exact.*not possible"), ("fsdp skip", "on_nan"), ("fsdp snapshot", "snapshot"), ("fsdp alone", "alone"), ("fsdp interrupt", "on_interrupt"), ("fsdp forecast", "before fully_shard")])
def test_said_in_both(two, name, match):
    import re
    for w in words(two, name): assert re.search(match, w), w


def test_a_killed_process_is_missed(two):
    assert "process 1 of 2 has not been heard of for 4 s" in words(two, "killed")[0]
    assert {k for k in json.loads((two/"words.0").read_text())} == {"not initialised", "nothing", "same", "seed", "weights", "fails", "cut", "others", "groups, of other data", "sliced", "fsdp exact", "fsdp skip", "fsdp snapshot", "fsdp alone", "fsdp interrupt", "fsdp forecast", "killed"}


def test_eigenvectors(two):
    from curvtools.decompose import Basis
    one = collect(tiny("llama"), batches(), "all", progress=False).eigen(progress=False)
    a, b = (Basis.load(two/f"basis.{r}") for r in range(2))
    assert all(torch.equal(a[n].UG, b[n].UG) and torch.equal(a[n].UA, b[n].UA) for n in one)
    assert list(a) == list(one) and all(torch.allclose(a[n].lam, one[n].lam, rtol=1e-8) and torch.allclose(a[n].mu, one[n].mu, rtol=1e-8) for n in one)


def test_second_moments(two):
    from curvtools.baselines import Moments, second_moments
    from curvtools.decompose import Basis
    model, basis = tiny("llama"), Basis.load(two/"basis.0")
    one, got = second_moments(model, basis, batches(), progress=False), Moments.load(two/"moments.1")
    assert all(torch.allclose(got[n], one[n], rtol=1e-6, atol=1e-12) for n in one)


def test_ekfac_in_one_pass(two):
    "Rows stay in their process; what is measured on them is added up."
    from curvtools.baselines import Moments, ekfac
    basis, one = ekfac(tiny("llama"), batches(), targets="all", progress=False)
    got = Moments.load(two/"one pass.0")
    assert got.meta["rows"] == got.meta["of"] == one.meta["of"]
    for n, e in basis.items():                                            # the basis may differ where eigenvalues are tied
        assert abs(float(got[n].sum() - one[n].sum())) < 1e-8 * float(one[n].sum())
        tied = min(float((e.lam[:-1] - e.lam[1:]).min() / e.lam[0]), float((e.mu[:-1] - e.mu[1:]).min() / e.mu[0])) < 1e-10
        assert tied or torch.allclose(got[n], one[n], rtol=1e-6, atol=1e-9 * float(one[n].max()))


def test_groups_and_files_of_two(two):
    from curvtools.decompose import Basis
    one = collect(tiny("llama"), batches(), progress=False)
    got = {n: f for p in sorted((two/"groups").glob("*.safetensors")) for n, f in Factors.load(p).items()}
    assert near(got, one) and len(list((two/"groups").iterdir())) > 2
    whole, parts = one.eigen(progress=False), {n: e for p in (two/"bases").iterdir() for n, e in Basis.load(p).items()}
    assert set(parts) == set(whole) and all(torch.allclose(parts[n].mu, whole[n].mu, rtol=1e-8) for n in whole)


def test_shard():
    import datasets
    items = list(range(11))
    assert sorted(x for r in range(4) for x in shard(items, r, 4)) == items and shard(items) is items
    assert list(shard(iter(items), 1, 4)) == [1, 5, 9] and isinstance(shard(items, 0, 2), Shard)
    ids = torch.arange(40).view(20, 2)
    assert torch.equal(torch.cat([torch.cat(list(shard(ids, r, 2))) for r in range(2)]).sort(0).values, ids)
    ds = datasets.Dataset.from_dict(dict(text=[str(i) for i in items]))
    for d in (ds, ds.to_iterable_dataset(num_shards=3), ds.to_iterable_dataset(num_shards=4)): assert sorted(int(x["text"]) for r in range(4) for x in shard(d, r, 4)) == items
    with pytest.raises(ValueError, match="counted from 0"): shard(items, 4, 4)


def test_dealt():
    for costs, n in (([5, 4, 3, 3, 3], 2), ([1] * 7, 3), ([8], 4), ([], 2)):
        who = _dealt(costs, n); load = [sum(c for c, w in zip(costs, who) if w == r) for r in range(n)]
        assert max(load) <= 4 / 3 * max(sum(costs) / n, max(costs, default=0))


def test_groups_in_one_process(tmp_path):
    model = tiny("llama"); one = collect(model, batches(), progress=False)
    assert [len(g) for g in _in_groups(find_targets(model), 1)] == [1] * 9 and len(_in_groups(find_targets(model), 10**9)) == 1
    paths = collect_in_groups(model, batches(), tmp_path, 8_000, progress=False)
    assert near({n: f for p in paths for n, f in Factors.load(p).items()}, one, 0)
    before = [p.stat().st_mtime_ns for p in paths]
    assert collect_in_groups(model, batches(), tmp_path, 8_000, progress=False) == paths and before == [p.stat().st_mtime_ns for p in paths]
    for bad in (dict(seed=1), dict(labels="data")):
        with pytest.raises(ValueError, match="another folder"): collect_in_groups(model, batches(), tmp_path, 8_000, progress=False, **bad)
    with pytest.raises(TypeError, match="only once"): collect_in_groups(model, iter(batches()), tmp_path, 8_000)
    files = eigen_files(paths, tmp_path/"bases"); stamp = [f.stat().st_mtime_ns for f in files]
    assert eigen_files(paths, tmp_path/"bases") == files and stamp == [f.stat().st_mtime_ns for f in files]


class Broken(list):
    "Batches of which the third is interrupted, in the n-th pass."
    def __init__(self, items, n): super().__init__(items); self.n, self.passes = n, 0
    def __iter__(self):
        self.passes += 1
        for i, b in enumerate(list.__iter__(self)):
            if i == 2 and self.passes == self.n: raise KeyboardInterrupt
            yield b


def test_groups_of_other_runs_are_not_mixed(tmp_path):
    model, kw = tiny("llama"), dict(progress=False, blocks=[0, 1])
    call = lambda data, **more: collect_in_groups(model, data, tmp_path, 8_000, **kw, **more)
    paths = call(batches()); paths[-1].unlink()
    stamps = lambda: [p.stat().st_mtime_ns for p in paths if p.exists()]
    before = stamps()
    for more in (dict(mc_samples=4), dict(stop=.5)):
        with pytest.raises(ValueError, match=f"other {next(iter(more))} .*another folder"): call(batches(), **more)
    with pytest.raises(ValueError, match="other data .*delete it"): call(batches()[::-1])
    for data in (batches(5), batches()[:1] + batches()[:0:-1]):              # the first batch is the same
        with pytest.raises(ValueError, match=rf"{paths[-1].name} would be of other data than .*{paths[0].name} .*Delete .*{paths[0].name}, .*{paths[-2].name} and"): call(data)
    assert stamps() == before and not paths[-1].exists()
    for p in paths[1:-1]: p.unlink()
    collect_in_groups(model, batches(5), tmp_path/"other", 8_000, **kw)[1].rename(paths[1])
    with pytest.raises(ValueError, match=f"{paths[1].name} is of other data .*Delete .*{paths[1].name} and"): call(batches())
    paths[1].unlink(); assert call(batches()) == paths and near({n: f for p in paths for n, f in Factors.load(p).items()}, collect(model, batches(), **kw), 0)
    collect(model, batches(), **kw).save(paths[0])
    with pytest.raises(ValueError, match="other targets"): call(batches())
    for p in paths: p.unlink()
    assert call(batches(), stop=.46, alone=True) == call(batches(), stop=.46) == paths and len({Factors.load(p).meta["batches"] for p in paths}) > 1     # passes that end early may read more or less


def test_an_interrupted_group_is_not_saved(tmp_path):
    model, kw = tiny("llama"), dict(progress=False, on_interrupt="return")
    with pytest.warns(UserWarning, match="1 of 5 groups are saved"): paths = collect_in_groups(model, Broken(batches(), 6), tmp_path, 8_000, **kw)
    assert [p.name for p in paths] == ["factors-000of005.safetensors"] and list(tmp_path.iterdir()) == paths
    for n, more in ((6, dict(kw, on_interrupt="raise")), (4, kw)):           # there is nothing to return
        with pytest.raises(KeyboardInterrupt): collect_in_groups(model, Broken(batches(), n), tmp_path/str(n), 8_000, **more)
    assert near({n: f for p in collect_in_groups(model, batches(), tmp_path, 8_000, **kw) for n, f in Factors.load(p).items()}, collect(model, batches(), progress=False), 0)


def test_groups_of_experts_that_nobody_asked(tmp_path):
    from curvtools.decompose import Basis
    model, kw = tiny("mixtral"), dict(blocks=[0], progress=False); data, names = [batches()[1][:1, :4]], find_targets(model, "experts", [0]).names
    one = collect(model, data, "experts", **kw); silent = [n for n in one if not one[n].count]
    assert silent and set(silent) < set(names)
    with pytest.warns(UserWarning, match="no position was routed"): paths = collect_in_groups(model, data, tmp_path/"one", 1, "experts", **kw)
    assert near({n: f for p in paths for n, f in Factors.load(p).items()}, {n: one[n] for n in one if n not in silent}, 0)
    with pytest.warns(UserWarning), pytest.raises(ValueError, match="no position was routed to any"): collect_in_groups(model, data, tmp_path/"none", 10**9, silent, **kw)
    whole = collect_in_groups(model, data, tmp_path/"whole", 10**9, "experts", **kw)
    assert len(whole) == 1 and collect_in_groups(model, data, tmp_path/"whole", 10**9, "experts", **kw) == whole
    assert {n for f in eigen_files(whole, tmp_path/"bases") for n in Basis.load(f)} == set(one) - set(silent)


HOST = """
    import os, sys, time, torch.distributed as dist
    from datetime import timedelta
    from curvtools.kfac import _peers
    dist.init_process_group("gloo", timeout=timedelta(seconds=120)); rank = dist.get_rank()
    dist.distributed_c10d._get_default_store().set_timeout(timedelta(seconds=6))
    with _peers() as p:
        if rank == 0: time.sleep(2)                                          # the others look less and less often
        if rank == 2: p.all("saved", None); os._exit(0)                       # it has heard, but dies before it says so
        p.leave("saved")
    print("left", flush=True); os._exit(0)
"""


def test_the_host_of_the_store_leaves_last(tmp_path):
    "Three processes that end at once, without destroy_process_group; one dies at the end, and is not waited for."
    (tmp_path/"host.py").write_text(textwrap.dedent(HOST))
    ps = _start(tmp_path/"host.py", 3)
    said = [p.communicate(timeout=300)[0] for p in ps]
    assert [p.returncode for p in ps] == [0] * 3 and ["left" in s for s in said] == [True, True, False], "\n".join(said)


def test_eigen_files_reads_only_what_is_whole(tmp_path):
    f = collect(tiny("llama"), batches(2), progress=False); f.save(tmp_path/"f"); raw = bytearray((tmp_path/"f").read_bytes())
    raw[-100] ^= 1; (tmp_path/"bad").write_bytes(raw); (tmp_path/"cut").write_bytes(raw[:-50]); f.eigen(progress=False).save(tmp_path/"basis")
    for name, match in (("bad", "damaged"), ("cut", "no complete file|not a complete"), ("basis", "basis")):
        with pytest.raises(ValueError, match=match): eigen_files(tmp_path/name, tmp_path/"out")
    with pytest.raises(FileNotFoundError): eigen_files(tmp_path/"none", tmp_path/"out")


def test_one_group_in_memory_at_a_time(tmp_path, monkeypatch):
    import curvtools.scale as scale
    collect(tiny("llama"), batches(2), progress=False).save(tmp_path/"f")
    seen, some = [], scale._some
    monkeypatch.setattr(scale, "_some", lambda p, names: seen.append(len(names)) or some(p, names))
    eigen_files(tmp_path/"f", tmp_path/"out")
    assert sorted(seen) == [1, 1, 1, 2, 2, 2]                                # gate and up share A; down


@pytest.mark.parametrize("how", ["memory", "disk", "all in memory", "device_map"])
def test_offloaded_blocks(how, tmp_path, capsys):
    "Blocks that are kept elsewhere, targets among them: the same factors to the bit, and the same forecast; flags as before; edits where they last."
    accelerate = pytest.importorskip("accelerate")
    kw, plain = dict(targets="all", progress=False), tiny("llama")
    want, model = collect(plain, batches(), **kw | dict(progress=True)), tiny("llama")
    told = capsys.readouterr().out
    if how == "memory": accelerate.cpu_offload(model.model.layers[1], "cpu")
    if how == "disk": accelerate.disk_offload(model.model.layers[1], str(tmp_path), "cpu")
    if how == "all in memory": accelerate.cpu_offload(model, "cpu")
    if how == "device_map": model = accelerate.dispatch_model(model, {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.norm": "cpu", "lm_head": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.layers.2": "disk"}, main_device="cpu", offload_dir=str(tmp_path))
    model.model.layers[0].mlp.up_proj.weight.requires_grad_(False)
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    got = collect(model, batches(), **kw | dict(progress=True))
    assert "of activations" in told and told == capsys.readouterr().out       # weights that are fetched for a pass are no activations
    assert near(got, want, 0) and got.fingerprints == want.fingerprints and flags == {n: p.requires_grad for n, p in model.named_parameters()}
    edit, t = got.eigen(progress=False).keep(rho=.5, blocks=[1]), want["model.layers.1.mlp.up_proj"].target
    before = weight(model, t).clone()
    if how in ("disk", "device_map"):
        with pytest.raises(ValueError, match="offloaded to a disk"): edit.apply(model)
    else:
        twin = want.eigen(progress=False).keep(rho=.5, blocks=[1])
        with edit.applied(model), twin.applied(plain): assert torch.equal(model(batches()[1]).logits, plain(batches()[1]).logits) and not torch.equal(weight(model, t), before)
    assert torch.equal(weight(model, t), before)
    again = collect(model, batches(), snapshot=tmp_path/"snap", **kw)        # the snapshot's hash of an offloaded model is that of a whole one
    assert near(collect(plain, batches(), snapshot=tmp_path/"snap", **kw), again, 0)


@pytest.mark.parametrize("how", ["command", "accelerate"])
def test_started_by_torchrun(how, tmp_path):
    "The command by itself, of which one process speaks and writes; and a script whose processes accelerate lets find each other (`accelerate launch` sets the same variables)."
    from curvtools.zoo import playground
    pg, script = playground(), tmp_path/"script.py"
    script.write_text("import accelerate; a = accelerate.Accelerator(cpu=True)\nfrom curvtools.all import *\npg = playground()\nf = collect(pg.model, shard(pg.clean[:4096 // pg.clean.length]), blocks=[2], progress=False)\nif a.is_main_process: f.save('f'); print('written:')\na.end_training()")
    what = ["-m", "curvtools.cli", "collect", "playground", "--blocks", "2", "--tokens", "4096", "--out", "f"] if how == "command" else [str(script)]
    ran = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *what], cwd=tmp_path, capture_output=True, text=True, env=dict(os.environ, OMP_NUM_THREADS="1", PYTHONPATH=str(TESTS.parent)), timeout=300)
    assert ran.returncode == 0, ran.stderr[-3000:]
    got, one = Factors.load(tmp_path/"f"), collect(pg.model, pg.clean[:4096 // pg.clean.length], blocks=[2], progress=False)
    assert near(got, one, 1e-6) and got.meta["processes"] == 2 and ran.stdout.count("written:") == 1


def test_sums_elsewhere():
    model = tiny("llama")
    assert near(collect(model, batches(), sums="cpu", progress=False), collect(model, batches(), progress=False), 0)
    for bad in ("gpu", "cuda:99", 3.5):
        with pytest.raises(ValueError, match="no device"): collect(model, batches(), sums=bad)


def test_a_part_of_a_stream_is_no_list(tmp_path):
    data = [torch.randint(3, 37, (4, 9))] * 4
    with pytest.raises(TypeError, match="read only once"): collect_in_groups(tiny("llama"), Shard(iter(data), 0, 2), tmp_path/"f", 1, "mlp", progress=False)


def test_every_group_has_a_snapshot_of_its_own(tmp_path):
    model, data = tiny("llama"), [torch.randint(3, 37, (4, 9), generator=torch.Generator().manual_seed(s)) for s in range(3)]
    paths = collect_in_groups(model, data, tmp_path/"f", 1, "mlp", progress=False, snapshot=tmp_path/"sums")
    assert len(paths) > 1 and len(list(tmp_path.glob("sums.factors-*of*[0-9]"))) == len(paths)
    want = collect(model, data, "mlp", progress=False)
    assert near({n: f for p in paths for n, f in Factors.load(p).items()}, want, 1e-12)
