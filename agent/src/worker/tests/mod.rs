//! What the tests of a worker share: a tiny random checkpoint, orders and calls on it, and a reference that
//! computes in float64 the plainest way.

mod call;
mod load;
mod stream;
mod wire;

use std::{
    path::Path,
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
};

use berth_kernels::{Backend, BackendKind, Batch, KernelError, MemoryUse, PackedExpert, StoredExpert, cpu::CpuBackend};
use berth_proto::v1;
use safetensors::{Dtype as StoredDtype, tensor::TensorView};
use tempfile::TempDir;
use tokio::sync::watch;

use super::codec::Dtype;

pub(crate) const HIDDEN: usize = 8;
pub(crate) const WIDTH: usize = 6;
/// Layer 0 is dense; 1 and 2 have experts.
pub(crate) const LAYERS: u32 = 3;
pub(crate) const EXPERTS: u32 = 4;
/// bf16 bytes of one expert.
pub(crate) const EXPERT_BYTES: u64 = 3 * 6 * 8 * 2;

/// Numbers between -1 and 1 that bf16 holds exactly, the same for the same seed.
pub(crate) fn numbers(seed: u64, count: usize) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15).wrapping_add(1);
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        let [byte, ..] = state.to_le_bytes();
        f32::from(byte) / 128.0 - 1.0
    };
    (0..count).map(|_| next()).collect()
}

fn weight(seed: u64, layer: u32, expert: u32, part: u64) -> Vec<f32> {
    numbers(seed * 10_000 + u64::from(layer) * 1_000 + u64::from(expert) * 10 + part, HIDDEN * WIDTH)
}

pub(crate) fn config() -> serde_json::Value {
    serde_json::json!({"model_type": "deepseek_v3", "num_hidden_layers": LAYERS, "first_k_dense_replace": 1,
        "n_routed_experts": EXPERTS, "n_shared_experts": 1, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1,
        "hidden_size": HIDDEN, "moe_intermediate_size": WIDTH})
}

/// Writes a checkpoint of random experts into `dir`, without the tensors whose name contains `without`.
pub(crate) fn write_checkpoint(dir: &Path, seed: u64, without: Option<&str>) {
    let mut tensors = Vec::new();
    for layer in 1..LAYERS {
        for expert in 0..EXPERTS {
            for (part, name, shape) in
                [(0, "gate", [WIDTH, HIDDEN]), (1, "up", [WIDTH, HIDDEN]), (2, "down", [HIDDEN, WIDTH])]
            {
                let name = format!("model.layers.{layer}.mlp.experts.{expert}.{name}_proj.weight");
                let bytes = Dtype::Bf16.encode(&weight(seed, layer, expert, part));
                if without.is_none_or(|without| !name.contains(without)) {
                    tensors.push((name, bytes, shape));
                }
            }
        }
    }
    let views = tensors.iter().map(|(name, bytes, shape)| {
        (name.as_str(), TensorView::new(StoredDtype::BF16, shape.to_vec(), bytes).unwrap())
    });
    safetensors::serialize_to_file(views, None, &dir.join("model.safetensors")).unwrap();
    std::fs::write(dir.join("config.json"), config().to_string()).unwrap();
}

pub(crate) fn checkpoint(seed: u64) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    write_checkpoint(dir.path(), seed, None);
    dir
}

pub(crate) fn digest(dir: &Path) -> String {
    berth_kernels::Checkpoint::open(dir).unwrap().digest().to_owned()
}

/// A shelf of placement `models/tiny` whose uid is `uid`.
pub(crate) fn shelf(dir: &Path, revision: u64, layers: &[(u32, &[u32])]) -> v1::Shelf {
    v1::Shelf {
        placement: "models/tiny".to_owned(),
        placement_uid: "uid".to_owned(),
        revision,
        weights: Some(v1::Weights { uri: format!("file://{}", dir.display()), digest: String::new() }),
        format: String::new(),
        layers: layers
            .iter()
            .map(|(layer, experts)| v1::LayerSlots { layer: *layer, experts: experts.to_vec() })
            .collect(),
    }
}

pub(crate) fn order(shelves: Vec<v1::Shelf>) -> v1::WorkerOrder {
    v1::WorkerOrder { shelves, ..Default::default() }
}

/// One row of a call, with its experts and weights.
pub(crate) type Row = (Vec<f32>, Vec<(u32, f32)>);

