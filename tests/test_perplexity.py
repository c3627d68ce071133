"Perplexity against torch's and transformers' own loss, by hand with padding and masks; and everything it must refuse."
import json
import math

import pytest
import torch
import torch.nn.functional as F
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM

from curvtools.data import Windows
from curvtools.evaluate import Perplexity, perplexity
from curvtools.evaluate import _window_nll

V = 53


def llama(dtype=torch.float64):
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(vocab_size=V, hidden_size=24, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                                        max_position_embeddings=32, initializer_range=.3)).to(dtype).eval()


def gpt2(dtype=torch.float64):
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=V, n_embd=24, n_layer=2, n_head=4, n_positions=32, initializer_range=.3)).to(dtype).eval()


def opt(dtype=torch.float64):
    torch.manual_seed(0)
    return OPTForCausalLM(OPTConfig(vocab_size=V, hidden_size=24, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4, word_embed_proj_dim=24,
                                    max_position_embeddings=32, init_std=.3)).to(dtype).eval()


models = pytest.mark.parametrize("make", [llama, gpt2, opt])


def some_ids(n=7, T=13, seed=0): return torch.randint(0, V, (n, T), generator=torch.Generator().manual_seed(seed))


def reference(model, rows, labels=None):
    "Total NLL and tokens, one unpadded row at a time, with torch's cross-entropy in float64; rows and labels are lists of ids."
    nll = n = 0
    for i, row in enumerate(rows):
        with torch.no_grad(): logits = model(torch.as_tensor(row)[None]).logits[0, :-1].double()
        t = torch.as_tensor(row if labels is None else labels[i])[1:]
        nll += F.cross_entropy(logits, t, ignore_index=-100, reduction="sum").item(); n += int((t != -100).sum())
    return nll, n


@models
def test_against_cross_entropy(make):
    model, ids = make(), some_ids()
    nll, n = reference(model, ids)
    p = perplexity(model, ids)
    assert (p.nll, float(p)) == pytest.approx((nll, math.exp(nll/n)), rel=1e-10)   # both float64; the order of sums differs
    assert (p.tokens, p.n, p.window, p.loss) == (7*12, 7, 13, pytest.approx(nll/n))


@models
def test_against_the_models_own_loss(make):
    ids, model = some_ids(), make()
    with torch.no_grad(): loss = model(ids, labels=ids).loss
    assert perplexity(model, ids).loss == pytest.approx(loss.item(), rel=1e-6)     # transformers computes the loss in float32 whatever the model's dtype
    model = model.float()
    with torch.no_grad(): loss = model(ids, labels=ids).loss
    assert perplexity(model, ids).loss == pytest.approx(loss.item(), rel=1e-6)


@models
def test_batch_size_and_form_do_not_matter(make):
    model, ids = make(), some_ids()
    p, w = perplexity(model, ids), Windows(ids, batch_size=3)
    forms = [w, (w, 2), (ids, 1), list(w), (b for b in w), [ids[:3], ids[3:]], [dict(input_ids=ids)], [dict(input_ids=ids, attention_mask=torch.ones_like(ids))],
             [dict(input_ids=ids, labels=ids, attention_mask=None)], [ids.int()], [dict(input_ids=ids.tolist())]]
    for f in forms:
        q = perplexity(model, *f) if isinstance(f, tuple) else perplexity(model, f)
        assert float(q) == pytest.approx(float(p), rel=1e-12) and q.n == 7 and torch.allclose(q.window_nll, p.window_nll, rtol=1e-12)


@pytest.mark.parametrize("side", ["left", "right"])
@models
def test_padding_does_not_matter(make, side):
    model = make()
    rows = [some_ids(1, T, seed=T)[0].tolist() for T in (5, 13, 2, 9)]
    ids, mask = torch.full((4, 13), 7), torch.zeros(4, 13).long()      # pads hold an ordinary id, that also occurs in the text
    for i, r in enumerate(rows):
        s = slice(13 - len(r), None) if side == "left" else slice(len(r))
        ids[i, s], mask[i, s] = torch.tensor(r), 1
    nll, n = reference(model, rows)
    for labels in ({}, dict(labels=ids), dict(labels=ids.masked_fill(mask == 0, -100))):
        p = perplexity(model, [dict(input_ids=ids, attention_mask=mask, **labels)])
        assert p.tokens == n == 4 + 12 + 1 + 8 and p.nll == pytest.approx(nll, rel=1e-10)
    assert perplexity(model, [dict(input_ids=ids, attention_mask=mask.bool())]).nll == pytest.approx(nll, rel=1e-10)


