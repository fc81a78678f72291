//! Whether a device still computes what it should: weights and inputs for which every correct device gives the same
//! bits, and the bits themselves. It decides nothing; whoever asks decides what a wrong answer means.
//!
//! All numbers are small integers, so every product and every sum is exact in float32 whatever the order of the terms,
//! and the gate is far enough above zero (129 to 383) that the sigmoid rounds to one: `silu(g) = g`. The answer is
//! therefore known without a second device: it is computed here in integers. The weights fill as much memory as is
//! asked for, with a pattern in which each expert differs from all others, and each is read back twice, after all were
//! written: a stuck or aliased address shows as a wrong sum.

use crate::backend::{Backend, Batch, PackedExpert, StoredExpert};
use crate::error::KernelError;
use crate::format::{StoredFormat, StoredMatrix};
use crate::num::{f32_of_i32, low_u32, u64_of};

/// Input and output features of a pattern expert, and its inner features.
const SIZE: usize = 128;
/// First input, and first column of every gate: their product holds the gate above zero.
const LEAD: i32 = 16;
/// Experts of one call.
const TOGETHER: usize = 64;
/// How often every expert is read back.
const ROUNDS: usize = 2;

/// What was checked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Validated {
    /// Experts written and read back.
    pub experts: usize,
    /// Bytes that the backend held for them.
    pub bytes: u64,
}

/// Why a device did not pass.
#[derive(Debug, thiserror::Error)]
pub enum ValidationError {
    /// The backend could not compute.
    #[error("the device cannot compute: {0}")]
    Kernel(#[from] KernelError),
    /// A number differs from the only right one.
    #[error(
        "the device computes wrong: element {element} of pattern {pattern} is {found}, the only right value is {right}; take it out of service"
    )]
    Wrong {
        /// Number of the pattern expert.
        pattern: usize,
        /// Element of its output.
        element: usize,
        /// What the device gave.
        found: f32,
        /// What it had to give.
        right: f32,
    },
}

/// Fills about `bytes` of the backend's memory (at least one expert, 96 KiB) with patterns and compares what it
/// computes with them bit for bit.
///
/// # Errors
/// [`ValidationError`].
pub fn validate(backend: &dyn Backend, bytes: u64) -> Result<Validated, ValidationError> {
    let before = backend.memory().packed;
    let mut packed = Vec::new();
    while packed.is_empty() || backend.memory().packed.saturating_sub(before) < bytes {
        packed.push(backend.pack(&expert(packed.len())?)?);
    }
    for _ in 0..ROUNDS {
        for (round, table) in packed.chunks(TOGETHER).enumerate() {
            check(backend, round * TOGETHER, table)?;
        }
    }
    Ok(Validated { experts: packed.len(), bytes: backend.memory().packed.saturating_sub(before) })
}

/// Each expert of `table` on its own row.
fn check(backend: &dyn Backend, first: usize, table: &[PackedExpert]) -> Result<(), ValidationError> {
    let rows: Vec<f32> =
        (0..table.len()).flat_map(|at| (0..SIZE).map(move |col| f32_of_i32(input(first + at, col)))).collect();
    let (mut offsets, mut experts) = (vec![0_u32], Vec::new());
    for at in 0..table.len() {
        experts.push(low_u32(u64_of(at)));
        offsets.push(low_u32(u64_of(at + 1)));
    }
    let weights = vec![1.0; table.len()];
    let batch = Batch { hidden: SIZE, rows: &rows, offsets: &offsets, experts: &experts, weights: &weights, table };
    let mut out = vec![f32::NAN; rows.len()];
    backend.forward(&batch, &mut out)?;
    for (at, found) in out.chunks(SIZE).enumerate() {
        for (element, (found, right)) in found.iter().zip(answer(first + at)).enumerate() {
            // Not `==`: zero has two sets of bits, and NaN must not pass.
            if found.to_bits() != right.to_bits() && !(*found == 0.0 && right == 0.0) {
                return Err(ValidationError::Wrong { pattern: first + at, element, found: *found, right });
            }
        }
    }
    Ok(())
}

/// Which numbers of a pattern expert.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Part {
    Gate,
    Up,
    Down,
    Input,
}

/// -1, 0 or 1, by a mix of its place (splitmix64).
fn pattern(expert: usize, part: Part, row: usize, col: usize) -> i32 {
    let part = match part {
        Part::Gate => 1,
        Part::Up => 2,
        Part::Down => 3,
        Part::Input => 4,
    };
    let mut mixed = ((u64_of(expert) * 4 + part) << 32 | u64_of(row) << 16 | u64_of(col))
        .wrapping_add(1)
        .wrapping_mul(0x9e37_79b9_7f4a_7c15);
    mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    match (mixed ^ (mixed >> 31)) % 3 {
        0 => -1,
        1 => 0,
        _ => 1,
    }
}

