//! Weights as checkpoints store them, and what each code means as a number.
//!
//! A `StoredMatrix` is checked once, when it is made; nothing here expands a whole matrix unless asked to, and
//! nothing here rounds: every value is the stored code times its scale, computed once in `f32`.

pub mod codes;
mod convert;

use crate::error::{KernelError, check_len};
use codes::{bf16_to_f32, e2m1_to_f32, e4m3_to_f32, e8m0_to_f32, int4_to_i8};

/// How a matrix is stored. Rows are output features, columns input features, row-major.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StoredFormat {
    /// Little-endian IEEE single precision.
    F32,
    /// Little-endian bfloat16.
    Bf16,
    /// One byte a value, one scale per `block[0]` rows × `block[1]` columns (row-major over blocks; the last may be partial).
    Fp8E4m3 {
        /// Rows and columns of one block.
        block: [usize; 2],
        /// How scales are stored.
        scale: ScaleType,
    },
    /// Two E2M1 values a byte (low nibble = lower column), one E8M0 scale per row and 32 columns.
    Mxfp4,
    /// One signed byte a value, one `f32` scale per row.
    Int8PerRow,
    /// Two signed nibbles a byte (low nibble = lower column), one `f32` scale per row and 32 columns.
    Int4Group32,
}

/// How block scales are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ScaleType {
    /// Little-endian `f32`.
    F32,
    /// One E8M0 byte: a power of two.
    E8m0,
}

impl ScaleType {
    /// Bytes of one scale.
    pub fn bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::E8m0 => 1,
        }
    }
}

impl StoredFormat {
    /// Rows and columns that share one scale, or `None` for formats without scales.
    pub fn scale_block(self, cols: usize) -> Option<([usize; 2], ScaleType)> {
        match self {
            Self::F32 | Self::Bf16 => None,
            Self::Fp8E4m3 { block, scale } => Some((block, scale)),
            Self::Mxfp4 => Some(([1, 32], ScaleType::E8m0)),
            Self::Int8PerRow => Some(([1, cols.max(1)], ScaleType::F32)),
            Self::Int4Group32 => Some(([1, 32], ScaleType::F32)),
        }
    }

    /// Bytes of one stored row, without scales; `None` if it does not fit the address space.
    pub fn row_bytes(self, cols: usize) -> Option<usize> {
        match self {
            Self::F32 => cols.checked_mul(4),
            Self::Bf16 => cols.checked_mul(2),
            Self::Fp8E4m3 { .. } | Self::Int8PerRow => Some(cols),
            Self::Mxfp4 | Self::Int4Group32 => Some(cols.div_ceil(2)),
        }
    }

    /// Bytes of data and of scales of a whole matrix; `None` on overflow or an empty block.
    pub fn sizes(self, rows: usize, cols: usize) -> Option<(usize, usize)> {
        let data = rows.checked_mul(self.row_bytes(cols)?)?;
        let scales = match self.scale_block(cols) {
            None => 0,
            Some(([0, _] | [_, 0], _)) => return None,
            Some(([br, bc], kind)) => rows.div_ceil(br).checked_mul(cols.div_ceil(bc))?.checked_mul(kind.bytes())?,
        };
        Some((data, scales))
    }
}

/// One weight matrix as in the checkpoint, owned.
#[derive(Clone, PartialEq)]
pub struct StoredMatrix {
    rows: usize,
    cols: usize,
    format: StoredFormat,
    data: Vec<u8>,
    scales: Vec<u8>,
}

impl std::fmt::Debug for StoredMatrix {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "StoredMatrix {{ {}×{}, {:?}, {} bytes }}", self.rows, self.cols, self.format, self.bytes())
    }
}

