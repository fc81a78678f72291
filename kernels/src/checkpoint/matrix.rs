//! From a tensor and its scale companion to a checked matrix.
//!
//! The stored format follows from dtypes and shapes alone (table E of the tensor facts): nothing is guessed from a
//! model's name. Scale blocks are told apart by the scale's shape, which is unambiguous for the published sizes.

use super::Checkpoint;
use super::error::CheckpointError;
use super::header::{Dtype, Entry};
use super::shard::Shard;
use crate::format::codes::{bf16_to_f32, e4m3_to_f32, e8m0_to_f32};
use crate::format::{ScaleType, StoredFormat, StoredMatrix};
use crate::num::f32_near;

impl Checkpoint {
    /// A tensor of any float type, widened to `f32` (F64 is rounded), flattened row-major. Scales are not applied.
    ///
    /// # Errors
    /// `Missing`, `Dtype` for integers, or a read error.
    pub fn vector(&self, name: &str) -> Result<Vec<f32>, CheckpointError> {
        let (shard, entry) = self.find(name)?;
        if !matches!(entry.dtype, Dtype::F32 | Dtype::Bf16 | Dtype::F16 | Dtype::F64 | Dtype::F8E4m3 | Dtype::F8E8m0) {
            return Err(dtype_error(shard, name, entry, "a float type"));
        }
        widen(shard, name, entry)
    }

    /// A tensor of any integer type (or bool), flattened row-major.
    ///
    /// # Errors
    /// `Missing`, `Dtype` for floats, `Header` for a U64 value beyond `i64`, or a read error.
    pub fn ints(&self, name: &str) -> Result<Vec<i64>, CheckpointError> {
        let (shard, entry) = self.find(name)?;
        let expected = "an integer type";
        let width = match entry.dtype {
            Dtype::Bool | Dtype::U8 | Dtype::I8 => 1,
            Dtype::U16 | Dtype::I16 => 2,
            Dtype::U32 | Dtype::I32 => 4,
            Dtype::U64 | Dtype::I64 => 8,
            _ => return Err(dtype_error(shard, name, entry, expected)),
        };
        let bytes = shard.read(name, entry)?;
        let mut out = Vec::with_capacity(bytes.len() / width);
        for chunk in bytes.chunks_exact(width) {
            let signed = matches!(entry.dtype, Dtype::I8 | Dtype::I16 | Dtype::I32 | Dtype::I64);
            let negative = signed && chunk.last().is_some_and(|top| top & 0x80 != 0);
            let mut wide = [if negative { 0xff } else { 0 }; 8];
            wide[..width].copy_from_slice(chunk);
            let value = i64::from_le_bytes(wide);
            if value < 0 && !signed {
                let problem = format!("tensor {name} has a value beyond 2^63");
                return Err(CheckpointError::Header { path: shard.path().to_owned(), problem });
            }
            out.push(value);
        }
        Ok(out)
    }

    /// A matrix of `rows` output and `cols` input features, with its scales if it has any.
    ///
    /// `name` is the tensor's (`….weight`) or its prefix. Scales are `….weight_scale_inv`, `….scale` or `….weight_scale`.
    ///
    /// # Errors
    /// `Missing` for the tensor or its scales, `Dtype`, `Shape` for either, or a read error.
    pub fn matrix(&self, name: &str, rows: usize, cols: usize) -> Result<StoredMatrix, CheckpointError> {
        let full = format!("{name}.weight");
        let name = if !self.has(name) && self.has(&full) { full.as_str() } else { name };
        let (shard, entry) = self.find(name)?;
        let packed = cols.div_ceil(2);
        let shape = entry.shape.as_slice();
        let shape_error = || bad_shape(shard, name, shape, format!("[{rows}, {cols}]"));
        let plain = || if shape == [rows, cols] { Ok(()) } else { Err(shape_error()) };
        let (format, scales) = match entry.dtype {
            Dtype::F32 | Dtype::F16 | Dtype::F64 => {
                plain()?;
                let values = widen(shard, name, entry)?;
                return StoredMatrix::from_f32(rows, cols, &values).map_err(|_| shape_error());
            }
            Dtype::Bf16 => plain().map(|()| (StoredFormat::Bf16, Vec::new()))?,
            Dtype::F8E4m3 => {
                plain()?;
                self.fp8_scales(name, rows, cols)?
            }
            Dtype::F4 => {
                plain()?;
                (StoredFormat::Mxfp4, self.mx_scales(name, rows, cols)?)
            }
            Dtype::I8 | Dtype::U8 => {
                let (scale_shard, scale_name, scale) = self.scale_of(name)?;
                match scale.dtype {
                    Dtype::F8E8m0 if shape == [rows, packed] => {
                        (StoredFormat::Mxfp4, self.mx_scales(name, rows, cols)?)
                    }
                    Dtype::F32 | Dtype::Bf16 | Dtype::F16 if shape == [rows, cols] || shape == [rows, packed] => {
                        let whole = shape == [rows, cols] && is_per_row(&scale.shape, rows);
                        let grouped = [rows, cols.div_ceil(32)];
                        if !whole && (shape != [rows, packed] || scale.shape != grouped) {
                            let expected = format!("[{rows}] (int8) or {grouped:?} (int4)");
                            return Err(bad_shape(scale_shard, &scale_name, &scale.shape, expected));
                        }
                        let format = if whole { StoredFormat::Int8PerRow } else { StoredFormat::Int4Group32 };
                        (format, f32_bytes(&widen(scale_shard, &scale_name, scale)?))
                    }
                    Dtype::F8E8m0 | Dtype::F32 | Dtype::Bf16 | Dtype::F16 => {
                        let expected = format!("[{rows}, {packed}] (two values a byte) or [{rows}, {cols}]");
                        return Err(bad_shape(shard, name, shape, expected));
                    }
                    _ => return Err(dtype_error(scale_shard, &scale_name, scale, "F8_E8M0 or F32")),
                }
            }
            _ => return Err(dtype_error(shard, name, entry, "F32, BF16, F16, F8_E4M3, F4 or I8")),
        };
        let data = shard.read(name, entry)?;
        StoredMatrix::new(rows, cols, format, data, scales).map_err(|_| shape_error())
    }

