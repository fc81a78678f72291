//! One call: what it computes and what it refuses.

use std::sync::Arc;

use berth_proto::v1::{self, ForwardStatus};
use berth_types::{ExpertId, LayerId, Revision};

use super::{EXPERTS, Gate, Gated, HIDDEN, assert_near, checkpoint, numbers, one_row, reference, request};
use crate::worker::{
    codec::Dtype,
    forward::{self, Refusal},
    shelf::{Held, HeldLayer, Resident, ShelfKey, Shelves},
};

const SEED: u64 = 7;

/// Revision 1 of `uid`: layer 1 with experts 0, 2 and 3.
pub(crate) fn shelves(backend: &dyn berth_kernels::Backend) -> Shelves {
    let dir = checkpoint(SEED);
    let checkpoint = berth_kernels::Checkpoint::open(dir.path()).unwrap();
    let (hidden, width) = (HIDDEN, super::WIDTH);
    let resident = |expert: u32| {
        let stored = checkpoint.expert(1, expert, hidden, width, None).unwrap();
        (ExpertId(expert), Arc::new(Resident { packed: backend.pack(&stored).unwrap() }))
    };
    let layer = HeldLayer::new([0, 2, 3].map(resident).into());
    let held = Held {
        digest: String::new(),
        hidden: u32::try_from(hidden).unwrap(),
        model_experts: EXPERTS,
        layers: [(LayerId(1), layer)].into(),
        _source: None,
    };
    let key = ShelfKey { placement_uid: "uid".to_owned(), revision: Revision(1) };
    Shelves::default().with(key, Arc::new(held))
}

fn answer(request: &v1::ForwardRequest) -> Result<Vec<f32>, Refusal> {
    let backend = Gated::new(Gate::Open);
    let (response, counted) = forward::answer(request, &shelves(&*backend), &*backend)?;
    assert_eq!((response.call_id, response.dtype), (request.call_id, request.dtype));
    assert_eq!(counted.experts, request.experts);
    Ok(Dtype::from_wire(response.dtype).unwrap().decode(&response.rows))
}

#[test]
fn rows_are_weighted_sums_over_the_experts_held_here() {
    let rows = [
        (numbers(1, HIDDEN), vec![(3, 0.25), (0, 0.5)]),
        (numbers(2, HIDDEN), vec![]),
        (numbers(3, HIDDEN), vec![(2, -1.5)]),
    ];
    let expected: Vec<f64> = rows.iter().flat_map(|(row, picks)| reference(SEED, 1, row, picks)).collect();
    let mut call = request(9, 1, &rows);
    assert_near(&answer(&call).unwrap(), &expected, 1e-5);
    call.rows = Dtype::Bf16.encode(&Dtype::F32.decode(&call.rows));
    call.dtype = Dtype::Bf16.to_wire();
    assert_near(&answer(&call).unwrap(), &expected, 1e-2);
}

#[test]
fn a_call_without_rows_is_answered_without_rows() {
    assert_eq!(answer(&request(1, 1, &[])), Ok(vec![]));
}

#[test]
fn a_row_with_nan_touches_no_other_row() {
    let mut bad = numbers(1, HIDDEN);
    bad[3] = f32::NAN;
    let good = numbers(2, HIDDEN);
    let picks = vec![(0, 0.5), (2, 0.5)];
    let rows = answer(&request(1, 1, &[(bad, picks.clone()), (good.clone(), picks.clone())])).unwrap();
    assert!(rows[..HIDDEN].iter().all(|value| !value.is_finite()));
    assert_eq!(rows[HIDDEN..], answer(&request(1, 1, &[(good, picks)])).unwrap());
}

#[test]
fn every_damaged_call_is_refused_by_field() {
    type Case = (fn(&mut v1::ForwardRequest), ForwardStatus, &'static str);
    let refused = |change: fn(&mut v1::ForwardRequest)| {
        let mut call = one_row(1);
        change(&mut call);
        let refusal = answer(&call).unwrap_err();
        (refusal.status, refusal.detail)
    };
    let cases: [Case; 18] = [
        (|call| call.dtype = 0, ForwardStatus::Invalid, "dtype 0 is unknown"),
        (|call| call.tokens = 2, ForwardStatus::Invalid, "rows are 32 bytes: 2 tokens × 8 values are 64"),
        (|call| call.tokens = u32::MAX, ForwardStatus::Invalid, "tokens 4294967295 are too many"),
        (|call| call.hidden = 0, ForwardStatus::Invalid, "hidden is 0"),
        (|call| call.hidden = u32::MAX, ForwardStatus::Invalid, "rows are 32 bytes"),
        (|call| call.rows = call.rows.slice(1..), ForwardStatus::Invalid, "rows are 31 bytes"),
        (|call| call.dtype = Dtype::Bf16.to_wire(), ForwardStatus::Invalid, "rows are 32 bytes"),
        (|call| call.offsets.clear(), ForwardStatus::Invalid, "offsets have 0 entries: send tokens + 1 = 2"),
        (|call| call.offsets[0] = 1, ForwardStatus::Invalid, "offsets do not start with 0"),
        (|call| call.offsets[1] = 3, ForwardStatus::Invalid, "experts have 2 entries: the last offset says 3"),
        (|call| call.experts.clear(), ForwardStatus::Invalid, "experts have 0 entries"),
        (|call| call.weights.push(1.0), ForwardStatus::Invalid, "weights have 3 entries: experts have 2"),
        (|call| call.experts[0] = 4, ForwardStatus::Invalid, "experts name 4: the model has experts 0 to 3"),
        (
            |call| {
                (call.experts, call.weights, call.offsets) = (vec![0; 4], vec![1.0; 4], vec![0, 4]);
            },
            ForwardStatus::Invalid,
            "experts of token 0 are more than the 3 that this layer has here",
        ),
        (|call| call.experts[0] = 1, ForwardStatus::NotHeld, "expert 1 of layer 1 is not on this device in revision 1"),
        (|call| call.layer = 2, ForwardStatus::NotHeld, "layer 2 has no slot on this device"),
        (|call| call.revision = 5, ForwardStatus::NotHeld, "revision 5 is not served by this device, 1 are"),
        (|call| call.placement_uid = "x".to_owned(), ForwardStatus::NotHeld, "placement_uid \"x\" is not served"),
    ];
    for (change, status, detail) in cases {
        let (got, sentence) = refused(change);
        assert_eq!(got, status, "{sentence}");
        assert!(sentence.starts_with(detail), "{sentence}\ndoes not start with {detail:?}");
    }
}

#[test]
fn falling_offsets_are_refused() {
    let row = (numbers(1, HIDDEN), vec![(0, 1.0)]);
    let mut call = request(1, 1, &[row.clone(), row]);
    call.offsets = vec![0, 2, 1];
    assert!(answer(&call).unwrap_err().detail.starts_with("offsets fall at token 1"));
}

#[test]
fn a_barred_device_answers_device_lost_whatever_is_asked() {
    let backend = Gated::new(Gate::Open);
    let shelves = shelves(&*backend).bar("XID 79");
    let refusal = forward::answer(&one_row(1), &shelves, &*backend).unwrap_err();
    assert_eq!(refusal.status, ForwardStatus::DeviceLost);
    assert_eq!(refusal.detail, "device lost (XID 79): use another replica");
    assert_eq!(backend.calls(), 0);
}
