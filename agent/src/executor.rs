//! Carries out the operator's orders, one at a time: ends the workers of the devices that go with it, calls the vendor's
//! own reset, and tells the ledger what happened. What may be begun, and that nothing begins twice, `docket` decides.
//!
//! An order begins only when the object holds that it did: an agent that ends half-way does not begin it again.

use std::{
    collections::BTreeSet,
    ffi::OsString,
    path::{Path, PathBuf},
    process::Stdio,
    sync::Arc,
    time::Duration,
};

use berth_crds::accelerator_node::{OrderPhase, OrderStatus};
use berth_runtime::Clock;
use berth_types::{Action, NodeName, Vendor};
use jiff::Timestamp;
use tokio::{process::Command, sync::watch};
use tokio_util::sync::CancellationToken;

use crate::{
    docket::{Docket, Due, Remembered, Scene},
    health::fact::{Fact, Local, ResetStep, What},
    node::Snapshot,
    orders::Wanted,
    vendor::{Facts, Seen, dcmi, grip::Grip, lane::Lane},
    workers::View,
};

/// Workers have ended by then, the killed ones included, or the order has failed.
const EMPTY_LIMIT: Duration = Duration::from_secs(30);
/// The object holds by then that an order began.
const RECORD_LIMIT: Duration = Duration::from_secs(20);
/// A detector has let go of its library by then, or the reset is tried all the same.
const GRIP_LIMIT: Duration = Duration::from_secs(12);

/// By what resets are made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tools {
    /// NVIDIA's program; its library has no call for a reset.
    pub nvidia_smi: PathBuf,
    /// Ascend's library; `None` = by its usual name.
    pub dcmi_library: Option<OsString>,
    /// Program and arguments that boot the node again; empty = this agent may not.
    pub reboot: Vec<String>,
}

/// What became of the orders, as it is to be written and as it was written.
#[derive(Debug)]
pub struct Told {
    /// To be written; `None` = nothing is known yet.
    pub fates: watch::Sender<Option<Arc<Vec<OrderStatus>>>>,
    /// What the object holds.
    pub recorded: watch::Receiver<Arc<Vec<OrderStatus>>>,
}

/// Carries out orders.
#[derive(Debug)]
pub struct Executor {
    /// Time.
    pub clock: Clock,
    /// This node.
    pub node: NodeName,
    /// Its boot.
    pub boot_id: String,
    /// By what.
    pub tools: Tools,
    /// What the operator wants.
    pub wanted: watch::Receiver<Wanted>,
    /// What the object knew when it was first seen.
    pub remembered: watch::Receiver<Option<Remembered>>,
    /// Devices and their health.
    pub snapshots: watch::Receiver<Option<Arc<Snapshot>>>,
    /// What the workers do.
    pub workers: watch::Receiver<View>,
    /// NVIDIA's library, as the detector holds it.
    pub grip: Grip,
    /// Where resets are told.
    pub facts: Facts,
    /// Devices that must have no worker.
    pub emptied: watch::Sender<BTreeSet<Local>>,
    /// The device that a probe is on.
    pub probed: watch::Receiver<Option<Local>>,
    /// What became of the orders.
    pub told: Told,
}

impl Executor {
    /// Carries out orders until `stop` is cancelled.
    pub async fn run(mut self, stop: CancellationToken) {
        // Cancel-safe: an order under way is remembered as begun, and the next agent says that its outcome is unknown.
        tokio::select! {
            () = stop.cancelled() => {}
            () = self.keep() => {}
        }
    }

    async fn keep(&mut self) {
        let remembered = match self.remembered.wait_for(Option::is_some).await {
            Ok(remembered) => remembered.clone().unwrap_or_default(),
            Err(_) => return,
        };
        let mut docket = Docket::resume(&remembered, &self.boot_id, self.now());
        for left in docket.left(&remembered) {
            self.tell(&left, ResetStep::Left).await;
        }
        loop {
            let orders = self.wanted.borrow_and_update().orders.clone();
            docket.take(&orders, self.now());
            let due = self.next(&mut docket);
            self.show(&docket);
            if let Some(due) = due {
                self.carry_out(&mut docket, due).await;
                continue;
            }
            if !docket.fates().iter().any(|fate| fate.phase == OrderPhase::Started) {
                self.empty(BTreeSet::new());
            }
            let left = docket.deadline().map_or(Duration::MAX, |at| self.left(at));
            // Cancel-safe: all arms only wait.
            tokio::select! {
                changed = self.wanted.changed() => if changed.is_err() { return },
                changed = self.snapshots.changed() => if changed.is_err() { return },
                changed = self.workers.changed() => if changed.is_err() { return },
                () = self.clock.sleep_until(self.clock.now().saturating_add(left)) => {}
            }
        }
    }

