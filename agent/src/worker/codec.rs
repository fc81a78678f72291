//! Activations between the wire's bytes and float32. Little-endian on every machine; it never looks at
//! what the numbers mean, and it never fails on a value: NaN and infinity pass through as themselves.

use berth_proto::v1::DType;
use bytes::{Bytes, BytesMut};

/// How one activation is written on the wire.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Dtype {
    /// IEEE float32.
    F32,
    /// The upper half of a float32.
    Bf16,
}

impl Dtype {
    /// The type that a message names; `None` for one that this build does not know.
    #[must_use]
    pub(crate) fn from_wire(number: i32) -> Option<Self> {
        match DType::try_from(number) {
            Ok(DType::DtypeF32) => Some(Self::F32),
            Ok(DType::DtypeBf16) => Some(Self::Bf16),
            Ok(DType::DtypeUnspecified) | Err(_) => None,
        }
    }

    /// The number that a message carries.
    #[must_use]
    pub(crate) fn to_wire(self) -> i32 {
        match self {
            Self::F32 => DType::DtypeF32.into(),
            Self::Bf16 => DType::DtypeBf16.into(),
        }
    }

    /// Bytes of one value.
    #[must_use]
    pub(crate) const fn size(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::Bf16 => 2,
        }
    }

    /// Values of `bytes`; a last incomplete value is ignored, so check the length first.
    #[must_use]
    pub(crate) fn decode(self, bytes: &[u8]) -> Vec<f32> {
        match self {
            Self::F32 => bytes.as_chunks::<4>().0.iter().map(|four| f32::from_le_bytes(*four)).collect(),
            Self::Bf16 => {
                bytes.as_chunks::<2>().0.iter().map(|[low, high]| f32::from_le_bytes([0, 0, *low, *high])).collect()
            }
        }
    }

    /// Bytes of `values`; bf16 rounds to nearest, ties to even.
    #[must_use]
    pub(crate) fn encode(self, values: &[f32]) -> Bytes {
        let mut bytes = BytesMut::with_capacity(values.len().saturating_mul(self.size()));
        for value in values {
            match self {
                Self::F32 => bytes.extend_from_slice(&value.to_le_bytes()),
                Self::Bf16 => bytes.extend_from_slice(&bf16(*value)),
            }
        }
        bytes.freeze()
    }
}

/// The two bytes of the nearest bf16. A NaN keeps its sign and becomes quiet.
fn bf16(value: f32) -> [u8; 2] {
    let bits = value.to_bits();
    let kept = if value.is_nan() {
        bits | 0x0040_0000
    } else {
        let half = 0x7fff + ((bits >> 16) & 1);
        bits.wrapping_add(half)
    };
    let [_, _, low, high] = kept.to_le_bytes();
    [low, high]
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn upper_half(value: f32) -> f32 {
        f32::from_bits(value.to_bits() & 0xffff_0000)
    }

    #[test]
    fn ties_go_to_the_even_neighbour() {
        let between = |bits: u32| Dtype::Bf16.encode(&[f32::from_bits(bits)]).to_vec();
        assert_eq!(between(0x3f80_8000), [0x80, 0x3f]);
        assert_eq!(between(0x3f81_8000), [0x82, 0x3f]);
        assert_eq!(between(0x3f80_8001), [0x81, 0x3f]);
    }

    #[test]
    fn nan_and_infinity_stay_what_they_are() {
        for dtype in [Dtype::F32, Dtype::Bf16] {
            let back = dtype.decode(&dtype.encode(&[f32::NAN, f32::INFINITY, f32::NEG_INFINITY, -0.0]));
            assert!(back[0].is_nan());
            assert_eq!(back[1..3], [f32::INFINITY, f32::NEG_INFINITY]);
            assert!(back[3] == 0.0 && back[3].is_sign_negative());
        }
        assert!(Dtype::Bf16.decode(&Dtype::Bf16.encode(&[f32::from_bits(0x7f80_0001)]))[0].is_nan());
    }

    #[test]
    fn unknown_types_are_refused() {
        assert_eq!(Dtype::from_wire(0), None);
        assert_eq!(Dtype::from_wire(77), None);
        assert_eq!(Dtype::from_wire(Dtype::Bf16.to_wire()), Some(Dtype::Bf16));
    }

    proptest! {
        #[test]
        fn float32_survives_and_bf16_is_the_nearest(value in proptest::num::f32::NORMAL) {
            prop_assert_eq!(Dtype::F32.decode(&Dtype::F32.encode(&[value])), vec![value]);
            let near = Dtype::Bf16.decode(&Dtype::Bf16.encode(&[value]))[0];
            prop_assert_eq!(upper_half(near), near);
            if near.is_finite() {
                prop_assert!((near - value).abs() <= (value.abs() * 2.0f32.powi(-8)));
            }
        }

        #[test]
        fn any_bytes_decode(bytes in proptest::collection::vec(any::<u8>(), 0..64)) {
            prop_assert_eq!(Dtype::F32.decode(&bytes).len(), bytes.len() / 4);
            prop_assert_eq!(Dtype::Bf16.decode(&bytes).len(), bytes.len() / 2);
        }
    }
}
