#!/usr/bin/env python3
"""Greedy decoding of one sequence: berth generate and transformers, by turns, on this machine.

    python3 against_transformers.py BERTH v3-tiny=DIR v4-tiny=DIR v4-wide=DIR [--rounds 3] [--tokens 32]

A folder that does not exist is made: V4-Flash's widths with 2 layers (sparse, heavy), 32 experts in MXFP4, attention and
shared expert in E4M3, the rest in bfloat16, random weights, about 2 GB. Needs torch and transformers (5.23), safetensors.
transformers computes with its own random weights of the same shape, in bfloat16 (float32 for the tiny models, whichever it
is faster with is given by --dtype), with its own cache; berth with one worker, every process on all cores. Both are timed from
the first to the last token of an 8-token prompt's continuation; loading is left out.
"""
import argparse, json, pathlib, subprocess, sys, tempfile, time
import torch, transformers
from safetensors.torch import save_file

FAMILY = {"deepseek_v3": (transformers.DeepseekV3Config, transformers.DeepseekV3ForCausalLM),
          "deepseek_v4": (transformers.DeepseekV4Config, transformers.DeepseekV4ForCausalLM)}
PROMPT = [0, 17, 33, 5, 201, 77, 140, 9]
WIDE = dict(model_type="deepseek_v4", vocab_size=49152, hidden_size=4096, moe_intermediate_size=2048, num_hidden_layers=2, num_attention_heads=64,
  num_key_value_heads=1, head_dim=512, qk_rope_head_dim=64, q_lora_rank=1024, n_routed_experts=32, n_shared_experts=1, num_experts_per_tok=6,
  scoring_func="sqrtsoftplus", norm_topk_prob=True, routed_scaling_factor=1.5, max_position_embeddings=65536, rope_theta=10000, compress_rope_theta=160000,
  compress_ratios=[4, 128, 0], num_hash_layers=0, swiglu_limit=10.0, sliding_window=128, o_groups=8, o_lora_rank=1024, index_n_heads=64, index_head_dim=128,
  index_topk=512, hc_mult=4, hc_sinkhorn_iters=20, hc_eps=1e-6, rms_norm_eps=1e-6, hidden_act="silu", tie_word_embeddings=False, bos_token_id=0, eos_token_id=1,
  expert_dtype="fp4", quantization_config=dict(quant_method="fp8", fmt="e4m3", scale_fmt="ue8m0", weight_block_size=[128, 128]))


