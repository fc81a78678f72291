//! `berth release`: a person vouches for a repaired device. It writes one annotation of the node's AcceleratorNode; the
//! agent then validates the device, and only a validation that passes brings it back.

use std::path::PathBuf;

use anyhow::anyhow;
use berth_agent::releases;
use berth_crds::AcceleratorNode;
use berth_types::DeviceId;
use clap::Args;

use crate::{
    cluster::{Cluster, ClusterArgs},
    output,
    verdict::Verdict,
};

/// Vouch for a repaired device: it is validated, and used again when that passes.
#[derive(Debug, Args)]
pub(crate) struct ReleaseArgs {
    /// The device, <node>/<PCI address> or <node>/<card>.<device>
    device: DeviceId,
    /// Kubeconfig file; by default as kubectl finds it
    #[arg(long)]
    kubeconfig: Option<PathBuf>,
    /// Context of the kubeconfig
    #[arg(long)]
    context: Option<String>,
}

/// Writes the annotation.
pub(crate) fn run(args: ReleaseArgs) -> anyhow::Result<Verdict> {
    let ReleaseArgs { device, kubeconfig, context } = args;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let cluster = Cluster::connect(&ClusterArgs::of(kubeconfig, context)).await?;
        let vouched = |node: &AcceleratorNode| {
            let known = node.status.iter().flat_map(|status| &status.devices).any(|known| known.device == device);
            let unknown = || anyhow!("{device}: its node knows no such device; see berth top devices");
            known.then_some(()).ok_or_else(unknown)?;
            let text = node.metadata.annotations.as_ref().and_then(|all| all.get(releases::ANNOTATION));
            Ok(releases::with(text.map_or("", String::as_str), device.local(), cluster.now_ms()))
        };
        cluster.annotate(device.node(), releases::ANNOTATION, vouched).await?;
        output::say(&format!("{device}: released; it is used again after a validation and its probation"))?;
        Ok(Verdict::Pass)
    })
}
