//! The CPU backend against plain `f64` arithmetic that shares no code with it, over random shapes and formats.
#![expect(clippy::unwrap_used, reason = "a test stops where its own set-up fails")]

use berth_kernels::cpu::{CpuBackend, CpuOptions, Level};
use berth_kernels::{
    Backend, Batch, KernelError, Linear, PackedExpert, ScaleType, StoredExpert, StoredFormat, StoredMatrix,
};
use proptest::prelude::*;

fn backend(threads: usize, level: Option<Level>) -> CpuBackend {
    CpuBackend::with(CpuOptions { threads: Some(threads), level }).unwrap()
}

/// A small generator, so that a shape and a seed say everything about a case.
struct Draw(u64);

impl Draw {
    fn next(&mut self) -> u32 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        u32::try_from(self.0 >> 40).unwrap()
    }

    /// Even in [-1, 1).
    fn unit(&mut self) -> f32 {
        f32::from(u16::try_from(self.next() & 0xffff).unwrap()) / 32768.0 - 1.0
    }

    fn byte(&mut self) -> u8 {
        self.next().to_le_bytes()[1]
    }

    fn below(&mut self, n: u32) -> u32 {
        self.next() % n
    }
}

/// Finite random weights of about unit size in a format.
fn matrix(rows: usize, cols: usize, format: StoredFormat, draw: &mut Draw) -> StoredMatrix {
    let (data, scales) = format.sizes(rows, cols).unwrap();
    let data: Vec<u8> = match format {
        StoredFormat::F32 => (0..data / 4).flat_map(|_| draw.unit().to_le_bytes()).collect(),
        StoredFormat::Bf16 => (0..data / 2).flat_map(|_| half::bf16::from_f32(draw.unit()).to_le_bytes()).collect(),
        StoredFormat::Fp8E4m3 { .. } => (0..data).map(|_| draw.byte() & 0xbf).collect(),
        _ => (0..data).map(|_| draw.byte()).collect(),
    };
    let scales = match format.scale_block(cols) {
        Some((_, ScaleType::E8m0)) => (0..scales).map(|_| 122 + draw.byte() % 6).collect(),
        _ => (0..scales / 4).flat_map(|_| (draw.unit() * 0.02).to_le_bytes()).collect(),
    };
    StoredMatrix::new(rows, cols, format, data, scales).unwrap()
}

fn expert(hidden: usize, width: usize, format: StoredFormat, limit: Option<f32>, draw: &mut Draw) -> StoredExpert {
    StoredExpert {
        gate: matrix(width, hidden, format, draw),
        up: matrix(width, hidden, format, draw),
        down: matrix(hidden, width, format, draw),
        limit,
    }
}

fn product(m: &StoredMatrix, x: &[f64]) -> Vec<f64> {
    (0..m.rows())
        .map(|r| (0..m.cols()).map(|c| f64::from(m.code_at(r, c)) * f64::from(m.scale_at(r, c)) * x[c]).sum())
        .collect()
}

fn naive(expert: &StoredExpert, x: &[f32]) -> Vec<f64> {
    let x: Vec<f64> = x.iter().map(|&v| f64::from(v)).collect();
    let limit = expert.limit.map_or(f64::INFINITY, f64::from);
    let (gate, up) = (product(&expert.gate, &x), product(&expert.up, &x));
    let h: Vec<f64> = gate
        .iter()
        .zip(&up)
        .map(|(&g, &u)| {
            let g = g.min(limit);
            g / (1.0 + (-g).exp()) * u.max(-limit).min(limit)
        })
        .collect();
    product(&expert.down, &h)
}

/// A batch that owns its parts.
#[derive(Debug, Clone)]
struct Owned {
    hidden: usize,
    rows: Vec<f32>,
    offsets: Vec<u32>,
    experts: Vec<u32>,
    weights: Vec<f32>,
}

impl Owned {
    fn draw(hidden: usize, rows: usize, experts: u32, draw: &mut Draw) -> Self {
        let mut batch = Self { hidden, rows: Vec::new(), offsets: vec![0], experts: Vec::new(), weights: Vec::new() };
        for _ in 0..rows {
            batch.rows.extend((0..hidden).map(|_| draw.unit()));
            for _ in 0..draw.below(4) {
                batch.experts.push(draw.below(experts));
                batch.weights.push(draw.unit());
            }
            batch.offsets.push(u32::try_from(batch.experts.len()).unwrap());
        }
        batch
    }

