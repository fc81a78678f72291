//! What a fault of one device means for others of its node: the devices that must be reset with it, and the
//! pairs of faults that mean more together. Pure, as all of the ledger.

use std::{collections::BTreeSet, time::Duration};

use berth_types::{Reason, Scope, Vendor};

use super::{
    alarms::Level,
    condition::{Origin, WINDOW},
    device::Device,
    fact::{Local, ResetStep},
    ledger::{Ledger, Outcome},
};

/// A link fault and what makes it worse lie this far apart at most.
const PAIRED: Duration = Duration::from_secs(300);
/// A link fault within this of a switch's belongs to it.
const SWITCHED: Duration = Duration::from_secs(30);

/// What a one-off code makes of a link fault on its node.
#[must_use]
pub(super) const fn paired(code: u32) -> Option<Level> {
    match code {
        0x8C1F_8608 | 0x8C1F_860B | 0x4C1F_8608 => Some(Level::Separate),
        0x8C1F_8609 => Some(Level::SubHealth),
        _ => None,
    }
}

impl Ledger {
    /// A one-off code was seen.
    pub(super) fn triggered(&mut self, now: Duration, code: u32) {
        self.triggers.retain(|(at, _)| now.saturating_sub(*at) <= PAIRED);
        if let Some(level) = paired(code) {
            self.triggers.push((now, level));
        }
    }

    /// Lets the faults of one device say what they mean for the others. Costs a look at each device.
    pub(super) fn relate(&mut self, now: Duration) {
        let switch = self.switches.last_began();
        for device in self.devices.values_mut() {
            if let Some(at) = switch {
                device.join_switch(at, SWITCHED);
            }
            let Some(since) = device.link_down() else { continue };
            for (at, level) in &self.triggers {
                if at.abs_diff(since) <= PAIRED {
                    device.pair(*level);
                }
            }
        }
        self.drain_siblings(now);
    }

    /// Devices that must be reset with one that is barred take nothing new.
    fn drain_siblings(&mut self, now: Duration) {
        let concerned = |device: &Device| device.is_sibling() || device.needs_group_reset().is_some();
        if !self.devices.values().any(concerned) {
            return;
        }
        let grouped: Vec<(Local, String, String)> = self
            .devices
            .iter()
            .filter_map(|(local, device)| {
                let info = device.info.as_ref()?;
                Some((local.clone(), info.reset_group.clone()?, info.card.clone()))
            })
            .collect();
        for (local, group, card) in &grouped {
            let cause = grouped.iter().filter(|(other, of, _)| of == group && other != local).find_map(
                |(other, _, other_card)| {
                    let (reason, evidence) = self.devices.get(other)?.needs_group_reset()?;
                    let scope = if other_card == card { Scope::Card } else { Scope::Ring };
                    Some((reason, scope, format!("{other}: {evidence}")))
                },
            );
            if let Some(device) = self.devices.get_mut(local) {
                device.sibling(now, cause);
            }
        }
    }

    /// An order to reset a device reaches all that are reset with it.
    pub(super) fn reset_group(&mut self, now: Duration, local: &Local, step: ResetStep, outcome: &mut Outcome) {
        let group = |ledger: &Self, local: &Local| {
            ledger.devices.get(local).and_then(|device| device.info.as_ref()?.reset_group.clone())
        };
        let Some(of) = group(self, local) else { return };
        let reason = self.devices.get(local).and_then(|device| device.state().0.reason);
        let cause = (reason.unwrap_or(Reason::ResetRequired), Scope::Ring, format!("{local} is reset"));
        let others: BTreeSet<Local> = self
            .devices
            .keys()
            .filter(|other| *other != local && group(self, other).as_ref() == Some(&of))
            .cloned()
            .collect();
        for other in others {
            let mut effects = Vec::new();
            if let Some(device) = self.devices.get_mut(&other) {
                device.reset_along(now, &cause, step, &mut effects);
            }
            self.follow(now, &other, effects, outcome);
        }
    }

    /// Every device's calls fail inside the library: the driver is to blame, no device. A line that blamed it is over
    /// when every device of the vendor reads well again and the minute of its incident has passed.
    pub(super) fn judge_driver(&mut self, now: Duration, vendor: Vendor) {
        let ours =
            |device: &&Device| device.answers() && device.info.as_ref().is_some_and(|info| info.vendor == vendor);
        let devices: Vec<&Device> = self.devices.values().filter(ours).collect();
        let why = devices.first().and_then(|device| device.driver_error());
        let why = why.filter(|_| devices.iter().all(|device| device.driver_error().is_some()));
        let line = (Reason::DriverFault, Origin::Vendor);
        let over = vendor == Vendor::Nvidia
            && self.node.get(&line).is_some_and(|line| {
                now.saturating_sub(line.last) > WINDOW
                    && devices.iter().all(|device| device.good_reading().is_some_and(|begun| begun > line.last))
            });
        if over {
            self.node.remove(&line);
        }
        self.driver_fault(now, Origin::Library(vendor), why);
    }
}

/// A reason with where it holds and what is said of it.
pub(crate) type Cause = (Reason, Scope, String);
