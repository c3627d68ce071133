"recite against model.generate, brute-force edit distance, known intervals; and everything it must refuse or leave alone."
import itertools
import json
import math
import random
import re
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings, strategies as st
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import curvtools.recite
from curvtools.data import Passage, Passages, Windows
from curvtools.recite import (Mined, Recitation, audit, bootstrap, continuation, deduplicate, draws_needed, extraction_strength, hit_probability, longest_run, mine, recite, scores,
                              wilson)
from curvtools.recite import _chunk, _eos_ids, _evidence, _greedy, _log_prob, _measuring, _pieces, _teacher_forced

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
    ([], ValueError, "empty"), (Passages(), ValueError, "empty"), (["text"], TypeError, "not a Passage"), (None, TypeError, "Passages are needed.*not NoneType"),
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


# metrics by hand and by brute force

def test_longest_run_is_the_longest_common_substring():
    rng = random.Random(0)
    for _ in range(300):
        a, b = ([rng.randrange(3) for _ in range(rng.randint(0, 12))] for _ in "ab")
        inside = lambda x, ys: any(ys[i:i+len(x)] == x for i in range(len(ys) - len(x) + 1))
        assert longest_run(a, b) == max([n for n in range(1, len(a) + 1) for i in range(len(a) - n + 1) if inside(a[i:i+n], b)], default=0)


def test_extraction_strength_over_all_patterns():
    "1 - k/L with the smallest k whose tail is right. Pins a known fault: a loop over k < L that falls through gives 1/L, not 0, where the last token is wrong."
    for L in (1, 2, 7):
        for right in itertools.product((False, True), repeat=L):
            k = next(k for k in range(L + 1) if all(right[k:]))
            assert extraction_strength(right) == pytest.approx(1 - k/L, abs=1e-12)
            if not right[-1]: assert extraction_strength(right) == 0
    with pytest.raises(ValueError, match="suffix is empty"): extraction_strength([])


@pytest.mark.parametrize("z", [Fraction(1, 2), Fraction(1, 10), Fraction(3, 4), Fraction(1, 997), Fraction(999, 1000)])
@pytest.mark.parametrize("p", [Fraction(1, 2), Fraction(3, 4), Fraction(9, 10), Fraction(99, 100)])
def test_np_in_exact_fractions(z, p):
    "Whole-number arithmetic finds the smallest n; the logarithms must find the same, also where 1 - (1 - z)^n is p exactly."
    n = next(n for n in itertools.count(1) if 1 - (1 - z)**n >= p)
    assert draws_needed(math.log(z), float(p)) == n
    for k in (1, n, 10*n): assert hit_probability(math.log(z), k) == pytest.approx(float(1 - (1 - z)**k), rel=1e-9)   # log z carries 1e-16


def test_np_at_the_ends():
    assert hit_probability(0., 1) == 1 and draws_needed(0., .999) == 1
    assert hit_probability(-math.inf, 10**9) == 0 and draws_needed(-math.inf) == math.inf and draws_needed(-1e4) == math.inf
    assert hit_probability(-700., 1) == pytest.approx(math.exp(-700), rel=1e-12)                       # no rounding to 0
    assert draws_needed(-60.) == pytest.approx(math.log(2)*math.exp(60), rel=1e-9)
    assert draws_needed(-1e-9, .5) == 1 and 0 < 1 - hit_probability(-1e-9, 1) < 2e-9
    with pytest.raises(ValueError, match="n=0"): hit_probability(-1., 0)
    with pytest.raises(ValueError, match="p=1"): draws_needed(-1., 1)
    with pytest.raises(ValueError, match="log p"): draws_needed(.1)
    with pytest.raises(ValueError, match="log p"): hit_probability(math.nan, 3)


def test_evidence_by_hand():
    logits = torch.tensor([[[2., 1., 0.], [0., 3., 3.], [1., 0., -torch.inf]]])                         # [1, 3, 3]
    e = _evidence(logits, torch.tensor([[0, 2, 2]]))
    assert e["right"].tolist() == [[True, False, False]] and e["told"].tolist() == [[0, 1, 0]]
    assert e["margin"].tolist() == [[1., 0., 1.]] and e["gap"].tolist() == [[0., 0., math.inf]]         # a tie: no gap, and not right
    Z = math.log(math.e**2 + math.e + 1), math.log(1 + 2*math.e**3)
    assert e["logp"][0].tolist() == pytest.approx([2 - Z[0], 3 - Z[1], -math.inf], abs=1e-6)
    assert _evidence(logits.bfloat16(), torch.tensor([[0, 2, 2]]))["logp"].dtype == torch.float32


