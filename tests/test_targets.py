"""targets: names, shapes, orientation and fused rows on every architecture; selections; what must be refused.
Tolerance where numbers are compared: 1e-12 in float64, since both sides are the same products, at most summed in another order."""
import copy, json, re, dataclasses
import pytest, torch, transformers as tf
from torch import nn
from torch.nn import functional as F
from hypothesis import given, settings, strategies as st
from tiny import tiny, tiny_inputs, ALL, D, F as FF, V
from curvtools.targets import Target, Targets, block_list, find_targets, fingerprint, weight, write_weight

GATED = dict(gate=(FF, D), up=(FF, D), down=(D, FF))
TWO = dict(fc1=(FF, D), fc2=(D, FF))
GQA, WIDE, MHA = dict(q=(16, D), k=(8, D), v=(8, D), o=(D, 16)), dict(q=(24, D), k=(12, D), v=(12, D), o=(D, 24)), dict(q=(D, D), k=(D, D), v=(D, D), o=(D, D))
QKV = dict(qkv=(3*D, D), o=(D, D))
EXPECTED = dict(llama=(GATED, GQA), olmo2=(GATED, GQA), qwen2=(GATED, GQA), qwen3=(GATED, WIDE), mistral=(GATED, GQA), gemma3=(GATED, WIDE),
                phi3=(dict(gate_up=(2*FF, D), down=(D, FF)), dict(qkv=(32, D), o=(D, 16))), gpt2=(TWO, QKV), gpt_neox=(TWO, QKV), opt=(TWO, MHA), vit=(TWO, MHA))
BIAS = dict(qwen2={"q", "k", "v"}, gpt2={"qkv", "o", "fc1", "fc2"}, gpt_neox={"qkv", "o", "fc1", "fc2"}, opt={*MHA, *TWO}, vit={*MHA, *TWO})
LIST = dict(gpt2="transformer.h", gpt_neox="gpt_neox.layers", opt="model.decoder.layers", vit="vit.layers")

@pytest.fixture(scope="module")
def models(): return {n: tiny(n) for n in ALL + ["mixtral"]}

# what is found

@pytest.mark.parametrize("name", ALL)
def test_projections_and_shapes(models, name):
    m, (mlp, att) = models[name], EXPECTED[name]
    for block in range(3):
        for role, want in (("mlp", mlp), ("attention", att)):
            ts = find_targets(m, role, blocks=block)
            assert {t.projection: (t.d_out, t.d_in) for t in ts} == want and len(ts) == len(want)
            assert all(t.role == role and t.block == block for t in ts)
            assert {t.projection for t in ts if t.bias} == BIAS.get(name, set()) & set(want)
    ts = find_targets(m, "all")
    order = [n for n, _ in m.named_modules()]
    assert ts.names == sorted(ts.names, key=order.index) and len(set(ts.names)) == len(ts) == 3 * (len(mlp) + len(att))
    assert {t.layout for t in ts} == {"conv1d" if name == "gpt2" else "linear"}
    path, blocks = block_list(m)
    assert path == LIST.get(name, "model.layers") and len(blocks) == 3
    assert all(t.name.startswith(f"{path}.{t.block}.") for t in ts)

@pytest.mark.parametrize("name", ALL)
def test_weight_is_what_the_module_computes(models, name):
    m, seen = models[name], {}
    ts = find_targets(m, "all")
    hooks = [m.get_submodule(t.name).register_forward_hook(lambda mod, a, y, n=t.name: seen.__setitem__(n, (a[0], y))) for t in ts]
    with torch.no_grad(): m(**tiny_inputs(name))
    for h in hooks: h.remove()
    assert set(seen) == set(ts.names)                                                  # every target really runs
    for t in ts:
        x, y = seen[t.name]
        W, mod = weight(m, t), m.get_submodule(t.name)
        assert W.shape == (t.d_out, t.d_in) and not W.requires_grad and W.data_ptr() == mod.weight.data_ptr()
        torch.testing.assert_close(F.linear(x, W, mod.bias), y, rtol=1e-12, atol=1e-12)
        assert t.bias == (mod.bias is not None)

