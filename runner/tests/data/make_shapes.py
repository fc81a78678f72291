"""Random V3-shaped checkpoints with logits, experts and greedy tokens of an independent float64 forward pass.

    python3 make_shapes.py one-group-yarn 11 a      python3 make_shapes.py tied-grouped 11 b

Run in this folder; needs numpy. Keys and values are expanded (the runner never does that), after the published V3 code:
a: no query compression, one group, two shared experts, YaRN with mscale; b: tied output matrix, no dense layer, half-split
RoPE, plain YaRN, weights not renormalised. Files have the form of tests/data/reference/models/v3-tiny.
"""
import json, math, struct, sys, pathlib, numpy as np
rng = np.random.default_rng(int(sys.argv[2])); out = pathlib.Path(sys.argv[1]); out.mkdir(parents=True, exist_ok=True)
variant = sys.argv[3]
cfg = dict(model_type="deepseek_v3", vocab_size=258, max_position_embeddings=512, hidden_size=72, num_hidden_layers=3, first_k_dense_replace=1,
  intermediate_size=88, num_attention_heads=3, num_key_value_heads=3, q_lora_rank=None, kv_lora_rank=24, qk_nope_head_dim=12, qk_rope_head_dim=8, v_head_dim=20,
  n_routed_experts=12, n_shared_experts=2, moe_intermediate_size=28, num_experts_per_tok=3, n_group=1, topk_group=1, norm_topk_prob=True,
  routed_scaling_factor=1.7, rms_norm_eps=1e-3, bos_token_id=0, eos_token_id=1, tie_word_embeddings=False, attention_bias=False, hidden_act="silu", rope_interleave=True,
  rope_parameters=dict(rope_type="yarn", rope_theta=10000.0, factor=8.0, original_max_position_embeddings=64, beta_fast=32, beta_slow=1, mscale=1.0, mscale_all_dim=0.8))
if variant == "b":
    cfg.update(q_lora_rank=20, tie_word_embeddings=True, n_group=3, topk_group=2, norm_topk_prob=False, rope_interleave=False, rope_theta=5000.0, rope_parameters=None,
      rope_scaling=dict(type="yarn", factor=4, original_max_position_embeddings=128), n_shared_experts=1, first_k_dense_replace=0)
C = type("C", (), cfg)
T = {}
def bf16(x):
    u = x.astype(np.float32).view(np.uint32); u = (u + 0x7fff + ((u >> 16) & 1)) & 0xffff0000
    return u.astype(np.uint32).view(np.float32)
def t(name, *shape):
    x = rng.standard_normal(shape); x = x / shape[-1] ** .5 if len(shape) > 1 else x * .1 + (1. if "norm" in name else 0.)
    T[name] = bf16(x); return T[name].astype(np.float64)