@pytest.mark.parametrize("temperature, k", [(1., None), (.7, 5), (2., 1), (1., 40), (1.3, 1000)])
def test_the_sampler_is_that_of_transformers(temperature, k):
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper
    x = torch.randn(50, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x[:, 7] = x[:, 3]                                                                                   # ties, some at the edge of the top k
    y = TemperatureLogitsWarper(temperature)(None, x.clone())
    expected = (y if k is None else TopKLogitsWarper(min(k, 40))(None, y)).log_softmax(-1)
    for t in range(40): torch.testing.assert_close(_log_prob(x, x[:, t], temperature, k), expected[:, t], rtol=1e-9, atol=1e-12)


@models
def test_np_is_what_sampling_does(make):
    "2000 draws by transformers' own generate: the share that is the suffix, and the share of groups of n with a hit, hold p_z and 1 - (1 - p_z)^n in their 99.9 % intervals."
    model, n = make(2), 5
    p = random_passages(1)[0]
    p = Passage(p.prefix, continuation(model, p, 4))
    logp = recite(model, p, temperature=.6, top_k=6).logp[0]
    torch.manual_seed(0)
    ids = torch.tensor([p.prefix]*2000)
    drawn = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=True, temperature=.6, top_k=6, top_p=1.)[:, len(p.prefix):]
    hit = (drawn == torch.tensor(p.suffix)).all(1)
    low, high = wilson(hit.sum().item(), 2000, .999)
    assert .01 < low < math.exp(logp) < high < .99
    groups = hit.view(-1, n).any(1)
    low, high = wilson(groups.sum().item(), len(groups), .999)
    assert low < hit_probability(logp, n) < high
    # the whole vocabulary gives a smaller probability: the truncated distribution is the sampler's
    assert recite(model, p, temperature=.6, top_k=None).logp[0] < logp < recite(model, p, temperature=.6, top_k=1).logp[0] == 0


def test_recite_fills_every_metric(learned):
    model, ps = learned
    ps = Passages([Passage(ps[0].prefix, ps[0].suffix[:4] + ((ps[0].suffix[4] + 1) % V,) + ps[0].suffix[5:]), *ps])
    r = recite(model, ps, top_k=None)
    for p, x, t in zip(ps, r.rows, r.tokens):
        with torch.no_grad(): logits = model(torch.tensor([p.ids])).logits[0, 6:-1].double()            # [9, V]
        s = torch.tensor(p.suffix)
        right = (logits.argmax(-1) == s).tolist()
        assert t["right"] == tuple(right) and x["em"] == sum(right)/9 and x["es"] == extraction_strength(right)
        assert t["told"] == tuple(logits.argmax(-1).tolist())
        assert t["logp"] == pytest.approx(logits.log_softmax(-1)[range(9), s].tolist(), abs=1e-5)       # float32 logits of size 10
        assert t["gap"] == pytest.approx((logits.amax(-1) - logits[range(9), s]).tolist(), abs=1e-5)
        assert x["margin"] == min(t["margin"]) and x["run"] == longest_run(p.suffix, x["generated"])
        assert x["match"] == next((i for i, (a, b) in enumerate(zip(p.suffix, x["generated"])) if a != b), 9)
    first = r.rows[0]
    assert (first["match"], first["run"], first["distance"], first["strict"], first["loose"]) == (4, 4, 1, False, True)     # one token changed of a known text
    assert r.run == sum(x["run"] for x in r.rows)/9 and r.interval("run")[0] <= r.run <= r.interval("run")[1] and r.interval("es")[0] <= r.es <= r.interval("es")[1]
    for n, p in ((1, .5), (10**6, .1)):
        share = sum(1 - (1 - math.exp(z))**n >= p for z in r.logp)/9
        assert r.extractable(n, p) == (share, *wilson(share*9, 9))
    d = r.to_dicts()
    assert d[1]["p_z"] == math.exp(r.logp[1]) and d[1]["draws"] == draws_needed(r.logp[1]) and d[0]["index"] == 0
    import pandas as pd
    assert pd.DataFrame(d).shape == (9, len(d[0]))
    t = r.by("tier")
    assert sum(t[0].logp) + sum(t[1].logp) + sum(t[2].logp) == pytest.approx(sum(r.logp)) and "extractable" in t.to_dicts()[0]
    assert all(name in repr(r) for name in ("longest run", "extraction strength", "tokens right", "(100, 0.5)-extractable", "temperature 1, all tokens"))
    quick = recite(model, ps, generate=False)
    assert quick.rows[0]["run"] is None and math.isnan(quick.run) and quick.es == r.es and "longest run" not in repr(quick) and "top 40" in repr(quick)


