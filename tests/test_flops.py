"""The cost of collect, in FLOPs counted by torch: at most 1.05 x the floor, so that speed cannot regress unseen on a machine where time means nothing.

Floor: the forward pass, the backward pass to the activations from the lowest target upwards, and the upper triangle of every covariance in strips (A once where it is shared)."""
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from curvtools.budget import forecast
from curvtools.kfac import _strips, add_outer, collect
from curvtools.targets import find_targets

addmm_ = lambda acc, a, b, *args, out_val=None, **kw: 2 * a[0] * a[1] * b[1]      # the counter does not know the in-place form
COUNT = dict(display=False, custom_mapping={torch.ops.aten.addmm_: addmm_})


def models():
    torch.manual_seed(0)
    llama = LlamaForCausalLM(LlamaConfig(vocab_size=512, hidden_size=64, intermediate_size=160, num_hidden_layers=6, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256))
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=512, n_embd=64, n_layer=6, n_head=4, n_positions=256, bos_token_id=0, eos_token_id=0))
    return dict(llama=llama.eval(), gpt2=gpt2.eval())


def floor(model, ids, targets):
    "Forward and activation-backward, counted on a frozen model whose lowest targets' outputs are leaves; covariances by formula."
    model.requires_grad_(False)
    leaf = lambda m, a, out: out if out.requires_grad else out.detach().requires_grad_()
    read, handles = {}, []
    for t in targets:
        m = model.get_submodule(t.name)
        handles += [m.register_forward_hook(leaf), m.register_forward_pre_hook(lambda m, a, t=t: read.setdefault(id(a[0]), (a[0], t.d_in)) and None)]
    with FlopCounterMode(**COUNT) as f:
        logits = model(input_ids=ids[:, :-1], use_cache=False).logits
        logits.backward(torch.ones_like(logits))
    for h in handles: h.remove()
    n = ids[:, 1:].numel()
    return f.get_total_flops() + sum(half(n, d) for _, d in read.values()) + sum(half(n, t.d_out) for t in targets)


def half(n, d): return sum(2 * n * (j - i) * (d - i) for i, j in _strips(d, torch.device("cpu")))


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("block", [0, 3, 5])
@pytest.mark.parametrize("select", ["mlp", "all"])
def test_flops_are_near_the_floor(name, block, select):
    model = models()[name]
    ids = torch.randint(0, 512, (8, 129), generator=torch.Generator().manual_seed(0))
    with FlopCounterMode(**COUNT) as f: collect(model, [ids], select, blocks=[block], progress=False)
    low = floor(model, ids, find_targets(model, select, blocks=[block]))
    assert .9 < f.get_total_flops() / low <= 1.05, f.get_total_flops() / low


def counted(f):
    with FlopCounterMode(**COUNT) as c: f()
    return c.get_total_flops()


@pytest.mark.parametrize("n,d,share", [(256, 64, 1), (256, 128, .75), (256, 512, .5625), (100, 1536, .5625), (7, 1000, .5625)])
def test_covariances_cost_little_more_than_half(n, d, share):
    x = torch.randn(n, d, generator=torch.Generator().manual_seed(0))
    f = counted(lambda: add_outer(torch.zeros(d, d), x))
    assert f == half(n, d) and f / (2 * n * d * d) == pytest.approx(share, abs=.01)
    total = torch.zeros(d, d); add_outer(total, x)
    assert torch.allclose(total.triu(), (x.double().T @ x.double()).float().triu(), atol=1e-5 * n)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_more_labels_cost_a_backward_pass_of_the_blocks_each(name):
    "Neither the forward pass nor the head is run again, and A is not summed again: predicted to 1 %, and by `forecast`."
    model, block = models()[name], 3
    ids = torch.randint(0, 512, (8, 129), generator=torch.Generator().manual_seed(0))
    one, two, four = (counted(lambda: collect(model, [ids], "mlp", blocks=[block], mc_samples=k, progress=False)) for k in (1, 2, 4))
    assert four - one == 3 * (two - one), "each costs the same"
    targets, n, head = find_targets(model, "mlp", blocks=[block]), ids[:, 1:].numel(), 2 * ids[:, 1:].numel() * 512 * 64
    with FlopCounterMode(**COUNT) as c: model(input_ids=ids[:, :-1], use_cache=False)
    A = half(n, 64) + half(n, 160 if name == "llama" else 256)
    assert two - one == pytest.approx(floor(model, ids, targets) - c.get_total_flops() - A - head, rel=.01)
    assert two < 1.45 * one
    say = [forecast(model, (8, 129), "mlp", blocks=[block], mc_samples=k).flops for k in (1, 2)]
    assert say[1] - say[0] == two - one
