//! What the checker can find, and how it says so.

use std::fmt;

use berth_types::{Bytes, DeviceId, ExpertId, LayerId};

/// Something wrong with a plan.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Finding {
    /// The plan has no layout, or a revision that is not the problem's.
    Shape {
        /// What is wrong.
        what: String,
    },
    /// A layer is missing, extra, or has another number of slots than the devices.
    Row {
        /// Wave, from 0.
        wave: usize,
        /// The layer.
        layer: LayerId,
        /// What is wrong.
        what: String,
    },
    /// A device appears twice, is unknown, not allowed, or may not hold this.
    Device {
        /// Wave, from 0.
        wave: usize,
        /// The device.
        device: DeviceId,
        /// What is wrong.
        what: String,
    },
    /// An expert has no replica.
    Missing {
        /// Wave, from 0.
        wave: usize,
        /// The layer.
        layer: LayerId,
        /// The expert.
        expert: ExpertId,
    },
    /// Two replicas of one expert share a device.
    Doubled {
        /// Wave, from 0.
        wave: usize,
        /// The layer.
        layer: LayerId,
        /// The expert.
        expert: ExpertId,
        /// The device.
        device: DeviceId,
    },
    /// The loss of one failure domain would leave an expert without a replica.
    Fragile {
        /// The layer.
        layer: LayerId,
        /// The expert.
        expert: ExpertId,
        /// The failure domain.
        domain: String,
    },
    /// All of several copies are lost with one node although another has an empty slot.
    Gathered {
        /// The layer.
        layer: LayerId,
        /// The expert.
        expert: ExpertId,
        /// The node.
        node: String,
    },
    /// The weights of an expert's replicas are not a split of its tokens.
    Weights {
        /// Wave, from 0.
        wave: usize,
        /// The layer; `None` = all of the wave.
        layer: Option<LayerId>,
        /// What is wrong.
        what: String,
    },
    /// The certificate says something else than the layout and the loads.
    Claim {
        /// What it speaks of.
        what: &'static str,
        /// What it says.
        said: String,
        /// What is so.
        found: String,
    },
    /// A device would hold more bytes than it has room for.
    Bytes {
        /// Wave, from 0.
        wave: usize,
        /// The device.
        device: DeviceId,
        /// Bytes at the peak of the move.
        peak: Bytes,
        /// Bytes it has room for.
        room: Bytes,
    },
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Shape { what } => write!(f, "plan: {what}"),
            Self::Row { wave, layer, what } => write!(f, "wave {wave}, layer {layer}: {what}"),
            Self::Device { wave, device, what } => write!(f, "wave {wave}, {device}: {what}"),
            Self::Missing { wave, layer, expert } => {
                write!(f, "wave {wave}, layer {layer}: expert {expert} has no replica")
            }
            Self::Doubled { wave, layer, expert, device } => {
                write!(f, "wave {wave}, layer {layer}: expert {expert} is twice on {device}")
            }
            Self::Fragile { layer, expert, domain } => {
                write!(f, "layer {layer}: expert {expert} lives in {domain} alone")
            }
            Self::Gathered { layer, expert, node } => {
                write!(f, "layer {layer}: all copies of expert {expert} are on {node} although another node has room")
            }
            Self::Weights { wave, layer: Some(layer), what } => write!(f, "wave {wave}, layer {layer}: {what}"),
            Self::Weights { wave, layer: None, what } => write!(f, "wave {wave}: {what}"),
            Self::Claim { what, said, found } => write!(f, "certificate: {what} is {found}, not {said}"),
            Self::Bytes { wave, device, peak, room } => {
                write!(f, "wave {wave}, {device}: {peak} at the peak, room for {room}")
            }
        }
    }
}