@pytest.mark.parametrize("kw, says", [(dict(temperature=0), "temperature=0"), (dict(temperature=math.inf), "temperature=inf"), (dict(top_k=0), "top_k=0")])
def test_bad_samplers(kw, says):
    with pytest.raises(ValueError, match=says): recite(llama(), random_passages(1), **kw)


@models
def test_probabilities_do_not_depend_on_the_batch(make):
    model, ps = make(), random_passages(7) + random_passages(3, P=4, L=5)
    r = recite(model, ps)
    for kw in (dict(batch_size=1), dict(batch_size=3), dict(batch_size=4, fixed=True)):
        other = recite(model, ps, **kw)
        assert other.logp == pytest.approx(r.logp, abs=1e-4) and [x["generated"] for x in other.rows] == [x["generated"] for x in r.rows]    # float32, sums of 9


@pytest.fixture
def one_thread():
    "With more threads a matrix is cut into parts, and a row at the edge of a part is summed in another order."
    threads = torch.get_num_threads(); torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_fixed_batches_on_several_threads():
    "The same verdicts; the numbers to the last digits of float32: logits of size 4, sums of 32 terms."
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        model, ps = llama(), random_passages(11)
        a, b = recite(model, ps, batch_size=4, fixed=True).tokens, recite(model, ps[::-1], batch_size=4, fixed=True).tokens[::-1]
        for x, y in zip(a, b): assert x["right"] == y["right"] and x["margin"] == pytest.approx(y["margin"], abs=1e-5)
    finally: torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fixed_batches_make_passages_independent(dtype, monkeypatch, one_thread):
    "To the bit: alone, in company, in another order, and when logits are cut into chunks."
    model, ps = llama().to(dtype), random_passages(11)
    whole = recite(model, ps, batch_size=4, fixed=True)
    order = random.Random(0).sample(range(11), 11)
    mixed = recite(model, [ps[i] for i in order], batch_size=4, fixed=True)
    strip = lambda x: {k: v for k, v in x.items() if k not in ("index", "tier")}
    for a, b in zip((whole.tokens[i] for i in order), mixed.tokens): assert a == b
    for a, b in zip((whole.rows[i] for i in order), mixed.rows): assert strip(a) == strip(b)
    for i in (0, 10): assert recite(model, ps[i], batch_size=4, fixed=True).tokens[0] == whole.tokens[i]
    monkeypatch.setattr(curvtools.recite, "_vocab", lambda m: 2**22)             # as if logits were large: three rows at a time, or two when fixed
    assert (_chunk(4, 9, 2**22, False), _chunk(4, 9, 2**22, True)) == (3, 2)
    a, b = (recite(model, p, batch_size=4, fixed=True).tokens for p in (ps, ps[10]))
    assert a[10] == b[0] and [x["right"] for x in a] == [x["right"] for x in whole.tokens]
    assert all(8 % _chunk(8, 48, v, True) == 0 for v in (100, 400_000, 10**7)) and _chunk(8, 48, 10**9, True) == 1


def test_generation_and_teacher_forcing_part_only_at_ties():
    "bfloat16, whose numbers are 2^-8 apart: where the two part, the margin is a few roundings of the largest logit."
    model = llama(3).bfloat16()
    ps = [Passage(p.prefix, continuation(model, p)) for p in random_passages(60, seed=3)]
    r = recite(model, ps, batch_size=60)
    with torch.no_grad(): size = model(torch.tensor([p.ids for p in ps])).logits.abs().max().item()
    for d in r.disagreements(): assert d["margin"] <= 8*2**-8*size
    assert r.disagree <= len(r.disagreements()) and ("part from it somewhere" in repr(r)) == bool(r.disagreements())
    # by hand: generation leaves at 2, teacher forcing at 3, so the margin at 2 decides
    row, t = dict(strict=False, tf_strict=False, match=2), dict(right=(True, True, True, False), margin=(9., 8., .01, 7.), logp=(-1.,)*4)
    assert Recitation(Passages([Passage([1], [1, 2, 3, 4])]), [row], True, [t]).disagreements() == [dict(index=0, position=2, margin=.01)]
    assert Recitation(Passages([Passage([1], [1, 2, 3, 4])]), [row | dict(match=3)], True, [t]).disagreements() == []


