//! What is said of the node as a whole, and what it means for its devices: libraries, inventories, the driver, switches,
//! programs that the kernel ended, and addresses that are no device of ours.

use std::time::Duration;

use berth_types::{Action, Admission, Health, Reason, Scope, Vendor};

use super::{
    catalog::Row,
    condition::{Clears, Condition, Origin, WINDOW, Words},
    device::Device,
    fact::{Local, Subject, What},
    ledger::{Ledger, Outcome},
    switch::Note,
};

/// Addresses of no device of ours that are remembered at once.
const STRANGERS: usize = 64;

/// Whose word it is that Ascend's driver is not well: its own.
const JUDGED: Origin = Origin::Code(0);

impl Ledger {
    /// A fault at an address that is no device of ours: the node says so once a minute.
    pub(super) fn stranger(&mut self, now: Duration, local: &Local, what: &What, outcome: &mut Outcome) {
        let evidence = match what {
            What::Xid(xid) => format!("{}, {local}: no device of this node", xid.evidence()),
            What::Recovery(value) => format!("Xid 154, recovery action {value:?}, {local}: no device of this node"),
            What::BusLoss(line) => format!("{line}: no device of this node"),
            _ => return,
        };
        self.strangers.retain(|_, at| now.saturating_sub(*at) <= WINDOW);
        // A log that invents addresses must not fill the memory.
        if self.strangers.len() >= STRANGERS && !self.strangers.contains_key(local) {
            outcome.swallowed = outcome.swallowed.saturating_add(1);
            return;
        }
        if self.strangers.insert(local.clone(), now).is_none() {
            self.note(now, &Subject::Node, Reason::UnknownFault, Action::None, Scope::Node, evidence, outcome);
        }
    }

    pub(super) fn take_node(&mut self, now: Duration, what: &What, outcome: &mut Outcome) {
        let words = |health, admission| Words::new(health, admission, Action::None, Scope::Node);
        match what {
            What::NoLibrary { vendor, why } => {
                let words = words(Health::Unknown, Admission::Barred);
                let row = Row { reason: Reason::AgentBlind, words, clears: Clears::Reading };
                self.node_condition(now, row, Origin::Library(*vendor), why);
                self.tell_vendor(now, *vendor, what, outcome);
            }
            What::Library(vendor) => {
                self.node.remove(&(Reason::AgentBlind, Origin::Library(*vendor)));
                self.tell_vendor(now, *vendor, what, outcome);
            }
            What::Inventory { vendor, locals } => self.take_inventory(now, *vendor, locals, outcome),
            What::LogBlind(Some(why)) => {
                // Readings and events go on, and are late where a line would not be.
                let words = words(Health::Degraded, Admission::Schedulable);
                let row = Row { reason: Reason::AgentBlind, words, clears: Clears::Reading };
                self.node_condition(now, row, Origin::Log, why);
            }
            What::LogBlind(None) => {
                self.node.remove(&(Reason::AgentBlind, Origin::Log));
            }
            What::Count { listed, expected } if listed != expected => {
                let row = Row {
                    reason: Reason::CountMismatch,
                    words: words(Health::Degraded, Admission::Schedulable),
                    clears: Clears::Reading,
                };
                let evidence = format!("{listed} devices listed, {expected} expected");
                self.node_condition(now, row, Origin::Vendor, &evidence);
            }
            What::Count { .. } => {
                self.node.remove(&(Reason::CountMismatch, Origin::Vendor));
            }
            What::Killed(text) => self.killed(now, text, outcome),
            What::DriverLoaded(_) | What::SlotDown(_) => outcome.reread.extend(self.devices.keys().cloned()),
            What::Switch { fatal, text } => self.switch(now, *fatal, text, outcome),
            What::Fabric { of, assertion, severity } => {
                if let Some(note) = self.switches.event(now, *of, *assertion, *severity) {
                    let Note { reason, action, evidence } = note;
                    self.note(now, &Subject::Node, reason, action, Scope::Node, evidence, outcome);
                }
                self.relate(now);
            }
            What::Fabrics { begun, faults } => {
                self.switches.list(now, *begun, faults);
                self.relate(now);
            }
            What::Driver(state) => self.driver_fault(now, JUDGED, state.fault()),
            _ => {}
        }
    }

    /// Programs that the kernel ended within a minute are one note: it hurts the node, and accuses no device.
    fn killed(&mut self, now: Duration, text: &str, outcome: &mut Outcome) {
        if self.killed.replace(now).is_none_or(|at| now.saturating_sub(at) > WINDOW) {
            let (reason, action) = (Reason::ProcessFault, Action::RestartWorkload);
            self.note(now, &Subject::Node, reason, action, Scope::Process, text.to_owned(), outcome);
        }
    }

    /// One fault of a switch is one note, whatever it prints within a minute.
    fn switch(&mut self, now: Duration, fatal: bool, text: &str, outcome: &mut Outcome) {
        let open = self.switch_fault.is_some_and(|at| now.saturating_sub(at) <= WINDOW);
        if !self.started || !fatal {
            return;
        }
        self.switch_fault = Some(now);
        if !open {
            let evidence = text.to_owned();
            self.note(now, &Subject::Node, Reason::FabricLinkDown, Action::None, Scope::Node, evidence, outcome);
        }
    }

    /// The driver itself is at fault, or is not any more, as `origin` tells.
    pub(super) fn driver_fault(&mut self, now: Duration, origin: Origin, why: Option<String>) {
        let Some(why) = why else {
            self.node.remove(&(Reason::DriverFault, origin));
            return;
        };
        let words = Words::new(Health::Degraded, Admission::Draining, Action::None, Scope::Node);
        let row = Row { reason: Reason::DriverFault, words, clears: Clears::Reading };
        self.node_condition(now, row, origin, &why);
    }

    /// Tells every device of a vendor.
    fn tell_vendor(&mut self, now: Duration, vendor: Vendor, what: &What, outcome: &mut Outcome) {
        let of = |device: &Device| device.info.as_ref().is_some_and(|info| info.vendor == vendor);
        let locals: Vec<Local> =
            self.devices.iter().filter(|(_, device)| of(device)).map(|(local, _)| local.clone()).collect();
        for local in locals {
            self.take_device(now, &local, what, outcome);
        }
    }

    /// What was here and is listed by nobody any more is lost.
    fn take_inventory(&mut self, now: Duration, vendor: Vendor, locals: &[Local], outcome: &mut Outcome) {
        let gone = |local: &Local, device: &Device| {
            device.info.as_ref().is_some_and(|info| info.vendor == vendor) && !locals.contains(local)
        };
        let gone: Vec<Local> =
            self.devices.iter().filter(|(local, device)| gone(local, device)).map(|(local, _)| local.clone()).collect();
        let lost = What::BusLoss("was here, and is listed by no library any more".to_owned());
        for local in gone {
            self.take_device(now, &local, &lost, outcome);
        }
    }

    pub(super) fn node_condition(&mut self, now: Duration, row: Row, origin: Origin, evidence: &str) {
        let Row { reason, words, clears } = row;
        let fresh = || Condition::begun(now, words, clears, evidence);
        self.node.entry((reason, origin)).or_insert_with(fresh).last = now;
    }
}
