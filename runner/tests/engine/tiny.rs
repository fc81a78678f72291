//! Tiny random models of the V3 family, written as checkpoints, and one model on one engine to ask.

use std::{path::Path, sync::Arc};

use berth_kernels::{BackendKind, Checkpoint};
use berth_runner::{
    engine::{Engine, EngineConfig, Event, Finished, Reason, Request, Trace},
    experts::{ExpertCalls, LocalExperts},
    model::Model,
};
use proptest::{
    strategy::{Strategy, ValueTree},
    test_runner::{RngAlgorithm, TestRng, TestRunner},
};
use serde_json::{Value, json};

/// A configuration with query compression and groups.
pub(crate) fn grouped() -> Value {
    json!({"model_type": "deepseek_v3", "vocab_size": 258, "max_position_embeddings": 128, "hidden_size": 32,
        "num_hidden_layers": 3, "first_k_dense_replace": 1, "intermediate_size": 48, "num_attention_heads": 2,
        "q_lora_rank": 24, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 12,
        "n_routed_experts": 8, "n_shared_experts": 1, "moe_intermediate_size": 16, "num_experts_per_tok": 2,
        "n_group": 4, "topk_group": 2, "norm_topk_prob": true, "routed_scaling_factor": 2.5,
        "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "bos_token_id": 0, "eos_token_id": 1})
}

/// No query compression, one group, two shared experts, YaRN, tied output matrix, odd widths.
pub(crate) fn plain() -> Value {
    let mut config = grouped();
    let other = json!({"q_lora_rank": null, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 3,
        "n_shared_experts": 2, "hidden_size": 40, "moe_intermediate_size": 20, "num_attention_heads": 3,
        "first_k_dense_replace": 0, "tie_word_embeddings": true, "norm_topk_prob": false,
        "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "mscale": 1.0,
            "mscale_all_dim": 0.7, "beta_fast": 32, "beta_slow": 1}, "rope_interleave": false});
    for (field, value) in other.as_object().unwrap() {
        config[field] = value.clone();
    }
    config
}

/// Names and shapes of every tensor of a configuration.
fn tensors(config: &Value) -> Vec<(String, Vec<usize>)> {
    let size = |field: &str| usize::try_from(config[field].as_u64().unwrap_or(0)).unwrap();
    let (hidden, heads) = (size("hidden_size"), size("num_attention_heads"));
    let (nope, rope, value) = (size("qk_nope_head_dim"), size("qk_rope_head_dim"), size("v_head_dim"));
    let (rank, queries) = (size("kv_lora_rank"), heads * (nope + rope));
    let mut all = vec![
        ("model.embed_tokens".to_owned(), vec![size("vocab_size"), hidden]),
        ("model.norm".to_owned(), vec![hidden]),
    ];
    if config["tie_word_embeddings"] != json!(true) {
        all.push(("lm_head".to_owned(), vec![size("vocab_size"), hidden]));
    }
    for layer in 0..size("num_hidden_layers") {
        let mut add = |part: &str, shape: Vec<usize>| all.push((format!("model.layers.{layer}.{part}"), shape));
        add("input_layernorm", vec![hidden]);
        add("post_attention_layernorm", vec![hidden]);
        match size("q_lora_rank") {
            0 => add("self_attn.q_proj", vec![queries, hidden]),
            compressed => {
                add("self_attn.q_a_proj", vec![compressed, hidden]);
                add("self_attn.q_a_layernorm", vec![compressed]);
                add("self_attn.q_b_proj", vec![queries, compressed]);
            }
        }
        add("self_attn.kv_a_proj_with_mqa", vec![rank + rope, hidden]);
        add("self_attn.kv_a_layernorm", vec![rank]);
        add("self_attn.kv_b_proj", vec![heads * (nope + value), rank]);
        add("self_attn.o_proj", vec![hidden, heads * value]);
        let mut block = |prefix: &str, width: usize| {
            add(&format!("{prefix}.gate_proj"), vec![width, hidden]);
            add(&format!("{prefix}.up_proj"), vec![width, hidden]);
            add(&format!("{prefix}.down_proj"), vec![hidden, width]);
        };
        if layer < size("first_k_dense_replace") {
            block("mlp", size("intermediate_size"));
            continue;
        }
        let width = size("moe_intermediate_size");
        for expert in 0..size("n_routed_experts") {
            block(&format!("mlp.experts.{expert}"), width);
        }
        if size("n_shared_experts") > 0 {
            block("mlp.shared_experts", width * size("n_shared_experts"));
        }
        add("mlp.gate", vec![size("n_routed_experts"), hidden]);
        all.push((format!("model.layers.{layer}.mlp.gate.e_score_correction_bias"), vec![size("n_routed_experts")]));
    }
    all
}

/// Writes a checkpoint with float32 weights from `seed`.
pub(crate) fn write(dir: &Path, config: &Value, seed: u8) {
    let mut runner = TestRunner::new_with_rng(
        proptest::test_runner::Config::default(),
        TestRng::from_seed(RngAlgorithm::ChaCha, &[seed; 32]),
    );
    let mut uniform = || (-1.0_f32..1.0).new_tree(&mut runner).unwrap().current();
    let (mut header, mut data) = (serde_json::Map::new(), Vec::<u8>::new());
    for (name, shape) in tensors(config) {
        let start = data.len();
        let count: usize = shape.iter().product();
        let scale = if shape.len() == 2 { 1.7 / f32::from(u16::try_from(shape[1]).unwrap()).sqrt() } else { 0.1 };
        for _ in 0..count {
            let centre = if name.ends_with("norm") { 1.0 } else { 0.0 };
            data.extend((centre + scale * uniform()).to_le_bytes());
        }
        let name = if name.ends_with("bias") { name } else { format!("{name}.weight") };
        header.insert(name, json!({"dtype": "F32", "shape": shape, "data_offsets": [start, data.len()]}));
    }
    let header = serde_json::to_vec(&Value::Object(header)).unwrap();
    let mut file = u64::try_from(header.len()).unwrap().to_le_bytes().to_vec();
    file.extend(header);
    file.extend(data);
    std::fs::write(dir.join("model.safetensors"), file).unwrap();
    std::fs::write(dir.join("config.json"), config.to_string()).unwrap();
    let tokenizer = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/data/reference/models/v3-tiny/tokenizer.json");
    std::fs::copy(tokenizer, dir.join("tokenizer.json")).unwrap();
}

/// A model and its experts in this process.
#[derive(Clone)]
pub(crate) struct Loaded {
    pub(crate) model: Arc<Model>,
    pub(crate) local: LocalExperts,
}

/// Loads the checkpoint in `dir`.
pub(crate) fn load(dir: &Path) -> Loaded {
    let checkpoint = Arc::new(Checkpoint::open(dir).unwrap());
    let model = Model::load(Arc::clone(&checkpoint), dir).unwrap();
    let backend = berth_kernels::open(BackendKind::Cpu).unwrap();
    let local = LocalExperts::load(&model, &checkpoint, backend).unwrap();
    Loaded { model, local }
}

/// A random model of `config`.
pub(crate) fn random(config: &Value, seed: u8) -> Loaded {
    let dir = tempfile::tempdir().unwrap();
    write(dir.path(), config, seed);
    load(dir.path())
}

/// All that a request gave.
#[derive(Debug, Default)]
pub(crate) struct Outcome {
    pub(crate) prompt: Vec<u32>,
    pub(crate) ids: Vec<u32>,
    pub(crate) text: String,
    pub(crate) revisions: Vec<u64>,
    pub(crate) trace: Vec<Trace>,
    pub(crate) finished: Finished,
}

/// Waits for a request's end.
pub(crate) fn collect(mut events: tokio::sync::mpsc::Receiver<Event>) -> Outcome {
    let mut outcome = Outcome::default();
    while let Some(event) = events.blocking_recv() {
        match event {
            Event::Prompt { ids } => outcome.prompt = ids,
            Event::Trace(trace) => outcome.trace.push(trace),
            Event::Token { id, text, revision } => {
                outcome.ids.push(id);
                outcome.text.push_str(&text);
                outcome.revisions.push(revision.0);
            }
            Event::Finished(finished) => {
                outcome.finished = finished;
                return outcome;
            }
        }
    }
    panic!("the events ended without Finished");
}

/// An engine with small chunks, so that prompts take several steps.
pub(crate) fn engine(model: &Arc<Model>, experts: Arc<dyn ExpertCalls>, prefill_tokens: usize) -> Engine {
    let config = EngineConfig { prefill_tokens, ..EngineConfig::default() };
    Engine::start(Arc::clone(model), experts, config).unwrap()
}

/// Generates `max_tokens` tokens and expects that it works.
pub(crate) fn generate(engine: &Engine, prompt_ids: &[u32], max_tokens: u32, trace: bool) -> Outcome {
    let request = Request { prompt_ids: prompt_ids.to_vec(), max_tokens, ignore_eos: true, trace, deadline: None };
    let outcome = collect(engine.generate(request));
    assert_eq!(outcome.finished.reason, Reason::Length, "{}", outcome.finished.error);
    outcome
}