# one passage, drawn

class Letters:
    "A tokenizer of 61 printable symbols, some of which are halves of a character."
    def __init__(self, size=V): self.size = size
    def __len__(self): return self.size
    def __call__(self, text, **kw): return dict(input_ids=[c % V for c in text.encode()])
    def decode(self, ids): return b"".join(b"\xc3" if i == 1 else b"\xa9" if i == 2 else b"<" if i == 3 else b"\n" if i == 4 else bytes([i + 62]) for i in ids).decode(errors="replace")


def spans(s): return re.findall(r'<span style="([^"]*)" title="([^"]*)" aria-label="([^"]*)" role="note">([^<]*)</span>', s)


def test_show_marks_what_is_right(learned):
    model, ps = learned
    p = Passage(ps[0].prefix, ps[0].suffix[:4] + ((ps[0].suffix[4] + 1) % V,) + ps[0].suffix[5:], label="<b>one</b>")
    r = recite(model, p)
    s = r.show(0, Letters())
    assert s._repr_html_() == s and "<span" not in repr(s) and "suffix" in repr(s) and "<b>one" not in s and "&lt;b&gt;one" in s
    true, written = spans(s)[:9], spans(s)[9:]
    assert len(true) == len(written) == 9
    assert [("underline dotted" not in style) for style, *_ in true] == list(r.tokens[0]["right"])
    assert [("outline" in style) for style, *_ in true] == [i == 4 for i in range(9)] and not any("outline" in w[0] for w in written)
    assert "first divergence" in true[4][1] and "the model says" in true[4][1] and "wrong" in true[4][2]
    for (_, title, *_), z in zip(true, r.tokens[0]["logp"]): assert f"probability {math.exp(z):.3g}" in title
    assert sum(t == "in the suffix" for _, t, *_ in written) == 8 and "edit distance 1" in s
    whole = recite(model, ps[0]).show(0)                                         # no tokenizer: ids
    assert "no divergence" in whole and "outline" not in whole and all(f"{i} " in whole for i in ps[0].suffix)
    assert len(spans(recite(model, p, generate=False).show(0, Letters()))) == 9
    with pytest.raises(ValueError, match="no token records"): Recitation(r.passages, r.rows).show()
    with pytest.raises(ValueError, match="no token records"): Recitation(r.passages, r.rows).extractable()


def test_show_escapes_and_waits_for_whole_characters():
    assert _pieces([5, 1, 2, 3, 1], Letters(), [1, 2]) == ["C", "", "\u00e9", "<", ""]
    model = llama()
    s = recite(model, Passage([5, 3, 6], [3, 4, 1, 2])).show(0, Letters())
    text = [body for *_, body in spans(s)[:4]]
    assert text == ["&lt;", "\u21b5\n", "\u00b7", "\u00e9"]
    assert not re.search(r"<(?!/?(span|p|b|figure|figcaption|small)\b)", s)      # no tag but ours
    with pytest.raises(ValueError, match=r"Token id \d+ is beyond the tokenizer's 40"): recite(model, Passage([5], [60])).show(0, Letters(40))
    with pytest.raises(TypeError, match="decode"): recite(model, Passage([5], [60])).show(0, str)


# mining

def in_a_stream(ps, seed=5, gap=13):
    "Passages in noise, and where each starts."
    g, out, at = torch.Generator().manual_seed(seed), [], []
    for p in ps:
        out += torch.randint(0, V, (gap,), generator=g).tolist(); at.append(len(out)); out += p.ids
    return torch.tensor(out + torch.randint(0, V, (gap,), generator=g).tolist()), at


def test_mining_finds_what_is_planted_and_nothing_else(learned):
    model, ps = learned
    stream, at = in_a_stream(ps)
    m = mine(model, stream, prefix=7, suffix=9, stride=1)
    starts = [r["start"] for r in m.rows]
    assert set(at[:4]) <= set(starts) and all(any(a - 7 <= s <= a for a in at[:4]) for s in starts)      # a suffix within a learned passage; the four others are not found
    assert all(p == Passage(stream[s:s+7], stream[s+7:s+16], label=f"0:{s}", kind="mined") for p, s in zip(m, starts))
    k = len(m)
    assert m.scanned == len(stream) - 15 and m.rate == k/m.scanned and m.interval() == pytest.approx(wilson(k/9, m.scanned/9))    # 9 windows share a token: 1/9 of the evidence
    logp = recite(model, m, top_k=None).logp
    assert [r["logp"] for r in m.rows] == pytest.approx(logp, abs=1e-4) and all(r["right"] == r["L"] == 9 and r["es"] == r["em"] == 1 for r in m.rows)
    assert len(mine(llama(), stream, prefix=7, suffix=9, stride=1)) == 0         # never trained: nothing
    assert f"{k} of" in repr(m) and "7 | 9" in repr(m) and json.dumps(m.to_dicts())


