//! One expert call, from request to response. It knows no transport: bytes of activations in, bytes of
//! weighted sums out, and a status with a sentence for everything else.
//!
//! Every length is checked against every other before a kernel sees it. Activations are never logged and
//! never part of a detail; a NaN in a row stays in that row and is no error.

use berth_kernels::{Backend, Batch};
use berth_proto::{
    MESSAGE_LIMIT,
    v1::{ForwardRequest, ForwardResponse, ForwardStatus},
};
use berth_types::{ExpertId, LayerId, Revision};

use super::{
    codec::Dtype,
    shelf::{Held, HeldLayer, Shelves},
};

/// Most rows in one call; longer prompts come in several.
pub(crate) const TOKENS_LIMIT: u32 = 65_536;

/// Why a call has no rows in its answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Refusal {
    /// What the caller should do about it.
    pub(crate) status: ForwardStatus,
    /// What is wrong and what to do, without any activation.
    pub(crate) detail: String,
}

impl Refusal {
    /// A refusal with its sentence.
    #[must_use]
    pub(crate) fn new(status: ForwardStatus, detail: impl Into<String>) -> Self {
        Self { status, detail: detail.into() }
    }

    fn invalid(field: &str, problem: impl std::fmt::Display) -> Self {
        Self::new(ForwardStatus::Invalid, format!("{field} {problem}"))
    }

    /// The device is gone; the caller takes another replica.
    #[must_use]
    pub(crate) fn lost(reason: &str) -> Self {
        Self::new(ForwardStatus::DeviceLost, format!("device lost ({reason}): use another replica"))
    }

    /// As it travels.
    #[must_use]
    pub(crate) fn into_wire(self, call_id: u64) -> ForwardResponse {
        ForwardResponse { call_id, status: self.status.into(), detail: self.detail, ..Default::default() }
    }
}

/// Tokens that one call sent to each expert of its layer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Counted {
    /// Placement of the call.
    pub(crate) placement_uid: String,
    /// Layer of the call.
    pub(crate) layer: LayerId,
    /// One entry per (row, expert) pair.
    pub(crate) experts: Vec<u32>,
}

/// Computes one call on the ready shelves.
///
/// # Errors
/// [`Refusal`] with `DEVICE_LOST` when barred, `INVALID` for a request that contradicts itself,
/// `NOT_HELD` for what is on another device, `FAILED` when the kernel gives up.
pub(crate) fn answer(
    request: &ForwardRequest,
    shelves: &Shelves,
    backend: &dyn Backend,
) -> Result<(ForwardResponse, Counted), Refusal> {
    if let Some(reason) = shelves.barred() {
        return Err(Refusal::lost(reason));
    }
    let shape = Shape::check(request)?;
    let held = shelves
        .find(&request.placement_uid, Revision(request.revision))
        .map_err(|missing| Refusal::new(ForwardStatus::NotHeld, missing.to_string()))?;
    let (layer, positions) = resolve(request, held)?;
    let rows = shape.dtype.decode(&request.rows);
    let mut sums = vec![0.0_f32; rows.len()];
    let batch = Batch {
        hidden: shape.hidden,
        rows: &rows,
        offsets: &request.offsets,
        experts: &positions,
        weights: &request.weights,
        table: layer.table(),
    };
    backend
        .forward(&batch, &mut sums)
        .map_err(|error| Refusal::new(ForwardStatus::Failed, format!("layer {}: {error}", request.layer)))?;
    let response = ForwardResponse {
        call_id: request.call_id,
        status: ForwardStatus::Ok.into(),
        detail: String::new(),
        dtype: shape.dtype.to_wire(),
        rows: shape.dtype.encode(&sums),
    };
    let counted = Counted {
        placement_uid: request.placement_uid.clone(),
        layer: LayerId(request.layer),
        experts: request.experts.clone(),
    };
    Ok((response, counted))
}

/// Sizes of a request that agree with each other.
#[derive(Debug)]
struct Shape {
    dtype: Dtype,
    hidden: usize,
}