impl StoredMatrix {
    /// Takes the bytes of a matrix and of its scales.
    ///
    /// # Errors
    /// `Invalid` if a size is zero or overflows, `Length` if `data` or `scales` are not exactly as long as the format says.
    pub fn new(
        rows: usize,
        cols: usize,
        format: StoredFormat,
        data: Vec<u8>,
        scales: Vec<u8>,
    ) -> Result<Self, KernelError> {
        if rows == 0 || cols == 0 {
            return Err(KernelError::invalid(
                "matrix",
                format!("{rows}×{cols} is empty: give at least one row and column"),
            ));
        }
        let Some((data_len, scale_len)) = format.sizes(rows, cols) else {
            return Err(KernelError::invalid(
                "matrix",
                format!("{rows}×{cols} as {format:?} does not fit memory: check its shape"),
            ));
        };
        check_len("data", data.len(), data_len, || format!("{rows}×{cols} as {format:?}"))?;
        check_len("scales", scales.len(), scale_len, || format!("bytes of {rows}×{cols} as {format:?}"))?;
        Ok(Self { rows, cols, format, data, scales })
    }

    /// Stores `values` (row-major, rows × cols) as `f32`.
    ///
    /// # Errors
    /// As [`StoredMatrix::new`].
    pub fn from_f32(rows: usize, cols: usize, values: &[f32]) -> Result<Self, KernelError> {
        let data = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        Self::new(rows, cols, StoredFormat::F32, data, Vec::new())
    }

    /// Output features.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Input features.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// How it is stored.
    pub fn format(&self) -> StoredFormat {
        self.format
    }

    /// The codes, row-major.
    pub fn data(&self) -> &[u8] {
        &self.data
    }

    /// The scales, row-major over blocks.
    pub fn scales(&self) -> &[u8] {
        &self.scales
    }

    /// Bytes of codes and scales.
    pub fn bytes(&self) -> usize {
        self.data.len() + self.scales.len()
    }

    /// The scale of one element; 1 for formats without scales, and for positions outside the matrix.
    pub fn scale_at(&self, row: usize, col: usize) -> f32 {
        let Some(([br, bc], kind)) = self.format.scale_block(self.cols) else {
            return 1.0;
        };
        let index = (row / br) * self.cols.div_ceil(bc) + col / bc;
        match kind {
            ScaleType::E8m0 => self.scales.get(index).map_or(1.0, |&code| e8m0_to_f32(code)),
            ScaleType::F32 => read_f32(&self.scales, index),
        }
    }

    /// The unscaled code of one element as a number. Exact.
    pub fn code_at(&self, row: usize, col: usize) -> f32 {
        let byte = |index: usize| self.data.get(index).copied().unwrap_or(0);
        let at = row * self.cols + col;
        let nibble = || {
            let byte = byte(row * self.cols.div_ceil(2) + col / 2);
            if col.is_multiple_of(2) { byte & 0xf } else { byte >> 4 }
        };
        match self.format {
            StoredFormat::F32 => read_f32(&self.data, at),
            StoredFormat::Bf16 => bf16_to_f32(u16::from_le_bytes([byte(2 * at), byte(2 * at + 1)])),
            StoredFormat::Fp8E4m3 { .. } => e4m3_to_f32(byte(at)),
            StoredFormat::Int8PerRow => f32::from(crate::num::signed(byte(at))),
            StoredFormat::Mxfp4 => e2m1_to_f32(nibble()),
            StoredFormat::Int4Group32 => f32::from(int4_to_i8(nibble())),
        }
    }

    /// Rows `start .. start + count` as a matrix of their own, with the same values. Stored as it is where the cut lies
    /// between scale blocks, as `f32` where it goes through one.
    ///
    /// # Errors
    /// `Invalid` if there are no such rows.
    pub fn slice_rows(&self, start: usize, count: usize) -> Result<Self, KernelError> {
        let end = start.checked_add(count).filter(|&end| count > 0 && end <= self.rows).ok_or_else(|| {
            KernelError::invalid("rows", format!("{start} and {count} more are not within {}: take fewer", self.rows))
        })?;
        let whole =
            |line: usize| self.format.scale_block(self.cols).is_none_or(|([block, _], _)| line.is_multiple_of(block));
        let (Some(bytes), true) = (self.format.row_bytes(self.cols), whole(start) && (end == self.rows || whole(end)))
        else {
            let value = |at: usize| {
                self.code_at(at / self.cols, at % self.cols) * self.scale_at(at / self.cols, at % self.cols)
            };
            let values: Vec<f32> = (start * self.cols..end * self.cols).map(value).collect();
            return Self::from_f32(count, self.cols, &values);
        };
        let scales = match self.format.scale_block(self.cols) {
            None => Vec::new(),
            Some(([rows, cols], kind)) => {
                let line = self.cols.div_ceil(cols) * kind.bytes();
                self.scales[start / rows * line..end.div_ceil(rows) * line].to_vec()
            }
        };
        Self::new(count, self.cols, self.format, self.data[start * bytes..end * bytes].to_vec(), scales)
    }

