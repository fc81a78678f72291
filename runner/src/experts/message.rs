//! Expert calls as bytes. A call carries the rows of the tokens it is about, once each, and per token which of the
//! worker's experts it wants; the answer has one row per token. Everything that comes back is checked.

use std::collections::BTreeMap;

use berth_proto::v1::{DType, ForwardRequest, ForwardResponse, ForwardStatus};
use berth_types::LayerId;
use bytes::{BufMut, Bytes, BytesMut};

use super::delivery::Entry;
use crate::{
    num::{u32_of, usize_of},
    routes::Routes,
};

/// A worker's "no".
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Refusal {
    /// Kind of refusal.
    pub(crate) kind: Kind,
    /// Its words; never activations.
    pub(crate) detail: String,
}

/// What a refusal means for the next try.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// The device is gone.
    Lost,
    /// The stream is gone.
    Broken,
    /// It has too much to do.
    Overloaded,
    /// The call is wrong whoever computes it.
    Invalid,
    /// Anything else: another replica may do it.
    Other,
}

/// The rows that a call is about, rising, and what it asks.
pub(crate) fn encode(
    routes: &Routes,
    layer: LayerId,
    hidden: usize,
    rows: &[f32],
    entries: &[Entry],
    deadline_ms: u32,
) -> (Vec<u32>, ForwardRequest) {
    let mut tokens: BTreeMap<u32, Vec<&Entry>> = BTreeMap::new();
    for entry in entries {
        tokens.entry(entry.row).or_default().push(entry);
    }
    let mut bytes = BytesMut::with_capacity(tokens.len() * hidden * size_of::<f32>());
    let mut offsets = vec![0];
    let (mut experts, mut weights) = (Vec::with_capacity(entries.len()), Vec::with_capacity(entries.len()));
    for (row, wanted) in &tokens {
        for value in &rows[usize_of(*row) * hidden..][..hidden] {
            bytes.put_f32_le(*value);
        }
        experts.extend(wanted.iter().map(|entry| entry.expert.0));
        weights.extend(wanted.iter().map(|entry| entry.weight));
        offsets.push(u32_of(experts.len()));
    }
    let request = ForwardRequest {
        call_id: 0,
        placement_uid: routes.placement_uid.clone(),
        revision: routes.revision.0,
        layer: layer.0,
        tokens: u32_of(tokens.len()),
        hidden: u32_of(hidden),
        dtype: DType::DtypeF32.into(),
        rows: bytes_of(bytes.freeze()),
        offsets,
        experts,
        weights,
        deadline_ms,
    };
    (tokens.into_keys().collect(), request)
}

/// The generated field's type.
fn bytes_of<T: From<Bytes>>(bytes: Bytes) -> T {
    bytes.into()
}

/// The rows of an answer to a call about `tokens` tokens, [tokens × hidden].
///
/// # Errors
/// The worker's refusal, or what is wrong with its answer.
pub(crate) fn decode(answer: &ForwardResponse, tokens: usize, hidden: usize) -> Result<Vec<f32>, Refusal> {
    let kind = match answer.status() {
        ForwardStatus::Ok => None,
        ForwardStatus::DeviceLost => Some(Kind::Lost),
        ForwardStatus::Overloaded => Some(Kind::Overloaded),
        ForwardStatus::Invalid => Some(Kind::Invalid),
        ForwardStatus::Unspecified | ForwardStatus::NotHeld | ForwardStatus::Deadline | ForwardStatus::Failed => {
            Some(Kind::Other)
        }
    };
    if let Some(kind) = kind {
        return Err(Refusal { kind, detail: format!("{}: {}", answer.status().as_str_name(), answer.detail) });
    }
    let malformed = |detail: String| Err(Refusal { kind: Kind::Other, detail });
    if answer.dtype() != DType::DtypeF32 {
        return malformed(format!("the answer's dtype is {}, expected float32", answer.dtype().as_str_name()));
    }
    let expected = tokens * hidden * size_of::<f32>();
    if answer.rows.len() != expected {
        return malformed(format!("the answer has {} bytes of rows, expected {expected}", answer.rows.len()));
    }
    let (values, _) = answer.rows.as_chunks::<4>();
    Ok(values.iter().map(|value| f32::from_le_bytes(*value)).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::routes::tests::table;
    use berth_types::ExpertId;
    use proptest::prelude::*;

    #[test]
    fn a_row_travels_once_with_all_it_wants() {
        let routes = Routes::new(table(7, &[]));
        let entry = |row, expert, weight| Entry { row, expert: ExpertId(expert), weight, spread: 0 };
        let entries = [entry(2, 5, 0.5), entry(0, 1, 1.0), entry(2, 3, 0.25)];
        let rows = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0];
        let (tokens, request) = encode(&routes, LayerId(1), 2, &rows, &entries, 9);
        assert_eq!(tokens, [0, 2]);
        assert_eq!((request.revision, request.tokens, request.hidden), (7, 2, 2));
        assert_eq!((request.offsets, request.experts), (vec![0, 1, 3], vec![1, 5, 3]));
        let sent: Vec<u8> = [1.0_f32, 2.0, 5.0, 6.0].iter().flat_map(|value| value.to_le_bytes()).collect();
        assert_eq!(request.rows, sent);
    }

    proptest! {
        #[test]
        fn any_answer_is_taken_or_refused_cleanly(
            status in -1_i32..9,
            dtype in -1_i32..4,
            rows in proptest::collection::vec(any::<u8>(), 0..40),
            tokens in 0_usize..4,
        ) {
            let answer = ForwardResponse { status, dtype, rows: rows.clone().into(), ..Default::default() };
            match decode(&answer, tokens, 2) {
                Ok(values) => prop_assert!(values.len() * 4 == rows.len() && status == 1 && dtype == 1),
                Err(refusal) => prop_assert!(!refusal.detail.is_empty()),
            }
        }
    }
}
