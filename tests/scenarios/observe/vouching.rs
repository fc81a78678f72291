//! `berth release` and `berth faults --node` as a person uses them, against a real API server and the agents of a running
//! cluster. An API server proxies to no loopback address, and here every pod has one: what is asked of an agent through
//! it is refused there, and the refusal must say by whom and for what.

use berth_agent::releases;
use berth_crds::AcceleratorNode;
use berth_tests::demo::objects;
use berth_types::DeviceId;
use kube::{Api, ResourceExt as _};

use super::{PATIENCE, Watched};

/// A device that was lost is vouched for; what is not on the node is not.
pub(super) async fn a_person_vouches_for_a_device(watched: &Watched, device: &DeviceId) {
    let said = watched.cluster.ask(&["release", &device.to_string()]).await.expect("an answer");
    assert!(said.contains(&format!("{device}: released")), "{said}");
    let nodes: Api<AcceleratorNode> = Api::all(watched.cluster.client().clone());
    let node = nodes.get(device.node()).await.expect("a node");
    let text = node.annotations().get(releases::ANNOTATION).expect("an annotation");
    let released: Vec<_> = releases::parse(text).into_iter().map(|release| release.local).collect();
    assert_eq!(released, [device.local()], "{text}");
    objects::wait_for("the agent's word that it heard of it", PATIENCE, || async {
        let lines = watched.log("agent");
        let heard =
            lines.iter().any(|line| line["message"] == "released by a person" && line["local"] == device.local());
        Ok(if heard { Ok(()) } else { Err(format!("{} lines", lines.len())) })
    })
    .await
    .expect("heard");
    // Vouched for, and still to be proven: nothing is used again by a word alone.
    let status = nodes.get(device.node()).await.expect("a node").status.expect("a status");
    let lost = status.devices.iter().find(|known| known.device == *device).expect("the device");
    assert_ne!(lost.admission, berth_types::Admission::Schedulable, "{lost:?}");
    let strange = format!("{}/0000:77:00.0", device.node());
    let said = watched.cluster.ask(&["release", &strange]).await.expect("an answer");
    assert!(said.contains(&strange) && said.contains("no such device"), "{said}");
}

/// The agent of a node is found by the API server's own lists, and asked through it.
pub(super) async fn incidents_are_asked_of_the_agent_of_a_node(watched: &Watched, device: &DeviceId) {
    let said = watched.cluster.ask(&["faults", "--node", device.node(), "-o", "csv"]).await.expect("an answer");
    let told = said.starts_with("node,device,") && said.contains(device.local()) && said.contains("DeviceLost");
    let refused = said.contains("proxy to pods") && said.contains("address not allowed");
    assert!(told || refused, "{said}");
    let said = watched.cluster.ask(&["faults", "--node", "nobody"]).await.expect("an answer");
    assert!(said.contains("no agent runs on \"nobody\""), "{said}");
}
