//! One grouped forward: rows sorted by expert, two passes over row blocks, one weighted sum per row.
//!
//! Pass 1 computes h = silu(gate) · up for (expert, 128 inner rows); pass 2 computes 32 output rows for all experts
//! and adds a row's experts in the row's own order. Neither order nor chunking depends on what else is in the batch,
//! which is what makes a row's bits its own. Inner activations are laid out per expert in panels of 128 columns, so
//! that every task owns one contiguous slice.

use rayon::prelude::*;

use super::CpuExpert;
use super::packed::CHUNK;
use super::simd::{LANES, Lane, Simd};
use super::tile::multiply;
use crate::backend::Batch;
use crate::error::{KernelError, zeroed};
use crate::num::{u64_of, usize_of};

/// Inner activations of one pass at most, in floats: 32 MiB. Longer batches run in several passes.
const INNER_FLOATS: usize = 8 << 20;

/// Below this many multiply-adds a call stays on the caller's thread: waking others would cost more.
const ALONE: usize = 1 << 20;

/// Buffers kept between calls.
#[derive(Debug, Default)]
pub(super) struct Scratch {
    inner: Vec<f32>,
    blocks: Vec<f32>,
}

impl Scratch {
    pub(super) fn bytes(&self) -> u64 {
        u64_of((self.inner.capacity() + self.blocks.capacity()) * size_of::<f32>())
    }
}

/// The slots of one expert in a pass.
struct Group<'a> {
    expert: &'a CpuExpert,
    /// Rows of the batch, one per slot.
    rows: Vec<usize>,
    /// First slot, in expert order.
    start: usize,
}

/// Runs a checked batch.
pub(super) fn run(
    simd: Simd,
    pool: Option<&rayon::ThreadPool>,
    experts: &[&CpuExpert],
    batch: &Batch<'_>,
    out: &mut [f32],
    scratch: &mut Scratch,
) -> Result<(), KernelError> {
    let widest = experts.iter().map(|e| e.gate.rows()).max().unwrap_or(1);
    let slots_at_most = (INNER_FLOATS / widest).max(1);
    let mut first = 0;
    while first < batch.len() {
        let mut last = first + 1;
        while last < batch.len() && usize_of(batch.offsets[last + 1] - batch.offsets[first]) <= slots_at_most {
            last += 1;
        }
        let out = &mut out[first * batch.hidden..last * batch.hidden];
        run_pass(simd, pool, experts, batch, first..last, out, scratch)?;
        first = last;
    }
    Ok(())
}

fn run_pass(
    simd: Simd,
    pool: Option<&rayon::ThreadPool>,
    experts: &[&CpuExpert],
    batch: &Batch<'_>,
    range: std::ops::Range<usize>,
    out: &mut [f32],
    scratch: &mut Scratch,
) -> Result<(), KernelError> {
    let (groups, position) = group(experts, batch, &range);
    let inner_len = groups.iter().map(|g| g.rows.len() * g.expert.gate.rows()).sum();
    let tiles = batch.hidden.div_ceil(LANES);
    resize("inner activations", &mut scratch.inner, inner_len)?;
    resize("output blocks", &mut scratch.blocks, tiles * range.len() * LANES)?;
    let pool = pool.filter(|_| inner_len.saturating_mul(batch.hidden) > ALONE);
    let pass = Pass { simd, batch, range, groups: &groups, position: &position };
    match pool {
        Some(pool) => pool.install(|| pass.run(true, scratch, out)),
        None => pass.run(false, scratch, out),
    }
    Ok(())
}

/// Sorts the slots of rows `range` by expert; also where each slot of the batch went.
fn group<'a>(
    experts: &[&'a CpuExpert],
    batch: &Batch<'_>,
    range: &std::ops::Range<usize>,
) -> (Vec<Group<'a>>, Vec<usize>) {
    let base = usize_of(batch.offsets[range.start]);
    let slots = base..usize_of(batch.offsets[range.end]);
    let mut by_expert: Vec<Vec<(usize, usize)>> = vec![Vec::new(); experts.len()];
    for row in range.clone() {
        for slot in usize_of(batch.offsets[row])..usize_of(batch.offsets[row + 1]) {
            by_expert[usize_of(batch.experts[slot])].push((row, slot - base));
        }
    }
    let mut position = vec![0; slots.len()];
    let mut groups = Vec::new();
    let mut start = 0;
    for (&expert, slots) in experts.iter().zip(by_expert).filter(|(_, slots)| !slots.is_empty()) {
        for (i, &(_, slot)) in slots.iter().enumerate() {
            position[slot] = start + i;
        }
        let rows: Vec<usize> = slots.into_iter().map(|(row, _)| row).collect();
        let next = start + rows.len();
        groups.push(Group { expert, rows, start });
        start = next;
    }
    (groups, position)
}

/// Everything the tasks of one pass read.
struct Pass<'a> {
    simd: Simd,
    batch: &'a Batch<'a>,
    range: std::ops::Range<usize>,
    groups: &'a [Group<'a>],
    position: &'a [usize],
}

