"Fused attention matrices: what is one target, what may be cut in some rows, and when a fused edit equals the separate ones."
import pytest
import torch
import transformers as tf

from curvtools.baselines import one_sided
from curvtools.decompose import Basis, Eigen, Staircase
from curvtools.edit import Edit, Plan, rows_only
from curvtools.kfac import Factor, Factors, collect
from curvtools.targets import find_targets, fingerprint, weight
from tiny import D, V, tiny, tiny_inputs

FUSED = ["gpt2", "phi3", "gpt_neox", "bloom"]


def model_of(name):
    if name != "bloom": return tiny(name)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        m = tf.BloomForCausalLM(tf.BloomConfig(vocab_size=V, hidden_size=D, n_layer=3, n_head=4, bos_token_id=1, eos_token_id=2)).double().eval()
        for p in m.parameters(): p.data.add_(.1*torch.randn_like(p))
    return m


@pytest.fixture(scope="module")
def made():
    out = {}
    for n in FUSED:
        m = model_of(n); out[n] = m, collect(m, tiny_inputs("gpt2", 6)["input_ids"], "attention", progress=False)
    return out


@pytest.mark.parametrize("name", FUSED)
def test_q_alone_is_refused_with_the_way_out(made, name):
    model, factors = made[name]
    with pytest.raises(ValueError, match="q is part of qkv, which is one target"): find_targets(model, "attention", projections="q")
    with pytest.raises(ValueError, match="q is some rows of qkv.*rows_only"): factors.eigen().keep(rho=.5, projections="q")


@pytest.mark.parametrize("name", FUSED)
def test_rows_only(made, name):
    model, factors = made[name]
    edit = factors.eigen().keep(rho=.6, projections="qkv")
    cuts = {p: rows_only(edit, model, p) for p in "qkv"}
    for n, p in edit.plan.items():
        W, whole = weight(model, p.target).clone(), p.new_weight(weight(model, p.target))
        for part, cut in cuts.items():
            r = p.target.rows(part); rest = [i for i in range(p.target.d_out) if i not in set(r)]
            assert torch.equal(cut.plan[n].W[r], whole[r]) and torch.equal(cut.plan[n].W[rest], W[rest])
        assert torch.equal(rows_only(edit, model, list("qkv")).plan[n].W, whole)               # all parts: the whole edit
    before = {t.name: fingerprint(model, t) for t in find_targets(model, "attention")}
    x = tiny_inputs("gpt2", 2)["input_ids"]; logits = model(x).logits
    with cuts["q"].applied(model): assert not torch.equal(model(x).logits, logits)
    assert before == {t.name: fingerprint(model, t) for t in find_targets(model, "attention")}


def test_rows_only_changes_what_it_says_and_nothing_else(made):
    "Outputs of the fused module: those of the other parts are the same to the bit."
    model, factors = made["gpt_neox"]; cut = rows_only(factors.eigen().keep(rho=.5, projections="qkv"), model, "v")
    t = find_targets(model, "attention", blocks=0, projections="qkv")[0]; m, x = model.get_submodule(t.name), torch.randn(5, D, dtype=torch.float64)
    y = m(x)
    with cut.applied(model): z = m(x)
    other = [i for i in range(t.d_out) if i not in set(t.rows("v"))]
    assert torch.equal(y[:, other], z[:, other]) and not torch.equal(y, z)


def test_rows_only_refuses(made):
    model, factors = made["gpt2"]; basis = factors.eigen()
    with pytest.raises(ValueError, match="none of them is fused"): rows_only(basis.keep(rho=.5, projections="o"), model, "q")
    with pytest.raises(ValueError, match="has the part 'gate'; there are q, k, v"): rows_only(basis.keep(rho=.5), model, "gate")
    edit = basis.keep(rho=.5, projections="qkv")
    with edit.applied(model), pytest.raises(ValueError, match="not the weights"): rows_only(edit, model, "q")