    /// Format and bytes of E4M3 scales; the block is the published one whose grid the scale has.
    fn fp8_scales(&self, name: &str, rows: usize, cols: usize) -> Result<(StoredFormat, Vec<u8>), CheckpointError> {
        let (shard, scale_name, scale) = self.scale_of(name)?;
        let mut candidates = vec![[128, 128], [32, 32], [1, 128], [1, cols.max(1)], [rows.max(1), cols.max(1)]];
        candidates.extend(self.configured_block());
        let fits = |b: &[usize; 2]| {
            let grid = [rows.div_ceil(b[0]), cols.div_ceil(b[1])];
            scale.shape == grid
                || (grid[1] == 1 && scale.shape == [grid[0]])
                || (grid == [1, 1] && scale.shape.is_empty())
        };
        let Some(&block) = candidates.iter().find(|b| fits(b)) else {
            let [a, b] = [32, 128].map(|n| format!("[{}, {}]", rows.div_ceil(n), cols.div_ceil(n)));
            return Err(bad_shape(
                shard,
                &scale_name,
                &scale.shape,
                format!("{b} (blocks of 128) or {a} (blocks of 32)"),
            ));
        };
        let (kind, bytes) = match scale.dtype {
            Dtype::F8E8m0 => (ScaleType::E8m0, shard.read(&scale_name, scale)?),
            Dtype::F32 | Dtype::Bf16 => (ScaleType::F32, f32_bytes(&widen(shard, &scale_name, scale)?)),
            _ => return Err(dtype_error(shard, &scale_name, scale, "F32 or F8_E8M0")),
        };
        Ok((StoredFormat::Fp8E4m3 { block, scale: kind }, bytes))
    }

    /// `quantization_config.weight_block_size` of config.json.
    fn configured_block(&self) -> Option<[usize; 2]> {
        let size = self.config.get("quantization_config")?.get("weight_block_size")?.as_array()?;
        let [a, b] = size.as_slice() else { return None };
        let side = |v: &serde_json::Value| v.as_u64().and_then(|n| usize::try_from(n).ok()).filter(|&n| n > 0);
        Some([side(a)?, side(b)?])
    }

    fn mx_scales(&self, name: &str, rows: usize, cols: usize) -> Result<Vec<u8>, CheckpointError> {
        let (shard, scale_name, scale) = self.scale_of(name)?;
        if !matches!(scale.dtype, Dtype::F8E8m0 | Dtype::U8) {
            return Err(dtype_error(shard, &scale_name, scale, "F8_E8M0"));
        }
        let expected = [rows, cols.div_ceil(32)];
        if scale.shape != expected {
            return Err(bad_shape(
                shard,
                &scale_name,
                &scale.shape,
                format!("{expected:?} (one per row and 32 columns)"),
            ));
        }
        shard.read(&scale_name, scale)
    }

    fn scale_of(&self, name: &str) -> Result<(&Shard, String, &Entry), CheckpointError> {
        let base = name.strip_suffix(".weight").unwrap_or(name);
        let names = [format!("{name}_scale_inv"), format!("{base}.scale"), format!("{name}_scale")];
        for candidate in &names {
            if self.has(candidate) {
                let (shard, entry) = self.find(candidate)?;
                return Ok((shard, candidate.clone(), entry));
            }
        }
        Err(self.missing(format!("{} (or {}), the scale of {name},", names[0], names[1])))
    }
}

fn is_per_row(shape: &[usize], rows: usize) -> bool {
    shape == [rows] || shape == [rows, 1]
}

fn f32_bytes(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|v| v.to_le_bytes()).collect()
}

fn widen(shard: &Shard, name: &str, entry: &Entry) -> Result<Vec<f32>, CheckpointError> {
    let bytes = shard.read(name, entry)?;
    Ok(match entry.dtype {
        Dtype::F32 => bytes.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect(),
        Dtype::F64 => bytes.as_chunks::<8>().0.iter().map(|b| f32_near(f64::from_le_bytes(*b))).collect(),
        Dtype::F16 => bytes.as_chunks::<2>().0.iter().map(|b| half::f16::from_le_bytes(*b).to_f32()).collect(),
        Dtype::Bf16 => bytes.as_chunks::<2>().0.iter().map(|b| bf16_to_f32(u16::from_le_bytes(*b))).collect(),
        Dtype::F8E8m0 => bytes.iter().map(|&b| e8m0_to_f32(b)).collect(),
        _ => bytes.iter().map(|&b| e4m3_to_f32(b)).collect(),
    })
}

fn dtype_error(shard: &Shard, tensor: &str, entry: &Entry, expected: &'static str) -> CheckpointError {
    let (path, found) = (shard.path().to_owned(), entry.dtype.to_string());
    CheckpointError::Dtype { path, tensor: tensor.to_owned(), found, expected }
}

fn bad_shape(shard: &Shard, tensor: &str, found: &[usize], expected: String) -> CheckpointError {
    CheckpointError::Shape { path: shard.path().to_owned(), tensor: tensor.to_owned(), found: found.to_vec(), expected }
}