    fn next(&mut self, docket: &mut Docket) -> Option<Due> {
        let snapshot = self.snapshots.borrow_and_update().clone()?;
        let view = self.workers.borrow_and_update().clone();
        let holds = snapshot.devices.keys().map(|local| (local.clone(), view.placements(local))).collect();
        docket.next(&Scene { now: self.now(), node: &self.node, snapshot: &snapshot, holds })
    }

    async fn carry_out(&mut self, docket: &mut Docket, due: Due) {
        let Due { order, members } = due;
        let (id, left) = (order.id.clone(), self.left(order.deadline.0));
        tracing::info!(order = id, device = %order.device, action = %order.action, ?members, "order begins");
        docket.begin(&id, "workers end", self.now());
        self.show(docket);
        self.empty(members.clone());
        let ready = match self.recorded(&id, left.min(RECORD_LIMIT)).await {
            Ok(()) => self.emptied(&members, left.min(EMPTY_LIMIT)).await,
            Err(why) => Err(why),
        };
        let outcome = match (ready, order.action) {
            (Err(why), _) => Err(why),
            (Ok(()), Action::RebootNode) => match self.reboot(self.left(order.deadline.0)).await {
                // It ends with this boot.
                Ok(()) => {
                    docket.begin(&id, "the node was told to boot again", self.now());
                    return self.show(docket);
                }
                Err(why) => Err(why),
            },
            (Ok(()), _) => self.reset(order.device.local(), &members, order.deadline.0).await,
        };
        match &outcome {
            Ok(how) => tracing::info!(order = id, how, "order carried out"),
            Err(why) => tracing::warn!(order = id, why, "order failed"),
        }
        docket.finish(&id, outcome.as_deref().map_err(String::as_str), self.now());
        self.show(docket);
        self.empty(BTreeSet::new());
    }

    /// Waits until the object holds that the order began.
    async fn recorded(&mut self, id: &str, limit: Duration) -> Result<(), String> {
        let begun =
            |fates: &Arc<Vec<OrderStatus>>| fates.iter().any(|fate| fate.id == id && fate.phase == OrderPhase::Started);
        match self.clock.timeout(limit, self.told.recorded.wait_for(begun)).await {
            Ok(Ok(_)) => Ok(()),
            _ => Err("not begun: the API server does not take this node's status".to_owned()),
        }
    }

    /// Waits until no worker and no probe is on the devices.
    async fn emptied(&mut self, members: &BTreeSet<Local>, limit: Duration) -> Result<(), String> {
        let until = self.clock.now().saturating_add(limit);
        let gone = |view: &View| !members.iter().any(|local| view.has(local));
        if !matches!(self.clock.timeout(limit, self.workers.wait_for(gone)).await, Ok(Ok(_))) {
            return Err("not reset: a worker does not end".to_owned());
        }
        let left = until.saturating_sub(self.clock.now());
        let away = |probed: &Option<Local>| probed.as_ref().is_none_or(|local| !members.contains(local));
        match self.clock.timeout(left, self.probed.wait_for(away)).await {
            Ok(Ok(_)) => Ok(()),
            _ => Err("not reset: a probe does not end".to_owned()),
        }
    }

    async fn reset(&self, device: &str, members: &BTreeSet<Local>, deadline: Timestamp) -> Result<String, String> {
        let vendor = self.snapshots.borrow().as_ref().and_then(|all| Some(all.devices.get(device)?.info.vendor));
        self.tell(device, ResetStep::Started).await;
        let outcome = match vendor {
            Some(Vendor::Nvidia) => self.reset_gpu(device, deadline).await,
            Some(Vendor::Ascend) => self.reset_npu(device, members, deadline).await,
            None => Err("the device is not known any more".to_owned()),
        };
        self.tell(device, if outcome.is_ok() { ResetStep::Done } else { ResetStep::Failed }).await;
        outcome
    }

    async fn tell(&self, device: &str, step: ResetStep) {
        self.facts.send(Seen::Fact(Fact::device(device, What::Reset(step))), None).await;
    }

    /// By NVIDIA's own program, which refuses while anybody has the device open: the detector lets go meanwhile.
    async fn reset_gpu(&self, device: &str, deadline: Timestamp) -> Result<String, String> {
        let limit = self.left(deadline).min(GRIP_LIMIT);
        if self.clock.timeout(limit, self.grip.loosen()).await.is_err() {
            tracing::warn!(device, "NVIDIA library is still held: the reset is tried all the same");
        }
        let arguments = ["--gpu-reset", "-i", device].map(str::to_owned);
        let outcome = call(&self.clock, &self.tools.nvidia_smi, &arguments, self.left(deadline)).await;
        self.grip.restore();
        outcome
    }