@models
def test_masked_labels_are_not_scored(make):
    model, ids = make(), some_ids()
    keep = torch.rand(ids.shape, generator=torch.Generator().manual_seed(1)) < .4
    keep[2] = False                                                   # a window without any label is no trouble
    nll, n = reference(model, ids, ids.masked_fill(~keep, -100))
    p = perplexity(model, Windows(ids, loss_mask=keep, batch_size=2))
    assert (p.tokens, p.nll) == (n, pytest.approx(nll, rel=1e-10)) and p.n == 7
    lo, hi = p.interval(); assert lo <= p <= hi


def test_paper_is_the_mean_over_batches():
    model, ids = llama(), some_ids()
    batches = [math.exp(nll/n) for nll, n in (reference(model, ids[i:i+3]) for i in (0, 3, 6))]
    p = perplexity(model, Windows(ids, batch_size=3), paper=True)
    assert float(p) == pytest.approx(sum(batches)/3, rel=1e-10) and "mean of batches" in repr(p)
    mask = torch.ones_like(ids).bool(); mask[:3] = False               # a batch in which nothing is scored is left out
    assert float(perplexity(model, Windows(ids, loss_mask=mask, batch_size=3), paper=True)) == pytest.approx(sum(batches[1:])/2, rel=1e-10)
    assert float(perplexity(model, ids, batch_size=100, paper=True)) == pytest.approx(float(perplexity(model, ids)), rel=1e-12)


def test_chunks_do_not_matter_and_float32_is_used_for_bfloat16():
    logits = torch.randn(3, 5, V, generator=torch.Generator().manual_seed(0))*5
    t = some_ids(3, 5); t[:, -1] = -100; t[1] = -100
    full = F.cross_entropy(logits.double().transpose(1, 2), t, reduction="none", ignore_index=-100).sum(1)
    for chunk in (1, V, 7*V, 10**9):
        nll, n = _window_nll(logits, t, chunk)
        assert torch.allclose(nll, full, rtol=1e-6) and n.tolist() == [4, 0, 4] and nll.dtype == torch.float64
    b = logits.bfloat16()
    full = F.cross_entropy(b.double().transpose(1, 2), t, reduction="none", ignore_index=-100).sum(1)
    assert torch.allclose(_window_nll(b, t)[0], full, rtol=1e-6)      # bfloat16 arithmetic would be off by 1e-3


