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
        let tile_bytes = self.tile_bytes();
        let row_bytes = tile_bytes / LANES;
        let rows = stored.data().chunks(LANES * row_bytes);
        for (tile, rows) in self.data.chunks_exact_mut(tile_bytes).zip(rows) {
            match self.codes {
                Codes::F32 => interleave_tile::<4>(rows, row_bytes, tile),
                Codes::Bf16 => interleave_tile::<2>(rows, row_bytes, tile),
                _ => interleave_tile::<1>(rows, row_bytes, tile),
            }
        }
    }
}

/// Up to 32 rows of units into [columns × 32 lanes], in runs of columns whose target stays in the first-level cache.
fn interleave_tile<const UNIT: usize>(rows: &[u8], row_bytes: usize, tile: &mut [u8]) {
    const RUN: usize = 64;
    let columns = tile.as_chunks_mut::<UNIT>().0;
    for (run, columns) in columns.chunks_mut(RUN * LANES).enumerate() {
        for (lane, row) in rows.chunks_exact(row_bytes).enumerate() {
            let units = &row.as_chunks::<UNIT>().0[run * RUN..];
            for (column, unit) in columns.as_chunks_mut::<LANES>().0.iter_mut().zip(units) {
                column[lane] = *unit;
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

#[cfg(test)]
mod tests {
    use super::super::simd::Level;
    use super::*;
    use crate::format::ScaleType;
    use proptest::prelude::*;

    fn any_format() -> impl Strategy<Value = StoredFormat> {
        let scale = prop_oneof![Just(ScaleType::F32), Just(ScaleType::E8m0)];
        let side = prop_oneof![Just(128usize), Just(32), 1usize..70];
        prop_oneof![
            Just(StoredFormat::F32),
            Just(StoredFormat::Bf16),
            Just(StoredFormat::Mxfp4),
            Just(StoredFormat::Int8PerRow),
            Just(StoredFormat::Int4Group32),
            (side.clone(), side, scale).prop_map(|(a, b, scale)| StoredFormat::Fp8E4m3 { block: [a, b], scale }),
        ]
    }

    fn any_matrix() -> impl Strategy<Value = StoredMatrix> {
        (any_format(), 1usize..80, 1usize..300, any::<u64>()).prop_map(|(format, rows, cols, seed)| {
            let mut random = crate::bench::Random(seed);
            let (data, scales) = format.sizes(rows, cols).unwrap();
            let mut bytes = |n: usize| (0..n).map(|_| random.next().to_le_bytes()[3]).collect::<Vec<u8>>();
            let scales = bytes(scales);
            StoredMatrix::new(rows, cols, format, bytes(data), scales).unwrap()
        })
    }

    /// The whole matrix through the packed form, row-major.
    fn unpack(matrix: &PackedMatrix, level: Level) -> Vec<f32> {
        let simd = Simd::at_most(level);
        let mut out = vec![0.0; matrix.rows() * matrix.cols()];
        for tile in 0..matrix.tiles() {
            for start in (0..matrix.cols()).step_by(CHUNK) {
                let end = matrix.cols().min(start + CHUNK);
                let mut chunk = vec![0.0; (end - start) * LANES];
                matrix.decode(simd, tile, start, end, &mut chunk);
                for (i, &value) in chunk.iter().enumerate() {
                    let (row, col) = (tile * LANES + i % LANES, start + i / LANES);
                    if row < matrix.rows() {
                        out[row * matrix.cols() + col] = value;
                    }
                }
            }
        }
        out
    }

    fn assert_same(got: &[f32], expected: &[f32]) {
        for (i, (a, b)) in got.iter().zip(expected).enumerate() {
            assert!(a == b || (a.is_nan() && b.is_nan()), "element {i}: {a} is not {b}");
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 300, failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn unpacking_what_was_packed_gives_every_value_at_every_level(stored in any_matrix()) {
            let packed = PackedMatrix::pack(&stored).unwrap();
            for level in Level::supported() {
                assert_same(&unpack(&packed, level), &stored.dequantise());
            }
        }
    }

    #[test]
    fn every_code_of_every_format_is_decoded_exactly() {
        let codes: Vec<u8> = (0..=255).collect();
        let block = |scale| StoredFormat::Fp8E4m3 { block: [1, 256], scale };
        let cases = [
            (block(ScaleType::F32), 256, 3.7f32.to_le_bytes().to_vec()),
            (block(ScaleType::E8m0), 256, vec![0]),
            (StoredFormat::Int8PerRow, 256, 0.013f32.to_le_bytes().to_vec()),
            (StoredFormat::Mxfp4, 512, (0..16).collect()),
            (StoredFormat::Int4Group32, 512, 0.3f32.to_le_bytes().repeat(16)),
        ];
        for (format, cols, scales) in cases {
            let stored = StoredMatrix::new(1, cols, format, codes.clone(), scales).unwrap();
            let packed = PackedMatrix::pack(&stored).unwrap();
            for level in Level::supported() {
                assert_same(&unpack(&packed, level), &stored.dequantise());
            }
        }
    }

    #[test]
    fn packed_formats_keep_their_size() {
        let bytes = |format: StoredFormat| {
            let (data, scales) = format.sizes(128, 256).unwrap();
            PackedMatrix::pack(&StoredMatrix::new(128, 256, format, vec![0; data], vec![0; scales]).unwrap())
                .unwrap()
                .bytes()
        };
        assert_eq!(bytes(StoredFormat::Bf16), 2 * 128 * 256);
        assert_eq!(bytes(StoredFormat::Mxfp4), 128 * 256 / 2 + 128 * 8);
        let fp8 = StoredFormat::Fp8E4m3 { block: [128, 128], scale: ScaleType::E8m0 };
        assert_eq!(bytes(fp8), 128 * 256 + 4 * 2 * 4);
    }
}
