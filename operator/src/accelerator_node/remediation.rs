//! Remediation of the whole cluster: reads what is so from the caches and what is remembered from its one object, lets
//! `remediate` decide, writes the object with its resourceVersion, and only then lets the node passes write what follows
//! into the specs. Tells each change once. Orders nothing by itself.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use berth_crds::{AcceleratorNode, managers};
use berth_runtime::Clock;
use berth_types::{Action, DeviceId};
use k8s_openapi::{
    api::core::v1::{ConfigMap, Node},
    jiff::Timestamp,
};
use kube::{
    Api, Resource as _, ResourceExt as _,
    runtime::events::{Event, EventType},
};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::{
    book::{Book, Operation, Phase},
    device_taints::DeviceTaints,
    facts,
    remediate::{Decision, Mode, Policy, Told, World, remediate},
    signs::{Bucket, Spoken},
};
use crate::{
    error::{Category, WriteError},
    metrics::OperatorMetrics,
    watches::{Signals, Stores},
    writes::Writes,
};

/// Name of the object that holds the book, in the operator's own namespace; the chart makes it.
pub const OBJECT: &str = "berth-remediation";
/// Annotation of that object which stops remediation while it is `true`.
pub const PAUSED: &str = "berth.dev/paused";
/// Reasons of the events that remediation tells.
pub(crate) const TOLD: [&str; 13] = [
    "DryRun",
    "RebootNeeded",
    "RemediationAdvised",
    "RemediationBegan",
    "RemediationCancelled",
    "RemediationCarriedOut",
    "RemediationEnded",
    "RemediationFailed",
    "RemediationOrdered",
    "RemediationStuck",
    "RemediationSucceeded",
    "RemediationUnclear",
    "ServiceNeeded",
];
/// Changes within this make one pass.
const GATHER: Duration = Duration::from_millis(200);
/// Deadlines pass and objects are paused without a change in any cache.
const LOOK: Duration = Duration::from_secs(5);
/// The object is read again after this: a person may have paused it.
const REREAD: Duration = Duration::from_secs(15);
/// Longest wait for the object.
const READ_LIMIT: Duration = Duration::from_secs(10);
/// What a device did within this before the term began is told by this leader, for the last one may not have.
const OVERLAP: i64 = 60;

/// What the cluster's owner chose.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Mode, budget, limits; `paused` is read from the object.
    pub policy: Policy,
    /// Labels by which other remediators say that they have a node in hand.
    pub others: Vec<String>,
    /// Whether Nodes get a condition, a taint and device taints.
    pub signs: bool,
    /// Namespace of the object.
    pub namespace: String,
}

/// Why a pass did not reach its end.
#[derive(Debug, thiserror::Error)]
pub enum PassError {
    /// The book could not be read.
    #[error("reading ConfigMap {namespace}/{OBJECT}: {why}")]
    Read {
        /// Its namespace.
        namespace: String,
        /// Why.
        why: String,
    },
    /// It could not be written.
    #[error(transparent)]
    Write(#[from] WriteError),
}

impl PassError {
    /// What to do about it.
    #[must_use]
    pub fn category(&self) -> Category {
        match self {
            Self::Read { .. } => Category::Transient,
            Self::Write(error) => error.category(),
        }
    }
}

/// Passes over everything.
pub struct RemediationPass<'a> {
    /// Caches.
    pub stores: &'a Stores,
    /// What changes concern.
    pub signals: &'a Signals,
    /// The door.
    pub writes: &'a Writes,
    /// Time.
    pub clock: &'a Clock,
    /// What was chosen.
    pub settings: &'a Settings,
    /// Counts.
    pub metrics: &'a OperatorMetrics,
    /// What the node passes write into the specs.
    pub book: watch::Sender<Option<Arc<Book>>>,
}

/// The object as it was read last.
struct Held {
    object: ConfigMap,
    book: Book,
    read: Duration,
}

/// What a term remembers.
struct Memory {
    /// `None` = not read, or there is none.
    held: Option<Held>,
    read: bool,
    claimed: bool,
    advised: BTreeMap<DeviceId, (Action, String)>,
    would: Vec<String>,
    spoken: Spoken,
    bucket: Bucket,
    since: Timestamp,
    taints: DeviceTaints,
}