def _spied(name):
    "q, k, v [T=1, rows] as the attention function receives them at position 0, where rotary embedding is the identity; and what block 1 computed."
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    got = []
    def spy(module, q, k, v, *a, **kw):
        got.append([x.transpose(1, 2).flatten(2) for x in (q, k, v)])                  # [B, H, T, h] -> [B, T, H h]
        return sdpa_attention_forward(module, q, k, v, *a, **kw)
    AttentionInterface.register("curvtools_spy", spy)
    m = tiny(name)
    m.set_attn_implementation("curvtools_spy")
    t = find_targets(m, "attention", blocks=1, projections="qkv")[0]
    with torch.no_grad():
        ins = []
        h = m.get_submodule(t.name).register_forward_pre_hook(lambda mod, a: ins.append(a[0]))
        m(**tiny_inputs(name, batch=3, length=1))
        h.remove()
        return t, F.linear(ins[0], weight(m, t), m.get_submodule(t.name).bias), got[1]

@pytest.mark.parametrize("name", ["phi3", "gpt2", "gpt_neox"])
def test_fused_qkv_rows_are_what_attention_receives(name):
    t, y, qkv = _spied(name)
    assert [p for p, _ in t.parts] == ["q", "k", "v"]
    assert sorted(i for p in "qkv" for i in t.rows(p)) == list(range(t.d_out))         # a partition of the rows
    for p, want in zip("qkv", qkv): torch.testing.assert_close(y[..., t.rows(p)], want, rtol=1e-12, atol=1e-12)
    if name == "phi3": assert [len(t.rows(p)) for p in "qkv"] == [16, 8, 8]
    if name == "gpt_neox": assert all(len(rs) == 4 for _, rs in t.parts)               # one range per head

def test_fused_gate_up_rows():
    m = tiny("phi3")
    up, down = find_targets(m, blocks=1)
    assert (up.projection, down.projection) == ("gate_up", "down") and up.parts == (("gate", ((0, FF),)), ("up", ((FF, 2*FF),)))
    x = torch.randn(4, D, dtype=torch.float64)
    y = F.linear(x, weight(m, up))
    mlp = m.model.layers[1].mlp
    by_hand = F.linear(mlp.activation_fn(y[:, up.rows("gate")]) * y[:, up.rows("up")], weight(m, down))
    torch.testing.assert_close(by_hand, mlp(x), rtol=1e-12, atol=1e-12)

def test_bloom_rows_are_per_head_and_peculiar_layouts_stay_unknown():
    bloom = tf.BloomForCausalLM(tf.BloomConfig(vocab_size=V, hidden_size=D, n_layer=2, n_head=4)).double()
    t = find_targets(bloom, "attention", projections=["qkv"])[0]
    att = bloom.transformer.h[0].self_attention
    x = torch.randn(1, 2, D, dtype=torch.float64)
    y = att.query_key_value(x)
    q, k, v = att._reshape(y)                                                          # [1, H, T, h]; the model's own split
    for p, want in zip("qkv", (q, k, v)): assert torch.equal(y[..., t.rows(p)], want.transpose(1, 2).flatten(2))
    codegen = tf.CodeGenForCausalLM(tf.CodeGenConfig(vocab_size=V, n_embd=D, n_layer=2, n_head=4, rotary_dim=4))
    t = find_targets(codegen, "attention", projections="qkv")[0]
    assert t.parts == ()
    with pytest.raises(ValueError, match="no part 'q'; its parts: none"): t.rows("q")

def test_other_families_by_name_and_shape():
    bert = tf.BertForMaskedLM(tf.BertConfig(vocab_size=V, hidden_size=D, intermediate_size=FF, num_hidden_layers=2, num_attention_heads=4))
    assert [t.projection for t in find_targets(bert, "all", blocks=0)] == ["q", "k", "v", "o", "fc1", "fc2"]
    class Mix(nn.Module):                                                              # no telling name anywhere
        def __init__(self): super().__init__(); self.lift, self.drop, self.side = nn.Linear(8, 12), nn.Linear(12, 8), nn.Linear(8, 8)
    class Odd(nn.Module):
        def __init__(self): super().__init__(); self.mix, self.norm = Mix(), nn.LayerNorm(8)
    class Net(nn.Module):
        def __init__(self): super().__init__(); self.parts, self.head = nn.ModuleList([Odd(), Odd()]), nn.Linear(8, 3)
    ts = find_targets(Net(), "all")
    assert [(t.name, t.projection, t.role) for t in ts[:3]] == [("parts.0.mix.lift", "fc1", "mlp"), ("parts.0.mix.drop", "fc2", "mlp"), ("parts.0.mix.side", "side", "other")]
    (head,) = find_targets(Net(), "head")
    assert (head.block, head.role, head.projection) == (-1, "other", "head")
    plain = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))                  # no blocks at all
    assert find_targets(plain, "*").names == ["0", "2"]
    with pytest.raises(ValueError, match="outside of the blocks, by name only: 0, 2"): find_targets(plain)
    with pytest.raises(ValueError, match="no list of blocks"): find_targets(plain, "*", blocks=0)
    blocks_only = nn.ModuleList([Odd(), Odd()])                                        # the model itself is the list
    assert find_targets(blocks_only, blocks=[-1]).names == ["1.mix.lift", "1.mix.drop"] and block_list(blocks_only)[0] == ""