    fn run(&self, backend: &dyn Backend, table: &[PackedExpert]) -> Vec<f32> {
        let mut out = vec![f32::NAN; self.rows.len()];
        backend.forward(&self.view(table), &mut out).unwrap();
        out
    }

    fn view<'a>(&'a self, table: &'a [PackedExpert]) -> Batch<'a> {
        Batch {
            hidden: self.hidden,
            rows: &self.rows,
            offsets: &self.offsets,
            experts: &self.experts,
            weights: &self.weights,
            table,
        }
    }

    fn len(&self) -> usize {
        self.offsets.len() - 1
    }

    fn slots(&self, row: usize) -> std::ops::Range<usize> {
        let at = |i: usize| usize::try_from(self.offsets[i]).unwrap();
        at(row)..at(row + 1)
    }

    /// One row alone.
    fn only(&self, row: usize) -> Self {
        let slots = self.slots(row);
        Self {
            hidden: self.hidden,
            rows: self.rows[row * self.hidden..][..self.hidden].to_vec(),
            offsets: vec![0, u32::try_from(slots.len()).unwrap()],
            experts: self.experts[slots.clone()].to_vec(),
            weights: self.weights[slots].to_vec(),
        }
    }
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|v| if v.is_nan() { f32::NAN.to_bits() } else { v.to_bits() }).collect()
}

fn any_format() -> impl Strategy<Value = StoredFormat> {
    let fp8 = |side, scale| StoredFormat::Fp8E4m3 { block: [side, side], scale };
    prop_oneof![
        Just(StoredFormat::F32),
        Just(StoredFormat::Bf16),
        Just(fp8(128, ScaleType::F32)),
        Just(fp8(128, ScaleType::E8m0)),
        Just(fp8(32, ScaleType::E8m0)),
        Just(fp8(32, ScaleType::F32)),
        Just(StoredFormat::Mxfp4),
        Just(StoredFormat::Int8PerRow),
        Just(StoredFormat::Int4Group32),
    ]
}

prop_compose! {
    fn any_case()(
        hidden in 1usize..200,
        width in 1usize..300,
        rows in 0usize..20,
        experts in 1u32..5,
        format in any_format(),
        limit in prop_oneof![Just(None), (0.1f32..10.0).prop_map(Some)],
        seed in any::<u64>(),
    ) -> (Vec<StoredExpert>, Owned) {
        let mut draw = Draw(seed);
        let table = (0..experts).map(|_| expert(hidden, width, format, limit, &mut draw)).collect();
        (table, Owned::draw(hidden, rows, experts, &mut draw))
    }
}