impl RemediationPass<'_> {
    /// Passes after changes until `stop` is cancelled; a pass in hand is finished.
    pub async fn keep(&self, stop: &CancellationToken) {
        let now = crate::timestamp(self.clock);
        let mut memory = Memory {
            held: None,
            read: false,
            claimed: false,
            advised: BTreeMap::new(),
            would: Vec::new(),
            spoken: Spoken::default(),
            bucket: Bucket::full(self.clock.now()),
            since: Timestamp::from_second(now.as_second() - OVERLAP).unwrap_or(Timestamp::UNIX_EPOCH),
            taints: DeviceTaints::default(),
        };
        loop {
            let counted = self.metrics.begin("Remediation", self.clock);
            let accelerators = self.stores.accelerators.state();
            self.tell_changes(&mut memory, &accelerators).await;
            let done = self.pass(&mut memory, &accelerators).await;
            counted.finish(done.is_ok());
            if let Err(error) = done {
                // Whoever wrote in between knows more: read again.
                memory.held = None;
                memory.read = false;
                self.metrics.failed("Remediation", error.category().as_str());
                match error.category() {
                    Category::Conflict => tracing::debug!(%error, "the book was written in between, again"),
                    _ => tracing::warn!(%error, "remediation pass failed"),
                }
            }
            if self.settings.signs {
                memory.taints.pass(self.writes, self.clock, &accelerators).await;
            }
            // Each arm only waits.
            tokio::select! {
                () = stop.cancelled() => return,
                () = self.signals.remediation.notified() => {}
                () = self.clock.sleep(LOOK) => {}
            }
            self.clock.sleep(GATHER).await;
        }
    }

    async fn pass(&self, memory: &mut Memory, accelerators: &[Arc<AcceleratorNode>]) -> Result<(), PassError> {
        let now = self.clock.now();
        if !memory.read || memory.held.as_ref().is_some_and(|held| now.saturating_sub(held.read) >= REREAD) {
            memory.held = self.read().await?;
            if memory.held.is_none() && !memory.read {
                tracing::warn!(object = OBJECT, "there is no such ConfigMap: remediation only advises");
            }
            memory.read = true;
        }
        let world = self.world(accelerators);
        let unix = crate::timestamp(self.clock).as_second();
        let Some(held) = memory.held.take() else {
            let policy = Policy { mode: Mode::Advise, ..self.settings.policy.clone() };
            let Decision { advice, .. } = remediate(&world, &Book::default(), &policy, unix);
            if self.book.borrow().is_none() {
                self.publish(&Book::default(), &Book::default(), accelerators);
            }
            self.advise(memory, accelerators, advice).await;
            return Ok(());
        };
        let (decision, would) = self.decide(&world, &held, unix);
        let before = held.book.clone();
        let changed = decision.book != held.book || !memory.claimed || would != memory.would;
        memory.held = Some(if changed { self.write(held, &decision.book, &would).await? } else { held });
        (memory.claimed, memory.would) = (true, would.clone());
        self.publish(&before, &decision.book, accelerators);
        self.metrics.remediating(&decision.book, &decision.waiting);
        for told in &decision.told {
            self.tell(accelerators, told).await;
        }
        self.advise(memory, accelerators, decision.advice).await;
        Ok(())
    }

    /// What follows, and in a dry run what would.
    fn decide(&self, world: &World, held: &Held, now: i64) -> (Decision, Vec<String>) {
        let paused = held.object.annotations().get(PAUSED).is_some_and(|value| value == "true");
        let policy = Policy { paused, ..self.settings.policy.clone() };
        if policy.mode != Mode::DryRun {
            return (remediate(world, &held.book, &policy, now), Vec::new());
        }
        // What was begun for real ends as if nothing were allowed any more.
        let real = remediate(world, &held.book, &Policy { mode: Mode::Advise, ..policy.clone() }, now);
        let played = remediate(world, &real.book, &policy, now);
        let would = would(&real.book, &played.book);
        let told = real.told;
        let (mut advice, waiting) = (played.advice, played.waiting);
        for (id, operation) in &played.book.operations {
            if !real.book.operations.contains_key(id) {
                let why = format!("dry run: would be {} now", doing(operation));
                advice.insert(operation.device.clone(), (operation.action, why));
            }
        }
        (Decision { book: real.book, told, advice, waiting }, would)
    }

    fn world(&self, accelerators: &[Arc<AcceleratorNode>]) -> World {
        let nodes: BTreeMap<String, Arc<Node>> =
            self.stores.nodes.state().into_iter().map(|node| (node.name_any(), node)).collect();
        let placements = self.stores.placements.state();
        let accelerators = accelerators.iter().map(AsRef::as_ref);
        facts::world(accelerators, &nodes, placements.iter().map(AsRef::as_ref), &self.settings.others)
    }

    fn api(&self) -> Api<ConfigMap> {
        self.writes.within(&self.settings.namespace)
    }

    async fn read(&self) -> Result<Option<Held>, PassError> {
        let wrong = |why: String| PassError::Read { namespace: self.settings.namespace.clone(), why };
        let answer = self.clock.timeout(READ_LIMIT, self.api().get_opt(OBJECT)).await;
        let object = answer.map_err(|error| wrong(error.to_string()))?.map_err(|error| wrong(error.to_string()))?;
        let Some(object) = object else { return Ok(None) };
        let text = object.data.as_ref().and_then(|data| data.get("book.json"));
        // A book that cannot be read is no empty one: what it holds may be under way.
        let book = text.map_or_else(|| Ok(Book::default()), |text| serde_json::from_str(text));
        let book = book.map_err(|error| {
            wrong(format!("data[book.json]: {error}: repair it, or delete that key when nothing is under way"))
        })?;
        Ok(Some(Held { object, book, read: self.clock.now() }))
    }

    async fn write(&self, held: Held, book: &Book, would: &[String]) -> Result<Held, PassError> {
        let Held { mut object, read, .. } = held;
        let wrong = |error: serde_json::Error| PassError::Read {
            namespace: self.settings.namespace.clone(),
            why: error.to_string(),
        };
        let data = object.data.get_or_insert_default();
        data.insert("book.json".to_owned(), serde_json::to_string_pretty(book).map_err(wrong)?);
        data.insert("settings".to_owned(), described(&self.settings.policy));
        data.remove("dryRun");
        if !would.is_empty() {
            data.insert("dryRun".to_owned(), would.join("\n"));
        }
        let object = self.writes.replace(&self.api(), &object).await?;
        Ok(Held { object, book: book.clone(), read })
    }

    /// Lets the passes over the nodes concerned write what follows; all of them, once it is known what does.
    fn publish(&self, before: &Book, now: &Book, accelerators: &[Arc<AcceleratorNode>]) {
        let shown = self.book.borrow().clone();
        if shown.as_deref() != Some(now) {
            self.book.send_replace(Some(Arc::new(now.clone())));
        }
        let operations = before.operations.values().chain(now.operations.values());
        let nodes: BTreeSet<String> = match shown {
            None => accelerators.iter().map(|object| object.name_any()).collect(),
            Some(shown) if *shown != *now || before != now => operations.map(|one| one.node().to_owned()).collect(),
            Some(_) => return,
        };
        nodes.into_iter().for_each(|node| self.signals.nodes.insert(node));
    }

    /// Tells what changed of devices' health.
    async fn tell_changes(&self, memory: &mut Memory, accelerators: &[Arc<AcceleratorNode>]) {
        for object in accelerators {
            for change in memory.spoken.changes(object, memory.since) {
                if !memory.bucket.take(self.clock.now()) {
                    self.metrics.unspoken();
                    continue;
                }
                let event = event(&change.reason, change.warning, change.note);
                self.writes.tell(&object.object_ref(&()), &event).await;
            }
        }
    }

    /// Tells advice that is new.
    async fn advise(
        &self,
        memory: &mut Memory,
        accelerators: &[Arc<AcceleratorNode>],
        advice: BTreeMap<DeviceId, (Action, String)>,
    ) {
        for (device, (action, why)) in &advice {
            if memory.advised.get(device).is_some_and(|known| known == &(*action, why.clone())) {
                continue;
            }
            let reason = match (action, why.starts_with("dry run")) {
                (_, true) => "DryRun",
                (Action::ServiceHardware, _) => "ServiceNeeded",
                (Action::RebootNode, _) => "RebootNeeded",
                _ => "RemediationAdvised",
            };
            let note = format!("{device}: {action} is advised; {why}");
            if memory.bucket.take(self.clock.now()) {
                self.tell(accelerators, &Told { device: device.clone(), reason, warning: reason != "DryRun", note })
                    .await;
            } else {
                self.metrics.unspoken();
            }
        }
        memory.advised = advice;
    }

    async fn tell(&self, accelerators: &[Arc<AcceleratorNode>], told: &Told) {
        let Told { device, reason, warning, note } = told;
        tracing::info!(%device, reason, note, "remediation");
        self.metrics.remediated(reason);
        if let Some(object) = accelerators.iter().find(|object| object.name_any() == device.node()) {
            self.writes.tell(&object.object_ref(&()), &event(reason, *warning, note.clone())).await;
        }
    }
}

