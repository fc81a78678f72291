//! The one kernel trait: what every backend takes, gives and promises.
//!
//! Shapes and tolerances live here and in `conformance`; a backend may choose its packed layout and its arithmetic,
//! never the meaning. Prompts and activations are never logged or kept.

use std::any::Any;
use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use crate::error::{KernelError, check_len};
use crate::format::StoredMatrix;
use crate::num::usize_of;

/// Which implementation does the maths.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum BackendKind {
    /// Portable and SIMD code on the host's cores; always there.
    Cpu,
    /// NVIDIA, through libcuda opened at run time.
    Cuda,
    /// Ascend, through libascendcl opened at run time.
    Ascend,
}

impl fmt::Display for BackendKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Cpu => "cpu",
            Self::Cuda => "cuda",
            Self::Ascend => "ascend",
        })
    }
}

impl FromStr for BackendKind {
    type Err = KernelError;

    fn from_str(text: &str) -> Result<Self, KernelError> {
        match text {
            "cpu" => Ok(Self::Cpu),
            "cuda" => Ok(Self::Cuda),
            "ascend" => Ok(Self::Ascend),
            other => Err(KernelError::invalid("backend", format!("{other:?} is unknown: use cpu, cuda or ascend"))),
        }
    }
}

/// One SwiGLU expert as stored: `down(silu(gate(x)) * up(x))`.
#[derive(Debug, Clone)]
pub struct StoredExpert {
    /// [width, hidden]; `gate_proj` or `w1`.
    pub gate: StoredMatrix,
    /// [width, hidden]; `up_proj` or `w3`.
    pub up: StoredMatrix,
    /// [hidden, width]; `down_proj` or `w2`.
    pub down: StoredMatrix,
    /// Bounds gate to (-∞, limit] and up to [-limit, limit] before silu. Per expert: V4's shared expert has none.
    pub limit: Option<f32>,
}

impl StoredExpert {
    /// Input and output features.
    pub fn hidden(&self) -> usize {
        self.gate.cols()
    }

    /// Inner features.
    pub fn width(&self) -> usize {
        self.gate.rows()
    }

    /// Checks that the three shapes belong together and the limit is a positive number.
    ///
    /// # Errors
    /// `Invalid`, naming the matrix.
    pub fn check(&self) -> Result<(), KernelError> {
        let (hidden, width) = (self.hidden(), self.width());
        let shape = |what, m: &StoredMatrix, rows, cols| {
            if (m.rows(), m.cols()) == (rows, cols) {
                return Ok(());
            }
            Err(KernelError::invalid(
                what,
                format!("is {}×{}, expected {rows}×{cols} from gate: give matrices of one expert", m.rows(), m.cols()),
            ))
        };
        shape("up", &self.up, width, hidden)?;
        shape("down", &self.down, hidden, width)?;
        match self.limit {
            Some(limit) if !(limit > 0.0 && limit.is_finite()) => {
                Err(KernelError::invalid("limit", format!("is {limit}: give a positive number, or none")))
            }
            _ => Ok(()),
        }
    }
}

/// Memory that a backend holds now.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct MemoryUse {
    /// Bytes of packed experts that are alive.
    pub packed: u64,
    /// Bytes of scratch kept between calls.
    pub workspace: u64,
}

/// What a backend keeps of one packed expert. Backends find their own type by `as_any`.
pub(crate) trait PackedBody: Any + Send + Sync + fmt::Debug {
    fn kind(&self) -> BackendKind;
    fn hidden(&self) -> usize;
    fn width(&self) -> usize;
    fn bytes(&self) -> u64;
    fn as_any(&self) -> &dyn Any;
}

/// One expert in a backend's own layout. Cloning shares it; the memory is freed with the last clone.
#[derive(Debug, Clone)]
pub struct PackedExpert {
    body: Arc<dyn PackedBody>,
}

impl PackedExpert {
    pub(crate) fn new(body: Arc<dyn PackedBody>) -> Self {
        Self { body }
    }

    pub(crate) fn body(&self) -> &dyn PackedBody {
        &*self.body
    }

    /// Which backend can use it.
    pub fn kind(&self) -> BackendKind {
        self.body.kind()
    }

    /// Input and output features.
    pub fn hidden(&self) -> usize {
        self.body.hidden()
    }

    /// Inner features.
    pub fn width(&self) -> usize {
        self.body.width()
    }

    /// Bytes it holds.
    pub fn bytes(&self) -> u64 {
        self.body.bytes()
    }
}

