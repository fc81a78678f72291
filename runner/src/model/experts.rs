//! A layer of routed experts with a shared one (DeepSeekMoE, arXiv 2401.06066, eq. 3–5; V3, arXiv 2412.19437, eq. 12–16):
//!
//! ```text
//! y = Σ wᵢ · expertᵢ(h) + shared(h)        wᵢ = scale · sᵢ / Σ chosen s        s = score(gate · h)
//! ```
//!
//! Which experts: the `top_k` best by score and bias, or those of a token-id table. Scores are computed in float32.
//! Routed experts are computed elsewhere: the layer's calls are started, the shared expert is computed meanwhile, then
//! the answers are awaited. Nothing here knows where they come from.

use berth_kernels::{Linear, Router};
use berth_types::LayerId;

use super::{
    chunk::{Outside, Phase, Rows},
    dense::Dense,
    linear::apply,
    maths::add,
};
use crate::{
    error::StepError,
    experts::{LayerCall, Pending},
    num::{u32_of, usize_of},
};

/// The part of an expert layer that every runner computes itself.
#[derive(Debug)]
pub(crate) struct ExpertLayer {
    /// [experts, hidden].
    pub(crate) gate: Linear,
    pub(crate) choice: Choice,
    pub(crate) router: Router,
    pub(crate) shared: Option<Dense>,
}

/// A layer whose calls are under way. Dropping it ends them.
#[derive(Debug)]
pub(crate) struct Underway {
    pending: Pending,
    shared: Option<Vec<f32>>,
}

impl Underway {
    /// Routed plus shared experts, [T × hidden].
    ///
    /// # Errors
    /// What the calls give.
    pub(crate) fn finish(self, ended: &dyn Fn(Phase)) -> Result<Vec<f32>, StepError> {
        let mut out = self.pending.wait()?;
        if let Some(shared) = self.shared {
            add(&mut out, &shared);
        }
        ended(Phase::Waiting);
        Ok(out)
    }
}

/// How experts are chosen.
#[derive(Debug)]
pub(crate) enum Choice {
    /// By score plus this, [experts].
    Bias(Vec<f32>),
    /// By token id: [vocab × top_k].
    Table(Vec<u32>),
}

impl ExpertLayer {
    /// Starts the routed experts of `h` ([T × hidden]) and computes the shared one meanwhile.
    ///
    /// # Errors
    /// When calls cannot be started, or too little memory.
    pub(crate) fn begin(
        &self,
        layer: usize,
        h: &[f32],
        rows: &Rows,
        outside: &mut Outside<'_>,
    ) -> Result<Underway, StepError> {
        let (experts, weights) = self.route(h, rows)?;
        (outside.ended)(Phase::Routing);
        let call = LayerCall {
            layer: LayerId(u32_of(layer)),
            hidden: h.len() / rows.len().max(1),
            rows: h,
            top_k: self.router.top_k,
            experts: &experts,
            weights: &weights,
            spread: &rows.spread,
        };
        let pending = (outside.start)(&call, rows.first)?;
        (outside.ended)(Phase::Calls);
        let shared = self.shared.as_ref().map(|shared| shared.forward(h, rows.len())).transpose()?;
        (outside.ended)(Phase::Shared);
        Ok(Underway { pending, shared })
    }

    /// Experts and weights of every row, [T × top_k] each.
    fn route(&self, h: &[f32], rows: &Rows) -> Result<(Vec<u32>, Vec<f32>), StepError> {
        let logits = apply(&self.gate, h, rows.len())?;
        let (mut experts, mut weights) = (Vec::new(), Vec::new());
        let top_k = self.router.top_k;
        let forced: Option<Vec<u32>> = match &self.choice {
            Choice::Bias(_) => None,
            // Tokens are checked against the vocabulary before they come here.
            Choice::Table(table) => Some(
                rows.tokens.iter().flat_map(|token| &table[usize_of(*token) * top_k..][..top_k]).copied().collect(),
            ),
        };
        let bias = if let Choice::Bias(bias) = &self.choice { Some(bias.as_slice()) } else { None };
        let count = self.gate.rows();
        self.router.route_experts(count, &logits, bias, forced.as_deref(), &mut experts, &mut weights)?;
        Ok((experts, weights))
    }
}