fn event(reason: &str, warning: bool, note: String) -> Event {
    let type_ = if warning { EventType::Warning } else { EventType::Normal };
    // The API server takes notes of 1 kB.
    let note = note.chars().take(900).collect();
    Event { type_, reason: reason.to_owned(), note: Some(note), action: managers::OPERATOR.to_owned(), secondary: None }
}

fn doing(operation: &Operation) -> &'static str {
    match operation.phase {
        Phase::Emptying => "emptied",
        Phase::Ordered | Phase::Validating => "ordered",
    }
}

/// What a dry run would begin, one line each; without ids, which differ in each pass.
fn would(real: &Book, played: &Book) -> Vec<String> {
    let new = played.operations.iter().filter(|(id, _)| !real.operations.contains_key(*id));
    let line = |operation: &Operation| {
        let members: Vec<&str> = operation.members.iter().map(DeviceId::local).collect();
        let (action, device) = (operation.action, &operation.device);
        format!(
            "{action} of {device}: would be {} now, with {}: {}",
            doing(operation),
            members.join(", "),
            operation.why
        )
    };
    new.map(|(_, operation)| line(operation)).collect()
}

fn described(policy: &Policy) -> String {
    let Policy { mode, budget, empty_limit, order_limit, validate_limit, reboot, paused: _ } = policy;
    format!(
        "mode={mode:?} cluster={} pool={} domain={} emptySeconds={empty_limit} orderSeconds={order_limit} validateSeconds={validate_limit} reboot={reboot}",
        budget.cluster, budget.pool, budget.domain
    )
}
