//! The CPU backend: always there, and the meaning that other backends are compared with.
//!
//! Weights stay packed in their stored format and are decoded 128 columns of 32 rows at a time; sums are in `f32`.
//! Work is cut into (expert, row block) tasks whose results do not depend on who runs them, so any number of
//! threads gives the same bits. It never logs or keeps an activation.

mod forward;
pub(crate) mod packed;
mod peaks;
pub(crate) mod simd;
pub(crate) mod tile;

use std::any::Any;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use crate::backend::{Backend, BackendKind, Batch, MemoryUse, PackedBody, PackedExpert, StoredExpert};
use crate::error::KernelError;
use packed::PackedMatrix;
pub use peaks::Peaks;
pub use simd::Level;
use simd::Simd;

/// How to open the CPU backend.
#[derive(Debug, Clone, Copy, Default)]
pub struct CpuOptions {
    /// Threads; `None`: as many as the process may use.
    pub threads: Option<usize>,
    /// The highest instruction set to use; `None`: the best there is.
    pub level: Option<Level>,
}

/// Expert maths on the host's cores.
#[derive(Debug)]
pub struct CpuBackend {
    simd: Simd,
    /// `None` when one thread is asked for: everything runs on the caller's.
    pool: Option<rayon::ThreadPool>,
    /// Bytes of packed experts alive; each expert gives its own back when dropped.
    packed: Arc<AtomicU64>,
    /// Scratch kept between calls, one per caller at a time.
    scratch: Mutex<Vec<forward::Scratch>>,
}

impl CpuBackend {
    /// The best instruction set, as many threads as the process may use.
    ///
    /// # Errors
    /// `Threads` if the pool cannot be started.
    pub fn new() -> Result<Self, KernelError> {
        Self::with(CpuOptions::default())
    }

    /// With a chosen number of threads or instruction set.
    ///
    /// # Errors
    /// `Threads` if the pool cannot be started.
    pub fn with(options: CpuOptions) -> Result<Self, KernelError> {
        let threads = options.threads.unwrap_or_else(|| std::thread::available_parallelism().map_or(1, usize::from));
        let pool = if threads > 1 { Some(start_pool(threads)?) } else { None };
        Ok(Self {
            simd: Simd::at_most(options.level.unwrap_or_else(Level::detect)),
            pool,
            packed: Arc::default(),
            scratch: Mutex::default(),
        })
    }

    /// The instruction set in use.
    pub fn level(&self) -> Level {
        self.simd.level()
    }

    /// Threads that compute.
    pub fn threads(&self) -> usize {
        self.pool.as_ref().map_or(1, rayon::ThreadPool::current_num_threads)
    }
}

fn start_pool(threads: usize) -> Result<rayon::ThreadPool, KernelError> {
    rayon::ThreadPoolBuilder::new()
        .num_threads(threads)
        .thread_name(|i| format!("berth-cpu-{i}"))
        .build()
        .map_err(|cause| KernelError::Threads { threads, cause: cause.to_string() })
}

/// An expert in tiles.
#[derive(Debug)]
pub(crate) struct CpuExpert {
    gate: PackedMatrix,
    up: PackedMatrix,
    down: PackedMatrix,
    limit: f32,
    bytes: u64,
    alive: Arc<AtomicU64>,
}

impl Drop for CpuExpert {
    fn drop(&mut self) {
        self.alive.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

impl PackedBody for CpuExpert {
    fn kind(&self) -> BackendKind {
        BackendKind::Cpu
    }

    fn hidden(&self) -> usize {
        self.gate.cols()
    }

    fn width(&self) -> usize {
        self.gate.rows()
    }

    fn bytes(&self) -> u64 {
        self.bytes
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

impl Backend for CpuBackend {
    fn kind(&self) -> BackendKind {
        BackendKind::Cpu
    }

    fn pack(&self, expert: &StoredExpert) -> Result<PackedExpert, KernelError> {
        expert.check()?;
        let gate = PackedMatrix::pack(&expert.gate)?;
        let up = PackedMatrix::pack(&expert.up)?;
        let down = PackedMatrix::pack(&expert.down)?;
        let bytes = gate.bytes() + up.bytes() + down.bytes();
        self.packed.fetch_add(bytes, Ordering::Relaxed);
        let limit = expert.limit.unwrap_or(f32::INFINITY);
        let alive = Arc::clone(&self.packed);
        Ok(PackedExpert::new(Arc::new(CpuExpert { gate, up, down, limit, bytes, alive })))
    }

    fn forward(&self, batch: &Batch<'_>, out: &mut [f32]) -> Result<(), KernelError> {
        batch.check(out)?;
        let mut experts = Vec::with_capacity(batch.table.len());
        for (index, expert) in batch.table.iter().enumerate() {
            let Some(own) = expert.body().as_any().downcast_ref::<CpuExpert>() else {
                return Err(KernelError::ForeignExpert { index, packed: expert.kind(), here: BackendKind::Cpu });
            };
            experts.push(own);
        }
        let mut scratch = self.scratch.lock().unwrap_or_else(PoisonError::into_inner).pop().unwrap_or_default();
        let done = forward::run(self.simd, self.pool.as_ref(), &experts, batch, out, &mut scratch);
        let mut kept = self.scratch.lock().unwrap_or_else(PoisonError::into_inner);
        if kept.len() < self.threads() {
            kept.push(scratch);
        }
        done
    }

    fn memory(&self) -> MemoryUse {
        let kept = self.scratch.lock().unwrap_or_else(PoisonError::into_inner);
        MemoryUse {
            packed: self.packed.load(Ordering::Relaxed),
            workspace: kept.iter().map(forward::Scratch::bytes).sum(),
        }
    }
}
