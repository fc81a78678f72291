//! One format into another, for a device that cannot compute with what the checkpoint stores.
//!
//! Two targets have a conversion. bfloat16 rounds to nearest even, and is exact for MXFP4 and for FP8 with power-of-two
//! scales, but where a product leaves bfloat16's normal range. Int8 takes one scale a row, the row's largest magnitude
//! ÷ 127, and rounds to nearest even: the symmetric per-channel scheme of Ascend's W8A8 checkpoints (Xiao et al.,
//! SmoothQuant, arXiv 2211.10438, equation 1). Anything else would guess at a calibration, so it is refused.

use std::borrow::Cow;

use berth_types::WeightFormat;

use super::{ScaleType, StoredFormat, StoredMatrix};
use crate::{
    backend::StoredExpert,
    error::KernelError,
    num::{byte_of, f32_to_i8},
};

/// Largest code of symmetric int8: -128 is left out, so that a matrix and its negative round alike.
const INT8_MOST: f32 = 127.0;

impl StoredFormat {
    /// Whether a matrix stored so is what `wanted` names. `int4_group32_bf16` has bfloat16 scales, which no
    /// stored format here keeps, so it is never met.
    #[must_use]
    pub fn is(self, wanted: WeightFormat) -> bool {
        let fp8 = |side, scale| Self::Fp8E4m3 { block: [side, side], scale };
        match wanted {
            WeightFormat::Bf16 => self == Self::Bf16,
            WeightFormat::Fp8Block128F32 => self == fp8(128, ScaleType::F32),
            WeightFormat::Fp8Block128Ue8m0 => self == fp8(128, ScaleType::E8m0),
            WeightFormat::Fp8Block32Ue8m0 => self == fp8(32, ScaleType::E8m0),
            WeightFormat::Mxfp4 => self == Self::Mxfp4,
            WeightFormat::Int8PerRow => self == Self::Int8PerRow,
            WeightFormat::Int4Group32 => false,
        }
    }
}

impl StoredMatrix {
    /// This matrix in `wanted`: itself if it is stored so. Costs about a nanosecond an element and core.
    ///
    /// # Errors
    /// `Invalid` when there is no conversion into `wanted`, or a value is not finite.
    pub fn converted(&self, wanted: WeightFormat) -> Result<Cow<'_, Self>, KernelError> {
        if self.format.is(wanted) {
            return Ok(Cow::Borrowed(self));
        }
        match wanted {
            WeightFormat::Bf16 => self.to_bf16().map(Cow::Owned),
            WeightFormat::Int8PerRow => self.to_int8().map(Cow::Owned),
            other => Err(KernelError::invalid(
                "format",
                format!(
                    "there is no conversion from {:?} to {other}: name bf16 or int8_per_channel in vendorFormats, or \
                     give a checkpoint that stores {other}",
                    self.format
                ),
            )),
        }
    }

    fn to_bf16(&self) -> Result<Self, KernelError> {
        let mut data = Vec::with_capacity(self.rows * self.cols * 2);
        let mut values = vec![0.0; self.cols];
        for row in 0..self.rows {
            self.finite_row(row, &mut values)?;
            data.extend(values.iter().flat_map(|value| half::bf16::from_f32(*value).to_le_bytes()));
        }
        Self::new(self.rows, self.cols, StoredFormat::Bf16, data, Vec::new())
    }

    fn to_int8(&self) -> Result<Self, KernelError> {
        let mut data = Vec::with_capacity(self.rows * self.cols);
        let mut scales = Vec::with_capacity(self.rows * 4);
        let mut values = vec![0.0; self.cols];
        for row in 0..self.rows {
            self.finite_row(row, &mut values)?;
            let most = values.iter().fold(0.0_f32, |most, value| most.max(value.abs()));
            // Division by the scale, not by its inverse: the largest magnitude must become exactly 127.
            let scale = if most > 0.0 { (most / INT8_MOST).max(f32::MIN_POSITIVE) } else { 1.0 };
            let code = |value: &f32| byte_of(f32_to_i8((value / scale).round_ties_even()));
            data.extend(values.iter().map(code));
            scales.extend(scale.to_le_bytes());
        }
        Self::new(self.rows, self.cols, StoredFormat::Int8PerRow, data, scales)
    }

    /// The values of one row.
    fn finite_row(&self, row: usize, values: &mut [f32]) -> Result<(), KernelError> {
        // One scale per run of columns: fetched once a run.
        let run = self.format.scale_block(self.cols).map_or(self.cols, |([_, cols], _)| cols.max(1));
        let mut finite = true;
        for (block, part) in values.chunks_mut(run).enumerate() {
            let start = block * run;
            let scale = self.scale_at(row, start);
            for (at, value) in part.iter_mut().enumerate() {
                *value = self.code_at(row, start + at) * scale;
                finite &= value.is_finite();
            }
        }
        if finite {
            return Ok(());
        }
        Err(KernelError::invalid("weights", format!("row {row} has a value that is not finite: repair the checkpoint")))
    }
}