def test_one_block_and_bare_trunk():
    cfg = tf.LlamaConfig(vocab_size=V, hidden_size=D, intermediate_size=FF, num_hidden_layers=1, num_attention_heads=4)
    ts = find_targets(tf.LlamaModel(cfg), "all", blocks=-1)
    assert len(ts) == 7 and ts[0].name == "layers.0.self_attn.q_proj"

# reading, writing, fingerprints

def bits(x): return x.contiguous().view(torch.uint8)

@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_write_round_trip_is_bit_exact(name, dtype):
    m = tiny(name, dtype)
    twin = copy.deepcopy(m)
    for t in find_targets(m, "all", blocks=[0, -1]):
        old, before = weight(m, t).clone(), fingerprint(m, t)
        assert before == fingerprint(twin, t) and len(before) == 16 and int(before, 16) >= 0
        new = torch.randn(t.d_out, t.d_in, dtype=torch.float64, requires_grad=True)
        write_weight(m, t, new)
        assert torch.equal(weight(m, t), new.detach().to(dtype)) and weight(m, t).dtype == dtype
        assert fingerprint(m, t) != before and not weight(m, t).requires_grad
        write_weight(m, t, old)
        assert torch.equal(bits(weight(m, t)), bits(weight(twin, t)))
        assert fingerprint(m, t) == before
    assert all(torch.equal(a, b) for a, b in zip(m.state_dict().values(), twin.state_dict().values()))
    assert all(p.requires_grad and p.grad is None for p in m.parameters())

@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_fingerprint_sees_one_ulp_and_signed_zero(dtype):
    m = tiny("gpt2", dtype)
    t = find_targets(m)[0]
    W, before = weight(m, t), fingerprint(m, t)
    old = W[2, 3].clone()
    W[2, 3] = (old.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[old.element_size()]) + 1).view(dtype)   # the next float
    assert W[2, 3] != old and fingerprint(m, t) != before
    W[2, 3] = 0.; zero = fingerprint(m, t)
    W[2, 3] = -0.; assert fingerprint(m, t) != zero
    W[2, 3] = old; assert fingerprint(m, t) == before

def test_bytes_through_a_box_are_the_same_bytes():
    "As they come from a GPU, in pieces; the last one is not full."
    from curvtools.targets import _pieces
    x = torch.arange(100, dtype=torch.uint8)
    for size in (1, 7, 100, 300): assert b"".join(p.tobytes() for p in _pieces(x, torch.empty(size, dtype=torch.uint8))) == bytes(range(100)) == b"".join(p.tobytes() for p in _pieces(x))
    assert not any(len(p) for p in _pieces(x[:0], torch.empty(3, dtype=torch.uint8)))


def test_fingerprint_depends_on_dtype_and_shape():
    a, b = nn.Sequential(nn.Linear(4, 2)), nn.Sequential(nn.Linear(2, 4))
    with torch.no_grad(): a[0].weight.zero_(); b[0].weight.zero_()
    ta, tb = find_targets(a, "0")[0], find_targets(b, "0")[0]
    assert len({fingerprint(a, ta), fingerprint(b, tb), fingerprint(a.half(), ta), fingerprint(a.bfloat16(), ta)}) == 4

def test_reading_another_model_is_refused(models):
    t = find_targets(models["llama"])[0]
    with pytest.raises(ValueError, match="no module model.layers.0.mlp.gate_proj"): weight(models["gpt2"], t)
    with pytest.raises(ValueError, match=r"should store a weight of \[9, 16\]"): weight(models["llama"], dataclasses.replace(t, d_out=9))
    with pytest.raises(ValueError, match=r"is \[24, 16\], got \[16, 24\]"): write_weight(models["llama"], t, torch.zeros(16, 24))
    with pytest.raises(ValueError, match="here it is missing"): fingerprint(models["llama"], dataclasses.replace(t, name="model.layers.0.mlp"))

