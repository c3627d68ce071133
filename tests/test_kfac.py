"""Factors are exact: A and G against autograd, position by position, in float64 on every class of model; and nothing about the batch changes them.

Tolerance: both sides are float64 sums of a few hundred products in another order, so 1e-9 relative (to the largest entry) leaves six digits of slack."""
from collections import Counter
import gc
import math
import os
import signal
import weakref

import pytest
import torch
import torch.nn.functional as F
import transformers
from transformers import LlamaForCausalLM
from transformers.modeling_outputs import CausalLMOutput
from tiny import ALL, LMS, V, tiny, tiny_inputs

from curvtools.kfac import Factors, OuterSum, collect, next_token_labels, row_uniforms, sample_labels, save_tensors, split_head, _beside, _check_finite
from curvtools.targets import block_list, find_targets, weight

RTOL = 1e-9


def near(a, b, rtol=RTOL): return (a - b).abs().max() <= rtol * b.abs().max()


def reference(model, sequences, select="all"):
    "A and G by looping over sequences and positions: `sequences` is a list of (ids [T], labels [T], -100 where masked), never padded."
    targets = find_targets(model, select)
    A = {t.name: torch.zeros(t.d_in, t.d_in, dtype=torch.float64) for t in targets}
    G = {t.name: torch.zeros(t.d_out, t.d_out, dtype=torch.float64) for t in targets}
    count = 0
    for ids, labels in sequences:
        read, made = {}, {}
        def hook(name): return lambda m, args, out: (read.update({name: args[0]}), made.update({name: out}))[2:] or None
        handles = [model.get_submodule(t.name).register_forward_hook(hook(t.name)) for t in targets]
        logits = model(input_ids=ids[None]).logits[0]                              # [T, V], the last position is fed here
        for h in handles: h.remove()
        loss = sum(F.cross_entropy(logits[t], labels[t + 1]) for t in range(len(ids) - 1) if labels[t + 1] != -100)
        grads = dict(zip(made, torch.autograd.grad(loss, list(made.values()))))
        for t in range(len(ids) - 1):
            if not (labels[t + 1:] != -100).any(): continue                        # nothing here or later counts
            count += 1
            for n in A:
                a, g = read[n].reshape(len(ids), -1)[t].detach(), grads[n].reshape(len(ids), -1)[t]
                A[n] += torch.outer(a, a); G[n] += torch.outer(g, g)
    return {n: (A[n] / count, G[n] / count, count) for n in A}


def check(factors, want, rtol=RTOL):
    for n, (A, G, count) in want.items():
        assert factors[n].count == count, n
        assert near(factors[n].A, A, rtol), f"A of {n}"
        assert near(factors[n].G, G, rtol), f"G of {n}"


def sequences(lengths=(9, 6, 11, 4), prompts=(0, 0, 0, 0), seed=0):
    "Random ids with random labels ('sampled' elsewhere, so that no sampling noise enters); the first `prompt` labels are masked."
    g, out = torch.Generator().manual_seed(seed), []
    for T, p in zip(lengths, prompts):
        ids, labels = torch.randint(3, V, (T,), generator=g), torch.randint(3, V, (T,), generator=g)
        labels[:p] = -100
        out.append((ids, labels))
    return out


def pad(seqs, side="right", width=None, filler=0):
    width = width or max(len(i) for i, _ in seqs)
    def put(x, fill): z = x.new_full((width - len(x),), fill); return torch.cat([x, z] if side == "right" else [z, x])
    return dict(input_ids=torch.stack([put(i, filler) for i, _ in seqs]), labels=torch.stack([put(l, -100) for _, l in seqs]),
                attention_mask=torch.stack([put(torch.ones_like(i), 0) for i, _ in seqs]))


@pytest.mark.parametrize("name", LMS)
def test_factors_equal_autograd(name):
    model, seqs = tiny(name), sequences(prompts=(0, 3, 5, 0))
    want = reference(model, seqs)
    kw = dict(targets="all", labels="data", progress=False)
    check(collect(model, [pad([s]) for s in seqs], **kw), want)                                    # one by one
    check(collect(model, [pad(seqs)], **kw), want)                                                 # one ragged batch, padded right
    check(collect(model, [pad(seqs, "left")], **kw), want)                                         # padded left
    check(collect(model, [pad(seqs[2:], "left", 14), pad(seqs[:2], "right", 12)], **kw), want)     # other sizes, order, padding


def test_vit_factors_equal_autograd():
    model, x = tiny("vit"), tiny_inputs("vit", 4)["pixel_values"]
    y, targets = torch.tensor([0, 3, 4, 1]), find_targets(model, "all")
    for tokens in ("cls", "all"):
        got = collect(model, [dict(pixel_values=x[:3], labels=y[:3]), dict(pixel_values=x[3:], labels=y[3:])], targets="all", labels="data", tokens=tokens, progress=False)
        for t in targets:
            A = G = n = 0
            for i in range(4):
                kept = {}
                h = model.get_submodule(t.name).register_forward_hook(lambda m, a, out: kept.update(a=a[0], out=out))
                loss = F.cross_entropy(model(pixel_values=x[i:i + 1]).logits, y[i:i + 1]); h.remove()
                g, = torch.autograd.grad(loss, kept["out"])
                for s in range(1 if tokens == "cls" else g.shape[1]):
                    A, G, n = A + torch.outer(kept["a"][0, s], kept["a"][0, s]).detach(), G + torch.outer(g[0, s], g[0, s]), n + 1
            assert got[t.name].count == n and near(got[t.name].A, A / n) and near(got[t.name].G, G / n), (t.name, tokens)


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "gemma3"])
def test_sampled_labels_do_not_depend_on_batching(name):
    model, seqs = tiny(name), sequences()
    kw = dict(targets="all", progress=False, seed=3)
    clean = [dict(d, labels=d["input_ids"].masked_fill(d["attention_mask"] == 0, -100)) for d in (pad([s]) for s in seqs)]
    want = collect(model, clean, **kw)
    for other in ([pad(seqs)], [pad(seqs, "left", 15)], [pad(seqs[1:]), pad(seqs[:1])]):
        got = collect(model, [{k: v for k, v in b.items() if k != "labels"} for b in other], **kw)
        for n in want: assert near(got[n].A, want[n].A) and near(got[n].G, want[n].G)
    other = collect(model, clean, targets="all", progress=False, seed=4)
    assert not near(other[next(iter(want))].G, want[next(iter(want))].G, 1e-3)      # another seed, other labels
    assert all(torch.equal(collect(model, clean, **kw)[n].G, want[n].G) for n in list(want)[:1])


