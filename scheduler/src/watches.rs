//! In: the objects. Watches of ExpertPlacements and AcceleratorNodes become facts; a watch that breaks is
//! started anew and lists first.

use std::{collections::BTreeSet, time::Duration};

use berth_crds::{AcceleratorNode, ExpertPlacement};
use berth_runtime::Clock;
use berth_types::PlacementName;
use futures::{Stream, TryStreamExt};
use kube::{
    Api, Client, ResourceExt,
    runtime::{WatchStreamExt, watcher},
};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use crate::facts::Fact;

/// Pause after a watch ended with an error that the watcher could not mend.
const PAUSE: Duration = Duration::from_secs(1);

/// Watches placements until `ended`.
pub(crate) async fn placements(client: Client, clock: Clock, facts: mpsc::Sender<Fact>, ended: CancellationToken) {
    let name =
        |object: &ExpertPlacement| PlacementName::new(&object.namespace().unwrap_or_default(), &object.name_any()).ok();
    let watch = || watcher(Api::<ExpertPlacement>::all(client.clone()), watcher::Config::default()).default_backoff();
    let here = |object: ExpertPlacement| Some(Fact::Placement(name(&object)?, object.into()));
    let gone = |object: &ExpertPlacement| Some(Fact::PlacementGone(name(object)?));
    let listed = |names: Vec<ExpertPlacement>| Fact::PlacementsListed(names.iter().filter_map(name).collect());
    follow(clock, facts, ended, watch, here, gone, listed).await;
}

/// Watches nodes until `ended`.
pub(crate) async fn nodes(client: Client, clock: Clock, facts: mpsc::Sender<Fact>, ended: CancellationToken) {
    let watch = || watcher(Api::<AcceleratorNode>::all(client.clone()), watcher::Config::default()).default_backoff();
    let here = |object: AcceleratorNode| Some(Fact::Node(object.name_any(), object.into()));
    let gone = |object: &AcceleratorNode| Some(Fact::NodeGone(object.name_any()));
    let listed = |nodes: Vec<AcceleratorNode>| {
        Fact::NodesListed(nodes.iter().map(ResourceExt::name_any).collect::<BTreeSet<_>>())
    };
    follow(clock, facts, ended, watch, here, gone, listed).await;
}

async fn follow<K, S>(
    clock: Clock,
    facts: mpsc::Sender<Fact>,
    ended: CancellationToken,
    watch: impl Fn() -> S,
    here: impl Fn(K) -> Option<Fact>,
    gone: impl Fn(&K) -> Option<Fact>,
    listed: impl Fn(Vec<K>) -> Fact,
) where
    K: Clone,
    S: Stream<Item = Result<watcher::Event<K>, watcher::Error>>,
{
    while !ended.is_cancelled() {
        let mut events = std::pin::pin!(watch());
        let mut listing = Vec::new();
        loop {
            // Both arms only wait; an event that was not taken comes again with the next list.
            let event = tokio::select! {
                () = ended.cancelled() => return,
                event = events.try_next() => event,
            };
            let fact = match event {
                Ok(Some(watcher::Event::Init)) => {
                    listing.clear();
                    None
                }
                Ok(Some(watcher::Event::InitApply(object))) => {
                    listing.push(object.clone());
                    here(object)
                }
                Ok(Some(watcher::Event::InitDone)) => Some(listed(std::mem::take(&mut listing))),
                Ok(Some(watcher::Event::Apply(object))) => here(object),
                Ok(Some(watcher::Event::Delete(object))) => gone(&object),
                Ok(None) => break,
                Err(error) => {
                    tracing::warn!(%error, "watch failed, trying on");
                    None
                }
            };
            if let Some(fact) = fact
                && facts.send(fact).await.is_err()
            {
                return;
            }
        }
        clock.sleep(PAUSE).await;
    }
}