@pytest.fixture(scope="module")
def twins():
    "A Llama and the Phi-3 with its weights."
    kw = dict(vocab_size=V, hidden_size=D, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, rms_norm_eps=1e-5, bos_token_id=1, eos_token_id=2, pad_token_id=0)
    with torch.random.fork_rng():
        torch.manual_seed(0); llama, phi = tf.LlamaForCausalLM(tf.LlamaConfig(**kw)).double().eval(), tf.Phi3ForCausalLM(tf.Phi3Config(**kw)).double().eval()
        for p in llama.parameters():
            if p.ndim > 1: p.data.normal_(std=.25)
    w = {k: p.data for k, p in llama.named_parameters()}
    for n, p in phi.named_parameters():
        head = n.rpartition(".self_attn.")[0] or n.rpartition(".mlp.")[0]
        p.data.copy_(torch.cat([w[f"{head}.self_attn.{k}_proj.weight"] for k in "qkv"]) if "qkv" in n else torch.cat([w[f"{head}.mlp.{k}_proj.weight"] for k in ("gate", "up")]) if "gate_up" in n else w[n])
    x = tiny_inputs("llama", 6)["input_ids"]
    torch.testing.assert_close(phi(x).logits, llama(x).logits, rtol=1e-8, atol=1e-10)
    return llama, phi, collect(llama, x, "attention", progress=False), collect(phi, x, "attention", progress=False)


def test_fused_factors_hold_the_separate_ones(twins):
    _, _, a, b = twins
    for block in (0, 1):
        f = b[block, "qkv"]
        for p in "qkv":
            r = torch.tensor(f.target.rows(p))
            torch.testing.assert_close(f.G[r][:, r], a[block, p].G, rtol=1e-8, atol=1e-12 * float(f.G.abs().max()))
            torch.testing.assert_close(f.A, a[block, p].A, rtol=1e-8, atol=1e-12)


def test_input_sided_fused_edit_equals_the_separate_ones(twins):
    llama, phi, a, b = twins
    ea, eb = (one_sided(f.eigen(), "input", fraction=.5) for f in (a, b))
    for block in (0, 1):
        t = b[block, "qkv"].target
        new = torch.cat([ea.plan[a[block, p].target.name].new_weight(weight(llama, a[block, p].target)) for p in "qkv"])
        torch.testing.assert_close(eb.plan[t.name].new_weight(weight(phi, t)), new, rtol=1e-5, atol=1e-6)


def test_two_sided_fused_edit_equals_the_separate_ones_at_one_threshold_without_cross_curvature(twins):
    "Where G has no blocks between q, k and v, the fused edit is the separate ones, each cut at the same curvature."
    llama, phi, a, b = twins
    f = b[0, "qkv"]; G = torch.zeros_like(f.G)
    for p in "qkv":
        r = torch.tensor(f.target.rows(p)); G[r[:, None], r] = f.G[r][:, r]
    e = Factors({f.target.name: Factor(f.target, f.A, G, f.count)}, b.fingerprints, b.meta, phi).eigen()[f.target.name]
    kept = e.mask(fraction=.4); pi = torch.outer(e.lam, e.mu)
    low, high = pi[kept.dense()].min(), pi[~kept.dense()].max()
    tau, new = float((low + high)/2), []
    for p in "qkv":
        s = a.eigen()[a[0, p].target.name]
        rows = (torch.outer(s.lam, s.mu) > tau).sum(1)
        new.append(Plan(s.target, s, rows).new_weight(weight(llama, s.target)))
    fused = Plan(f.target, e, kept.rows).new_weight(weight(phi, f.target))
    assert sum(int((torch.outer(a.eigen()[a[0, p].target.name].lam, e.mu) > tau).sum()) for p in "qkv") == kept.kept
    torch.testing.assert_close(fused, torch.cat(new), rtol=1e-4, atol=1e-5)


def test_gpt2_conv1d_edit_is_exact(made):
    "GPT-2 keeps W transposed (Conv1D): the module's output under the edit is that of UG (mask * C) UA^T, in its own orientation."
    model, factors = made["gpt2"]; basis = factors.eigen(); edit = basis.keep(rho=.6, projections="qkv")
    t = find_targets(model, "attention", blocks=0, projections="qkv")[0]; m, e, p = model.get_submodule(t.name), basis[t.name], edit.plan[t.name]
    W = weight(model, t); assert tuple(W.shape) == (t.d_out, t.d_in) and torch.equal(W, m.weight.T)
    pi = torch.outer(e.lam, e.mu); mask = torch.arange(t.d_in)[None] < p.rows[:, None]
    assert float(pi[mask].sum()/pi.sum()) >= .6 and float(pi[mask].min()) >= float(pi[~mask].max())
    UG, UA = e.UG.double(), e.UA.double(); want = UG @ (mask*(UG.T @ W @ UA)) @ UA.T
    with edit.applied(model): torch.testing.assert_close(m.weight.T, want, rtol=1e-5, atol=1e-6)
    assert torch.equal(weight(model, t), W)
    with basis.keep(rho=1.).applied(model): assert torch.equal(weight(model, t), W)
