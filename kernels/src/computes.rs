//! Which weight formats a chip computes with: what a device may be asked to hold.

use berth_types::WeightFormat;

use crate::backend::BackendKind;

/// Chips without FP8 and FP4: Ascend A2 and A3 (910B, 910C) and older.
const INTEGERS_AND_BF16: &[WeightFormat] = &[WeightFormat::Bf16, WeightFormat::Int8PerRow, WeightFormat::Int4Group32];

/// The formats that `kind`'s kernels compute with on a chip of `product`, as the vendor's library names it.
///
/// The CPU and CUDA kernels decode every format in registers. Ascend's grouped matrix products take what the chip
/// takes: bfloat16, int8 and int4 on A2 and A3, FP8 and MXFP4 too on the 950 (CANN, aclnnGroupedMatmulV5, data types by
/// product). A chip that is not known gets what all of its vendor's chips have.
#[must_use]
pub fn computes(kind: BackendKind, product: &str) -> &'static [WeightFormat] {
    match kind {
        BackendKind::Cpu | BackendKind::Cuda => WeightFormat::ALL,
        BackendKind::Ascend if product.contains("950") || product.contains("Atlas 350") => WeightFormat::ALL,
        BackendKind::Ascend => INTEGERS_AND_BF16,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_chip_lacks_is_not_promised() {
        for product in ["910B3", "Ascend910_9392", "Ascend310P3", ""] {
            let formats = computes(BackendKind::Ascend, product);
            assert!(formats.contains(&WeightFormat::Int8PerRow), "{product}");
            assert!(!formats.contains(&WeightFormat::Mxfp4), "{product}");
            assert!(!formats.contains(&WeightFormat::Fp8Block128F32), "{product}");
        }
        assert!(computes(BackendKind::Ascend, "Ascend950PR").contains(&WeightFormat::Mxfp4));
        assert_eq!(computes(BackendKind::Cpu, "910B3"), WeightFormat::ALL);
    }
}
