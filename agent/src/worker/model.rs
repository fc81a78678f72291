//! What a checkpoint's `config.json` says of its experts, held against what an order asks for.

use berth_kernels::Checkpoint;
use berth_proto::convert::Shelf;
use berth_types::Geometry;

use super::load_error::LoadError;

/// What a checkpoint's config says of its experts.
pub(super) struct Model {
    pub(super) geometry: Geometry,
    pub(super) hidden: usize,
    pub(super) width: usize,
    pub(super) limit: Option<f32>,
}

impl Model {
    pub(super) fn read(checkpoint: &Checkpoint, uri: &str) -> Result<Self, LoadError> {
        let config = checkpoint.config_json();
        let geometry =
            Geometry::from_config(config).map_err(|cause| LoadError::Geometry { uri: uri.to_owned(), cause })?;
        let limit = match config.get("swiglu_limit") {
            None | Some(serde_json::Value::Null) => None,
            Some(value) => Some(limit(value).ok_or_else(|| LoadError::Config {
                uri: uri.to_owned(),
                field: "swiglu_limit",
                value: value.to_string(),
                expected: "a number above 0, or none",
            })?),
        };
        let size = |count: u32| usize::try_from(count).unwrap_or(usize::MAX);
        let (hidden, width) = (size(geometry.hidden), size(geometry.expert_width));
        Ok(Self { geometry, hidden, width, limit })
    }

    pub(super) fn check(&self, shelf: &Shelf) -> Result<(), LoadError> {
        let last = self.geometry.experts.saturating_sub(1);
        let layers = self.geometry.dense_layers..self.geometry.layers;
        for (layer, slots) in &shelf.slots {
            if !layers.contains(&layer.0) {
                let (first, last) = (layers.start, layers.end.saturating_sub(1));
                return Err(LoadError::Layer { layer: *layer, first, last });
            }
            if let Some(expert) = slots.iter().flatten().find(|expert| expert.0 > last) {
                return Err(LoadError::Expert { layer: *layer, expert: *expert, last });
            }
        }
        Ok(())
    }
}

fn limit(value: &serde_json::Value) -> Option<f32> {
    let limit: f32 = serde_json::from_value(value.clone()).ok()?;
    (limit.is_finite() && limit > 0.0).then_some(limit)
}