def test_labels_on_padding_do_not_reach_real_positions():
    "Others' bug: sampling on padding too, whose loss flows back through attention. Here the padding's content and length change nothing; the faulty way, made on purpose, does."
    model, seqs = tiny("llama"), sequences((7,))
    factors = [collect(model, [{k: v for k, v in pad(seqs, "right", w, f).items() if k != "labels"}], progress=False) for w, f in ((7, 0), (32, 0), (32, 5))]
    n = "model.layers.1.mlp.up_proj"
    for f in factors[1:]: assert f[n].count == 6 and near(f[n].G, factors[0][n].G)
    faulty = pad(seqs, "right", 32); faulty.pop("attention_mask"); faulty["labels"] = torch.full((1, 32), 4); faulty["labels"][:, :7] = seqs[0][1]
    leak = collect(model, [faulty], labels="data", progress=False)[n].G
    assert not near(leak, factors[0][n].G, .01)


def test_masked_prompt_positions_are_counted():
    "The prompt carries gradient through attention: dropping its positions would give other factors."
    model = tiny("llama")
    seqs = sequences((10,), (6,))
    got = collect(model, [pad(seqs)], labels="data", progress=False)
    assert got.tokens == 9                                                           # not 4
    tail = seqs[0][1].clone(); tail[8:] = -100                                       # nothing counts after position 6
    assert collect(model, [dict(input_ids=seqs[0][0][None], labels=tail[None])], labels="data", progress=False).tokens == 7


@pytest.mark.parametrize("name", ALL)
def test_one_repeated_input_gives_the_exact_block_fisher(name):
    "One datum, one position: K-FAC is no approximation, G (x) A is the Fisher block of the weight, through every nonlinearity above it."
    model = tiny(name)
    x = dict(input_ids=torch.tensor([[5, 9]])) if name != "vit" else tiny_inputs("vit", 1)
    targets = [t for t in find_targets(model, "all") if name != "vit" or (t.block == 2 and t.projection in ("fc1", "fc2", "o"))]   # ViT: where only CLS carries gradient
    f = collect(model, [x] * 3, targets=[t.name for t in targets], labels="exact", progress=False)
    for t in targets:
        p = model.get_submodule(t.name).weight
        with torch.enable_grad():
            logits = model(**x).logits.reshape(-1, model.config.vocab_size if name != "vit" else 5)[0]
            logp = logits.log_softmax(-1)
            grads = [torch.autograd.grad(l, p, retain_graph=True)[0] for l in logp]
        rows = torch.stack([(g.T if t.layout == "conv1d" else g).flatten() for g in grads])          # [V, d_out d_in]
        exact = rows.T @ (logp.exp().detach()[:, None] * rows)
        if exact.abs().max() < 1e-28:                             # the first position attends to itself alone, so q and k have no gradient: what is left is rounding, squared, and differs from machine to machine
            assert t.projection in ("q", "k") and f[t.name].G.abs().max() < 1e-28, t.name
            continue
        assert near(torch.kron(f[t.name].G, f[t.name].A), exact), t.name