    /// By the driver's call, on a thread that may hang.
    async fn reset_npu(&self, device: &str, members: &BTreeSet<Local>, deadline: Timestamp) -> Result<String, String> {
        let left = self.left(deadline);
        let until = self.clock.now().saturating_add(left);
        let library = dcmi::library_path(self.tools.dcmi_library.as_deref());
        let (device, members, clock) = (device.to_owned(), members.clone(), self.clock.clone());
        let made = move || dcmi::resets::reset(&library, &device, &members, &clock, until);
        let mut lane = Lane::new("dcmi reset", self.clock.clone());
        match lane.call(left.saturating_add(Duration::from_secs(1)), Duration::default, made).await {
            Ok(Ok(())) => Ok("reset by the driver, started again".to_owned()),
            Ok(Err(error)) => Err(error.to_string()),
            Err(missed) => Err(format!("the driver's reset: {missed}")),
        }
    }

    async fn reboot(&self, limit: Duration) -> Result<(), String> {
        match self.tools.reboot.split_first() {
            None => Err("this agent may not boot its node again: set agent.rebootCommand, or do it by hand".to_owned()),
            Some((program, arguments)) => call(&self.clock, Path::new(program), arguments, limit).await.map(drop),
        }
    }

    fn show(&self, docket: &Docket) {
        let fates = docket.fates();
        self.told.fates.send_if_modified(|told| {
            let changed = told.as_ref().is_none_or(|told| told.as_slice() != fates);
            if changed {
                *told = Some(Arc::new(fates.to_vec()));
            }
            changed
        });
    }

    fn empty(&self, members: BTreeSet<Local>) {
        self.emptied.send_if_modified(|emptied| {
            let changed = *emptied != members;
            *emptied = members;
            changed
        });
    }

    fn now(&self) -> Timestamp {
        let ms = i64::try_from(self.clock.unix_ms()).unwrap_or(i64::MAX);
        // Whole seconds, as the object holds them.
        Timestamp::from_second(ms / 1000).unwrap_or(Timestamp::UNIX_EPOCH)
    }

    fn left(&self, deadline: Timestamp) -> Duration {
        let ms = i128::from(deadline.as_millisecond()) - i128::from(self.clock.unix_ms());
        Duration::from_millis(u64::try_from(ms).unwrap_or(0))
    }
}

/// Runs a program to its end; one that has not ended by then is killed. Answers, or fails with, its last words.
async fn call(clock: &Clock, program: &Path, arguments: &[String], limit: Duration) -> Result<String, String> {
    let name = program.display();
    let child = Command::new(program)
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .map_err(|error| format!("starting {name}: {error}"))?;
    let output = match clock.timeout(limit, child.wait_with_output()).await {
        Ok(Ok(output)) => output,
        Ok(Err(error)) => return Err(format!("{name}: {error}")),
        Err(elapsed) => return Err(format!("{name}: {elapsed}")),
    };
    let words = last_line(&output.stderr).or_else(|| last_line(&output.stdout)).unwrap_or_default();
    match output.status.success() {
        true => Ok(if words.is_empty() { format!("{name}: done") } else { words }),
        false => Err(format!("{name}: {}: {words}", output.status)),
    }
}

/// What a program said last, cut short.
fn last_line(text: &[u8]) -> Option<String> {
    let text = String::from_utf8_lossy(text);
    let line = text.lines().rfind(|line| !line.trim().is_empty())?;
    Some(line.trim().chars().take(300).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_program_s_last_words_are_the_outcome() {
        let clock = Clock::real();
        let shell = |script: &str| ["-c".to_owned(), script.to_owned()];
        let limit = Duration::from_secs(20);
        let done = call(&clock, Path::new("/bin/sh"), &shell("echo one; echo all done"), limit).await;
        assert_eq!(done, Ok("all done".to_owned()));
        let failed = call(&clock, Path::new("/bin/sh"), &shell("echo in use >&2; exit 3"), limit).await.unwrap_err();
        assert!(failed.contains("exit status: 3: in use"), "{failed}");
        let missing = call(&clock, Path::new("/nonexistent/tool"), &[], limit).await.unwrap_err();
        assert!(missing.contains("/nonexistent/tool"), "{missing}");
    }

    #[tokio::test]
    async fn a_program_that_does_not_end_is_killed_at_its_limit() {
        let arguments = ["-c".to_owned(), "exec sleep 600".to_owned()];
        let late = call(&Clock::real(), Path::new("/bin/sh"), &arguments, Duration::from_millis(50)).await;
        assert!(late.unwrap_err().contains("/bin/sh"));
    }
}
