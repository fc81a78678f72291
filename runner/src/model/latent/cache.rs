//! What attention remembers of one sequence: MLA's compressed key-values (DeepSeek-V2, arXiv 2405.04434, §2.1),
//! one row of `kv_lora_rank + qk_rope_head_dim` float32 values per token and layer. Never shared between
//! sequences; dropping it frees it.

/// The rows of one sequence, by layer.
#[derive(Debug)]
pub(crate) struct Cache {
    width: usize,
    layers: Vec<Vec<f32>>,
}

impl Cache {
    /// An empty cache of `layers` layers with rows of `width` values.
    pub(crate) fn new(layers: usize, width: usize) -> Self {
        Self { width, layers: vec![Vec::new(); layers] }
    }

    /// Rows of one layer, [tokens × width], to append to.
    pub(crate) fn layer_mut(&mut self, layer: usize) -> &mut Vec<f32> {
        &mut self.layers[layer]
    }

    /// Rows of one layer.
    pub(crate) fn layer(&self, layer: usize) -> &[f32] {
        &self.layers[layer]
    }

    /// Values of a row.
    pub(crate) fn width(&self) -> usize {
        self.width
    }
}