H, V = C.hidden_size, C.vocab_size
nh, no, ro, vd, r = C.num_attention_heads, C.qk_nope_head_dim, C.qk_rope_head_dim, C.v_head_dim, C.kv_lora_rank
def rms(x, w, eps): return w * (x / np.sqrt((x * x).mean(-1, keepdims=True) + eps))
def silu(x): return x / (1 + np.exp(-x))
rp = cfg.get("rope_parameters") or cfg["rope_scaling"]; theta = rp.get("rope_theta", cfg.get("rope_theta"))
def msc(s, m=1.): return 1. if s <= 1 else .1 * m * math.log(s) + 1
f = rp["factor"]; om = rp["original_max_position_embeddings"]
def cd(n): return ro * math.log(om / (n * 2 * math.pi)) / (2 * math.log(theta))
lo, hi = max(math.floor(cd(rp.get("beta_fast", 32))), 0), min(math.ceil(cd(rp.get("beta_slow", 1))), ro - 1)
if lo == hi: hi += .001
ramp = np.clip((np.arange(ro // 2) - lo) / (hi - lo), 0, 1); keep = 1 - ramp
pf = theta ** (np.arange(0, ro, 2) / ro); inv = 1 / (f * pf) * (1 - keep) + 1 / pf * keep
att = msc(f, rp["mscale"]) / msc(f, rp["mscale_all_dim"]) if rp.get("mscale") and rp.get("mscale_all_dim") else msc(f)
scale = (no + ro) ** -.5
if rp.get("mscale_all_dim"): scale *= msc(f, rp["mscale_all_dim"]) ** 2
def rope(x, pos):  # [S, h, ro]
    if C.rope_interleave: x = x.reshape(*x.shape[:-1], ro // 2, 2).swapaxes(-1, -2).reshape(x.shape)
    a = pos[:, None] * inv; a = np.concatenate([a, a], -1)[:, None]; half = np.concatenate([-x[..., ro // 2:], x[..., :ro // 2]], -1)
    return x * np.cos(a) * att + half * np.sin(a) * att
def mlp(p, w):
    g, u, d = t(p + ".gate_proj.weight", w, H), t(p + ".up_proj.weight", w, H), t(p + ".down_proj.weight", H, w)
    return lambda x: (silu(x @ g.T) * (x @ u.T)) @ d.T
emb = t("model.embed_tokens.weight", V, H); layers = []
for l in range(C.num_hidden_layers):
    p = f"model.layers.{l}."; L = dict(n1=t(p + "input_layernorm.weight", H), n2=t(p + "post_attention_layernorm.weight", H)); a = p + "self_attn."
    if C.q_lora_rank:
        L["qa"], L["qn"], L["qb"] = t(a + "q_a_proj.weight", C.q_lora_rank, H), t(a + "q_a_layernorm.weight", C.q_lora_rank), t(a + "q_b_proj.weight", nh * (no + ro), C.q_lora_rank)
    else: L["q"] = t(a + "q_proj.weight", nh * (no + ro), H)
    L["kva"], L["kvn"], L["kvb"], L["o"] = t(a + "kv_a_proj_with_mqa.weight", r + ro, H), t(a + "kv_a_layernorm.weight", r), t(a + "kv_b_proj.weight", nh * (no + vd), r), t(a + "o_proj.weight", H, nh * vd)
    if l < C.first_k_dense_replace: L["mlp"] = mlp(p + "mlp", C.intermediate_size)
    else:
        L["ex"] = [mlp(p + f"mlp.experts.{e}", C.moe_intermediate_size) for e in range(C.n_routed_experts)]
        L["sh"] = mlp(p + "mlp.shared_experts", C.moe_intermediate_size * C.n_shared_experts)
        L["g"], L["b"] = t(p + "mlp.gate.weight", C.n_routed_experts, H), t(p + "mlp.gate.e_score_correction_bias", C.n_routed_experts)
    layers.append(L)
norm = t("model.norm.weight", H); head = emb if C.tie_word_embeddings else t("lm_head.weight", V, H)
def forward(ids):
    x = emb[ids]; S = len(ids); pos = np.arange(S, dtype=np.float64); chosen = []
    for L in layers:
        h = rms(x, L["n1"], C.rms_norm_eps)
        q = rms(h @ L["qa"].T, L["qn"], 1e-6) @ L["qb"].T if C.q_lora_rank else h @ L["q"].T
        q = q.reshape(S, nh, no + ro); kv = h @ L["kva"].T
        k = (rms(kv[:, :r], L["kvn"], 1e-6) @ L["kvb"].T).reshape(S, nh, no + vd); kr = rope(kv[:, None, r:], pos)
        qq = np.concatenate([q[..., :no], rope(q[..., no:], pos)], -1); kk = np.concatenate([k[..., :no], np.repeat(kr, nh, 1)], -1)
        s = np.einsum("shd,thd->hst", qq, kk) * scale; s = np.where(np.tril(np.ones((S, S))) > 0, s, -np.inf)
        w = np.exp(s - s.max(-1, keepdims=True)); w /= w.sum(-1, keepdims=True)
        x = x + np.einsum("hst,thd->shd", w, k[..., no:]).reshape(S, -1) @ L["o"].T
        h = rms(x, L["n2"], C.rms_norm_eps)
        if "mlp" in L: x = x + L["mlp"](h); continue
        sc = 1 / (1 + np.exp(-(h @ L["g"].T))); ch = sc + L["b"]; E, G = C.n_routed_experts, C.n_group
        gs = np.sort(ch.reshape(S, G, E // G), -1)[..., -2:].sum(-1); top = np.argsort(-gs, -1)[:, :C.topk_group]
        mask = np.zeros((S, G)); np.put_along_axis(mask, top, 1, -1); ch = np.where(np.repeat(mask, E // G, -1) > 0, ch, -np.inf)
        idx = np.argsort(-ch, -1)[:, :C.num_experts_per_tok]; wt = np.take_along_axis(sc, idx, -1)
        if C.norm_topk_prob: wt = wt / (wt.sum(-1, keepdims=True) + 1e-20)
        wt = wt * C.routed_scaling_factor; chosen.append(idx.astype(np.int32)); y = L["sh"](h)
        for i in range(S):
            for j, e in enumerate(idx[i]): y[i] = y[i] + wt[i, j] * L["ex"][e](h[i])
        x = x + y
    return rms(x, norm, C.rms_norm_eps) @ head.T, np.stack(chosen)
def save(path, tensors):
    head, blob = {}, b""
    for n, (d, x, raw) in tensors.items(): head[n] = dict(dtype=d, shape=list(x.shape), data_offsets=[len(blob), len(blob) + len(raw)]); blob += raw
    j = json.dumps(head).encode(); j += b" " * (-len(j) % 8); path.write_bytes(struct.pack("<Q", len(j)) + j + blob)
tok = json.load(open(pathlib.Path(__file__).parent / "../../../tests/data/reference/models/v3-tiny/tokenizer.json")); json.dump(tok, open(out / "tokenizer.json", "w"))
vocab = tok["model"]["vocab"]; enc = {0x20: "Ġ"}
cases, ref = [], {}
for i, text in enumerate(["the quick brown fox jumps over the lazy dog again and again until nobody can say what the seventieth word was meant to be", "short"]):
    ids = [0] + [vocab[enc.get(b, chr(b))] for b in text.encode()]
    lg, ex = forward(ids); ref[f"prompt{i}.logits"] = ("F32", lg, lg.astype("<f4").tobytes()); ref[f"prompt{i}.experts"] = ("I32", ex, ex.astype("<i4").tobytes())
    seq = list(ids)
    for _ in range(10): seq.append(int(forward(seq)[0][-1].argmax()))
    cases.append(dict(text=text, prompt_ids=ids, greedy_ids=seq[len(ids):], min_gap_std=0))
save(out / "model.safetensors", {n: ("BF16", x, (x.view(np.uint32) >> 16).astype("<u2").tobytes()) for n, x in T.items()})
save(out / "reference.safetensors", ref); json.dump(dict(cases=cases), open(out / "reference.json", "w")); json.dump(cfg, open(out / "config.json", "w"))
