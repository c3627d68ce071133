"""Random tiny models of the installed transformers, one of every class the tests cover: `tiny("llama")`."""
import types, torch, transformers as tf

V, D, F = 37, 16, 24                                    # vocabulary, width, MLP width
_lm = dict(vocab_size=V, hidden_size=D, intermediate_size=F, num_hidden_layers=3, num_attention_heads=4, max_position_embeddings=64,
           bos_token_id=1, eos_token_id=2, pad_token_id=0, tie_word_embeddings=False)
_gqa = dict(_lm, num_key_value_heads=2)

def _build(name):
    if name == "llama":    return tf.LlamaConfig(**_gqa), tf.LlamaForCausalLM
    if name == "olmo2":    return tf.Olmo2Config(**_gqa), tf.Olmo2ForCausalLM
    if name == "qwen2":    return tf.Qwen2Config(**_gqa), tf.Qwen2ForCausalLM
    if name == "qwen3":    return tf.Qwen3Config(**_gqa, head_dim=6), tf.Qwen3ForCausalLM               # q is [24, 16], o is [16, 24]
    if name == "mistral":  return tf.MistralConfig(**_gqa, sliding_window=None), tf.MistralForCausalLM
    if name == "gemma3":   return tf.Gemma3TextConfig(**dict(_gqa, tie_word_embeddings=True), head_dim=6, sliding_window=8, query_pre_attn_scalar=6,
                                                      layer_types=["sliding_attention", "full_attention", "sliding_attention"]), tf.Gemma3ForCausalLM
    if name == "phi3":     return tf.Phi3Config(**_gqa, original_max_position_embeddings=64), tf.Phi3ForCausalLM
    if name == "gpt2":     return tf.GPT2Config(vocab_size=V, n_embd=D, n_inner=F, n_layer=3, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2,
                                                resid_pdrop=0., embd_pdrop=0., attn_pdrop=0.), tf.GPT2LMHeadModel
    if name == "gpt_neox": return tf.GPTNeoXConfig(**_lm), tf.GPTNeoXForCausalLM
    if name == "opt":      return tf.OPTConfig(vocab_size=V, hidden_size=D, ffn_dim=F, num_hidden_layers=3, num_attention_heads=4, max_position_embeddings=64,
                                               word_embed_proj_dim=D, dropout=0., bos_token_id=1, eos_token_id=2, pad_token_id=0), tf.OPTForCausalLM
    if name == "vit":      return tf.ViTConfig(hidden_size=D, intermediate_size=F, num_hidden_layers=3, num_attention_heads=4, image_size=8, patch_size=4,
                                               num_channels=3, num_labels=5, hidden_dropout_prob=0., attention_probs_dropout_prob=0.), tf.ViTForImageClassification
    if name == "mixtral":  return tf.MixtralConfig(**_gqa, num_local_experts=4, num_experts_per_tok=2, experts_implementation="eager"), tf.MixtralForCausalLM
    if name == "qwen3_moe": return tf.Qwen3MoeConfig(**_gqa, head_dim=6, num_experts=6, num_experts_per_tok=2, moe_intermediate_size=8, mlp_only_layers=[0], norm_topk_prob=True,
                                                     experts_implementation="eager"), tf.Qwen3MoeForCausalLM
    if name == "olmoe":    return tf.OlmoeConfig(**_gqa, num_experts=5, num_experts_per_tok=3, experts_implementation="eager"), tf.OlmoeForCausalLM
    if name == "gpt_oss":  return tf.GptOssConfig(**_gqa, head_dim=4, num_local_experts=4, num_experts_per_tok=2, experts_implementation="eager"), tf.GptOssForCausalLM
    raise ValueError(f"no tiny model called {name!r}; there are {', '.join(ALL + MOES)}")

LMS = ["llama", "olmo2", "qwen2", "qwen3", "mistral", "gemma3", "phi3", "gpt2", "gpt_neox", "opt"]
ALL = LMS + ["vit"]
MOES = ["mixtral", "qwen3_moe", "olmoe", "gpt_oss"]

def _rms64(self, x):
    "RMSNorm in the dtype of x. The models' own casts to float32, which would put 1e-8 of noise into float64 tests."
    y = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + getattr(self, "variance_epsilon", getattr(self, "eps", None)))
    return y * (1 + self.weight if type(self).__name__.startswith("Gemma") else self.weight)

def tiny(name, dtype=torch.float64, seed=0, std=.25):
    "A random model in eval mode, matrices drawn with `std` and norms jittered around 1, so that no gradient is tiny and no symmetry hides a fault."
    config, cls = _build(name)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = cls(config).to(dtype).eval()
        if dtype == torch.float64:
            for m in model.modules():
                if type(m).__name__.endswith("RMSNorm"): m.forward = types.MethodType(_rms64, m)
        for n, p in model.named_parameters():
            noise = torch.randn(p.shape, dtype=torch.float64) * (std if p.dim() > 1 else .1)
            p.data.copy_(noise + (1. if p.dim() == 1 and "norm" in n.lower().replace("ln_", "norm") and n.endswith("weight") and name != "gemma3" else 0.))
    return model

def tiny_inputs(name, batch=2, length=9, dtype=torch.float64, seed=0):
    "A batch the model takes: `input_ids` [B, T] for a language model, `pixel_values` [B, 3, 8, 8] for the ViT."
    g = torch.Generator().manual_seed(seed)
    if name == "vit": return dict(pixel_values=torch.randn(batch, 3, 8, 8, generator=g, dtype=torch.float64).to(dtype))
    return dict(input_ids=torch.randint(3, V, (batch, length), generator=g))
