//! The small number formats, one code at a time, exactly.
//!
//! Sources: OCP 8-bit floating point (E4M3: bias 7, no infinities, S.1111.111 is NaN) and OCP Microscaling 1.0
//! (E2M1, E8M0: 2^(code - 127), 0xFF is NaN). Every decoded value is exact in `f32`. These functions are the
//! meaning of the formats; faster paths must agree with them bit for bit.

use crate::num::signed;

/// The eight magnitudes of E2M1.
const E2M1: [f32; 8] = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0];

/// E4M3 ("fn" variant: finite plus NaN) to `f32`.
pub fn e4m3_to_f32(code: u8) -> f32 {
    let magnitude = code & 0x7f;
    let exponent = i32::from(magnitude >> 3);
    let mantissa = f32::from(magnitude & 7);
    let value = if magnitude == 0x7f {
        f32::NAN
    } else if exponent == 0 {
        mantissa * exp2(-9)
    } else {
        (8.0 + mantissa) * exp2(exponent - 10)
    };
    if code & 0x80 == 0 { value } else { -value }
}

/// The nearest E4M3 code, ties to even; beyond ±464 and NaN become the NaN code, as a saturating cast must not hide them.
pub fn e4m3_from_f32(value: f32) -> u8 {
    let sign = if value.is_sign_negative() { 0x80 } else { 0 };
    let target = value.abs();
    if target.is_nan() || target > 464.0 {
        return sign | 0x7f;
    }
    let mut best = 0u8;
    for code in 1..0x7fu8 {
        let (near, held) = ((e4m3_to_f32(code) - target).abs(), (e4m3_to_f32(best) - target).abs());
        if near < held || (near == held && code & 1 == 0) {
            best = code;
        }
    }
    sign | best
}

/// E2M1 (the low four bits) to `f32`.
pub fn e2m1_to_f32(code: u8) -> f32 {
    let value = E2M1[usize::from(code & 7)];
    if code & 8 == 0 { value } else { -value }
}

/// The nearest E2M1 code, ties to the even code, saturating at ±6.
pub fn e2m1_from_f32(value: f32) -> u8 {
    let target = value.abs();
    let mut best = 0u8;
    for code in 1..8u8 {
        let (near, held) = ((e2m1_to_f32(code) - target).abs(), (e2m1_to_f32(best) - target).abs());
        if near < held || (near == held && code & 1 == 0) {
            best = code;
        }
    }
    if value.is_sign_negative() { best | 8 } else { best }
}

/// E8M0 to `f32`: 2^(code - 127); 0xFF is NaN. Code 0 is a subnormal `f32`, still exact.
pub fn e8m0_to_f32(code: u8) -> f32 {
    match code {
        0 => f32::from_bits(0x0040_0000),
        255 => f32::NAN,
        _ => f32::from_bits(u32::from(code) << 23),
    }
}

/// Two's complement nibble (the low four bits) to -8..=7.
pub fn int4_to_i8(code: u8) -> i8 {
    signed(code << 4) >> 4
}

/// bfloat16 bits to `f32`.
pub fn bf16_to_f32(bits: u16) -> f32 {
    f32::from_bits(u32::from(bits) << 16)
}

/// 2^n for the exponents used here (-126..=127).
fn exp2(n: i32) -> f32 {
    f32::from_bits(u32::try_from(n + 127).unwrap_or(0) << 23)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_e4m3_code_survives_a_round_trip() {
        for code in 0..=255u8 {
            let value = e4m3_to_f32(code);
            assert_eq!(value.is_nan(), code & 0x7f == 0x7f);
            assert_eq!(e4m3_from_f32(value), code, "code {code:#x} = {value}");
        }
        assert_eq!(e4m3_to_f32(0x7e), 448.0);
        assert_eq!(e4m3_to_f32(0x01), 0.001_953_125);
        assert_eq!(e4m3_to_f32(0xb8), -1.0);
    }

    #[test]
    fn every_e2m1_code_survives_a_round_trip() {
        for code in 0..16u8 {
            assert_eq!(e2m1_from_f32(e2m1_to_f32(code)), code);
        }
        assert_eq!(e2m1_from_f32(5.0), 6, "a tie goes to the even code, 4.0");
        assert_eq!(e2m1_from_f32(100.0), 7);
    }

    #[test]
    fn every_e8m0_code_is_its_power_of_two() {
        for code in 0..255u8 {
            assert_eq!(f64::from(e8m0_to_f32(code)), 2f64.powi(i32::from(code) - 127));
        }
        assert!(e8m0_to_f32(255).is_nan());
    }

    #[test]
    fn nibbles_are_twos_complement() {
        let all: Vec<i8> = (0..16u8).map(int4_to_i8).collect();
        assert_eq!(all, [0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1]);
    }

    #[test]
    fn e4m3_agrees_with_bf16_on_shared_values() {
        for code in 0..0x7fu8 {
            let value = e4m3_to_f32(code);
            assert_eq!(half::bf16::from_f32(value).to_f32(), value);
        }
    }
}
