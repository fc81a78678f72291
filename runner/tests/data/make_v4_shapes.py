"""Random V4-shaped checkpoints that v4-tiny does not cover, with the published implementation's logits, experts and tokens.

    python3 make_v4_shapes.py v4-first-form      python3 make_v4_shapes.py v4-current-form

Run in this folder; needs torch, transformers (5.23), safetensors. Files have the form of tests/data/reference/models/v4-tiny.
v4-first-form: fields as first published (compress_ratios, num_hash_layers, rope_scaling), YaRN, non-expert weights in E4M3 with
power-of-two scales per 32 x 32 block (some partial, one cut through by wo_a's groups), experts in MXFP4, a limit that bites.
v4-current-form: three streams, other ratios, hash layers that are not the first, tied output matrix, sigmoid scores, YaRN with
its amplitude, experts in E4M3 with float32 scales. Seeds are the first at which no indexer score ties at the cut.
"""
import json, pathlib, re, sys
import torch, transformers
from safetensors.torch import load_file, save_file
from transformers.models.deepseek_v4 import modeling_deepseek_v4 as v4

COMMON = dict(vocab_size=258, max_position_embeddings=256, n_shared_experts=1, num_key_value_heads=1, hidden_act="silu",
  attention_bias=False, norm_topk_prob=True, bos_token_id=0, eos_token_id=1, num_nextn_predict_layers=0, compress_rope_theta=40000.0)
SHAPES = {
 "v4-first-form": dict(COMMON, hidden_size=96, num_hidden_layers=4, num_attention_heads=6, head_dim=24, qk_rope_head_dim=6, q_lora_rank=40,
  o_groups=3, o_lora_rank=20, sliding_window=7, compress_ratios=[0, 4, 128, 4, 0], compress_rate_hca=6, num_hash_layers=1, index_n_heads=12,
  index_head_dim=20, index_topk=3, hc_mult=2, hc_sinkhorn_iters=5, hc_eps=1e-5, n_routed_experts=8, num_experts_per_tok=3,
  moe_intermediate_size=32, scoring_func="sqrtsoftplus", topk_method="noaux_tc", routed_scaling_factor=2.5, swiglu_limit=0.6, rms_norm_eps=1e-5,
  rope_theta=5000.0, tie_word_embeddings=False, rope_scaling=dict(type="yarn", factor=8, original_max_position_embeddings=32, beta_fast=32, beta_slow=1)),
 "v4-current-form": dict(COMMON, hidden_size=80, num_hidden_layers=5, num_attention_heads=4, head_dim=16, partial_rotary_factor=0.5, q_lora_rank=36,
  o_groups=4, o_lora_rank=12, sliding_window=5, layer_types=["compressed_sparse_attention", "heavily_compressed_attention", "sliding_attention",
   "compressed_sparse_attention", "heavily_compressed_attention"], compress_rates=dict(compressed_sparse_attention=3, heavily_compressed_attention=10),
  mlp_layer_types=["moe", "hash_moe", "moe", "moe", "hash_moe"], index_n_heads=9, index_head_dim=12, index_topk=5, hc_mult=3, hc_sinkhorn_iters=2, hc_eps=1e-6,
  n_routed_experts=7, num_experts_per_tok=2, moe_intermediate_size=24, scoring_func="sigmoid", routed_scaling_factor=1.2, swiglu_limit=1.1, rms_norm_eps=1e-6,
  rope_theta=10000.0, tie_word_embeddings=True, rope_parameters=dict(main=dict(rope_type="default", rope_theta=10000.0, partial_rotary_factor=0.5),
   compress=dict(rope_type="yarn", rope_theta=40000.0, partial_rotary_factor=0.5, factor=4.0, original_max_position_embeddings=64))),
}
TEXTS = ["the quick brown fox jumps over the lazy dog again and again until nobody can say what the seventieth word was meant to be", "short"]
E2M1 = torch.tensor([0, .5, 1, 1.5, 2, 3, 4, 6])

