//! A weight matrix in the CPU's layout: tiles of 32 output rows, columns in order, codes still in their stored format.
//!
//! Layout of tile i, column k: 32 codes, lane r = row 32·i + r (absent rows are zero). Nibble formats hold two columns a
//! byte. Tiles are contiguous, so a forward reads memory in order. Nothing here is expanded but one chunk of one tile.

use super::simd::{LANES, Lane, Simd};
use crate::error::{KernelError, zeroed};
use crate::format::codes::{e8m0_to_f32, int4_to_i8};
use crate::format::{StoredFormat, StoredMatrix};
use crate::num::u64_of;

/// Columns decoded at a time: 128 × 32 floats stay in the first-level cache.
pub(crate) const CHUNK: usize = 128;

/// How codes are laid out and read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Codes {
    F32,
    Bf16,
    E4m3 {
        nan: bool,
    },
    Int8,
    /// Twice the E2M1 value, so that it is an integer; scales are halved to match. Exact.
    E2m1,
    Int4,
}

/// Scales of one tile.
#[derive(Debug)]
enum Scales {
    None,
    /// One for all lanes and `block` columns: [tiles × blocks].
    Tile {
        block: usize,
        values: Vec<f32>,
    },
    /// One per lane and `block` columns: [tiles × blocks × 32].
    Lanes {
        block: usize,
        values: Vec<f32>,
    },
    /// E8M0 per lane and 32 columns: [tiles × blocks × 32].
    E8m0 {
        codes: Vec<u8>,
    },
}

const E2M1_TWICE: [i8; 16] = [0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12];

/// A packed matrix.
#[derive(Debug)]
pub(crate) struct PackedMatrix {
    rows: usize,
    cols: usize,
    codes: Codes,
    data: Vec<u8>,
    scales: Scales,
}

impl PackedMatrix {
    /// Copies a stored matrix into tiles.
    pub(crate) fn pack(stored: &StoredMatrix) -> Result<Self, KernelError> {
        let codes = match stored.format() {
            StoredFormat::F32 => Codes::F32,
            StoredFormat::Bf16 => Codes::Bf16,
            StoredFormat::Fp8E4m3 { .. } => Codes::E4m3 { nan: stored.data().iter().any(|c| c & 0x7f == 0x7f) },
            StoredFormat::Int8PerRow => Codes::Int8,
            StoredFormat::Mxfp4 => Codes::E2m1,
            StoredFormat::Int4Group32 => Codes::Int4,
        };
        let (rows, cols) = (stored.rows(), stored.cols());
        let mut packed = Self { rows, cols, codes, data: Vec::new(), scales: Scales::None };
        packed.data = zeroed("packed weights", packed.tiles().saturating_mul(packed.tile_bytes()))?;
        packed.scales = pack_scales(stored, packed.tiles())?;
        packed.interleave(stored);
        Ok(packed)
    }

    pub(crate) fn rows(&self) -> usize {
        self.rows
    }

    pub(crate) fn cols(&self) -> usize {
        self.cols
    }

    /// Tiles of 32 rows; the last may be partial.
    pub(crate) fn tiles(&self) -> usize {
        self.rows.div_ceil(LANES)
    }

    /// Bytes held.
    pub(crate) fn bytes(&self) -> u64 {
        let scales = match &self.scales {
            Scales::None => 0,
            Scales::Tile { values, .. } | Scales::Lanes { values, .. } => values.len() * 4,
            Scales::E8m0 { codes } => codes.len(),
        };
        u64_of(self.data.len() + scales)
    }

    /// Columns `start..end` of a tile into `out` ([(end - start) × 32]); `start` is a multiple of [`CHUNK`].
    pub(crate) fn decode(&self, simd: Simd, tile: usize, start: usize, end: usize, out: &mut [f32]) {
        let step = match &self.scales {
            Scales::None => CHUNK,
            Scales::Tile { block, .. } | Scales::Lanes { block, .. } => *block,
            Scales::E8m0 { .. } => 32,
        };
        let data = &self.data[tile * self.tile_bytes()..][..self.tile_bytes()];
        let mut from = start;
        while from < end {
            let to = end.min((from / step + 1) * step);
            let scale = self.scale(tile, from / step);
            let out = &mut out[(from - start) * LANES..(to - start) * LANES];
            self.decode_run(simd, data, from, to, &scale, out);
            from = to;
        }
    }