    /// Expands the whole matrix to `f32`, row-major. For tests, small matrices and formats without a packed form.
    pub fn dequantise(&self) -> Vec<f32> {
        let mut out = Vec::with_capacity(self.rows * self.cols);
        for row in 0..self.rows {
            out.extend((0..self.cols).map(|col| self.code_at(row, col) * self.scale_at(row, col)));
        }
        out
    }
}

/// Reads the `index`-th little-endian `f32`; positions outside are 1, which only a caller outside its matrix sees.
fn read_f32(bytes: &[u8], index: usize) -> f32 {
    match bytes.get(4 * index..4 * index + 4) {
        Some(&[a, b, c, d]) => f32::from_le_bytes([a, b, c, d]),
        _ => 1.0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn partial_blocks_have_their_own_scales() {
        let format = StoredFormat::Fp8E4m3 { block: [128, 128], scale: ScaleType::E8m0 };
        assert_eq!(format.sizes(130, 257), Some((130 * 257, 2 * 3)));
        let mut scales = vec![127u8; 6];
        scales[5] = 129;
        let m = StoredMatrix::new(130, 257, format, vec![0x38; 130 * 257], scales).unwrap();
        assert_eq!(m.scale_at(127, 256), 1.0);
        assert_eq!(m.scale_at(128, 256) * m.code_at(128, 256), 4.0);
    }

    #[test]
    fn wrong_lengths_are_refused_with_both_numbers() {
        let error = StoredMatrix::new(2, 32, StoredFormat::Mxfp4, vec![0; 32], vec![127]).unwrap_err();
        assert_eq!(
            error.to_string(),
            "scales has 1 elements, expected 2 (bytes of 2×32 as Mxfp4): pass a buffer of that length"
        );
        assert!(StoredMatrix::new(0, 3, StoredFormat::F32, vec![], vec![]).is_err());
        assert!(StoredMatrix::new(usize::MAX, 3, StoredFormat::F32, vec![], vec![]).is_err());
        let hollow = StoredFormat::Fp8E4m3 { block: [0, 4], scale: ScaleType::F32 };
        assert!(StoredMatrix::new(2, 2, hollow, vec![0; 4], vec![]).is_err());
    }

    #[test]
    fn rows_cut_between_and_through_scale_blocks_keep_their_values() {
        let format = StoredFormat::Fp8E4m3 { block: [2, 3], scale: ScaleType::E8m0 };
        let m = StoredMatrix::new(5, 4, format, (0x30..0x44).collect(), vec![127, 128, 129, 126, 125, 130]).unwrap();
        let all = m.dequantise();
        for (start, count, stored) in
            [(0, 2, true), (2, 3, true), (4, 1, true), (1, 2, false), (0, 5, true), (2, 1, false)]
        {
            let cut = m.slice_rows(start, count).unwrap();
            assert_eq!(cut.dequantise(), all[start * 4..(start + count) * 4]);
            assert_eq!(cut.format() == format, stored, "{start} {count}");
        }
        assert!(m.slice_rows(3, 3).is_err() && m.slice_rows(0, 0).is_err() && m.slice_rows(usize::MAX, 2).is_err());
    }

    #[test]
    fn low_nibble_is_the_lower_column() {
        let m = StoredMatrix::new(1, 2, StoredFormat::Mxfp4, vec![0x72], vec![128]).unwrap();
        assert_eq!(m.dequantise(), [2.0, 12.0]);
        let m = StoredMatrix::new(1, 2, StoredFormat::Int4Group32, vec![0xf7], 0.5f32.to_le_bytes().to_vec()).unwrap();
        assert_eq!(m.dequantise(), [3.5, -0.5]);
    }
}