def test_monte_carlo_agrees_with_exact_within_its_error():
    "200 seeds; v^T G v for eight directions lies within four standard errors of the exact value."
    model, ids, n = tiny("llama"), sequences((8,))[0][0][None], "model.layers.2.mlp.down_proj"
    kw = dict(targets=n, progress=False)
    exact = collect(model, [ids], labels="exact", **kw)[n].G
    v = torch.randn(8, exact.shape[0], dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    q = torch.stack([((v @ collect(model, [ids], seed=s, **kw)[n].G) * v).sum(1) for s in range(200)])      # [200, 8]
    z = (q.mean(0) - ((v @ exact) * v).sum(1)) / (q.std(0) / 200**.5)
    assert z.abs().max() < 4, z


def test_exact_equals_the_sum_over_labels_with_attention():
    "On three positions and a small vocabulary: enumerate every joint labelling, weigh it by its probability, average g g^T."
    model, ids = tiny("llama"), torch.tensor([[4, 7, 11]])
    n, K = "model.layers.1.mlp.gate_proj", 5
    model.lm_head.weight.data = model.lm_head.weight.data[:K].clone(); model.lm_head.out_features = K; model.config.vocab_size = K
    got = collect(model, [ids], targets=n, labels="exact", progress=False)[n].G
    kept = {}
    h = model.get_submodule(n).register_forward_hook(lambda m, a, out: kept.update(out=out))
    logp = model(input_ids=ids).logits[0, :2].log_softmax(-1); h.remove()
    want = 0
    for a in range(K):
        for b in range(K):
            g, = torch.autograd.grad(-(logp[0, a] + logp[1, b]), kept["out"], retain_graph=True)
            want = want + (logp[0, a] + logp[1, b]).exp().detach() * torch.einsum("ti,tj->ij", g[0, :2], g[0, :2]) / 2
    assert near(got, want)


def test_logits_that_are_processed_after_the_head():
    "Soft-capped logits are not head(trunk(x)): collect must notice and go the long way."
    import transformers as tf
    torch.manual_seed(0)
    cfg = tf.Gemma2Config(vocab_size=V, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=8,
                          max_position_embeddings=64, final_logit_softcapping=2., attn_logit_softcapping=None)
    model = tf.Gemma2ForCausalLM(cfg).double().eval()
    for p in model.parameters(): torch.nn.init.normal_(p, std=.4)
    assert not split_head(model, dict(input_ids=torch.tensor([[3, 4, 5]])))[2]
    seqs = sequences((6, 8))
    check(collect(model, [pad(seqs)], targets="all", labels="data", progress=False), reference(model, seqs), 1e-5)   # Gemma 2 itself computes norms and attention in float32


def test_chunking_the_head_changes_nothing():
    model, ids = tiny("qwen2"), torch.randint(3, V, (3, 10), generator=torch.Generator().manual_seed(0))
    a, b = (collect(model, [ids], chunk=c, progress=False) for c in (4, 1000))
    for n in a: assert near(a[n].G, b[n].G)


def test_low_precision_models_accumulate_in_float32():
    model, ids = tiny("llama", torch.bfloat16), torch.randint(3, V, (4, 16), generator=torch.Generator().manual_seed(0))
    f = collect(model, [ids], labels="data", progress=False)
    assert all(x.A.dtype == x.G.dtype == torch.float32 for x in f.values())
    exact = collect(model.double(), [ids], labels="data", progress=False)            # the same (rounded) weights, computed in float64
    for n in f: assert near(f[n].A.double(), exact[n].A, .05) and near(f[n].G.double(), exact[n].G, .1)   # bf16 has 8 bits: 0.4 % a rounding, a few roundings deep
    ones = OuterSum(1, torch.bfloat16)
    for _ in range(1000): ones.add(torch.ones(1, 1, dtype=torch.bfloat16))
    assert ones.sum.item() == 1000                                                   # a bf16 sum stops at 256


def test_only_the_graph_above_the_lowest_target(monkeypatch):
    "No weight gets a gradient, and the blocks below the lowest target see no graph."
    model, seen = tiny("llama"), {}
    for i, b in enumerate(model.model.layers): b.register_forward_hook(lambda m, a, out, i=i: seen.update({i: (out[0] if isinstance(out, tuple) else out).requires_grad}))
    collect(model, [torch.randint(3, V, (2, 8))], blocks=[1], progress=False)
    assert seen == {0: False, 1: True, 2: True} and all(p.grad is None for p in model.parameters())


def snapshot(model):
    return ([m.training for m in model.modules()], [p.requires_grad for p in model.parameters()], [p.grad for p in model.parameters()],
            [len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.modules()], sorted(k for m in model.modules() for k in vars(m)),
            [p.detach().clone() for p in model.parameters()], torch.get_rng_state())


def same(a, b): return a[:5] == b[:5] and all(map(torch.equal, a[5], b[5])) and torch.equal(a[6], b[6])


def test_the_model_is_left_as_found():
    model = tiny("llama"); model.train(); model.model.layers[0].eval(); model.lm_head.weight.requires_grad_(False)
    before, ids = snapshot(model), torch.randint(3, V, (2, 8), generator=torch.Generator().manual_seed(0))
    collect(model, [ids], progress=False); assert same(before, snapshot(model))
    with torch.inference_mode(): collect(model, [ids], progress=False)
    assert same(before, snapshot(model))
    with pytest.raises(ValueError, match="vocabulary of 37"): collect(model, [ids, torch.full((1, 5), V + 10)], progress=False)
    assert same(before, snapshot(model))


def test_interrupted_after_two_batches():
    model, ids = tiny("llama"), torch.randint(3, V, (6, 8), generator=torch.Generator().manual_seed(0))
    def stream():
        yield ids[:2]; yield ids[2:4]
        raise KeyboardInterrupt
    before, want = snapshot(model), collect(model, [ids[:4]], progress=False)
    with pytest.raises(KeyboardInterrupt) as e: collect(model, stream(), progress=False)
    assert same(before, snapshot(model))
    for part in (e.value.partial, collect(model, stream(), progress=False, on_interrupt="return")):
        for n in want: assert near(part[n].G, want[n].G) and part[n].count == want[n].count
    def at_once():
        raise KeyboardInterrupt
        yield
    with pytest.raises(KeyboardInterrupt): collect(model, at_once(), progress=False, on_interrupt="return")


@pytest.fixture
def ctrl_c():
    "SIGINT raises KeyboardInterrupt, also where the test run was started with SIGINT ignored (in the background of a shell) or a library has changed it."
    old = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, old if old is not None else signal.SIG_DFL)