fn pack(backend: &dyn Backend, experts: &[StoredExpert]) -> Vec<PackedExpert> {
    experts.iter().map(|e| backend.pack(e).unwrap()).collect()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 96, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn forward_equals_plain_double_precision((experts, batch) in any_case()) {
        let cpu = backend(2, None);
        let out = batch.run(&cpu, &pack(&cpu, &experts));
        let mut expected = vec![0.0f64; out.len()];
        let mut size = 1e-30f64;
        for row in 0..batch.len() {
            let x = &batch.rows[row * batch.hidden..][..batch.hidden];
            for slot in batch.slots(row) {
                let y = naive(&experts[usize::try_from(batch.experts[slot]).unwrap()], x);
                for (sum, y) in expected[row * batch.hidden..].iter_mut().zip(&y) {
                    *sum += f64::from(batch.weights[slot]) * y;
                    size = size.max((f64::from(batch.weights[slot]) * y).abs());
                }
            }
        }
        for (i, (got, want)) in out.iter().zip(&expected).enumerate() {
            prop_assert!((f64::from(*got) - want).abs() <= 2e-5 * size, "element {}: {} is not {}", i, got, want);
        }
    }

    #[test]
    fn a_rows_bits_depend_on_nothing_but_the_row((experts, batch) in any_case()) {
        let cpu = backend(1, None);
        let table = pack(&cpu, &experts);
        let together = batch.run(&cpu, &table);
        for row in 0..batch.len() {
            let alone = batch.only(row).run(&cpu, &table);
            prop_assert_eq!(bits(&alone), bits(&together[row * batch.hidden..][..batch.hidden]));
        }
    }

    #[test]
    fn threads_and_instruction_sets_do_not_change_a_bit((experts, batch) in any_case()) {
        let plain = backend(1, Some(Level::Portable));
        let expected = bits(&batch.run(&plain, &pack(&plain, &experts)));
        for level in Level::supported() {
            for threads in [1, 3] {
                let cpu = backend(threads, Some(level));
                prop_assert_eq!(&bits(&batch.run(&cpu, &pack(&cpu, &experts))), &expected);
            }
        }
    }

    #[test]
    fn a_bad_row_is_all_bad_and_alone(
        (experts, batch) in any_case(),
        row in any::<prop::sample::Index>(),
        column in any::<prop::sample::Index>(),
        poison in prop_oneof![Just(f32::NAN), Just(f32::INFINITY), Just(f32::NEG_INFINITY)],
    ) {
        prop_assume!(batch.len() > 0);
        let cpu = backend(1, None);
        let table = pack(&cpu, &experts);
        let clean = batch.run(&cpu, &table);
        let (row, hidden) = (row.index(batch.len()), batch.hidden);
        let mut poisoned = batch.clone();
        poisoned.rows[row * hidden + column.index(hidden)] = poison;
        let out = poisoned.run(&cpu, &table);
        for (t, (got, was)) in out.chunks(hidden).zip(clean.chunks(hidden)).enumerate() {
            if t == row && !batch.slots(row).is_empty() {
                prop_assert!(got.iter().all(|v| !v.is_finite()));
            } else {
                prop_assert_eq!(bits(got), bits(was));
            }
        }
    }

    #[test]
    fn a_linear_rows_bits_depend_on_nothing_but_the_row(
        rows in 1usize..100, cols in 1usize..300, count in 0usize..12, format in any_format(), seed in any::<u64>(),
    ) {
        let mut draw = Draw(seed);
        let stored = matrix(rows, cols, format, &mut draw);
        let x: Vec<f32> = (0..count * cols).map(|_| draw.unit()).collect();
        let linear = Linear::from_stored(&stored).unwrap();
        let mut out = vec![f32::NAN; count * rows];
        linear.apply(&x, &mut out).unwrap();
        for (x, got) in x.chunks(cols).zip(out.chunks(rows)) {
            let mut alone = vec![f32::NAN; rows];
            linear.apply(x, &mut alone).unwrap();
            prop_assert_eq!(bits(got), bits(&alone));
            let wide: Vec<f64> = x.iter().map(|&v| f64::from(v)).collect();
            let expected = product(&stored, &wide);
            let size = expected.iter().fold(1e-3f64, |a, b| a.max(b.abs()));
            for (got, want) in got.iter().zip(&expected) {
                prop_assert!((f64::from(*got) - want).abs() <= 2e-5 * size, "{} is not {}", got, want);
            }
        }
    }
}

#[test]
fn a_batch_longer_than_one_pass_gives_the_same_bits() {
    let mut draw = Draw(3);
    let cpu = backend(2, None);
    let table = [cpu.pack(&expert(8, 8192, StoredFormat::Int8PerRow, None, &mut draw)).unwrap()];
    let rows = 1100;
    let mut batch = Owned::draw(8, rows, 1, &mut draw);
    batch.experts = vec![0; rows];
    batch.weights = vec![0.5; rows];
    batch.offsets = (0..=u32::try_from(rows).unwrap()).collect();
    let out = batch.run(&cpu, &table);
    for row in [0, 1023, 1024, 1025, rows - 1] {
        assert_eq!(bits(&batch.only(row).run(&cpu, &table)), bits(&out[row * 8..][..8]), "row {row}");
    }
}

#[test]
fn no_rows_and_rows_without_experts_are_fine() {
    let cpu = backend(2, None);
    let table = [cpu.pack(&expert(4, 4, StoredFormat::Bf16, None, &mut Draw(1))).unwrap()];
    let empty = Owned { hidden: 4, rows: vec![], offsets: vec![0], experts: vec![], weights: vec![] };
    assert!(empty.run(&cpu, &table).is_empty());
    assert!(empty.run(&cpu, &[]).is_empty());
    let idle = Owned { hidden: 4, rows: vec![1.0; 8], offsets: vec![0, 0, 0], experts: vec![], weights: vec![] };
    assert_eq!(idle.run(&cpu, &table), [0.0; 8]);
}

