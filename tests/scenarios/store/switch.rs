//! From the API server to etcd and back, while a placement serves: no expert moves and no revision falls.

use std::collections::BTreeSet;

use berth_crds::{ExpertPlacement, PlacementMap};
use berth_runtime::Clock;
use berth_scheduler::store::{Etcd, StoreConfig, StoreKind};
use berth_tests::{
    EtcdServer,
    control_plane::{ControlPlane, ControlPlaneConfig},
    etcd::EtcdOptions,
};
use kube::{
    Api, Client,
    api::{DeleteParams, ListParams, PostParams},
};
use serde_json::Value;
use tokio::{sync::watch, task::JoinSet};

use super::config;
use crate::{
    cluster::eventually,
    crd_rules,
    scheduler::{Agents, Replica, add_node, number, placement, status},
};

const NAME: &str = "p";

/// Revisions of the maps at the API server.
async fn at_the_api(client: &Client) -> Vec<u64> {
    let maps: Api<PlacementMap> = Api::namespaced(client.clone(), "default");
    let mut all: Vec<u64> =
        maps.list(&ListParams::default()).await.unwrap().items.into_iter().map(|map| map.spec.revision).collect();
    all.sort_unstable();
    all
}

async fn in_etcd(server: &EtcdServer) -> Vec<u64> {
    let maps = Etcd::new(config(server), Clock::real()).maps().await.unwrap();
    maps.into_iter().map(|(_, map)| map.spec.revision).collect()
}

/// The status once the next leader has claimed the placement, which must not have changed by it.
async fn claimed(client: &Client, before: &Value) -> Value {
    let epoch = number(before, "/assignment/epoch");
    let live =
        status(client, NAME, "claimed by the next leader", |live| number(live, "/assignment/epoch") > epoch).await;
    for field in ["/assignment/revision", "/assignment/digest", "/assignment/devices", "/servingRevision"] {
        assert_eq!(live.pointer(field), before.pointer(field), "{field}");
    }
    live
}

#[tokio::test(flavor = "multi_thread")]
async fn switching_the_store_and_back_moves_no_expert() {
    let (plane, server) = tokio::join!(
        ControlPlane::start(ControlPlaneConfig::named("switch")),
        EtcdServer::start(EtcdOptions::default())
    );
    let (plane, server) = (plane.unwrap(), server.unwrap());
    let client = plane.client().unwrap();
    crd_rules::install(&client).await;
    let (lose, lost) = watch::channel(BTreeSet::new());
    let mut agents = Agents { client: client.clone(), tasks: JoinSet::new() };
    for node in ["n1", "n2"] {
        add_node(&client, node).await;
        agents.start(node, lost.clone());
    }
    let placements: Api<ExpertPlacement> = Api::namespaced(client.clone(), "default");
    placements.create(&PostParams::default(), &placement(NAME)).await.unwrap();
    let store = |kind| StoreConfig { kind, etcd: Some(config(&server)) };

    let first = Replica::with_store("one", client.clone(), StoreConfig::default());
    let before = status(&client, NAME, "revision 1 serves", |live| number(live, "/servingRevision") == 1).await;
    first.end().await;

    let second = Replica::with_store("two", client.clone(), store(StoreKind::Etcd));
    claimed(&client, &before).await;
    assert_eq!(
        (at_the_api(&client).await, in_etcd(&server).await),
        (vec![1], vec![1]),
        "copied, and kept for a way back"
    );
    lose.send_replace(["n1/0000:01:00.0".to_owned()].into());
    let before = status(&client, NAME, "revision 2 serves", |live| number(live, "/servingRevision") == 2).await;
    assert_eq!((at_the_api(&client).await, in_etcd(&server).await), (vec![1], vec![1, 2]), "written to etcd alone");
    second.end().await;

    let third = Replica::with_store("three", client.clone(), store(StoreKind::Api));
    let before = claimed(&client, &before).await;
    assert_eq!((at_the_api(&client).await, in_etcd(&server).await), (vec![1, 2], vec![1, 2]));
    third.end().await;

    let fourth = Replica::with_store("four", client.clone(), StoreConfig::default());
    let before = claimed(&client, &before).await;
    fourth.end().await;

    // What is left goes with its owner, also from the store that has no garbage collector.
    let fifth = Replica::with_store("five", client.clone(), store(StoreKind::Etcd));
    claimed(&client, &before).await;
    placements.delete(NAME, &DeleteParams::background()).await.unwrap();
    eventually("no map is left in either store", || async {
        (at_the_api(&client).await.is_empty() && in_etcd(&server).await.is_empty()).then_some(())
    })
    .await;
    agents.tasks.shutdown().await;
    fifth.end().await;
}