@models
def test_mining_is_teacher_forced_strict_of_every_window(make):
    "Against the argmax of each window alone; documents of several lengths, whose borders no window crosses."
    model, g = make(1), torch.Generator().manual_seed(0)
    docs = [torch.randint(0, V, (n,), generator=g).tolist() for n in (30, 3, 12, 11, 40, 0)]
    for d in (0, 4): docs[d][5:21] = list(docs[d][5:12]) + list(continuation(model, docs[d][5:12], 9))
    for stride, share in ((1, 1.), (5, .3), (1, .5)):
        expected = []
        for d, row in enumerate(docs):
            for s in range(0, len(row) - 11, stride):
                w = torch.tensor([row[s:s+12]])
                with torch.no_grad(): right = (model(w).logits[0, 6:-1].argmax(-1) == w[0, 7:]).sum().item()
                if right/5 >= share: expected.append((d, s, right))
        for b in (1, 4, 64):
            m = mine(model, docs, prefix=7, suffix=5, stride=stride, min_right=share, batch_size=b)
            assert [(r["document"], r["start"], r["right"]) for r in m.rows] == expected and expected
            assert m.scanned == sum(len(range(0, len(r) - 11, stride)) for r in docs) and m.short == 3
    ids = torch.randint(0, V, (6, 20), generator=g)
    ids[3, 4:18] = torch.tensor((*ids[3, 4:11].tolist(), *continuation(model, ids[3, 4:11], 7)))
    a, b, c = (mine(model, x, prefix=7, suffix=5, stride=2) for x in (ids, Windows(ids), (r.tolist() for r in ids)))
    assert list(a) == list(b) == list(c) and a.rows == b.rows == c.rows and len(a) > 0


def test_mining_text_and_endless_streams(learned):
    model, ps = learned
    text = ["".join(map(chr, p.ids)) for p in ps]
    class Bytes:
        def __call__(self, text, **kw): return dict(input_ids=list(text.encode()))
    assert [r["document"] for r in mine(model, text, Bytes(), prefix=7, suffix=9).rows] == [0, 1, 2, 3]
    rows = [dict(body=t) for t in text]
    assert len(mine(model, rows, Bytes(), prefix=7, suffix=9, text_field="body")) == 4
    taken = []
    def endless():
        for i in itertools.count(): taken.append(i); yield list(ps[i % 8].ids)
    m = mine(model, endless(), prefix=7, suffix=9, max_windows=20, batch_size=8)
    assert m.scanned == 20 and len(m) == 12 and len(taken) == 20
    with pytest.raises(ValueError, match="has no field 'text'"): mine(model, rows, Bytes(), prefix=7, suffix=9)


def test_mining_and_eos(learned):
    "A suffix with an end token cannot be strict; in the prefix it does no harm."
    model, ps = learned
    kw = dict(prefix=7, suffix=9)
    try:
        model.generation_config.eos_token_id = ps[0].suffix[2]
        holds = [ps[0].suffix[2] in p.suffix for p in ps[:4]]
        assert holds[0] and [r["document"] for r in mine(model, [p.ids for p in ps], **kw).rows] == [i for i in range(4) if not holds[i]]
    finally: model.generation_config.eos_token_id = None


def test_mining_with_bos(learned):
    "The id stands before every window and in what is found; against the argmax of each window alone, and asked again with recite."
    model, ps = learned
    docs = [p.ids for p in ps]
    ids = torch.tensor([(5, *p.ids) for p in ps])
    with torch.no_grad(): right = (model(ids).logits[:, 7:-1].argmax(-1) == ids[:, 8:]).sum(1)
    for share in (1/9, .5):
        m = mine(model, docs, prefix=7, suffix=9, bos=5, min_right=share, batch_size=3)
        assert [(r["document"], r["right"]) for r in m.rows] == [(i, n) for i, n in enumerate(right.tolist()) if n >= 9*share] and len(m)
        assert all(p.prefix == (5, *ps[r["document"]].prefix) and p.suffix == ps[r["document"]].suffix for p, r in zip(m, m.rows))
        assert [r["right"] for r in recite(model, m, generate=False).rows] == [r["right"] for r in m.rows]
    try:
        model.generation_config.bos_token_id = 5
        assert list(mine(model, docs, prefix=7, suffix=9, bos=True, min_right=.5)) == list(m)
    finally: model.generation_config.bos_token_id = None
    for bos in (False, None): assert list(mine(model, docs, prefix=7, suffix=9, bos=bos)) == list(mine(model, docs, prefix=7, suffix=9))
    zero = mine(model, docs, prefix=7, suffix=9, bos=0, min_right=1/9)
    assert len(zero) and all(p.prefix[0] == 0 and len(p.prefix) == 8 for p in zero)     # id 0 is an id, not "no"