impl Pass<'_> {
    fn run(&self, parallel: bool, scratch: &mut Scratch, out: &mut [f32]) {
        let tasks = self.panels(&mut scratch.inner);
        each(parallel, tasks, |(group, panel, h)| self.inner(group, panel, h));
        let inner = &scratch.inner;
        let block = self.range.len() * LANES;
        let tasks = scratch.blocks.chunks_exact_mut(block.max(1)).enumerate().collect();
        each(parallel, tasks, |(tile, block)| self.outer(tile, inner, block));
        let blocks = &scratch.blocks;
        let rows = out.chunks_exact_mut(self.batch.hidden).enumerate().collect();
        each(parallel, rows, |(row, out)| self.gather(row, blocks, out));
    }

    /// Cuts the inner buffer into one slice per (expert, panel).
    fn panels<'h>(&self, mut inner: &'h mut [f32]) -> Vec<(usize, usize, &'h mut [f32])> {
        let mut tasks = Vec::new();
        for (index, group) in self.groups.iter().enumerate() {
            let width = group.expert.gate.rows();
            for panel in 0..width.div_ceil(CHUNK) {
                let columns = CHUNK.min(width - panel * CHUNK);
                let (slice, rest) = inner.split_at_mut(columns * group.rows.len());
                tasks.push((index, panel, slice));
                inner = rest;
            }
        }
        tasks
    }

    /// h[slot][128 inner rows of `panel`] for every slot of a group.
    fn inner(&self, group: usize, panel: usize, h: &mut [f32]) {
        let group = &self.groups[group];
        let expert = group.expert;
        let slots = group.rows.len();
        let columns = h.len() / slots;
        let hidden = self.batch.hidden;
        let x = |slot: usize, start: usize, end: usize| &self.batch.rows[group.rows[slot] * hidden..][start..end];
        let mut gate: Vec<Lane> = vec![[0.0; LANES]; slots];
        let mut up: Vec<Lane> = vec![[0.0; LANES]; slots];
        for from in (0..columns).step_by(LANES) {
            let tile = (panel * CHUNK + from) / LANES;
            gate.fill([0.0; LANES]);
            up.fill([0.0; LANES]);
            multiply(self.simd, &expert.gate, tile, &mut gate, x);
            multiply(self.simd, &expert.up, tile, &mut up, x);
            let to = columns.min(from + LANES);
            for ((h, gate), up) in h.chunks_exact_mut(columns).zip(&gate).zip(&up) {
                for ((h, &gate), &up) in h[from..to].iter_mut().zip(gate).zip(up) {
                    *h = swiglu(gate, up, expert.limit);
                }
            }
        }
    }

    /// 32 output rows of `tile` for every row of the pass: `block` is [rows × 32].
    fn outer(&self, tile: usize, inner: &[f32], block: &mut [f32]) {
        let mut slots: Vec<Lane> = vec![[0.0; LANES]; self.position.len()];
        let mut base = 0;
        for group in self.groups {
            let (width, count) = (group.expert.gate.rows(), group.rows.len());
            let h = &inner[base..][..width * count];
            base += width * count;
            let x = |slot: usize, start: usize, end: usize| &h[start * count + slot * (end - start)..][..end - start];
            let acc = &mut slots[group.start..group.start + count];
            multiply(self.simd, &group.expert.down, tile, acc, x);
        }
        let first = usize_of(self.batch.offsets[self.range.start]);
        for (row, sum) in self.range.clone().zip(block.as_chunks_mut::<LANES>().0) {
            sum.fill(0.0);
            for slot in usize_of(self.batch.offsets[row])..usize_of(self.batch.offsets[row + 1]) {
                let weight = self.batch.weights[slot];
                let values = &slots[self.position[slot - first]];
                sum.iter_mut().zip(values).for_each(|(sum, &value)| *sum += weight * value);
            }
        }
    }

    /// Collects a row from its blocks. A row that came in non-finite leaves as NaN throughout.
    fn gather(&self, row: usize, blocks: &[f32], out: &mut [f32]) {
        let at = self.range.start + row;
        let served = self.batch.offsets[at] != self.batch.offsets[at + 1];
        let input = &self.batch.rows[at * self.batch.hidden..][..self.batch.hidden];
        if served && !input.iter().all(|x| x.is_finite()) {
            out.fill(f32::NAN);
            return;
        }
        let rows = self.range.len();
        for (tile, out) in out.chunks_mut(LANES).enumerate() {
            let block = &blocks[(tile * rows + row) * LANES..][..out.len()];
            out.copy_from_slice(block);
        }
    }
}

/// silu(min(gate, limit)) · clamp(up, ±limit); NaN stays NaN.
fn swiglu(gate: f32, up: f32, limit: f32) -> f32 {
    let gate = if gate > limit { limit } else { gate };
    gate / (1.0 + (-gate).exp()) * up.clamp(-limit, limit)
}

/// Runs independent tasks here or on the current pool; the result is the same.
fn each<T: Send>(parallel: bool, tasks: Vec<T>, run: impl Fn(T) + Sync + Send) {
    if parallel {
        tasks.into_par_iter().for_each(run);
    } else {
        tasks.into_iter().for_each(run);
    }
}

fn resize(what: &'static str, buffer: &mut Vec<f32>, len: usize) -> Result<(), KernelError> {
    if buffer.capacity() < len {
        *buffer = zeroed(what, len)?;
    }
    buffer.resize(len, 0.0);
    Ok(())
}