def make(folder, tokenizer):
    c, t, gen = WIDE, {}, torch.Generator().manual_seed(1)
    def noise(*shape): return torch.randn(shape, generator=gen) / shape[-1] ** .5
    def bf16(name, *shape): t[name + ".weight"] = noise(*shape).bfloat16()
    def fp8(name, rows, cols):
        t[name + ".weight"] = (noise(rows, cols) * 64).to(torch.float8_e4m3fn)
        t[name + ".scale"] = torch.full((-(-rows // 128), -(-cols // 128)), 2.0 ** -6).to(torch.float8_e8m0fnu)
    def fp4(name, rows, cols):
        t[name + ".weight"] = torch.randint(0, 256, (rows, cols // 2), generator=gen, dtype=torch.uint8).view(torch.int8)
        t[name + ".scale"] = torch.full((rows, cols // 32), 2.0 ** -8).to(torch.float8_e8m0fnu)
    def ones(name, n): t[name + ".weight"] = torch.ones(n).bfloat16()
    h, w, d, r, n = c["hidden_size"], c["moe_intermediate_size"], c["head_dim"], c["q_lora_rank"], c["hc_mult"]
    heads, groups, rank, index, ask = c["num_attention_heads"], c["o_groups"], c["o_lora_rank"], c["index_head_dim"], c["index_n_heads"]
    def compressor(p, ratio, width, out):
        bf16(p + ".wkv", out, h); bf16(p + ".wgate", out, h); ones(p + ".norm", width); t[p + ".ape"] = noise(ratio, out)
    for l in range(c["num_hidden_layers"]):
        p = f"layers.{l}."; a = p + "attn."; ratio = c["compress_ratios"][l]
        fp8(a + "wq_a", r, h); fp8(a + "wq_b", heads * d, r); fp8(a + "wkv", d, h); fp8(a + "wo_a", groups * rank, heads * d // groups); fp8(a + "wo_b", h, groups * rank)
        ones(a + "q_norm", r); ones(a + "norm", d); t[a + "attn_sink"] = torch.zeros(heads); ones(p + "attn_norm", h); ones(p + "ffn_norm", h)
        compressor(a + "compressor", ratio, d, d * (2 if ratio == 4 else 1))
        if ratio == 4: compressor(a + "indexer.compressor", ratio, index, 2 * index); fp8(a + "indexer.wq_b", ask * index, r); bf16(a + "indexer.weights_proj", ask, h)
        for b in ("hc_attn", "hc_ffn"): t[p + b + "_fn"] = noise((2 + n) * n, n * h); t[p + b + "_base"] = torch.zeros((2 + n) * n); t[p + b + "_scale"] = torch.ones(3)
        bf16(p + "ffn.gate", c["n_routed_experts"], h); t[p + "ffn.gate.bias"] = torch.zeros(c["n_routed_experts"])
        for e in range(c["n_routed_experts"]): fp4(f"{p}ffn.experts.{e}.w1", w, h); fp4(f"{p}ffn.experts.{e}.w3", w, h); fp4(f"{p}ffn.experts.{e}.w2", h, w)
        fp8(p + "ffn.shared_experts.w1", w, h); fp8(p + "ffn.shared_experts.w3", w, h); fp8(p + "ffn.shared_experts.w2", h, w)
    bf16("embed", c["vocab_size"], h); bf16("head", c["vocab_size"], h); ones("norm", h)
    t["hc_head_fn"], t["hc_head_base"], t["hc_head_scale"] = noise(n, n * h), torch.zeros(n), torch.ones(1)
    folder.mkdir(parents=True); save_file(t, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(c, indent=1)); (folder / "tokenizer.json").write_bytes(tokenizer.read_bytes())


def berth(binary, folder, tokens, threads):
    with tempfile.NamedTemporaryFile(suffix=".json") as out:
        run = [binary, "generate", "--checkpoint", folder, "--prompt-ids", ",".join(map(str, PROMPT)), "--max-tokens", str(tokens), "--ignore-eos",
               "--agents", "1", "--threads", str(threads), "--profile", "--json", out.name]
        text = subprocess.run(run, check=True, capture_output=True, text=True).stdout
        return json.load(open(out.name))["prompts"][0]["tokens_per_s"], text


def reference(model, tokens):
    cache, ids, begin = None, torch.tensor([PROMPT]), time.perf_counter()
    with torch.no_grad():
        for _ in range(tokens):
            out = model(ids, past_key_values=cache, use_cache=True); cache = out.past_key_values; ids = out.logits[:, -1:].argmax(-1)
    return tokens / (time.perf_counter() - begin)


def main():
    args = argparse.ArgumentParser(); args.add_argument("berth"); args.add_argument("models", nargs="+")
    args.add_argument("--rounds", type=int, default=3); args.add_argument("--tokens", type=int, default=32); args.add_argument("--dtype", default=None); args.add_argument("--torch-threads", type=int, default=torch.get_num_threads()); args.add_argument("--threads", type=int, default=2)
    args = args.parse_args(); torch.set_num_threads(args.torch_threads); here = pathlib.Path(__file__).parent
    for entry in args.models:
        name, folder = entry.split("=", 1); folder = pathlib.Path(folder)
        if not folder.exists(): make(folder, here / "../../tests/data/reference/models/v4-tiny/tokenizer.json")
        config = json.loads((folder / "config.json").read_text()); kind = FAMILY[config["model_type"]]
        dtype = getattr(torch, args.dtype or ("float32" if config["hidden_size"] < 1024 else "bfloat16"))
        plain = {k: v for k, v in config.items() if k not in ("quantization_config", "expert_dtype", "dtype", "architectures", "transformers_version", "model_type")}
        torch.set_default_dtype(dtype); model = kind[1](kind[0](**plain)).eval(); torch.set_default_dtype(torch.float32)
        reference(model, 2)
        for at in range(args.rounds):
            ours, text = berth(args.berth, folder, args.tokens, args.threads); theirs = reference(model, args.tokens)
            print(f"{name} round {at}: berth {ours:.2f} tokens/s, transformers ({dtype}) {theirs:.2f} tokens/s, ratio {ours / theirs:.2f}", flush=True)
        print("\n".join(line for line in text.splitlines() if line.startswith("  ") or " steps, " in line), flush=True)
        del model


main()