#[test]
fn memory_is_counted_and_given_back() {
    let cpu = backend(1, None);
    assert_eq!(cpu.memory().packed, 0);
    let packed = cpu.pack(&expert(64, 32, StoredFormat::Bf16, None, &mut Draw(1))).unwrap();
    assert_eq!(packed.bytes(), 3 * 64 * 32 * 2);
    assert_eq!((packed.hidden(), packed.width()), (64, 32));
    let twin = packed.clone();
    assert_eq!(cpu.memory().packed, packed.bytes());
    drop(packed);
    assert_eq!(cpu.memory().packed, twin.bytes());
    drop(twin);
    assert_eq!(cpu.memory().packed, 0);
}

#[test]
fn a_wrong_batch_is_refused_by_its_field() {
    let cpu = backend(1, None);
    let table = [cpu.pack(&expert(4, 8, StoredFormat::F32, None, &mut Draw(1))).unwrap()];
    let good =
        Owned { hidden: 4, rows: vec![0.0; 8], offsets: vec![0, 1, 2], experts: vec![0, 0], weights: vec![1.0; 2] };
    let refuse = |change: &dyn Fn(&mut Owned), out: usize| -> String {
        let mut batch = good.clone();
        change(&mut batch);
        cpu.forward(&batch.view(&table), &mut vec![0.0; out]).unwrap_err().to_string()
    };
    assert!(refuse(&|b| b.hidden = 0, 8).starts_with("hidden: "));
    assert!(refuse(&|b| b.offsets.clear(), 8).starts_with("offsets: "));
    assert!(refuse(&|b| b.offsets = vec![0, 2, 1], 8).starts_with("offsets: fall"));
    assert!(refuse(&|b| b.rows.truncate(7), 8).starts_with("rows has 7 elements, expected 8 (2 rows × 4 hidden)"));
    assert!(refuse(&|_| (), 7).starts_with("out has 7 elements, expected 8"));
    assert!(refuse(&|b| b.weights.push(1.0), 8).starts_with("weights has 3 elements, expected 2"));
    assert!(refuse(&|b| b.experts.truncate(1), 8).starts_with("experts has 1 elements, expected 2"));
    assert!(refuse(&|b| b.experts[1] = 9, 8).starts_with("experts[1] is 9, but the table has 1 experts"));
    assert!(refuse(&|b| b.hidden = 8, 8).starts_with("rows has 8 elements, expected 16"));
    let wide = [cpu.pack(&expert(8, 8, StoredFormat::F32, None, &mut Draw(1))).unwrap()];
    let error = cpu.forward(&good.view(&wide), &mut [0.0; 8]).unwrap_err().to_string();
    assert!(error.starts_with("table: expert 0 has hidden 8, the batch 4"), "{error}");
}

#[test]
fn an_expert_whose_matrices_do_not_belong_together_is_refused() {
    let cpu = backend(1, None);
    let mut wrong = expert(4, 8, StoredFormat::F32, None, &mut Draw(1));
    wrong.limit = Some(f32::NAN);
    assert!(cpu.pack(&wrong).unwrap_err().to_string().starts_with("limit: is NaN"));
    wrong.limit = None;
    wrong.down = matrix(4, 7, StoredFormat::F32, &mut Draw(1));
    let error = cpu.pack(&wrong).unwrap_err();
    assert_eq!(error.to_string(), "down: is 4×7, expected 4×8 from gate: give matrices of one expert");
    assert!(matches!(error, KernelError::Invalid { what: "down", .. }));
}

#[test]
fn concurrent_callers_get_the_same_bits() {
    let mut draw = Draw(8);
    let cpu = backend(2, None);
    let table = pack(&cpu, &[expert(96, 160, StoredFormat::Mxfp4, Some(10.0), &mut draw)]);
    let batch = Owned::draw(96, 12, 1, &mut draw);
    let expected = bits(&batch.run(&cpu, &table));
    std::thread::scope(|scope| {
        for _ in 0..6 {
            scope.spawn(|| (0..10).for_each(|_| assert_eq!(bits(&batch.run(&cpu, &table)), expected)));
        }
    });
    assert!(cpu.memory().workspace > 0);
}