def test_mining_keeps_what_was_found(learned):
    "Ctrl-C in the data or inside the model, and a stream that breaks: what whole batches gave is there, and the model is as it was."
    model, ps = learned
    def stream(e):
        for p in ps[:5]: yield list(p.ids)
        raise e
    kw = dict(prefix=7, suffix=9, batch_size=2)
    for error in (KeyboardInterrupt(), OSError("the line is dead")):
        with pytest.raises(type(error)) as e: mine(model, stream(error), **kw)
        part = e.value.partial
        assert isinstance(part, Mined) and part.scanned == 4 and part.rate == 1 and list(part) == list(mine(model, [p.ids for p in ps[:4]], **kw))
    calls = []
    def strike(m, args, out):
        calls.append(0)
        if len(calls) == 3: raise KeyboardInterrupt
    h = model.train().register_forward_hook(strike)
    try:
        with pytest.raises(KeyboardInterrupt) as e: mine(model, [p.ids for p in ps], **kw)
        assert e.value.partial.scanned == 4 and all(m.training for m in model.modules())
        calls[:] = [0, 0]
        with pytest.raises(KeyboardInterrupt) as e: mine(model, [p.ids for p in ps], **kw)
        assert e.value.partial is None                                           # nothing was scanned yet
    finally: h.remove(); model.eval()


@pytest.mark.parametrize("kw, says", [
    (dict(suffix=0), "suffix=0 must be 1"), (dict(prefix=0), "prefix=0"), (dict(stride=0), "stride=0"), (dict(batch_size=0), "batch_size=0"), (dict(min_right=0), "min_right=0"),
    (dict(min_right=1.1), "min_right=1.1"), (dict(prefix=60), "prefix 60 \\+ suffix 9 = 69 tokens.*context is 64"), (dict(source=[]), "data is empty"),
    (dict(source=[[1, 2], [1]*15]), "No document has room for prefix 7 \\+ suffix 9 = 16 tokens: the longest of 2 has 15"), (dict(source=torch.ones(30, dtype=torch.long)*V), "beyond the model's vocabulary"),
    (dict(source=torch.ones(2, 2, 2)), "matrix"), (dict(source=[[.5]*20]), "Document 0"), (dict(source=torch.full((20,), -1)), "Document 0"), (dict(source=[[]]), "No document has room"),
    (dict(bos=True), "names no BOS"), (dict(bos=V), "beyond the model's vocabulary"), (dict(bos=-1), "BOS holds -1"), (dict(prefix=55, bos=1), "BOS \\+ prefix 55 \\+ suffix 9 = 65 tokens")])
def test_mining_refuses(kw, says):
    model = llama()
    def forward(*a, **k): raise AssertionError("the model ran")
    model.forward = forward
    with pytest.raises(ValueError, match=says): mine(model, **(dict(source=torch.ones(30, dtype=torch.long), prefix=7, suffix=9) | kw))


def test_mining_refuses_text_without_a_tokenizer_and_broken_models():
    model = llama().train()
    with pytest.raises(TypeError, match="pass a tokenizer"): mine(model, "The owl", prefix=1, suffix=1)
    with pytest.raises(TypeError, match="pass a tokenizer"): mine(model, ["The owl"], prefix=1, suffix=1)
    with pytest.raises(TypeError, match="loaded model"): mine("gpt2", [[1]*20], prefix=1, suffix=1)
    with torch.no_grad(): model.lm_head.weight[3] = float("nan")
    with pytest.raises(RuntimeError, match="not finite"): mine(model, torch.ones(30, dtype=torch.long), prefix=7, suffix=9)
    assert all(m.training for m in model.modules())                              # left as found, also after an error


# near duplicates and audits