def power(amax, top): return torch.exp2(torch.ceil(torch.log2(amax.clamp(min=1e-30) / top)))
def blocks(w, size):
    r, c = w.shape; R, C = -(-r // size), -(-c // size)
    padded = torch.zeros(R * size, C * size); padded[:r, :c] = w
    return padded.view(R, size, C, size).abs().amax((1, 3))
def fp8(w, size, exact):
    amax = blocks(w, size); scale = power(amax, 448.0) if exact else amax / 448.0
    full = scale.repeat_interleave(size, 0)[: w.shape[0]].repeat_interleave(size, 1)[:, : w.shape[1]]
    code = (w / full).to(torch.float8_e4m3fn)
    return code.float() * full, code, scale.to(torch.float8_e8m0fnu) if exact else scale
def fp4(w):
    g = w.view(w.shape[0], -1, 32); scale = power(g.abs().amax(-1), 6.0); x = (g / scale[..., None]).clamp(-6, 6)
    code = (x.abs()[..., None] - E2M1).abs().argmin(-1); value = E2M1[code] * x.sign() * scale[..., None]
    code = (code | ((x < 0).long() << 3)).view(w.shape).to(torch.uint8)
    return value.view(w.shape), (code[:, 0::2] | (code[:, 1::2] << 4)).view(torch.int8), scale.to(torch.float8_e8m0fnu)

def stored(which, name, w):
    """Value, codes and scale (None: bf16) of a matrix under its published name."""
    if ".ffn.experts." in name: return fp4(w) if which == "v4-first-form" else fp8(w, 128, False)
    if which == "v4-first-form" and re.search(r"\.(wq_a|wq_b|wkv|wo_a|wo_b|w1|w2|w3)\.weight$", name) and "compressor" not in name: return fp8(w, 32, True)
    return w.bfloat16().float(), w.bfloat16(), None

def main(which):
    out = pathlib.Path(which); out.mkdir(exist_ok=True); config = SHAPES[which]
    for seed in range(100):
        ties, gen = [], torch.Generator().manual_seed(seed)
        model = transformers.DeepseekV4ForCausalLM(transformers.DeepseekV4Config(**json.loads(json.dumps(config)))).eval()
        model.config._attn_implementation = "eager"
        with torch.no_grad():
            for name, p in [*model.named_parameters(), *model.named_buffers()]:
                if "tid2eid" in name: p.copy_(torch.stack([torch.randperm(config["n_routed_experts"], generator=gen)[: p.shape[-1]] for _ in range(p.shape[0])]))
                elif p.is_floating_point() and "inv_freq" not in name:
                    n = torch.randn(p.shape, generator=gen); p.copy_(n / p.shape[-1] ** .5 if p.ndim > 1 else n * .1 + (1. if "norm" in name else 0.))
        model.save_pretrained(out); files = {}
        for name, w in load_file(out / "model.safetensors").items():
            for a, b in [(r"^model\.hc_head\.hc_", "hc_head_"), (r"^model\.embed_tokens\.", "embed."), (r"^model\.", "")]: name = re.sub(a, b, name)
            if not w.is_floating_point(): files[name] = w; continue
            if w.ndim == 2 and "_fn" not in name and "ape" not in name: _, code, scale = stored(which, name, w.float())
            elif "hc_" in name or "sink" in name or "ape" in name or "bias" in name: code, scale = w.float(), None   # as published: float32
            else: code, scale = w.bfloat16(), None
            files[name] = code.contiguous()
            if scale is not None: files[name.replace(".weight", ".scale")] = scale.contiguous()
        save_file(files, out / "model.safetensors")
        load(model, which)
        score, pick = v4.DeepseekV4IndexerScorer.forward, v4.DeepseekV4Indexer.forward
        seen = []
        v4.DeepseekV4IndexerScorer.forward = lambda self, *a: (seen.append(score(self, *a)), seen[-1])[1]
        cases, ref = [], {}
        vocab = json.load(open("../../../tests/data/reference/models/v4-tiny/tokenizer.json"))["model"]["vocab"]
        with torch.no_grad():
            for i, text in enumerate(TEXTS):
                ids = [0] + [vocab["Ġ" if b == 32 else chr(b)] for b in text.encode()]; chosen = []
                hooks = [l.mlp.experts.register_forward_pre_hook(lambda m, a: chosen.append(a[1].int().clone())) for l in model.model.layers]
                ref[f"prompt{i}.logits"] = model(torch.tensor([ids]), use_cache=False).logits[0].float().contiguous()
                ref[f"prompt{i}.experts"] = torch.stack(chosen)
                [h.remove() for h in hooks]; seq, gap = list(ids), 9.0
                for _ in range(10):
                    l = model(torch.tensor([seq]), use_cache=False).logits[0, -1]; best = l.topk(2).values
                    gap = min(gap, float((best[0] - best[1]) / l.std())); seq.append(int(l.argmax()))
                cases.append(dict(text=text, prompt_ids=ids, greedy_ids=seq[len(ids):], min_gap_std=round(gap, 5)))
        v4.DeepseekV4IndexerScorer.forward = score
        k, m = config["index_topk"], model.config.compress_rates["compressed_sparse_attention"]
        for s in seen:
            for t in range(s.shape[1]):
                v = s[0, t, : (t + 1) // m].sort(descending=True).values
                if len(v) > k and v[k - 1] - v[k] < 1e-4: ties.append(t)
        limits = min(c["min_gap_std"] for c in cases)
        print(which, "seed", seed, "ties", len(ties), "gap", limits)
        if not ties and limits > 0.01: break
    save_file(ref, out / "reference.safetensors")
    json.dump(dict(seed=seed, transformers=transformers.__version__, cases=cases), open(out / "reference.json", "w"), indent=1)
    (out / "tokenizer.json").write_bytes(pathlib.Path("../../../tests/data/reference/models/v4-tiny/tokenizer.json").read_bytes())
    published = dict(config, model_type="deepseek_v4", expert_dtype="fp4" if which == "v4-first-form" else "fp8")
    published["quantization_config"] = dict(quant_method="fp8", fmt="e4m3", weight_block_size=[32, 32] if which == "v4-first-form" else [128, 128], **({"scale_fmt": "ue8m0"} if which == "v4-first-form" else {}))
    (out / "config.json").write_text(json.dumps(published, indent=1)); (out / "generation_config.json").unlink(missing_ok=True)

def load(model, which):
    """Puts the values that were stored into the model: what is quantised is quantised in it too."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "inv_freq" in name: continue
            if ".experts.gate_up_proj" in name or ".experts.down_proj" in name:
                for e in range(p.shape[0]):
                    parts = p[e].chunk(2) if "gate_up" in name else [p[e]]
                    p[e].copy_(torch.cat([stored(which, ".ffn.experts.", x.contiguous())[0] for x in parts]))
            elif p.ndim == 2 and "hc" not in name and "position_bias" not in name:
                plain = {"q_a_proj": "wq_a", "q_b_proj": "wq_b", "kv_proj": "wkv", "o_a_proj": "wo_a", "o_b_proj": "wo_b", "gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
                leaf = name.split(".")[-2]; inner = "compressor" if "compressor" in name and leaf != "q_b_proj" else "x"
                p.copy_(stored(which, f"{inner}.{plain.get(leaf, leaf)}.weight", p.detach().clone())[0])
            elif "norm" in name: p.copy_(p.bfloat16().float())

main(sys.argv[1])
