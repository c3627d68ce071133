"recite against model.generate, brute-force edit distance, known intervals; and everything it must refuse or leave alone."
import itertools
import json
import math
import random

import pytest
import torch
from hypothesis import given, settings, strategies as st
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from curvtools.data import Passage, Passages
from curvtools.recite import Recitation, bootstrap, continuation, recite, scores, wilson
from curvtools.recite import _eos_ids, _greedy, _measuring, _teacher_forced

V = 61


def llama(seed=0, **kw):
    torch.manual_seed(seed)
    kw = dict(vocab_size=V, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
              max_position_embeddings=64, bos_token_id=None, eos_token_id=None, pad_token_id=None, initializer_range=.2) | kw
    return LlamaForCausalLM(LlamaConfig(**kw)).eval()


def gpt2(seed=0, **kw):
    torch.manual_seed(seed)
    kw = dict(vocab_size=V, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=None, eos_token_id=None, initializer_range=.2) | kw
    return GPT2LMHeadModel(GPT2Config(**kw)).eval()


models = pytest.mark.parametrize("make", [llama, gpt2])


def random_passages(n, P=7, L=9, seed=0):
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, V, (n, P + L), generator=g)
    return Passages(Passage(r[:P], r[P:], tier=i % 3) for i, r in enumerate(ids))


@pytest.fixture(scope="module")
def learned():
    "A model that knows the first four of eight passages by heart."
    model, ps = llama(), random_passages(8)
    ids = torch.tensor([p.ids for p in ps[:4]])
    opt = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60): model(ids, labels=ids).loss.backward(); opt.step(); opt.zero_grad()
    return model.eval(), ps


# edit distance and scores

def edit_distance(a, b):
    d = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        d, last = [i], d
        for j, y in enumerate(b, 1): d.append(min(last[j] + 1, d[j-1] + 1, last[j-1] + (x != y)))
    return d[-1]


def test_distance_is_levenshteins():
    rng = random.Random(0)
    for _ in range(1000):
        k = rng.choice((2, 5, 100_000))    # few symbols, and ids beyond 16 bits
        a, b = ([rng.randrange(k) for _ in range(rng.randint(m, 30))] for m in (1, 0))
        s = scores(a, b)
        assert s["distance"] == edit_distance(a, b) and s["lev"] == s["distance"]/len(a)
        assert s["strict"] == (a == b) and s["loose"] == (1 - s["distance"]/len(a) >= .75)


@pytest.mark.parametrize("L, most", [(48, 12), (8, 2), (50, 12), (1, 0), (3, 0), (4, 1)])
def test_loose_at_its_edge(L, most):
    assert [scores([0]*L, [0]*(L-k) + [1]*k)["loose"] for k in (most, most + 1)] == [True, False]


def test_scores_of_nothing():
    with pytest.raises(ValueError, match="suffix is empty"): scores([], [1])


# intervals

@pytest.mark.parametrize("k, n, low, high", [  # Newcombe 1998, table I, method 3
    (81, 263, .2553, .3662), (15, 148, .0624, .1605), (0, 20, 0, .1611), (1, 29, .0061, .1718), (29, 29, .8830, 1)])
def test_wilson(k, n, low, high):
    assert wilson(k, n) == pytest.approx((low, high), abs=5e-5)   # the table has four digits