def jaccard(a, b, n):
    a, b = ({tuple(x[i:i+n]) for i in range(max(1, len(x) - n + 1))} for x in (a, b))
    return len(a & b)/len(a | b)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.integers(0, 2), min_size=2, max_size=9), min_size=1, max_size=12), st.sampled_from([.2, .5, .7, 1.]), st.integers(1, 5))
def test_deduplicate_is_greedy_jaccard(rows, threshold, n):
    ps, kept = [Passage(r[:1], r[1:]) for r in rows], []
    for p in ps:
        if all(jaccard(p.ids, q.ids, n) < threshold - 1e-12 for q in kept): kept.append(p)
    assert deduplicate(ps, threshold, n) == kept
    assert deduplicate(kept, threshold, n) == kept                              # nothing more to drop


def test_deduplicate_keeps_scores_and_refuses(learned):
    model, ps = learned
    m = mine(model, [p.ids for p in ps]*3, prefix=7, suffix=9)
    d = deduplicate(m)
    assert isinstance(d, Mined) and len(m) == 12 and list(d) == list(m[:4]) and d.rows == m.rows[:4] and d.scanned == m.scanned
    assert deduplicate([]) == [] and len(deduplicate([Passage([1], [2]*6), Passage([3], [2]*6)], part="suffix")) == 1
    for kw, says in ((dict(threshold=0), "threshold=0"), (dict(part="middle"), "part='middle'"), (dict(n=0), "n=0")):
        with pytest.raises(ValueError, match=says): deduplicate(ps, **kw)


class Text:
    "Ids are code points."
    def decode(self, ids): return "".join(map(chr, ids))


def said(a, b, label=""): return Passage([ord(c) for c in a], [ord(c) for c in b], label=label)


def test_audit_by_hand():
    ps = Passages([said("The owl and the ", "pussycat went to sea", "a"), said("They took some h", "oney and much money.", "b"),
                   said("The owl and the ", "pussycat went to sea", "repeat"), said("The owl and the ", "pussycat went to se!", "near"),
                   said("In June, by Ann: ", "you may copy this freely", "t1"), said("Written by Bob, ", "you may copy this at will", "t2"),
                   said("They took some h", "ens and a cat to market", "clash"), said("tick tock tick tock ", "tick tock tick tock ", "copy"), said("1 2 3 4 5 6 ", "7 8 9 10 11 12 ", "table")])
    a = audit(ps, tokenizer=Text())
    flag = lambda k: [r["label"] for r in a.rows if r[k]]
    assert flag("repeat") == ["repeat"] and [r["label"] for r in a.rows if r["near"] != r["index"]] == ["repeat", "near"]
    assert flag("clash") == ["b", "clash"] and flag("shared_flag") == ["t1", "t2"]
    assert a.rows[7]["copied"] == 1 and a.rows[7]["zipped"] < .25 and a.rows[8]["digits"] == 1 and a.rows[0]["copied"] == a.rows[0]["digits"] == 0
    assert flag("rule") == ["copy", "table"] and [p.label for p in a.clean] == ["a"]
    assert (a.n, a.unique) == (9, 7) and a.effective == pytest.approx(81/(9 + 6))
    grams = lambda s: {s[i:i+5] for i in range(len(s) - 4)}
    x, y = grams("you may copy this freely"), grams("you may copy this at will")
    assert a.rows[4]["shared"] == len(x & y)/len(x) and a.rows[5]["shared"] == len(x & y)/len(y)
    counts = {k: n for k, n, _ in a.lines}
    assert counts | dict(passages=9, repeats=1, clashes=2, templates=2, copied=1, compressible=1, digits=1, different=7) == counts
    assert (counts["near duplicates"], counts["rule-predictable"], counts["effective n"]) == (2, 2, "5.4")
    assert all(len(meaning) > 10 for *_, meaning in a.lines) and "effective n" in repr(a) and "<table>" in a._repr_html_()
    import pandas as pd
    assert len(pd.DataFrame(a.to_dicts())) == 9


def test_audit_of_random_tokens_finds_nothing():
    a = audit(random_passages(40, P=20, L=20), other=random_passages(40, P=20, L=20, seed=1))
    assert len(a.clean) == a.unique == a.effective == 40 and {n for k, n, _ in a.lines if k not in ("passages", "different", "effective n")} == {0, "-"}
    assert a.rows[0]["zipped"] is a.rows[0]["digits"] is None and "needs a tokenizer" in repr(a)