@pytest.mark.parametrize("side", ["forward", "backward"])
def test_ctrl_c_inside_a_batch_waits_for_its_end(side, ctrl_c):
    "A real SIGINT in the second batch, on the way up or down: A, G and count are those of two whole batches. A second SIGINT does not wait."
    model, ids, calls = tiny("llama"), torch.randint(3, V, (6, 8), generator=torch.Generator().manual_seed(0)), []
    want, before = collect(model, [ids[:2], ids[2:4]], progress=False), snapshot(model)
    def strike(times):
        def hook(m, args, out):
            def hit(g=None):
                calls.append(0)
                if len(calls) == 2: [signal.raise_signal(signal.SIGINT) for _ in range(times)]
            if out.shape[1] == 7: hit() if side == "forward" else out.register_hook(hit)    # not in the first look, which feeds four tokens
        return model.model.layers[1].mlp.register_forward_hook(hook)
    for times in (1, 2):
        h = strike(times); calls.clear()
        with pytest.raises(KeyboardInterrupt) as e: collect(model, ids.split(2), progress=False)
        h.remove(); assert same(before, snapshot(model)) and signal.getsignal(signal.SIGINT) is signal.default_int_handler
        if times == 1:
            part = e.value.partial
            assert part.meta["batches"] == 2 and part.meta["data"] == want.meta["data"]
            for n in want: assert near(part[n].G, want[n].G) and near(part[n].A, want[n].A) and part[n].count == want[n].count
        else: assert len(calls) == 2



@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3"])
def test_one_look_beforehand(name):
    "Every batch is one pass; before them, one of four tokens with two ends."
    model, ids, sizes = tiny(name), torch.randint(3, V, (6, 8), generator=torch.Generator().manual_seed(0)), []
    block = block_list(model)[1][0]
    h = block.register_forward_hook(lambda m, args, kw, out: sizes.append(list((args[0] if args else kw["hidden_states"]).shape[:2])), with_kwargs=True)
    collect(model, ids.split(3), progress=False); h.remove()
    assert sizes == [[2, 4], [3, 7], [3, 7]]


@pytest.mark.parametrize("name", ["llama", "gpt2", "vit", "mixtral"])
def test_nothing_keeps_a_model_alive(name):
    "After the factors are there, and the model is not needed any more, none of its weights is in memory."
    model, x = tiny(name), tiny_inputs(name)
    collect(model, [x], "experts" if name == "mixtral" else "mlp", progress=False)
    kept = [weakref.ref(p) for p in model.parameters()]
    del model; gc.collect()
    assert not any(r() is not None for r in kept)


class Odd(LlamaForCausalLM):
    "Doubles what its trunk gives, in place or by a flag of its own."
    way = "in place"
    def forward(self, input_ids=None, use_cache=None, **kw):
        out = self.model(input_ids=input_ids, use_cache=use_cache, **({} if self.way == "in place" else dict(double=True)))
        h = out.last_hidden_state
        if self.way == "in place": h *= 2
        return CausalLMOutput(logits=self.lm_head(h))


@pytest.mark.parametrize("way", ["in place", "flag"])
def test_a_model_that_does_more_with_its_trunk(way):
    "Such a model is one whole: its factors are those of its own logits."
    plain = tiny("llama"); ids = torch.randint(3, V, (2, 8), generator=torch.Generator().manual_seed(0))
    odd = Odd(plain.config).double().eval(); odd.load_state_dict(plain.state_dict()); odd.way = way
    if way == "flag":
        run = odd.model.forward
        def forward(*args, double=False, **kw): out = run(*args, **kw); out.last_hidden_state = out.last_hidden_state * (1 + double); return out
        odd.model.forward = forward
    assert not split_head(odd, dict(input_ids=ids))[2]
    check(collect(odd, [ids], "mlp", labels="data", progress=False), reference(odd, [(r, r) for r in ids], "mlp"))


def test_the_first_batch_may_be_two_tokens():
    "A model that looks ahead is refused from whatever it reads first; one with an encoder and a decoder too."
    bert = transformers.BertForMaskedLM(transformers.BertConfig(vocab_size=V, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24)).eval()
    with pytest.raises(ValueError, match="looks at later tokens"): collect(bert, [torch.tensor([[3, 4]]), torch.randint(3, V, (2, 9))], "all", progress=False)
    t5 = transformers.T5ForConditionalGeneration(transformers.T5Config(vocab_size=V, d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=4)).eval()
    with pytest.raises(ValueError, match="encoder"): collect(t5, [torch.randint(3, V, (2, 9))], "all", progress=False)
    model = tiny("llama"); assert collect(model, [torch.tensor([[3, 4]])], progress=False).tokens == 1


@pytest.mark.parametrize("name", ["run", "run[1]*", "r" * 238, "ü" * 120])
def test_only_what_a_killed_run_left_is_cleared(name, tmp_path):
    "Folders of the user's with like names stay."
    path, ids = tmp_path/name, torch.randint(3, V, (2, 8), generator=torch.Generator().manual_seed(0))
    theirs = [tmp_path/f"{name[:20]}.thesis.tmp", tmp_path/f"{name[:20]}.12.tmp"]
    left = tmp_path/f"{_beside(path)}.4471.abcd_123.tmp"
    for d in (*theirs, left): d.mkdir(); (d/"new").touch()
    collect(tiny("llama"), [ids], snapshot=path, progress=False)
    assert path.is_file() and not left.exists() and all((d/"new").exists() for d in theirs)


