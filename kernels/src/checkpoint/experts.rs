//! Expert weights under their published names.
//!
//! V3 and its kin: `model.layers.L.mlp.experts.E.{gate,up,down}_proj`; V4: `layers.L.ffn.experts.E.{w1,w3,w2}`.

use super::Checkpoint;
use super::error::CheckpointError;
use crate::backend::StoredExpert;

/// Prefix of a layer's feed-forward block, and the names of gate, up and down, family by family.
const FAMILIES: [(&str, &str, [&str; 3]); 3] = [
    ("model.layers.", ".mlp.", ["gate_proj", "up_proj", "down_proj"]),
    ("layers.", ".ffn.", ["w1", "w3", "w2"]),
    ("model.layers.", ".ffn.", ["w1", "w3", "w2"]),
];

impl Checkpoint {
    /// One routed expert: gate and up [width × hidden], down [hidden × width], each with its scales.
    ///
    /// # Errors
    /// `Missing` naming every spelling that was tried, `Dtype`, `Shape`, or a read error.
    pub fn expert(
        &self,
        layer: u32,
        expert: u32,
        hidden: usize,
        width: usize,
        limit: Option<f32>,
    ) -> Result<StoredExpert, CheckpointError> {
        self.feed_forward(layer, &format!("experts.{expert}."), hidden, width, limit)
    }

    /// A layer's shared expert. `width` counts all shared experts together, as they are stored.
    ///
    /// # Errors
    /// As [`Checkpoint::expert`].
    pub fn shared_expert(
        &self,
        layer: u32,
        hidden: usize,
        width: usize,
        limit: Option<f32>,
    ) -> Result<StoredExpert, CheckpointError> {
        self.feed_forward(layer, "shared_experts.", hidden, width, limit)
    }

    /// A dense layer's block, of the same three matrices.
    ///
    /// # Errors
    /// As [`Checkpoint::expert`].
    pub fn dense(
        &self,
        layer: u32,
        hidden: usize,
        width: usize,
        limit: Option<f32>,
    ) -> Result<StoredExpert, CheckpointError> {
        self.feed_forward(layer, "", hidden, width, limit)
    }

    fn feed_forward(
        &self,
        layer: u32,
        which: &str,
        hidden: usize,
        width: usize,
        limit: Option<f32>,
    ) -> Result<StoredExpert, CheckpointError> {
        let name = |family: &(&str, &str, [&str; 3]), part: usize| {
            format!("{}{layer}{}{which}{}.weight", family.0, family.1, family.2[part])
        };
        let Some(family) = FAMILIES.iter().find(|f| self.has(&name(f, 0))) else {
            return Err(self.missing(format!("{} (or {})", name(&FAMILIES[0], 0), name(&FAMILIES[1], 0))));
        };
        Ok(StoredExpert {
            gate: self.matrix(&name(family, 0), width, hidden)?,
            up: self.matrix(&name(family, 1), width, hidden)?,
            down: self.matrix(&name(family, 2), hidden, width)?,
            limit,
        })
    }
}