def test_target_survives_json(models):
    for name in ("gpt_neox", "phi3"):
        for t in find_targets(models[name], "all"):
            assert Target(**json.loads(json.dumps(dataclasses.asdict(t)))) == t and hash(t) == hash(copy.copy(t))

# selections

def test_selections(models):
    m = models["llama"]
    everything = find_targets(m, "all")
    assert find_targets(m).names == [t.name for t in everything if t.role == "mlp"]
    assert find_targets(m, ["attention", "mlp"]) == everything                         # model order, whatever the order asked for
    assert find_targets(m, "*.gate_proj") == find_targets(m, projections=["gate"]) == find_targets(m, projections="gate")
    assert find_targets(m, ["*.1.mlp.*", "model.layers.0.self_attn.q_proj"]).names == ["model.layers.0.self_attn.q_proj"] + [f"model.layers.1.mlp.{p}_proj" for p in ("gate", "up", "down")]
    assert find_targets(m, everything, blocks=[0], projections=["q", "up"]).names == ["model.layers.0.self_attn.q_proj", "model.layers.0.mlp.up_proj"]
    assert find_targets(m, everything[3]) == [everything[3]] and find_targets(copy.deepcopy(m), everything) == everything
    assert "lm_head" not in everything.names and find_targets(m, "lm_head").names == ["lm_head"]
    assert find_targets(m, ["mlp", "lm_head"], blocks=range(3)) == find_targets(m)

@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(-3, 2), min_size=1, max_size=5))
def test_blocks_in_any_order_negative_or_repeated(bs):
    m = test_blocks_in_any_order_negative_or_repeated.model
    assert sorted({t.block for t in find_targets(m, blocks=bs)}) == sorted({b % 3 for b in bs})
    assert find_targets(m, blocks=bs) == [t for t in find_targets(m) if t.block in {b % 3 for b in bs}]
test_blocks_in_any_order_negative_or_repeated.model = tiny("qwen3")

@pytest.mark.parametrize("name,args,error,says", [
    ("llama", dict(blocks=[0, 3]), ValueError, r"block 3 is out of range: the model has blocks 0 to 2 \(or -3 to -1\)"),
    ("llama", dict(blocks=-4), ValueError, "block -4 is out of range"),
    ("llama", dict(blocks=[1.0]), TypeError, "blocks are integers, got 1.0"),
    ("llama", dict(blocks="1"), TypeError, "blocks are integers"),
    ("llama", dict(blocks=[True]), TypeError, "blocks are integers, got True"),
    ("llama", dict(blocks=[]), ValueError, r"in blocks \[\].*mlp: gate, up, down in blocks 0-2; attention: q, k, v, o"),
    ("llama", dict(select=[]), ValueError, r"nothing selected by \[\].*mlp: gate, up, down"),
    ("llama", dict(select=None), TypeError, "not NoneType"),
    ("llama", dict(select=["mlp", "*.fc1"]), ValueError, r"no target matches '\*.fc1'.*mlp: gate, up, down in blocks 0-2.*lm_head"),
    ("llama", dict(select="lm_head", blocks=[0]), ValueError, r"nothing selected by 'lm_head' in blocks \[0\]"),
    ("llama", dict(projections=["fc1"]), ValueError, "no projection 'fc1'. There is: gate, up, down"),
    ("llama", dict(projections=["gate", "q"]), ValueError, r"no projection 'q' in this selection, which has: gate, up, down. There is one in 'attention' \(blocks 0-2\)"),
    ("llama", dict(projections=[]), ValueError, "projections is empty"),
    ("phi3", dict(projections=["gate"]), ValueError, "gate is part of gate_up, which is one target .*There is: gate_up, down"),
    ("phi3", dict(select="attention", projections=["v"]), ValueError, "v is part of qkv, which is one target"),
    ("gpt2", dict(select="lm_head"), ValueError, "lm_head: one weight with transformer.wte.weight"),
    ("mixtral", dict(select="mlp"), ValueError, r"no target matches 'mlp'.*attention: q, k, v, o in blocks 0-2.*\"experts\" \(4 in a block\): gate_up, down in blocks 0-2"),
    ("mixtral", dict(select="*.experts.down_proj[4]"), ValueError, r"no target matches .*down_proj\[4\]': there are experts 0-3"),
    ("mixtral", dict(select="model.layers.0.mlp.experts.down_proj[-1]"), ValueError, r"there are experts 0-3"),
    ("mixtral", dict(select="experts", projections=["gate"]), ValueError, r"gate is part of gate_up"),
    ("llama", dict(select="experts"), ValueError, r"no target matches 'experts'.*mlp: gate, up, down"),
])
def test_what_is_not_there_says_what_there_is(models, name, args, error, says):
    with pytest.raises(error, match=says): find_targets(models[name], **args)