@pytest.mark.parametrize("bad", [[float("nan")], [float("inf")], [float("inf"), -float("inf")]])
def test_weights_that_are_no_numbers(bad):
    "One such number is found wherever it is; a sum that overflows is none."
    model, ids = tiny("llama"), torch.randint(3, V, (2, 8), generator=torch.Generator().manual_seed(0))
    W = model.model.layers[2].mlp.down_proj.weight.data
    W.view(-1)[torch.arange(len(bad)) * 7 + 5] = torch.tensor(bad, dtype=W.dtype)
    with pytest.raises(ValueError, match="layers.2.mlp.down_proj hold NaN or infinity"): collect(model, ids, progress=False)
    large = tiny("llama", torch.float32)
    large.model.layers[2].mlp.down_proj.weight.data[:2] = 3e38               # its sum is no float32
    _check_finite(large, find_targets(large, "mlp"))


@pytest.mark.skipif(os.name != "posix", reason="modes of files")
@pytest.mark.parametrize("mask", [0o022, 0o027, 0o077])
def test_a_saved_file_is_read_by_whom_any_new_file_is(mask, tmp_path):
    "safetensors makes files for their owner alone; factors are passed on."
    before = os.umask(mask)
    try: save_tensors(tmp_path/"a", "k/1", dict(x=torch.zeros(2)), {}); (tmp_path/"b").touch()
    finally: os.umask(before)
    assert (tmp_path/"a").stat().st_mode == (tmp_path/"b").stat().st_mode and {p.name for p in tmp_path.iterdir()} == {"a", "b"}


def test_save_load_merge(tmp_path):
    model, ids = tiny("phi3"), torch.randint(3, V, (4, 8), generator=torch.Generator().manual_seed(0))
    a, b, whole = (collect(model, [x], "all", labels="data", progress=False) for x in (ids[:1], ids[1:], ids))
    (a + b).save(tmp_path/"f.safetensors")
    back = Factors.load(tmp_path/"f.safetensors")
    assert [f.name for f in tmp_path.iterdir()] == ["f.safetensors"] and list(back) == list(whole) and back.fingerprints == whole.fingerprints
    for n in whole: assert back[n].target == whole[n].target and back[n].count == whole[n].count and near(back[n].G, whole[n].G) and near(back[n].A, whole[n].A)
    assert a.model() is model and back.model() is None
    with pytest.raises(ValueError, match="same targets"): a + collect(tiny("phi3", seed=1), [ids], "all", labels="data", progress=False)
    with pytest.raises(ValueError, match="labels"): a + collect(model, [ids], "all", progress=False)
    # A that is shared is stored once
    m2 = tiny("llama"); f = collect(m2, [ids], progress=False); f.save(tmp_path/"g.safetensors"); g = Factors.load(tmp_path/"g.safetensors")
    assert g[0, "gate"].A.data_ptr() == g[0, "up"].A.data_ptr()


def test_factors_do_not_keep_the_model_alive():
    model = tiny("llama"); f = collect(model, [torch.randint(3, V, (2, 8))], progress=False)
    del model; gc.collect()
    assert f.model() is None