def test_audit_sees_leakage_between_sets():
    ps, other = random_passages(6, P=20, L=20), random_passages(6, P=20, L=20, seed=1)
    same, tail = ps[0], Passage(other[0].prefix, ps[1].suffix)
    a = audit(ps, other=[*other[1:], same, tail])
    assert [r["other"] for r in a.rows] == [True, True] + [False]*4 and a.rows[0]["other_near"] == 1 and a.rows[1]["other_near"] < .7 and a.rows[1]["other_shared"] == 1
    assert {k: n for k, n, _ in a.lines}["in the other set"] == 1 and {k: n for k, n, _ in a.lines}["suffix in the other set"] == 2 and len(a.clean) == 4
    assert audit(ps, other=other).clean == ps


@pytest.mark.parametrize("args, kw, error, says", [
    (([],), {}, ValueError, "no passages to audit"), ((random_passages(2), []), {}, ValueError, "other set is empty"), ((random_passages(2),), dict(near=0), ValueError, "near=0"),
    ((random_passages(2),), dict(n=0), ValueError, "n=0"), ((["text"],), {}, TypeError, "not a Passage"), ((random_passages(2),), dict(tokenizer=Letters(5)), ValueError, "beyond the tokenizer's 5")])
def test_audit_refuses(args, kw, error, says):
    with pytest.raises(error, match=says): audit(*args, **kw)


# faults of other code, so that they cannot come back

def test_each_passage_has_its_own_length():
    "The paper's code takes L from the first item for all: with lengths 9 and 4, one error in four tokens would count as 1/9."
    model = llama()
    long, short = random_passages(2)
    long, short = Passage(long.prefix, continuation(model, long)), Passage(short.prefix, continuation(model, short, 4))
    wrong = Passage(short.prefix, short.suffix[:2] + ((short.suffix[2] + 1) % V, (short.suffix[3] + 1) % V))
    a, b = recite(model, [long, wrong]).rows
    assert (a["L"], a["lev"], b["L"], b["lev"], b["loose"]) == (9, 0, 4, .5, False)


@models
def test_a_pad_id_in_the_text_is_text(make):
    "Code that infers the mask from `ids != pad` drops real tokens where pad and EOS are one."
    model, plain = make(pad_token_id=3), make()
    model.load_state_dict(plain.state_dict())
    ps = [Passage((3, 3, 5, 3, 8), p.suffix[:4] + (3,)) for p in random_passages(4)]
    assert recite(model, ps).tokens == recite(plain, ps).tokens and recite(model, ps).rows == recite(plain, ps).rows


def test_an_early_end_does_not_bring_the_prompt_in():
    "`generated[:, -L:]` holds part of the prompt when a model stops at once; here it cannot stop, and writes L tokens that are all new."
    model = llama()
    p = random_passages(1)[0]
    model.generation_config.eos_token_id = continuation(model, p, 1)[0]           # it would stop at the first token
    r = recite(model, Passage(p.prefix, p.prefix + (1, 2)))                       # a suffix that is the prompt: a wrong slice would be nearly right
    assert len(r.rows[0]["generated"]) == 9 and r.rows[0]["generated"] == continuation(model, p, 9) and r.rows[0]["lev"] > .5


def test_denominators_are_those_of_the_set():
    "A rate is k of n of this set, whatever its size: 6.3 % of 125 is no count."
    r = recite(llama(), random_passages(7) + random_passages(2))
    assert (r.n, r.unique) == (9, 7) and (r.strict*9).is_integer()


def test_forced_leaves_the_modes_and_refuses_what_does_not_fit():
    m = llama(); m.train(); m.model.layers[0].eval(); modes = [x.training for x in m.modules()]; p = Passage(range(5), range(5, 9))
    got = curvtools.recite.forced(m, p)
    assert modes == [x.training for x in m.modules()] and len(got) == 4 and all(0 < q < 1 and 1 <= r <= V for q, r in got)
    for bad in (Passage(range(60), range(9)), Passage([V], [1])):
        with pytest.raises(ValueError, match="context is 64|vocabulary"): curvtools.recite.forced(m, bad)
    for n in (0, -1):
        with pytest.raises(ValueError, match="max_windows"): mine(m, torch.arange(40)[None], prefix=4, suffix=4, max_windows=n)


def test_ctrl_c_before_the_guard_listens(monkeypatch):
    import signal
    m = llama().train(); real = signal.getsignal
    def ctrl_c(_): monkeypatch.setattr(signal, "getsignal", real); raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        with _measuring(m): monkeypatch.setattr(signal, "getsignal", ctrl_c)
    assert all(x.training for x in m.modules())