impl StoredExpert {
    /// This expert with its three matrices in `wanted`.
    ///
    /// # Errors
    /// As [`StoredMatrix::converted`].
    pub fn converted(self, wanted: WeightFormat) -> Result<Self, KernelError> {
        Ok(Self {
            gate: self.gate.converted(wanted)?.into_owned(),
            up: self.up.converted(wanted)?.into_owned(),
            down: self.down.converted(wanted)?.into_owned(),
            limit: self.limit,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn mxfp4(rows: usize, cols: usize, data: Vec<u8>, scale: u8) -> StoredMatrix {
        let scales = vec![scale; rows * cols.div_ceil(32)];
        StoredMatrix::new(rows, cols, StoredFormat::Mxfp4, data, scales).unwrap()
    }

    #[test]
    fn what_is_stored_so_already_is_not_copied() {
        let matrix = mxfp4(2, 4, vec![0x12; 4], 127);
        assert!(matches!(matrix.converted(WeightFormat::Mxfp4), Ok(Cow::Borrowed(_))));
    }

    #[test]
    fn every_code_of_mxfp4_is_exact_in_bf16() {
        let codes: Vec<u8> = (0..=255).collect();
        for scale in [1, 64, 127, 200] {
            let matrix = mxfp4(8, 64, codes.clone(), scale);
            let converted = matrix.converted(WeightFormat::Bf16).unwrap();
            assert_eq!(converted.dequantise(), matrix.dequantise(), "scale {scale}");
        }
    }

    #[test]
    fn what_needs_a_calibration_is_refused_with_a_remedy() {
        let matrix = StoredMatrix::from_f32(1, 2, &[1.0, 2.0]).unwrap();
        let error = matrix.converted(WeightFormat::Mxfp4).unwrap_err().to_string();
        assert!(error.contains("no conversion from F32 to mxfp4_group32_ue8m0: name bf16 or int8"), "{error}");
    }

    #[test]
    fn a_value_that_is_not_finite_names_its_row() {
        let matrix = StoredMatrix::from_f32(2, 2, &[1.0, 2.0, f32::NAN, 0.0]).unwrap();
        let error = matrix.converted(WeightFormat::Int8PerRow).unwrap_err().to_string();
        assert!(error.contains("row 1"), "{error}");
    }

    #[test]
    fn a_row_of_zeros_stays_zero() {
        let matrix = StoredMatrix::from_f32(1, 3, &[0.0, -0.0, 0.0]).unwrap();
        assert_eq!(matrix.converted(WeightFormat::Int8PerRow).unwrap().dequantise(), [0.0, 0.0, 0.0]);
    }

    proptest! {
        #[test]
        fn int8_is_within_half_a_step_of_its_row(values in proptest::collection::vec(-1e3_f32..1e3, 24)) {
            let matrix = StoredMatrix::from_f32(3, 8, &values).unwrap();
            let converted = matrix.converted(WeightFormat::Int8PerRow).unwrap();
            for (row, (got, wanted)) in converted.dequantise().chunks(8).zip(values.chunks(8)).enumerate() {
                let step = converted.scale_at(row, 0);
                for (got, wanted) in got.iter().zip(wanted) {
                    prop_assert!((got - wanted).abs() <= step * 0.501, "{got} {wanted} {step}");
                }
            }
        }

        #[test]
        fn bf16_is_within_half_a_unit(values in proptest::collection::vec(-1e3_f32..1e3, 24)) {
            let matrix = StoredMatrix::from_f32(3, 8, &values).unwrap();
            let got = matrix.converted(WeightFormat::Bf16).unwrap().dequantise();
            for (got, wanted) in got.iter().zip(&values) {
                prop_assert!((got - wanted).abs() <= wanted.abs() / 256.0, "{got} {wanted}");
            }
        }
    }
}