def test_bad_files(tmp_path):
    model = tiny("llama"); f = collect(model, [torch.randint(3, V, (2, 8))], progress=False)
    p = tmp_path/"f.safetensors"; f.save(p); raw = p.read_bytes()
    for cut in (0, 5, 100, len(raw) // 2, len(raw) - 1):
        p.write_bytes(raw[:cut])
        with pytest.raises(ValueError, match="complete safetensors"): Factors.load(p)
    from safetensors.torch import save_file
    save_file({"x": torch.ones(1)}, p)
    with pytest.raises(ValueError, match="not 'curvtools.factors/1'"): Factors.load(p)
    with pytest.raises(FileNotFoundError): Factors.load(tmp_path/"none.safetensors")
    # the right kind, but damaged inside: never a bare KeyError
    import json
    from safetensors import safe_open
    f.save(p)
    with safe_open(p, "pt") as s: header, tensors = s.metadata(), {k: s.get_tensor(k) for k in s.keys()}
    meta, n = json.loads(header["meta"]), next(iter(f))
    less = lambda d, k: {a: b for a, b in d.items() if a != k}
    def put(m=meta, t=tensors): save_file(t, p, metadata=dict(less(header, "crc32"), meta=json.dumps(m)))   # the checksum would find it all
    for k in meta: put(less(meta, k)); pytest.raises(ValueError, Factors.load, p).match("complete factors")
    for row in (less(meta["targets"][n], "count"), dict(meta["targets"][n], new=1)):
        put(dict(meta, targets=dict(meta["targets"], **{n: row}))); pytest.raises(ValueError, Factors.load, p).match("complete factors")
    put(t=less(tensors, f"G/{n}")); pytest.raises(ValueError, Factors.load, p).match("complete factors")
    put(t=dict(tensors, **{f"G/{n}": torch.eye(3)})); pytest.raises(ValueError, Factors.load, p).match(r"G is \[3, 3\]")
    save_file(tensors, p, metadata=dict(kind=header["kind"])); pytest.raises(ValueError, Factors.load, p).match("no readable header")


def test_bad_input():
    model, ids = tiny("llama"), torch.randint(3, V, (2, 8))
    for kw, match in ((dict(labels="gold"), "sample"), (dict(targets="mpl"), "mlp|select"), (dict(blocks=[7]), "block"), (dict(tokens="x"), "cls"), (dict(chunk=0), "chunk=0"), (dict(on_interrupt="stop"), "raise")):
        with pytest.raises(ValueError, match=match): collect(model, [ids], **kw)
    with pytest.raises(ValueError, match="empty"): collect(model, [])
    with pytest.raises(ValueError, match="at least two tokens"): collect(model, [ids[:, :1]])
    with pytest.raises(TypeError, match="windows\\("): collect(model, "text")
    with pytest.raises(TypeError, match="windows\\("): collect(model, ["text"])
    with pytest.raises(ValueError, match="no label counts"): collect(model, [dict(input_ids=ids, labels=torch.full_like(ids, -100))], progress=False)
    with pytest.raises(ValueError, match="outside the blocks"): collect(model, [ids], targets="lm_head")
    with pytest.raises(ValueError, match="context of 64"): collect(model, [torch.full((1, 66), 4)])
    with pytest.raises(ValueError, match="no head"): collect(model.model, [ids])
    import transformers as tf
    wide = tf.LlamaForCausalLM(tf.LlamaConfig(vocab_size=5000, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, max_position_embeddings=64))
    with pytest.raises(ValueError, match="backward passes"): collect(wide, [torch.randint(3, V, (1, 60))], labels="exact", progress=False)
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = math.nan
    with pytest.raises(ValueError, match="model.layers.1.mlp.up_proj"): collect(model, [ids])
    model = tiny("llama"); model.model.embed_tokens.weight.data[5] = math.inf
    with pytest.raises(FloatingPointError, match="batch 2.*model.layers.0"): collect(model, [torch.full((1, 6), 4), torch.full((1, 6), 5)], progress=False)
    model.model.norm.weight.data[0] = math.nan
    with pytest.raises(FloatingPointError, match="above all targets"): collect(model, [torch.full((1, 6), 4)], progress=False)


def test_uniforms_follow_the_row():
    from collections import Counter
    ids = torch.tensor([[5, 6, 7], [5, 6, 7], [8, 9, 9]]); real = torch.ones_like(ids, dtype=torch.bool)
    u = row_uniforms(ids, real, 0, Counter())
    assert not torch.equal(u[0], u[1])                                     # the same row again gets other numbers
    assert torch.equal(row_uniforms(ids[[2, 0, 1]], real, 0, Counter())[0], u[2])
    assert u.min() >= 0 and u.max() < 1
    p = torch.eye(4)[[2, 0]]
    assert sample_labels(p, torch.tensor([.999999, 0.])).tolist() == [2, 0]


def test_labels_of_a_vocabulary_in_blocks():
    "As from one cumulative sum, also where a block is not full, where u rounds to 1, and where nearly all labels are impossible; whatever is drawn is possible."
    g = torch.Generator().manual_seed(0)
    for V in (5, 256, 257, 1000):
        p, u = torch.rand(50, V, generator=g, dtype=torch.float64) * (torch.rand(50, V, generator=g) < .05), torch.rand(50, 4, generator=g, dtype=torch.float64)
        p[:, V // 2] += .1; u[:, 3] = 1 - 1e-16
        got = sample_labels(p, u); low = sample_labels(p.float(), u)
        assert torch.equal(got[:, :3], torch.searchsorted(p.cumsum(-1), u[:, :3] * p.sum(-1, keepdim=True), right=True))
        assert (p.gather(1, got) > 0).all() and (p.gather(1, low) > 0).all() and (low == got).double().mean() > .99
    assert sample_labels(torch.full((2, 300), math.nan), torch.tensor([.5, .1])).max() < 300       # which is an error further up, not an index outside


def test_next_token_labels_edges():
    ids = torch.arange(5)[None]
    y, w = next_token_labels(ids)
    assert y.tolist() == [[1, 2, 3, 4]] and w.all()
    y, w = next_token_labels(ids, torch.tensor([[0, 1, 1, 1, 0]]))
    assert y.tolist() == [[-100, 2, 3, -100]] and w.int().tolist() == [[0, 1, 1, 0]]


def test_any_form_of_ids_is_the_same_data():
    "int32 ids, arrays, lists and what a tokenizer returns are the same tokens: the same labels are drawn, the same factors come out."
    from transformers import BatchEncoding
    model, ids = tiny("llama"), torch.randint(3, V, (3, 8), generator=torch.Generator().manual_seed(0))
    want, n = collect(model, [ids], progress=False), "model.layers.0.mlp.up_proj"
    for b in (ids.int(), ids.to(torch.uint8), ids.numpy(), dict(input_ids=ids.numpy()), dict(input_ids=ids.int(), labels=ids.int()), BatchEncoding(dict(input_ids=ids.tolist(), attention_mask=[[1] * 8] * 3))):
        for batches in ([b], iter([b])):
            got = collect(model, batches, progress=False)
            assert torch.equal(got[n].G, want[n].G) and torch.equal(got[n].A, want[n].A) and got.meta["data"] == want.meta["data"], type(b)


def test_bad_batches():
    model, ids = tiny("llama"), torch.randint(3, V, (2, 8))
    for b, match in ((ids.float(), "whole numbers"), (ids - 40, "attention_mask"), (ids[0], r"shape \[8\].*ids\[None\]"), (dict(input_ids=ids, labels=ids[:, 1:]), r"labels has shape \[2, 7\]"),
                     (dict(input_ids=ids, attention_mask=torch.ones(2, 1, 8, 8)), "attention_mask has shape"), (dict(input_ids=ids, labels=ids.clone().fill_(-1)), "label -1.*-100"),
                     (dict(input_ids=ids, labels=ids + V), r"not a class \(0 to 36\)")):
        with pytest.raises(ValueError, match=match): collect(model, [b], labels="data", progress=False)


def test_a_model_that_looks_ahead_is_refused():
    import transformers as tf
    torch.manual_seed(0)
    bert = tf.BertForMaskedLM(tf.BertConfig(vocab_size=V, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=64)).eval()
    for p in bert.parameters(): torch.nn.init.normal_(p, std=.3)
    with pytest.raises(ValueError, match="later tokens"): collect(bert, [torch.randint(3, V, (2, 8))], progress=False)
    with torch.inference_mode(): inside = tiny("llama")
    with pytest.raises(ValueError, match="inference_mode"): collect(inside, [torch.randint(3, V, (2, 8))], progress=False)


def test_a_head_behind_another_width():
    "ALBERT's way: the output embeddings do not fit the trunk. Here: a Llama whose output embeddings are said to be another matrix."
    model, ids = tiny("llama"), torch.randint(3, V, (2, 8), generator=torch.Generator().manual_seed(0))
    want = collect(model, [ids], progress=False)
    model.get_output_embeddings = lambda: torch.nn.Linear(7, V)
    got = collect(model, [ids], progress=False)
    for n in want: assert near(got[n].G, want[n].G)


def test_packed_documents_keep_their_positions():
    "GPT-2 with position_ids that restart: the same as the model called with them, not as without."
    model, ids = tiny("gpt2"), torch.randint(3, V, (1, 10), generator=torch.Generator().manual_seed(0))
    pos = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3, 4]])
    n, kept = "transformer.h.1.mlp.c_fc", {}
    h = model.get_submodule(n).register_forward_hook(lambda m, a, out: kept.update(a=a[0]))
    model(input_ids=ids[:, :-1], position_ids=pos[:, :-1], use_cache=False); h.remove()   # without a cache, as transformers sees packing only then
    a = kept["a"][0].detach()
    got = collect(model, [dict(input_ids=ids, position_ids=pos)], labels="data", progress=False)[n].A
    assert near(got, a.T @ a / 9) and not near(collect(model, [ids], labels="data", progress=False)[n].A, got, 1e-3)