@given(st.integers(1, 5000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_is_sane(kn):
    (k, n), (lo, hi) = kn, wilson(*kn)
    assert 0 <= lo <= k/n <= hi <= 1 and lo < hi
    assert wilson(n - k, n) == pytest.approx((1 - hi, 1 - lo), abs=1e-12)
    assert wilson(k, n, level=.99)[1] >= hi


def test_bootstrap():
    x = torch.randn(2000, generator=torch.Generator().manual_seed(0))
    lo, hi = bootstrap(x)
    half = 1.96*x.std().item()/2000**.5
    assert (lo, hi) == pytest.approx((x.mean().item() - half, x.mean().item() + half), abs=.2*half)   # 2000 draws: quantiles within some per cent
    assert bootstrap(x, seed=0) == (lo, hi) != bootstrap(x, seed=1)
    assert bootstrap([.5]*9) == (.5, .5)
    state = torch.get_rng_state(); bootstrap(x); assert torch.equal(state, torch.get_rng_state())
    w = torch.rand(300) + .1
    assert bootstrap(torch.full((300,), 3.), w) == pytest.approx((3, 3))
    a, b = bootstrap(torch.cat([x[:300], x[300:600]]), torch.cat([torch.ones(300), torch.zeros(300)]))
    assert (a, b) == pytest.approx(bootstrap(x[:300]), abs=.05)                      # weight zero: not there


@pytest.mark.parametrize("bad", [dict(values=[]), dict(values=[1., 2.], weights=[1.]), dict(values=[[1.]]), dict(values=[1.], level=1)])
def test_bad_bootstrap(bad):
    with pytest.raises(ValueError): bootstrap(**bad)


@pytest.mark.parametrize("k, n", [(0, 0), (3, 2), (-1, 5)])
def test_bad_wilson(k, n):
    with pytest.raises(ValueError): wilson(k, n)


# generation

@models
def test_greedy_is_generate(make):
    for seed in range(3):
        model, ids = make(seed), torch.randint(0, V, (5, 11), generator=torch.Generator().manual_seed(seed))
        expected = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, do_sample=False)[:, 11:]
        with _measuring(model): assert torch.equal(_greedy(model, ids, 20, []), expected)
        for row, e in zip(ids, expected): assert continuation(model, row, 20) == tuple(e.tolist())


@models
def test_greedy_with_cache_is_greedy_without(make):
    model, ids = make(), torch.randint(0, V, (3, 5))
    full = ids
    with torch.no_grad():
        for _ in range(12): full = torch.cat([full, model(full).logits[:, -1:].argmax(-1)], 1)
    with _measuring(model): assert torch.equal(_greedy(model, ids, 12, []), full[:, 5:])


def test_a_model_without_a_cache_is_fed_the_whole_text():
    model = llama()
    a = continuation(model, (1, 2, 3), 12)
    old = model.forward
    def forward(input_ids, use_cache=None, logits_to_keep=0):   # takes no cache, gives none
        out = old(input_ids=input_ids, use_cache=False, logits_to_keep=logits_to_keep)
        assert out.past_key_values is None
        return out
    model.forward = forward
    assert continuation(model, (1, 2, 3), 12) == a


def test_generation_defaults_of_the_model_do_not_matter():
    model, ps = llama(), random_passages(6)
    plain = recite(model, ps).rows
    for k, v in dict(repetition_penalty=1.9, no_repeat_ngram_size=2, do_sample=True, temperature=3., max_new_tokens=2, suppress_tokens=list(range(30))).items():
        setattr(model.generation_config, k, v)
    assert recite(model, ps).rows == plain


@models
def test_eos_is_suppressed(make):
    model, ps = make(), random_passages(6)
    first = {t for r in recite(model, ps).rows for t in r["generated"]}
    eos = sorted(first)[:len(first)//2]
    model.generation_config.eos_token_id, model.config.eos_token_id = eos[:-1], eos[-1]     # both places count, lists and numbers
    assert _eos_ids(model) == eos
    r = recite(model, ps)
    assert not set(eos) & {t for x in r.rows for t in x["generated"]} and all(len(x["generated"]) == 9 for x in r.rows)
    assert [x["eos"] for x in r.rows] == [bool(set(eos) & set(p.suffix)) for p in ps]
    # and in the teacher-forced argmax: what is left is the best of the others
    ids = torch.tensor([p.ids for p in ps])
    with torch.no_grad(): logits = model(ids).logits[:, 6:-1]
    logits[..., eos] = -torch.inf
    with _measuring(model): right, margin = _teacher_forced(model, ids, 9, eos)
    top = logits.topk(2, -1).values
    assert torch.equal(right, logits.argmax(-1) == ids[:, 7:]) and torch.allclose(margin, top[..., 0] - top[..., 1], atol=1e-5)


def test_eos_beyond_the_vocabulary_is_ignored():
    model = gpt2(eos_token_id=50256)
    assert _eos_ids(model) == [] and recite(model, random_passages(2)).n == 2


def test_own_text_is_recited_unless_it_holds_eos():
    model = llama()
    ps = [Passage(p.prefix, continuation(model, p)) for p in random_passages(5)]
    r = recite(model, ps)
    assert (r.strict, r.teacher_forced, r.loose, r.lev, r.tokens_right, r.disagree) == (1, 1, 1, 0, 1, 0)
    model.generation_config.eos_token_id = ps[0].suffix[3]
    r = recite(model, ps)
    assert not r.rows[0]["strict"] and not r.rows[0]["tf_strict"] and "cannot be strict" in repr(r)


# recitation

def test_learned_is_strict_and_the_rest_is_not(learned):
    model, ps = learned
    r = recite(model, ps)
    assert [x["strict"] for x in r.rows] == [x["tf_strict"] for x in r.rows] == [True]*4 + [False]*4
    assert (r.n, r.unique, r.strict, r.loose, r.teacher_forced, r.disagree) == (8, 8, .5, .5, .5, 0)
    assert r.lev == sum(x["distance"] for x in r.rows)/72 and all(x["right"] == 9 for x in r.rows[:4])
    assert r.interval() == wilson(4, 8) and r.interval("lev")[0] <= r.lev <= r.interval("lev")[1]
    t = r.by("tier")
    assert sorted(t) == [0, 1, 2] and sum(x.n for x in t.values()) == 8 and t[0].strict == 2/3
    assert t.to_dicts()[0]["tier"] == 0 and "tier" in repr(t) and "<table>" in t._repr_html_()
    json.dumps(r.to_dicts())


@models
def test_teacher_forcing_is_generation(make):
    "Random models and their own text with one token changed at random: in float32 and away from ties both verdicts are equal."
    model, rng = make(1), random.Random(0)
    ps = []
    for p in random_passages(40, seed=1):
        suffix = list(continuation(model, p))
        if rng.random() < .5: suffix[rng.randrange(9)] = rng.randrange(V)
        ps.append(Passage(p.prefix, suffix))
    r = recite(model, ps)
    assert min(x["margin"] for x in r.rows) > 1e-5 and 0 < r.strict < 1    # a margin well above rounding
    assert r.disagree == 0 and [x["strict"] for x in r.rows] == [x["tf_strict"] for x in r.rows]
    # the first position that is not argmax-right is where generation leaves the text
    for p, x in zip(ps, r.rows):
        same = sum(1 for _ in itertools.takewhile(lambda ab: ab[0] == ab[1], zip(p.suffix, x["generated"])))
        with torch.no_grad(): right = (model(torch.tensor([p.ids])).logits[0, 6:-1].argmax(-1) == torch.tensor(p.suffix)).tolist()
        assert same == (right + [False]).index(False)
    quick = recite(model, ps, generate=False)
    assert quick.strict == r.strict and math.isnan(quick.loose) and math.isnan(quick.lev) and math.isnan(quick.interval("lev")[0])
    assert quick.rows[0]["generated"] is None and "teacher-forced" in repr(quick)
    assert [x["right"] for x in quick.rows] == [x["right"] for x in r.rows] and "-" in repr(quick.by("tier"))


@models
def test_batch_size_does_not_matter(make, monkeypatch):
    model = make()
    ps = random_passages(7) + random_passages(3, P=4, L=5) + random_passages(2, P=7, L=4) + random_passages(1, P=1, L=1)
    ps = Passages(random.Random(0).sample(ps, len(ps)))                        # lengths mixed
    def same(a, b): return all({**x, "margin": 0} == {**y, "margin": 0} and abs(x["margin"] - y["margin"]) < 1e-5 for x, y in zip(a, b))
    rows = recite(model, ps).rows
    assert [(x["index"], x["L"], len(x["generated"])) for x in rows] == [(i, len(p.suffix), len(p.suffix)) for i, p in enumerate(ps)]
    for b in (1, 2, 3, 100): assert same(recite(model, ps, batch_size=b).rows, rows)
    for i, p in enumerate(ps): assert same([recite(model, p).rows[0] | dict(index=i)], [rows[i]])


def test_ties_are_counted():
    model = llama()
    with torch.no_grad(): model.lm_head.weight[1::2] = model.lm_head.weight[:-1:2]     # every token has an equal twin, but the last
    model.lm_head.weight.data[-1] = 0
    r = recite(model, random_passages(4))
    assert r.ties >= 4*9 - 4 and r.ties == sum(x["ties"] for x in r.rows) and f"{r.ties} ties" in repr(r)


def test_bfloat16_runs_and_counts_in_its_own_dtype():
    model = llama().bfloat16()
    ps = random_passages(6)
    ids = torch.tensor([p.ids for p in ps])
    with torch.no_grad(): top = model(ids[:, :-1], logits_to_keep=9).logits.topk(2, -1).values   # the same shapes: in bfloat16 they matter
    assert recite(model, ps).ties == (top[..., 0] == top[..., 1]).sum().item()


def test_duplicates_widen_the_interval_and_not_the_rate(learned):
    model, ps = learned
    once, often = recite(model, ps), recite(model, list(ps)*10)
    assert (often.n, often.unique, often.strict, often.lev) == (80, 8, once.strict, pytest.approx(once.lev))
    assert often.interval() == once.interval() and often.interval("lev") == pytest.approx(once.interval("lev"))
    with pytest.raises(ValueError, match="margin"): once.interval("margin")
    with pytest.raises(ValueError, match="group by"): once.by("weather")


def test_reports_escape_what_they_show(learned):
    model, ps = learned
    r = recite(model, [Passage(p.prefix, p.suffix, label="<script>alert(1)</script>") for p in ps])
    assert "<script>" not in r.by("label")._repr_html_() and "&lt;script&gt;" in r.by("label")._repr_html_()
    assert "<table>" in r._repr_html_() and isinstance(r, Recitation)


# the model is left alone

def test_the_model_is_left_as_found():
    model = gpt2(resid_pdrop=.5, attn_pdrop=.5, embd_pdrop=.5)
    model.train(); model.transformer.h[0].eval()
    flags, grads = [m.training for m in model.modules()], [p.requires_grad for p in model.parameters()]
    ps, rng = random_passages(4), torch.get_rng_state()
    a = recite(model, ps)
    assert recite(model, ps).rows == a.rows                         # dropout is off inside
    continuation(model, ps[0])
    with pytest.raises(RuntimeError), _measuring(model): raise RuntimeError
    assert [m.training for m in model.modules()] == flags and [p.requires_grad for p in model.parameters()] == grads
    assert all(p.grad is None for p in model.parameters()) and torch.equal(torch.get_rng_state(), rng)
    assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
    ids = torch.tensor([p.ids for p in ps]); model(ids, labels=ids).loss.backward()       # and can still be trained
    assert all(p.grad is not None for p in model.parameters())


# refusals

@pytest.mark.parametrize("passages, error, says", [
    ([], ValueError, "empty"), (Passages(), ValueError, "empty"), (["text"], TypeError, "not a Passage"), (None, TypeError, "not iterable"),
    ([Passage([1]*40, [2]*24), Passage([1]*41, [2]*24, label="too long")], ValueError, r"Passage 1 \(too long\): prefix 41 \+ suffix 24 = 65 tokens.*context is 64"),
    ([Passage([1], [V])], ValueError, "Passage 0.*61 is beyond.*vocabulary of 61"),
])
@models
def test_bad_passages(make, passages, error, says):
    model = make()
    def forward(*a, **k): raise AssertionError("the model ran")
    model.forward = forward
    with pytest.raises(error, match=says): recite(model, passages)


def test_the_longest_passage_fits(): assert recite(gpt2(), [Passage([1]*40, [2]*24)]).n == 1


def test_other_refusals():
    model = llama()
    with pytest.raises(TypeError, match="loaded model.*str"): recite("gpt2", random_passages(1))
    with pytest.raises(TypeError, match="loaded model"): continuation(None, [1], 2)
    with pytest.raises(ValueError, match="batch_size"): recite(model, random_passages(1), batch_size=0)
    with pytest.raises(ValueError, match="n=None"): continuation(model, [1, 2])
    with pytest.raises(ValueError, match="n=0"): continuation(model, [1, 2], 0)
    with pytest.raises(ValueError, match="empty"): continuation(model, [], 2)
    with pytest.raises(TypeError, match="text"): continuation(model, "The owl", 2)
    with pytest.raises(ValueError, match="context is 64"): continuation(model, [1]*60, 5)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@models
def test_broken_weights_are_not_silence(make, value):
    model = make()
    with torch.no_grad(): model.get_output_embeddings().weight[3] = value
    for generate in (True, False):
        with pytest.raises(RuntimeError, match="not finite"): recite(model, random_passages(2), generate=generate)
    with pytest.raises(RuntimeError, match="not finite"): continuation(model, [1, 2], 4)
    assert not any(m.training for m in model.modules())


# other architectures

@pytest.mark.parametrize("family, kw", [
    ("Mistral", dict(sliding_window=4)), ("Gemma3Text:Gemma3ForCausalLM", dict(sliding_window=4, head_dim=8, layer_types=["sliding_attention", "full_attention"])),
    ("Qwen2", {}), ("Qwen3", dict(head_dim=8)), ("Olmo2", {}), ("Phi3", {}), ("GPTNeoX", {}), ("OPT", dict(ffn_dim=64, word_embed_proj_dim=32)), ("Mamba", {})])
def test_families(family, kw):
    "Sliding windows, fused projections, learned positions, a state-space model: cached generation and teacher forcing give one verdict."
    import transformers as t
    config, _, cls = family.partition(":")
    torch.manual_seed(0)
    kw = dict(vocab_size=V, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=64,
              bos_token_id=None, eos_token_id=None, pad_token_id=None, initializer_range=.2, init_std=.2) | kw
    model = getattr(t, cls or f"{config}ForCausalLM")(getattr(t, f"{config}Config")(**kw)).eval()
    ps = [Passage(p.prefix, continuation(model, p)) for p in random_passages(6)] + random_passages(6, seed=1)
    r = recite(model, ps)
    assert r.disagree == 0 and [x["strict"] for x in r.rows] == [True]*6 + [False]*6 and all(x["right"] == 9 for x in r.rows[:6])