def test_targets_of_another_model_and_no_model(models):
    with pytest.raises(ValueError, match="is not a target of this model.*There is: mlp: fc1, fc2"): find_targets(models["gpt2"], find_targets(models["llama"]))
    with pytest.raises(TypeError, match="expected a torch model .*, got str"): find_targets("gpt2")

# what is refused, and said so

class QuantLinear(nn.Module):                     # as in GPTQ packages
    def __init__(self): super().__init__(); self.register_buffer("qweight", torch.zeros(2, 24, dtype=torch.int32))
class Linear4bit(nn.Linear): pass                 # as in bitsandbytes
class LoraLinear(nn.Module):                      # as in peft
    def __init__(self, base): super().__init__(); self.base_layer, self.lora_A = base, nn.ModuleDict(dict(default=nn.Linear(16, 2)))
class Noisy(nn.Linear):
    def forward(self, x): return super().forward(x) * 2
def _int8(): l = nn.Linear(16, 24); l.weight = nn.Parameter(torch.zeros(24, 16, dtype=torch.int8), requires_grad=False); return l
def _float8(): l = nn.Linear(16, 24); l.weight = nn.Parameter(torch.zeros(24, 16).to(torch.float8_e4m3fn), requires_grad=False); return l

@pytest.mark.parametrize("make,says", [
    (QuantLinear, "quantised weights; load the model without quantisation"), (lambda: Linear4bit(16, 24), "quantised weights"), (_int8, r"quantised weights \(int8\)"),
    (_float8, r"quantised weights \(float8_e4m3fn\)"), (lambda: LoraLinear(nn.Linear(16, 24)), "LoRA.*merge_and_unload"), (lambda: nn.Linear(16, 24, device="meta"), "meta device"),
    (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(16, 24)), "computed"), (lambda: Noisy(16, 24), "forward of its own"), (lambda: nn.Conv1d(16, 24, 1), "a convolution"),
    (lambda: torch.ao.nn.quantized.dynamic.Linear(16, 24), "quantised weights"), (lambda: nn.MultiheadAttention(16, 4), "without calling their modules")])
@pytest.mark.filterwarnings("ignore")
def test_one_bad_matrix_is_listed_and_the_rest_stays(make, says):
    m = tiny("llama")
    m.model.layers[1].mlp.up_proj = make()
    ts = find_targets(m)
    bad = "model.layers.1.mlp.up_proj"
    assert [n for n, _ in ts.unsupported] == [bad] and re.search(says, ts.unsupported[0][1])
    assert len(ts) == 8 and not any(n.startswith(bad) for n in find_targets(m, "*").names)
    assert "not supported" in repr(ts) and "up_proj" in repr(ts).split("not supported")[1]
    with pytest.raises(ValueError, match="Not supported, model.layers.1.mlp.up_proj"): find_targets(m, bad)

def test_whole_model_quantised_says_so():
    m = tiny("llama")
    for b in m.model.layers:
        for parent in (b.mlp, b.self_attn):
            for n, _ in list(parent.named_children()):
                if isinstance(getattr(parent, n), nn.Linear): setattr(parent, n, QuantLinear())
    with pytest.raises(ValueError, match="no target matches 'mlp'.*QuantLinear: quantised weights"): find_targets(m)

def test_mixture_of_experts(models):
    ts = find_targets(models["mixtral"], "attention")
    assert [t.projection for t in ts[:4]] == ["q", "k", "v", "o"] and len(ts) == 12
    bad = dict(ts.unsupported)
    for b in range(3): assert "MixtralTopKRouter" in bad[f"model.layers.{b}.mlp.gate.weight"]
    assert len(bad) == 3 and "13.1% of the model's 17,616" in repr(ts)
    assert not {t.role for t in find_targets(models["mixtral"], "all")} & {"expert"}
    es = find_targets(models["mixtral"], "experts")
    assert len(es) == 3 * 2 * 4 and es[5].name == "model.layers.0.mlp.experts.down_proj[1]" and (es[5].expert, es[5].d_out, es[5].d_in) == (1, 16, 24)
    assert find_targets(models["mixtral"], "*.experts.down_proj", blocks=-1) == find_targets(models["mixtral"], "experts", blocks=2, projections="down")
    with torch.no_grad(): models["mixtral"](**tiny_inputs("mixtral"))

