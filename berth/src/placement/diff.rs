//! What one revision changed in another, device by device. Pure.

use std::collections::{BTreeMap, BTreeSet};

use berth_crds::{PlacementMap, expert_placement::PlanCertificate};
use berth_planner::Layout;
use berth_scheduler::index::from_map;
use berth_types::{Bytes, DeviceId, ExpertId, LayerId};
use kube::ResourceExt;
use serde::Serialize;

use super::Shown;
use crate::table::Table;

/// What `--diff -o json` writes. Fields are only ever added.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct DiffView {
    schema: &'static str,
    namespace: String,
    name: String,
    from_revision: u64,
    to_revision: u64,
    /// Replicas that devices load, and drop.
    loads: usize,
    drops: usize,
    /// Expert bytes that devices load.
    moved_bytes: u64,
    /// Replicas that stay where they are.
    kept: usize,
    /// Why the revision was made, if that is still known.
    why: String,
    /// How good it is, if it is the assigned one.
    certificate: Option<PlanCertificate>,
    devices: Vec<DeviceChange>,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct DeviceChange {
    device: DeviceId,
    /// `added`, `removed` or `changed`.
    change: &'static str,
    slots_before: u32,
    slots_after: u32,
    loads: usize,
    drops: usize,
    load_bytes: u64,
    moves: Vec<Move>,
}

/// What happens in one layer of a device.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Move {
    layer: LayerId,
    loads: Vec<ExpertId>,
    drops: Vec<ExpertId>,
}

impl DiffView {
    /// Nothing changed.
    pub(crate) fn is_empty(&self) -> bool {
        self.devices.is_empty()
    }
}

type Held = BTreeSet<(LayerId, ExpertId)>;

/// What `shown` changes in `before`, in one layer if `layer` is given.
pub(crate) fn diff(shown: &Shown<'_>, before: &PlacementMap, layer: Option<u32>) -> DiffView {
    let (old_layout, new_layout) = (from_map(before), from_map(shown.map));
    let only =
        |held: &Held| held.iter().filter(|(at, _)| layer.is_none_or(|layer| *at == LayerId(layer))).copied().collect();
    let held = |layout: &Layout| -> BTreeMap<DeviceId, Held> {
        layout.replicas().into_iter().map(|(device, held)| (device.clone(), only(&held))).collect()
    };
    let (old, new) = (held(&old_layout), held(&new_layout));
    let slots = |layout: &Layout, device: &DeviceId| {
        layout.devices.iter().find(|entry| entry.device == *device).map_or(0, |entry| entry.slots)
    };
    let none = Held::new();
    let (mut devices, mut kept) = (Vec::new(), 0);
    for device in old.keys().chain(new.keys()).collect::<BTreeSet<_>>() {
        let (had, has) = (old.get(device).unwrap_or(&none), new.get(device).unwrap_or(&none));
        kept += had.intersection(has).count();
        let (slots_before, slots_after) = (slots(&old_layout, device), slots(&new_layout, device));
        if had == has && slots_before == slots_after {
            continue;
        }
        let loads = has.difference(had).count();
        devices.push(DeviceChange {
            device: device.clone(),
            change: match (old.contains_key(device), new.contains_key(device)) {
                (false, _) => "added",
                (true, false) => "removed",
                (true, true) => "changed",
            },
            slots_before,
            slots_after,
            loads,
            drops: had.difference(has).count(),
            load_bytes: shown.bytes(device, loads).get(),
            moves: moves(had, has),
        });
    }
    let to = shown.map.spec.revision;
    let status = shown.placement.status.clone().unwrap_or_default();
    let made = status.decisions.into_iter().find(|decision| decision.revision == to && decision.from_revision < to);
    DiffView {
        schema: "berth.dev/placement-diff/v1",
        why: made.map(|decision| decision.why).unwrap_or_default(),
        certificate: status.certificate.filter(|certificate| certificate.revision == to),
        namespace: shown.placement.namespace().unwrap_or_default(),
        name: shown.placement.name_any(),
        from_revision: before.spec.revision,
        to_revision: shown.map.spec.revision,
        loads: devices.iter().map(|change| change.loads).sum(),
        drops: devices.iter().map(|change| change.drops).sum(),
        moved_bytes: devices.iter().map(|change| change.load_bytes).sum(),
        kept,
        devices,
    }
}

fn moves(had: &Held, has: &Held) -> Vec<Move> {
    let mut layers: BTreeMap<LayerId, (Vec<ExpertId>, Vec<ExpertId>)> = BTreeMap::new();
    for (layer, expert) in has.difference(had) {
        layers.entry(*layer).or_default().0.push(*expert);
    }
    for (layer, expert) in had.difference(has) {
        layers.entry(*layer).or_default().1.push(*expert);
    }
    layers.into_iter().map(|(layer, (loads, drops))| Move { layer, loads, drops }).collect()
}

/// A difference for people.
pub(crate) fn text(view: &DiffView) -> String {
    let DiffView { namespace, name, from_revision, to_revision, loads, drops, moved_bytes, kept, devices, .. } = view;
    let head = format!("{namespace}/{name}   revision {from_revision} -> {to_revision}");
    if devices.is_empty() {
        return format!("{head}: no change");
    }
    let mut table = Table::new(&["DEVICE", "CHANGE", "SLOTS A LAYER", "LOADS", "DROPS", "BYTES TO LOAD"]);
    for change in devices {
        let slots = match (change.slots_before, change.slots_after) {
            (before, after) if before == after => after.to_string(),
            (before, after) => format!("{before} -> {after}"),
        };
        table.row([
            change.device.to_string(),
            change.change.to_owned(),
            slots,
            change.loads.to_string(),
            change.drops.to_string(),
            Bytes(change.load_bytes).to_string(),
        ]);
    }
    let sum = format!("{loads} replicas load ({}), {drops} drop, {kept} stay", Bytes(*moved_bytes));
    let why = Some(&view.why).filter(|why| !why.is_empty()).map(|why| format!("why: {why}\n"));
    let certified = view.certificate.as_ref().map(|certificate| super::certified(certificate) + "\n");
    let reasons = why.into_iter().chain(certified).collect::<String>();
    let mut text = format!("{head}\n{sum}\n{reasons}\n{table}");
    for change in devices.iter().filter(|change| !change.moves.is_empty()) {
        text.push_str(&format!("\n{}\n", change.device));
        for Move { layer, loads, drops } in &change.moves {
            let marked = |mark: &str, experts: &[ExpertId]| -> String {
                experts.iter().map(|expert| format!(" {mark}{expert}")).collect()
            };
            text.push_str(&format!("  layer {layer}:{}{}\n", marked("+", loads), marked("-", drops)));
        }
    }
    text
}