def test_batches_that_are_none():
    with pytest.raises(TypeError, match="iterable of batches, not NoneType"): collect(tiny("llama"), None, targets="all", progress=False)


def test_more_labels_are_the_same_average_with_less_noise():
    "n labels from one forward pass: counts and A stay, G's squared error falls as 1/n, within what 40 seeds allow."
    model, name = tiny("llama"), "model.layers.1.mlp.down_proj"
    ids = torch.randint(3, V, (2, 9), generator=torch.Generator().manual_seed(0))
    pick = dict(targets=[name], progress=False)
    exact, one = collect(model, [ids], labels="exact", **pick)[name], collect(model, [ids], **pick)[name]
    def runs(k): return [collect(model, [ids], seed=s, mc_samples=k, **pick)[name] for s in range(40)]
    found = {k: runs(k) for k in (1, 4, 16)}
    error = {k: torch.stack([(f.G - exact.G).square().sum() for f in fs]) for k, fs in found.items()}
    for k, fs in found.items():
        assert all(f.count == one.count == 16 and torch.equal(f.A, one.A) for f in fs)
        ratio = error[1].mean() / error[k].mean()
        se = ratio * ((error[1].std() / error[1].mean())**2 / 40 + (error[k].std() / error[k].mean())**2 / 40)**.5
        assert abs(ratio - k) < 4 * se + 1e-9, (k, ratio, se)
        mean = torch.stack([f.G for f in fs]); sem = mean.std(0) / 40**.5
        assert ((mean.mean(0) - exact.G).abs() < 5 * sem + 1e-12).all(), "no bias"


def test_more_labels_contain_the_first_and_do_not_depend_on_batches():
    model, ids = tiny("qwen2"), torch.randint(3, V, (3, 10), generator=torch.Generator().manual_seed(0))
    seen = [row_uniforms(ids, torch.ones(3, 10, dtype=torch.bool), 0, Counter(), k) for k in (1, 3)]
    assert seen[1].shape == (3, 10, 3) and torch.equal(seen[1][..., 0], seen[0])
    a, b, c = (collect(model, x, mc_samples=3, progress=False) for x in ([ids], list(ids.split(1)), [dict(input_ids=torch.cat([torch.zeros(3, 2, dtype=torch.long), ids], 1), attention_mask=torch.tensor([0, 0] + [1] * 10).expand(3, -1))]))
    for n in a: assert near(a[n].G, b[n].G) and near(a[n].G, c[n].G) and a[n].count == b[n].count == c[n].count == 27
    assert a.meta["mc_samples"] == 3
    for bad in (0, 1.5, True, "2"):
        with pytest.raises(ValueError, match="mc_samples"): collect(model, [ids], mc_samples=bad)
    with pytest.raises(ValueError, match='labels="data"'): collect(model, [ids], labels="data", mc_samples=2)


@pytest.mark.parametrize("fail", range(1, 13))
@pytest.mark.parametrize("labels,k", [("sample", 3), ("exact", 1)])
def test_memory_that_runs_out_at_any_sum(monkeypatch, fail, labels, k):
    "Whichever addition finds no memory, with several passes down: every pass enters every sum once."
    model, ids = tiny("llama"), torch.randint(3, V, (2, 5), generator=torch.Generator().manual_seed(0))
    kw = dict(blocks=[1], labels=labels, mc_samples=k, progress=False)
    want, calls, real = collect(model, [ids], **kw), [], OuterSum.add
    def add(self, x, n=None):
        if not self.skip:
            calls.append(1)
            if len(calls) == fail: raise torch.OutOfMemoryError("simulated")
        return real(self, x, n)
    monkeypatch.setattr(OuterSum, "add", add)
    got = collect(model, [ids], **kw)
    for n in want: assert near(got[n].A, want[n].A) and near(got[n].G, want[n].G) and got[n].count == want[n].count