def test_experts_as_modules_and_router():
    class Expert(nn.Module):
        def __init__(self): super().__init__(); self.w1, self.w2, self.w3 = nn.Linear(8, 12), nn.Linear(12, 8), nn.Linear(8, 12)
    class Moe(nn.Module):
        def __init__(self): super().__init__(); self.gate, self.experts, self.shared_expert = nn.Linear(8, 4), nn.ModuleList([Expert() for _ in range(4)]), Expert()
    class Block(nn.Module):
        def __init__(self): super().__init__(); self.block_sparse_moe = Moe()
    m = nn.ModuleDict(dict(layers=nn.ModuleList([Block(), Block()])))
    ts = find_targets(m, "all", blocks=0)
    assert {t.name.split("moe.")[1]: (t.projection, t.role) for t in ts} == {"gate": ("router", "other"), "shared_expert.w1": ("gate", "mlp"), "shared_expert.w2": ("down", "mlp"), "shared_expert.w3": ("up", "mlp")}
    assert len(ts.unsupported) == 2 * 12 and all("experts" in why for _, why in ts.unsupported)

def test_encoder_decoder_second_list_and_cross_attention():
    t5 = tf.T5ForConditionalGeneration(tf.T5Config(vocab_size=V, d_model=D, d_ff=FF, num_layers=2, num_heads=4, d_kv=4, feed_forward_proj="gated-gelu"))
    ts = find_targets(t5)
    bad = dict(ts.unsupported)
    assert [t.projection for t in ts] == ["gate", "up", "down"] * 2 and ts[0].name.startswith("decoder.block.0")
    assert "another list of blocks (2 x T5Block): only decoder.block" in bad["encoder.block"] and "cross-attention" in bad["decoder.block.0.layer.1.EncDecAttention.k"]
    assert not [n for n in find_targets(t5, "*").names if n.startswith("encoder")]

def test_reused_and_tied_modules():
    m = tiny("llama")
    m.model.layers[2].mlp.up_proj = m.model.layers[0].mlp.up_proj                      # the same module twice
    m.model.layers[1].mlp.gate_proj.weight = m.model.layers[0].mlp.gate_proj.weight   # two modules, one parameter
    bad = dict(find_targets(m).unsupported)
    assert "one weight with model.layers.2.mlp.up_proj.weight" in bad["model.layers.0.mlp.up_proj"]
    assert "gate_proj" in bad["model.layers.0.mlp.gate_proj"] and "gate_proj" in bad["model.layers.1.mlp.gate_proj"]
    assert find_targets(m, blocks=0).names == ["model.layers.0.mlp.down_proj"]

def test_stem_of_vit_is_listed(models):
    assert [(n, "part of the stem" in why) for n, why in find_targets(models["vit"]).unsupported] == [("vit.embeddings.patch_embeddings.projection", True)]

# the table

def test_table_is_compact_and_escaped():
    big = Targets([Target(f"model.layers.{b}.mlp.{p}_proj", b, p, "mlp", 11008, 4096) for b in range(32) if b != 7 for p in ("gate", "up")],
                  [(f"model.layers.{b}.mlp.experts.w", "<b>3-D</b>") for b in range(32)])
    text = repr(big)
    assert len(text.splitlines()) == 6 and "0-6, 8-31" in text and "31 x 45,088,768" in text and "62 targets" in text and "(32 times)" in text
    page = big._repr_html_()
    assert "<b>3-D" not in page and "&lt;b&gt;3-D" in page and page.count("<tr>") == 4
    assert isinstance(big[:3], Targets) and len(big[:3]) == 3 and big[:3].unsupported == big.unsupported and big[0].block == 0
    assert "0 targets" in repr(Targets())

def test_finding_leaves_the_model_alone():
    m = tiny("gpt2").train()
    look = lambda: {n: (set(x.__dict__), set(x._forward_hooks), x.training) for n, x in m.named_modules()}
    before = look()
    state = {k: v.clone() for k, v in m.state_dict().items()}
    repr(find_targets(m, "all")); [fingerprint(m, t) for t in find_targets(m, "all")]
    assert look() == before
    assert all(torch.equal(v, state[k]) for k, v in m.state_dict().items())