/// A call in float32 on revision 1: each row with its experts and weights.
pub(crate) fn request(call_id: u64, layer: u32, rows: &[Row]) -> v1::ForwardRequest {
    let mut offsets = vec![0];
    let (mut experts, mut weights, mut values) = (Vec::new(), Vec::new(), Vec::new());
    for (row, picks) in rows {
        values.extend_from_slice(row);
        for (expert, weight) in picks {
            experts.push(*expert);
            weights.push(*weight);
        }
        offsets.push(u32::try_from(experts.len()).unwrap());
    }
    v1::ForwardRequest {
        call_id,
        placement_uid: "uid".to_owned(),
        revision: 1,
        layer,
        tokens: u32::try_from(rows.len()).unwrap(),
        hidden: u32::try_from(HIDDEN).unwrap(),
        dtype: Dtype::F32.to_wire(),
        rows: Dtype::F32.encode(&values),
        offsets,
        experts,
        weights,
        deadline_ms: 0,
    }
}

/// One row of random numbers on experts 0 and 2 of layer 1.
pub(crate) fn one_row(call_id: u64) -> v1::ForwardRequest {
    request(call_id, 1, &[(numbers(call_id, HIDDEN), vec![(0, 0.75), (2, 0.5)])])
}

fn dot(matrix: &[f32], row: usize, x: &[f64]) -> f64 {
    matrix[row * x.len()..][..x.len()].iter().zip(x).map(|(w, x)| f64::from(*w) * x).sum()
}

/// The weighted sum over the experts of one row of the checkpoint made with `seed`.
pub(crate) fn reference(seed: u64, layer: u32, row: &[f32], picks: &[(u32, f32)]) -> Vec<f64> {
    let x: Vec<f64> = row.iter().copied().map(f64::from).collect();
    let mut sum = vec![0.0; HIDDEN];
    for (expert, share) in picks {
        let [gate, up, down] = [0, 1, 2].map(|part| weight(seed, layer, *expert, part));
        let inner: Vec<f64> = (0..WIDTH)
            .map(|i| {
                let gate = dot(&gate, i, &x);
                gate / (1.0 + (-gate).exp()) * dot(&up, i, &x)
            })
            .collect();
        for (i, sum) in sum.iter_mut().enumerate() {
            *sum += f64::from(*share) * dot(&down, i, &inner);
        }
    }
    sum
}

/// Whether `rows` are the reference's within what float32 loses.
#[track_caller]
pub(crate) fn assert_near(rows: &[f32], expected: &[f64], tolerance: f64) {
    assert_eq!(rows.len(), expected.len());
    for (got, expected) in rows.iter().zip(expected) {
        assert!((f64::from(*got) - expected).abs() <= tolerance * (1.0 + expected.abs()), "{got} is not {expected}");
    }
}

/// What the gated backend does with a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Gate {
    Open,
    /// Kernel calls hang until the gate opens.
    Closed,
    /// The next kernel call panics.
    Panics,
}

/// The CPU backend behind a gate, with a count of kernel calls.
#[derive(Debug)]
pub(crate) struct Gated {
    inner: CpuBackend,
    gate: Mutex<Gate>,
    changed: Condvar,
    begun: watch::Sender<u64>,
}

impl Gated {
    pub(crate) fn new(gate: Gate) -> Arc<Self> {
        let inner = CpuBackend::new().unwrap();
        Arc::new(Self { inner, gate: Mutex::new(gate), changed: Condvar::new(), begun: watch::Sender::new(0) })
    }

    fn lock(&self) -> MutexGuard<'_, Gate> {
        self.gate.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn set(&self, gate: Gate) {
        *self.lock() = gate;
        self.changed.notify_all();
    }

    /// Kernel calls begun.
    pub(crate) fn calls(&self) -> u64 {
        *self.begun.borrow()
    }

    /// Waits until so many kernel calls have begun.
    pub(crate) async fn wait_for_calls(&self, calls: u64) {
        let mut begun = self.begun.subscribe();
        let wait = begun.wait_for(|begun| *begun >= calls);
        tokio::time::timeout(std::time::Duration::from_secs(60), wait).await.expect("in time").unwrap();
    }
}

impl Backend for Gated {
    fn kind(&self) -> BackendKind {
        self.inner.kind()
    }

    fn pack(&self, expert: &StoredExpert) -> Result<PackedExpert, KernelError> {
        self.inner.pack(expert)
    }

    fn forward(&self, batch: &Batch<'_>, out: &mut [f32]) -> Result<(), KernelError> {
        self.begun.send_modify(|begun| *begun += 1);
        let mut gate = self.lock();
        if *gate == Gate::Panics {
            *gate = Gate::Open;
            drop(gate);
            panic!("a bug in a kernel");
        }
        drop(self.changed.wait_while(gate, |gate| *gate == Gate::Closed).unwrap_or_else(PoisonError::into_inner));
        self.inner.forward(batch, out)
    }

    fn memory(&self) -> MemoryUse {
        self.inner.memory()
    }
}