def test_a_device_that_multiplies_bfloat16_into_float32_and_one_that_cannot(monkeypatch):
    "The product with out_dtype is used where a tensor is on a GPU; where it is refused the operands are cast, and the sum is the same."
    import curvtools.kfac as kfac
    x, total, seen = torch.randn(20, 8).bfloat16(), torch.zeros(8, 8), []
    class Cuda(torch.Tensor):                                                    # says that it is on a GPU
        is_cuda = True
    def mixed(into, a, b, out_dtype, out): seen.append(out_dtype); return out.copy_(into + a.float() @ b.float())
    def refuses(*a, **kw): raise NotImplementedError("Could not run 'aten::addmm.dtype_out'")
    want = x.float().T @ x.float()
    for how in (mixed, refuses):
        monkeypatch.setattr(torch, "addmm", how); total.zero_()
        kfac._product(total, x.T.as_subclass(Cuda), x.as_subclass(Cuda))
        assert torch.allclose(total.as_subclass(torch.Tensor), want, atol=1e-4)
    assert seen == [torch.float32]
    if torch.cuda.is_available():
        monkeypatch.undo(); total = torch.zeros(300, 300, device="cuda"); x = torch.randn(64, 300, device="cuda").bfloat16()
        kfac.add_outer(total, x)
        assert torch.allclose(total.triu(), (x.float().T @ x.float()).triu(), atol=1e-3)


def alike(a, b): return list(a) == list(b) and all(near(a[n].A, b[n].A) and near(a[n].G, b[n].G) and a[n].count == b[n].count for n in a)


def test_a_hook_on_the_head_counts_with_several_labels_too():
    "Further labels of a position are differences of the head's rows only where the head does nothing else."
    hooked, scaled = tiny("llama"), tiny("llama"); ids = tiny_inputs("llama", 4)["input_ids"]
    hooked.lm_head.register_forward_hook(lambda m, a, o: o * .3)
    with torch.no_grad(): scaled.lm_head.weight *= .3
    for k in (1, 3): assert alike(collect(hooked, [ids], mc_samples=k, progress=False), collect(scaled, [ids], mc_samples=k, progress=False))


class Passing(torch.nn.Module):
    "A wrapper that passes on whatever it is given, as those of adapters do; it has no trunk of its own."
    def __init__(self, model): super().__init__(); self.inner, self.config = model, model.config
    def forward(self, *args, **kw): return self.inner(*args, **kw)
    def get_input_embeddings(self): return self.inner.get_input_embeddings()
    def get_output_embeddings(self): return self.inner.get_output_embeddings()
    @property
    def base_model(self): return self.inner


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
def test_a_wrapper_that_passes_arguments_on(name):
    "Padding on the left needs position_ids, of which the wrapper's signature says nothing."
    batch = pad(sequences(), "left"); wrapped, plain = (collect(m, [batch], "all", progress=False) for m in (Passing(tiny(name)), tiny(name)))
    assert all(near(wrapped["inner." + n].A, f.A) and near(wrapped["inner." + n].G, f.G) for n, f in plain.items()) and len(wrapped) == len(plain)


def test_what_cannot_be_collected_is_named(tmp_path):
    model = tiny("llama"); ids = tiny_inputs("llama")["input_ids"]
    with pytest.raises(ValueError, match="is empty: leave it out"): collect(model, [ids, ids[:, :0]], progress=False)
    with pytest.raises(ValueError, match='sums="meta" holds no numbers'): collect(model, [ids], sums="meta", progress=False)
    import torch.distributed as dist
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with pytest.raises(ValueError, match="model.module"): collect(torch.nn.parallel.DistributedDataParallel(model), [ids], progress=False)
    finally: dist.destroy_process_group()
    model.config.save_pretrained(tmp_path); torch.save(model.state_dict(), tmp_path/"pytorch_model.bin")
    with pytest.raises(OSError): collect(str(tmp_path), [ids], progress=False)          # a pickle is not read


@pytest.mark.parametrize("at", range(3))
def test_ctrl_c_before_the_guard_listens(at, monkeypatch):
    "The first, second, third guard of a collection; the model is as before."
    model = tiny("llama").train(); ids = tiny_inputs("llama")["input_ids"]; n, real = [0], signal.getsignal
    modes, flags = [m.training for m in model.modules()], [p.requires_grad for p in model.parameters()]
    def ctrl_c(s):
        n[0] += 1
        if n[0] == at + 1: raise KeyboardInterrupt
        return real(s)
    monkeypatch.setattr(signal, "getsignal", ctrl_c)
    with pytest.raises(KeyboardInterrupt): collect(model, [ids], progress=False)
    assert modes == [m.training for m in model.modules()] and flags == [p.requires_grad for p in model.parameters()] and not any(m._forward_hooks for m in model.modules())


def test_text_is_not_for_a_classifier_of_images():
    from curvtools.evaluate import perplexity
    m, ids = tiny("vit"), torch.randint(3, V, (2, 5))
    for f in (lambda: collect(m, [ids], progress=False), lambda: perplexity(m, ids)):
        with pytest.raises(ValueError, match="ViTForImageClassification reads pixel_values"): f()
    from curvtools.data import image_batches
    with pytest.raises(ValueError, match="whole numbers, not torch.float32"): image_batches(torch.randn(2, 3, 8, 8), labels=[.7, 1.])