impl Shape {
    fn check(request: &ForwardRequest) -> Result<Self, Refusal> {
        let dtype = Dtype::from_wire(request.dtype)
            .ok_or_else(|| Refusal::invalid("dtype", format_args!("{} is unknown: send f32 or bf16", request.dtype)))?;
        if request.tokens > TOKENS_LIMIT {
            let problem = format_args!("{} are too many: send at most {TOKENS_LIMIT} in a call", request.tokens);
            return Err(Refusal::invalid("tokens", problem));
        }
        let hidden = size(request.hidden);
        if hidden == 0 {
            return Err(Refusal::invalid("hidden", "is 0: send the model's hidden size"));
        }
        let tokens = size(request.tokens);
        let bytes = tokens.saturating_mul(hidden).saturating_mul(dtype.size());
        if request.rows.len() != bytes || bytes > MESSAGE_LIMIT {
            let got = request.rows.len();
            let problem = format_args!("are {got} bytes: {tokens} tokens × {hidden} values are {bytes}");
            return Err(Refusal::invalid("rows", problem));
        }
        check_offsets(request, tokens)?;
        Ok(Self { dtype, hidden })
    }
}

/// Offsets rise from 0 to the number of experts; weights are as many.
fn check_offsets(request: &ForwardRequest, tokens: usize) -> Result<(), Refusal> {
    let (offsets, entries) = (&request.offsets, request.experts.len());
    if offsets.len() != tokens.saturating_add(1) {
        let problem = format_args!("have {} entries: send tokens + 1 = {}", offsets.len(), tokens + 1);
        return Err(Refusal::invalid("offsets", problem));
    }
    if offsets.first() != Some(&0) {
        return Err(Refusal::invalid("offsets", "do not start with 0"));
    }
    if let Some(row) = offsets.array_windows::<2>().position(|[start, end]| start > end) {
        return Err(Refusal::invalid(
            "offsets",
            format_args!("fall at token {row}: each must be at least the one before"),
        ));
    }
    let last = offsets.last().copied().map_or(0, size);
    if last != entries {
        return Err(Refusal::invalid("experts", format_args!("have {entries} entries: the last offset says {last}")));
    }
    if request.weights.len() != entries {
        let got = request.weights.len();
        return Err(Refusal::invalid("weights", format_args!("have {got} entries: experts have {entries}")));
    }
    Ok(())
}

/// The layer of the call and, for each of its experts, the position in the layer's table.
fn resolve<'a>(request: &ForwardRequest, held: &'a Held) -> Result<(&'a HeldLayer, Vec<u32>), Refusal> {
    if request.hidden != held.hidden {
        let problem = format_args!("is {}: the model has {}", request.hidden, held.hidden);
        return Err(Refusal::invalid("hidden", problem));
    }
    if let Some(expert) = request.experts.iter().find(|expert| **expert >= held.model_experts) {
        let problem =
            format_args!("name {expert}: the model has experts 0 to {}", held.model_experts.saturating_sub(1));
        return Err(Refusal::invalid("experts", problem));
    }
    let missing = |what: String| Refusal::new(ForwardStatus::NotHeld, format!("{what}: take the routes again"));
    let not_here =
        || missing(format!("layer {} has no slot on this device in revision {}", request.layer, request.revision));
    let layer = held.layers.get(&LayerId(request.layer)).ok_or_else(not_here)?;
    let most = layer.experts().len();
    if let Some(row) = request.offsets.array_windows::<2>().position(|[start, end]| size(end - start) > most) {
        let problem = format_args!("of token {row} are more than the {most} that this layer has here");
        return Err(Refusal::invalid("experts", problem));
    }
    let position = |expert: &u32| {
        let found = layer.position(ExpertId(*expert)).and_then(|position| u32::try_from(position).ok());
        found.ok_or_else(|| {
            missing(format!(
                "expert {expert} of layer {} is not on this device in revision {}",
                request.layer, request.revision
            ))
        })
    };
    let positions = request.experts.iter().map(position).collect::<Result<Vec<_>, _>>()?;
    Ok((layer, positions))
}

/// A count of the wire as a length; on a machine where it does not fit it is as long as can be.
fn size(count: u32) -> usize {
    usize::try_from(count).unwrap_or(usize::MAX)
}