fn gate(expert: usize, row: usize, col: usize) -> i32 {
    if col == 0 { LEAD } else { pattern(expert, Part::Gate, row, col) }
}

fn input(expert: usize, col: usize) -> i32 {
    if col == 0 { LEAD } else { pattern(expert, Part::Input, 0, col) }
}

fn expert(number: usize) -> Result<StoredExpert, KernelError> {
    let matrix = |value: &dyn Fn(usize, usize) -> i32| {
        let values = (0..SIZE).flat_map(|row| (0..SIZE).map(move |col| f32_of_i32(value(row, col))));
        // A bfloat16 is the upper half of a float32, and holds integers up to 256.
        let data = values.flat_map(|value| [value.to_le_bytes()[2], value.to_le_bytes()[3]]).collect();
        StoredMatrix::new(SIZE, SIZE, StoredFormat::Bf16, data, Vec::new())
    };
    Ok(StoredExpert {
        gate: matrix(&|row, col| gate(number, row, col))?,
        up: matrix(&|row, col| pattern(number, Part::Up, row, col))?,
        down: matrix(&|row, col| pattern(number, Part::Down, row, col))?,
        limit: None,
    })
}

/// What expert `number` must give, computed in integers: below 2^23 in amount.
fn answer(number: usize) -> impl Iterator<Item = f32> {
    let sum = |weight: &dyn Fn(usize) -> i32| (0..SIZE).map(|col| weight(col) * input(number, col)).sum::<i32>();
    let inner: Vec<i32> = (0..SIZE)
        .map(|row| sum(&|col| gate(number, row, col)) * sum(&|col| pattern(number, Part::Up, row, col)))
        .collect();
    (0..SIZE).map(move |row| {
        f32_of_i32(inner.iter().enumerate().map(|(col, value)| pattern(number, Part::Down, row, col) * value).sum())
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::{BackendKind, MemoryUse};
    use crate::cpu::CpuBackend;

    /// A device of which one output bit is wrong from some call on.
    #[derive(Debug)]
    struct Worn {
        sound: CpuBackend,
        calls: std::sync::atomic::AtomicUsize,
        from: usize,
    }

    impl Backend for Worn {
        fn kind(&self) -> BackendKind {
            self.sound.kind()
        }

        fn pack(&self, expert: &StoredExpert) -> Result<PackedExpert, KernelError> {
            self.sound.pack(expert)
        }

        fn forward(&self, batch: &Batch<'_>, out: &mut [f32]) -> Result<(), KernelError> {
            self.sound.forward(batch, out)?;
            if self.calls.fetch_add(1, std::sync::atomic::Ordering::Relaxed) >= self.from {
                out[200] = f32::from_bits(out[200].to_bits() ^ 1);
            }
            Ok(())
        }

        fn memory(&self) -> MemoryUse {
            self.sound.memory()
        }
    }

    #[test]
    fn a_sound_device_passes_and_its_memory_was_filled() {
        let backend = CpuBackend::new().unwrap();
        let validated = validate(&backend, 4 << 20).unwrap();
        assert!(validated.bytes >= 4 << 20 && validated.experts > TOGETHER / 2, "{validated:?}");
    }

    #[test]
    fn every_vector_level_gives_the_same_bits() {
        for level in crate::cpu::Level::supported() {
            let options = crate::cpu::CpuOptions { threads: Some(1), level: Some(level) };
            validate(&CpuBackend::with(options).unwrap(), 0).unwrap();
        }
    }

    #[test]
    fn one_wrong_bit_is_found_even_if_it_comes_late() {
        let worn = |from| Worn { sound: CpuBackend::new().unwrap(), calls: 0.into(), from };
        let error = validate(&worn(0), 1 << 20).unwrap_err();
        assert!(matches!(error, ValidationError::Wrong { pattern: 1, element: 72, .. }), "{error}");
        assert!(validate(&worn(1), 1 << 20).is_err());
    }

    #[test]
    fn no_two_experts_have_the_same_weights() {
        let weights = |number| expert(number).unwrap().gate.data().to_vec();
        let all: std::collections::BTreeSet<_> = (0..500).map(weights).collect();
        assert_eq!(all.len(), 500);
    }

    #[test]
    fn every_intermediate_is_an_exact_integer() {
        for number in 0..50 {
            let gates: Vec<i32> =
                (0..SIZE).map(|row| (0..SIZE).map(|col| gate(number, row, col) * input(number, col)).sum()).collect();
            assert!(gates.iter().all(|gate| (129..=383).contains(gate)), "{gates:?}");
            assert!(answer(number).all(|value| value.abs() < 16_777_216.0));
            assert!(answer(number).any(|value| value != 0.0));
        }
    }
}