/// Routed rows of one layer, in compressed sparse row form.
///
/// Row `t` is `rows[t * hidden..][..hidden]`; its experts are `experts[offsets[t]..offsets[t + 1]]` (indices into
/// `table`) with `weights` at the same positions. A row may have no expert here: its output is zero.
#[derive(Debug, Clone, Copy)]
pub struct Batch<'a> {
    /// Input and output features.
    pub hidden: usize,
    /// [T × hidden].
    pub rows: &'a [f32],
    /// [T + 1], from 0, never falling.
    pub offsets: &'a [u32],
    /// [offsets[T]], indices into `table`.
    pub experts: &'a [u32],
    /// [offsets[T]], multiplied with the expert's output.
    pub weights: &'a [f32],
    /// The experts that this call may use.
    pub table: &'a [PackedExpert],
}

impl Batch<'_> {
    /// T, the number of rows.
    pub fn len(&self) -> usize {
        self.offsets.len().saturating_sub(1)
    }

    /// Whether there is no row.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Checks every length and index against the others, and `out` against the rows.
    ///
    /// # Errors
    /// The first violation, naming the field.
    pub fn check(&self, out: &[f32]) -> Result<(), KernelError> {
        if self.hidden == 0 {
            return Err(KernelError::invalid("hidden", "is 0: give the model's hidden size"));
        }
        if self.offsets.first() != Some(&0) {
            return Err(KernelError::invalid("offsets", "must have rows + 1 entries and start with 0"));
        }
        if self.offsets.windows(2).any(|pair| pair[0] > pair[1]) {
            return Err(KernelError::invalid("offsets", "fall: each row must start where the one before ends"));
        }
        let rows = self.len();
        let elements =
            rows.checked_mul(self.hidden).ok_or_else(|| KernelError::invalid("rows", "overflow: send fewer"))?;
        check_len("rows", self.rows.len(), elements, || format!("{rows} rows × {} hidden", self.hidden))?;
        check_len("out", out.len(), elements, || format!("{rows} rows × {} hidden", self.hidden))?;
        let slots = self.offsets.last().copied().map_or(0, usize_of);
        check_len("experts", self.experts.len(), slots, || "the last offset".to_owned())?;
        check_len("weights", self.weights.len(), slots, || "the last offset".to_owned())?;
        for (position, &index) in self.experts.iter().enumerate() {
            let Some(expert) = self.table.get(usize_of(index)) else {
                return Err(KernelError::UnknownExpert { position, index, table: self.table.len() });
            };
            if expert.hidden() != self.hidden {
                return Err(KernelError::invalid(
                    "table",
                    format!(
                        "expert {index} has hidden {}, the batch {}: send it to its own model",
                        expert.hidden(),
                        self.hidden
                    ),
                ));
            }
        }
        Ok(())
    }
}

/// Expert maths on one kind of device.
///
/// A row's result depends on that row, its experts and its weights alone. On the CPU backend this holds bit for bit,
/// whatever else is in the batch. A row with NaN or infinity comes out non-finite and touches no other row.
pub trait Backend: Send + Sync + fmt::Debug {
    /// Which implementation this is.
    fn kind(&self) -> BackendKind;

    /// Copies an expert into this backend's layout.
    ///
    /// # Errors
    /// Shapes that do not belong together, a limit that is not positive, or too little memory.
    fn pack(&self, expert: &StoredExpert) -> Result<PackedExpert, KernelError>;

    /// Computes every row's weighted sum over its experts into `out` ([T × hidden], overwritten).
    ///
    /// # Errors
    /// Any violation that [`Batch::check`] finds, an expert of another backend, or too little memory; `out` is then
    /// unspecified.
    fn forward(&self, batch: &Batch<'_>, out: &mut [f32]) -> Result<(), KernelError>;

    /// What is allocated now.
    fn memory(&self) -> MemoryUse;
}

/// Opens a backend with its defaults.
///
/// # Errors
/// A vendor library that is missing, or a backend that this build does not have.
pub fn open(kind: BackendKind) -> Result<Arc<dyn Backend>, KernelError> {
    match kind {
        BackendKind::Cpu => Ok(Arc::new(crate::cpu::CpuBackend::new()?)),
        BackendKind::Cuda => Err(crate::vendor::missing(crate::vendor::CUDA)),
        BackendKind::Ascend => Err(crate::vendor::missing(crate::vendor::ASCEND)),
    }
}
