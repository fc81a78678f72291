//! What recorded load windows say of usual traffic, for a profile: token counts summed over the windows, each layer in
//! shares of its hottest expert.

use std::{fs, path::Path};

use anyhow::{Context as _, bail};
use berth_crds::model_profile::LayerShares;
use berth_types::Geometry;

/// The shares that `file` gives: little-endian u32 `[windows][layers][experts]`, expert layers only, as
/// `berth bench placement` reads them; and how many windows there are.
pub(super) fn shares(file: &Path, geometry: &Geometry) -> anyhow::Result<(Vec<LayerShares>, usize)> {
    let bytes = fs::read(file).with_context(|| format!("reading --loads {}", file.display()))?;
    let experts = usize::try_from(geometry.experts)?;
    let layers: Vec<_> = geometry.expert_layer_ids().collect();
    let window = layers.len().saturating_mul(experts).saturating_mul(4);
    if bytes.is_empty() || window == 0 || !bytes.len().is_multiple_of(window) {
        bail!(
            "--loads {}: {} bytes are no whole windows of {} expert layers x {experts} experts x 4 bytes",
            file.display(),
            bytes.len(),
            layers.len()
        );
    }
    let (counts, _) = bytes.as_chunks::<4>();
    let mut sums = vec![0_u64; window / 4];
    for (at, count) in counts.iter().enumerate() {
        sums[at % (window / 4)] += u64::from(u32::from_le_bytes(*count));
    }
    let layer = |(layer, sums): (&berth_types::LayerId, &[u64])| {
        let most = sums.iter().copied().max().unwrap_or(0).max(1);
        // The sum is at most `most`, so the share fits.
        let share =
            |sum: &u64| u16::try_from(u128::from(*sum) * u128::from(u16::MAX) / u128::from(most)).unwrap_or(u16::MAX);
        LayerShares { layer: layer.0, shares: sums.iter().map(share).collect() }
    };
    Ok((layers.iter().zip(sums.chunks(experts)).map(layer).collect(), bytes.len() / window))
}