    fn decode_run(&self, simd: Simd, data: &[u8], from: usize, to: usize, scale: &Lane, out: &mut [f32]) {
        let run = |bytes: usize| &data[from * LANES * bytes..to * LANES * bytes];
        let pairs = || &data[from / 2 * LANES..to.div_ceil(2) * LANES];
        match self.codes {
            Codes::F32 => decode_f32(run(4), out),
            Codes::Bf16 => simd.decode_bf16(run(2), out),
            Codes::E4m3 { nan } => simd.decode_e4m3(run(1), scale, nan, out),
            Codes::Int8 => simd.decode_int8(run(1), scale, out),
            Codes::E2m1 => simd.decode_nibbles(pairs(), &E2M1_TWICE, scale, out),
            Codes::Int4 => simd.decode_nibbles(pairs(), &int4_table(), scale, out),
        }
    }

    fn scale(&self, tile: usize, index: usize) -> Lane {
        match &self.scales {
            Scales::None => [1.0; LANES],
            Scales::Tile { block, values } => [values[tile * self.cols.div_ceil(*block) + index]; LANES],
            Scales::Lanes { block, values } => values.as_chunks::<LANES>().0[tile * self.cols.div_ceil(*block) + index],
            Scales::E8m0 { codes } => {
                codes.as_chunks::<LANES>().0[tile * self.cols.div_ceil(32) + index].map(|c| e8m0_to_f32(c) * 0.5)
            }
        }
    }

    fn tile_bytes(&self) -> usize {
        LANES
            * match self.codes {
                Codes::F32 => 4 * self.cols,
                Codes::Bf16 => 2 * self.cols,
                Codes::E4m3 { .. } | Codes::Int8 => self.cols,
                Codes::E2m1 | Codes::Int4 => self.cols.div_ceil(2),
            }
    }

    /// Moves rows into lanes. A unit is what one stored row keeps together: a value, or a byte of two nibbles.
    fn interleave(&mut self, stored: &StoredMatrix) {
        let unit = match self.codes {
            Codes::F32 => 4,
            Codes::Bf16 => 2,
            _ => 1,
        };
        let tile_bytes = self.tile_bytes();
        let row_bytes = tile_bytes / LANES;
        for (row, codes) in stored.data().chunks_exact(row_bytes).enumerate() {
            let tile = &mut self.data[row / LANES * tile_bytes..][..tile_bytes];
            for (column, code) in tile.chunks_exact_mut(LANES * unit).zip(codes.chunks_exact(unit)) {
                column[row % LANES * unit..][..unit].copy_from_slice(code);
            }
        }
    }
}

/// Scales in tile order; absent rows of the last tile scale by zero.
fn pack_scales(stored: &StoredMatrix, tiles: usize) -> Result<Scales, KernelError> {
    let Some(([block_rows, block], _)) = stored.format().scale_block(stored.cols()) else {
        return Ok(Scales::None);
    };
    let block = block.min(stored.cols());
    let blocks = stored.cols().div_ceil(block);
    let per_lane = |tile: usize, index: usize, lane: usize| {
        let row = tile * LANES + lane;
        if row < stored.rows() { stored.scale_at(row, index * block) } else { 0.0 }
    };
    if stored.format() == StoredFormat::Mxfp4 {
        let mut codes: Vec<u8> = zeroed("packed scales", tiles * blocks * LANES)?;
        for (row, scales) in stored.scales().chunks_exact(blocks).enumerate() {
            for (index, &scale) in scales.iter().enumerate() {
                codes[(row / LANES * blocks + index) * LANES + row % LANES] = scale;
            }
        }
        return Ok(Scales::E8m0 { codes });
    }
    let shared = block_rows % LANES == 0 || block_rows >= stored.rows();
    let lanes = if shared { 1 } else { LANES };
    let mut values: Vec<f32> = zeroed("packed scales", tiles * blocks * lanes)?;
    for (i, value) in values.iter_mut().enumerate() {
        let (tile, index, lane) = (i / lanes / blocks, i / lanes % blocks, i % lanes);
        *value = per_lane(tile, index, lane);
    }
    Ok(if shared { Scales::Tile { block, values } } else { Scales::Lanes { block, values } })
}

fn decode_f32(codes: &[u8], out: &mut [f32]) {
    for (out, &code) in out.iter_mut().zip(codes.as_chunks::<4>().0) {
        *out = f32::from_le_bytes(code);
    }
}

fn int4_table() -> [i8; 16] {
    [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15].map(int4_to_i8)
}