def test_no_second_copy_of_the_logits():
    "The largest tensor made for a chunk is the chunk, not N x T x V."
    from torch.utils._python_dispatch import TorchDispatchMode
    class Largest(TorchDispatchMode):
        top = 0
        def __torch_dispatch__(self, f, types, args=(), kwargs=None):
            out = f(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.untyped_storage().data_ptr() != logits.untyped_storage().data_ptr() and out.is_floating_point(): self.top = max(self.top, out.numel())
            return out
    logits, t = torch.randn(4, 50, 1000).bfloat16(), torch.zeros(4, 50).long()
    with Largest() as m: _window_nll(logits, t, chunk=10_000)
    assert m.top <= 10_000


def test_the_number_remembers():
    model, ids = llama(), some_ids()
    p = perplexity(model, ids)
    assert isinstance(p, float) and repr(p) == str(p) == f"{float(p):.4g} (n=7, window 13)"
    assert json.loads(json.dumps(dict(p=p))) == dict(p=float(p)) and f"{p:.2f}" == f"{float(p):.2f}" and type(p*2) is float
    lo, hi = p.interval(); assert lo < p < hi and p.interval() == (lo, hi) != p.interval(seed=1)
    assert perplexity(model, [ids, ids[:, :5]]).window == "5-13"


def test_a_perplexity_can_be_copied():
    "Results travel: copy.deepcopy of a report, a worker process."
    import copy, pickle
    for paper in (False, True):
        p = perplexity(llama(), Windows(some_ids(), batch_size=3), paper=paper)
        for q in (copy.copy(p), copy.deepcopy(p), pickle.loads(pickle.dumps(p))): assert q == p and repr(q) == repr(p) and torch.equal(q.window_nll, p.window_nll) and q.interval() == p.interval()


def test_ratio_is_paired():
    model, ids = llama(), some_ids(40)
    before = perplexity(model, ids)
    with torch.no_grad(): model.model.layers[0].mlp.down_proj.weight.mul_(.98)
    after = perplexity(model, ids)
    r, lo, hi = after.ratio(before)
    assert r == pytest.approx(after/before, rel=1e-12) and lo <= r <= hi
    a, b = after.interval(); assert (hi - lo) < .2*(b - a)/before       # far narrower than unpaired
    assert before.ratio(before) == (1, 1, 1)
    with pytest.raises(ValueError, match="same windows"): after.ratio(perplexity(model, ids[:5]))


def test_a_hopeless_model_is_infinitely_perplexed_not_an_error():
    p = Perplexity(torch.tensor([2000.], dtype=torch.float64), torch.tensor([2]), window=3)
    assert p == math.inf and p.loss == 1000


def test_the_model_is_left_as_found():
    model = gpt2(torch.float32).train(); model.transformer.h[1].eval()
    flags, rng = [m.training for m in model.modules()], torch.get_rng_state()
    assert perplexity(model, some_ids()) == perplexity(model, some_ids())      # dropout is off inside
    with pytest.raises(ValueError): perplexity(model, [some_ids(), some_ids(3, 1)])
    assert [m.training for m in model.modules()] == flags and torch.equal(rng, torch.get_rng_state()) and torch.is_grad_enabled()
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("windows, error, says", [
    (torch.empty(0, 8).long(), ValueError, "empty"), ([], ValueError, "empty"), (iter(()), ValueError, "empty"),
    (torch.ones(4, 1).long(), ValueError, "one token"), ([some_ids(), some_ids(3, 1)], ValueError, "Batch 1.*one token"),
    ([some_ids()[0]], ValueError, "Batch 0 has shape"), ([some_ids(), some_ids()[:0]], ValueError, "Batch 1 has shape"),
    (some_ids(2, 33), ValueError, "windows of 33.*context is 32"), ([some_ids(), some_ids() + V], ValueError, "Batch 1.*vocabulary of 53"),
    ([dict(ids=some_ids())], ValueError, "Batch 0 has no input_ids.*'ids'"), ([dict(input_ids=some_ids(), labels=some_ids(7, 5))], ValueError, "shapes differ"),
    ([dict(input_ids=some_ids(), labels=torch.full((7, 13), -100))], ValueError, "No token is scored"),
    ([dict(input_ids=some_ids(), attention_mask=torch.zeros(7, 13))], ValueError, "No token is scored"),
    ("some text", TypeError, "str"), (dict(input_ids=some_ids()), TypeError, "dict"),
])
def test_refusals(windows, error, says):
    with pytest.raises(error, match=says): perplexity(gpt2(), windows)


def test_other_refusals():
    with pytest.raises(TypeError, match="loaded model.*str"): perplexity("gpt2", some_ids())
    with pytest.raises(ValueError, match="in batches already"): perplexity(gpt2(), [some_ids()], batch_size=2)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_names_its_batch(value):
    model, ids = llama(), some_ids().clamp(max=V-2)
    with torch.no_grad(): model.model.embed_tokens.weight[V-1] = value         # only text with this token is hurt
    bad = ids.clone(); bad[4, 3] = V-1
    with pytest.raises(RuntimeError, match="loss of batch 2 is not finite"): perplexity(model, Windows(bad, batch_size=2))
    assert perplexity(model, Windows(ids, batch_size=2)) > 1


def test_batches_that_are_none_are_named():
    m = llama(); ids = torch.tensor([[3, 4, 5]])
    for bad, match in ((torch.tensor([[3.7, 4.2, 5.9]]), "whole numbers"), (torch.tensor([[3, -1, 5]]), "from -1"), (dict(input_ids=ids, labels=torch.tensor([[3, V, 5]])), f"label {V} is no token id"),
                       (dict(input_ids=ids, labels=torch.tensor([[3, -1, 5]])), "label -1 is no token id"), (dict(input_ids=ids, labels=ids.float()), "is no token id")):
        with pytest.raises(ValueError, match=match): perplexity(m, [bad])


def test_positions_of_a_batch_are_used():
    "Two documents in one window, each counted from its start."
    m = gpt2(); ids = torch.randint(V, (2, 8)); pos = torch.arange(8).repeat(2, 1) % 4
    want = F.cross_entropy(m(ids, position_ids=pos, use_cache=False).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).exp().item()
    assert math.isclose(perplexity(m, [dict(input_ids=ids, position_ids=pos)]), want, rel_tol=1e-9)


def test_a_ratio_to_another_text_is_refused():
    m, ids = llama(), torch.randint(V, (6, 9), generator=torch.Generator().manual_seed(0)); a = perplexity(m, ids, batch_size=2)
    assert math.isclose(a.ratio(perplexity(m, ids, batch_size=3))[0], 1, rel_tol=1e-12)
    with pytest.raises(ValueError, match="different texts"): a.ratio(perplexity(m, (ids + 1) % V))
