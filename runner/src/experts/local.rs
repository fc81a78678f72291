//! Routed experts in this process: every expert of the model packed for one kernel backend. The oracle of tests and
//! the baseline of measurements; a deployment never uses it, since a large model's experts do not fit one process.

use std::{collections::BTreeMap, sync::Arc};

use berth_kernels::{Backend, Batch, Checkpoint, PackedExpert};
use berth_types::{LayerId, Revision};

use super::{CallCounts, ExpertCalls, LayerCall, Pending, StepCalls};
use crate::{
    error::{ExpertsError, ModelError},
    model::Model,
    num::u32_of,
};

/// All experts of a model.
#[derive(Clone, Debug)]
pub struct LocalExperts {
    backend: Arc<dyn Backend>,
    layers: Arc<BTreeMap<LayerId, Vec<PackedExpert>>>,
}

impl LocalExperts {
    /// Packs every routed expert of `model` from its checkpoint.
    ///
    /// # Errors
    /// A tensor that is missing, has another shape or does not fit memory.
    pub fn load(model: &Model, checkpoint: &Checkpoint, backend: Arc<dyn Backend>) -> Result<Self, ModelError> {
        let mut layers = BTreeMap::new();
        for layer in model.expert_layers() {
            let pack = |expert| {
                let stored = {
                    let (hidden, width, limit) = (model.hidden(), model.expert_width(), model.expert_limit());
                    checkpoint.expert(layer.0, expert, hidden, width, limit)?
                };
                let tensor = format!("expert {expert} of layer {layer}");
                backend.pack(&stored).map_err(|source| ModelError::Pack { tensor, source })
            };
            let experts = (0..u32_of(model.experts())).map(pack).collect::<Result<_, ModelError>>()?;
            layers.insert(layer, experts);
        }
        Ok(Self { backend, layers: Arc::new(layers) })
    }
}

impl ExpertCalls for LocalExperts {
    fn begin(&self) -> Result<Box<dyn StepCalls>, ExpertsError> {
        Ok(Box::new(LocalStep { experts: self.clone(), counts: CallCounts::default() }))
    }
}

struct LocalStep {
    experts: LocalExperts,
    counts: CallCounts,
}

impl StepCalls for LocalStep {
    fn start(&mut self, call: &LayerCall<'_>) -> Result<Pending, ExpertsError> {
        self.counts.calls += 1;
        let failed = |detail: String| ExpertsError::Kernel { layer: call.layer, detail };
        let table = self.experts.layers.get(&call.layer).ok_or_else(|| failed("no such expert layer".to_owned()))?;
        let offsets: Vec<u32> = (0..=call.spread.len()).map(|row| u32_of(row * call.top_k)).collect();
        let batch = Batch {
            hidden: call.hidden,
            rows: call.rows,
            offsets: &offsets,
            experts: call.experts,
            weights: call.weights,
            table,
        };
        let mut out = vec![0.0; call.rows.len()];
        self.experts.backend.forward(&batch, &mut out).map_err(|source| failed(source.to_string()))?;
        Ok(Pending::ready(Ok(out)))
    }

    fn revision(&self) -> Revision {
        Revision(0)
    }

    fn counts(&self) -> CallCounts {
        self.counts
    }
}
