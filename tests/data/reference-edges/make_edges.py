#!/usr/bin/env python3
"""Writes the edge cases of this folder: the script of ../reference, its numpy float64 path alone.

Needs: numpy, ml_dtypes, safetensors. Use: make_edges.py --cases edges.json --out .
`make_reference.py` imports torch and transformers for its second oracle. Edge cases (no token, one token, rows of NaN and
infinity, shapes that are no multiple of anything) need only the first, so both imports are replaced by empty modules and the
second oracle by the first.
"""
import pathlib, sys, types

for name in ("torch", "transformers", "transformers.models", "transformers.models.deepseek_v3",
             "transformers.models.deepseek_v3.modeling_deepseek_v3", "transformers.models.deepseek_v4",
             "transformers.models.deepseek_v4.modeling_deepseek_v4"):
    sys.modules[name] = types.ModuleType(name)
torch, transformers = sys.modules["torch"], sys.modules["transformers"]
torch.float64, torch.float32, torch.bfloat16, torch.set_num_threads = "f64", "f32", "bf16", lambda n: None
transformers.DeepseekV3Config = transformers.DeepseekV4Config = None
sys.modules["transformers.models.deepseek_v3.modeling_deepseek_v3"].DeepseekV3MoE = None
sys.modules["transformers.models.deepseek_v4.modeling_deepseek_v4"].DeepseekV4SparseMoeBlock = None
script = pathlib.Path(__file__).resolve().parent.parent / "reference" / "make_reference.py"
g = {"__name__": "make_reference"}
exec(compile(script.read_text(), str(script), "exec"), g)
np = g["np"]


def numpy_only(c, W, shared, gate, bias, tid, x, ids, dtype):
    chosen = None if tid is None else tid[ids]
    top, weights, _ = g["route"](np.nan_to_num(x @ gate.T), bias, c["K"], c["scale"], c["family"], c.get("groups"), chosen)
    y = g["expert"](x, *shared, c.get("limit", 0))
    for e in range(c["E"]):
        t, k = np.where(top == e)
        if len(t):
            y[t] += weights[t, k][:, None] * g["expert"](x[t], *W[e], c.get("limit", 0))
    return y, top


g["hf_run"] = numpy_only
g["main"]()
