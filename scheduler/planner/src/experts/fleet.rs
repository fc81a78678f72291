//! The devices that all layers of an instance share: slots, speeds and what fails together. Takes no
//! decision.

use std::collections::BTreeMap;

use crate::num;

/// Halvings of the interval in which a bound lies.
const HALVINGS: usize = 40;

/// One device, as a layer sees it.
#[derive(Clone, Debug, PartialEq)]
pub struct Site {
    /// Its slots.
    pub slots: usize,
    /// Relative speed, above 0.
    pub speed: f64,
    /// Number of its failure domain: its node, or its rack when the loss of a rack must be survived.
    pub node: usize,
    /// Number of its card.
    pub card: usize,
    /// Bytes of one expert there: formats differ.
    pub bytes: u64,
    /// Keeps what it holds and takes nothing new.
    pub closed: bool,
}

/// Devices with their slots numbered through, device by device.
#[derive(Clone, Debug)]
pub struct Fleet {
    pub(super) sites: Vec<Site>,
    /// First slot of each device, then the number of all slots.
    pub(super) first: Vec<usize>,
    /// Device of each slot.
    pub(super) owner: Vec<usize>,
    /// 1 ÷ speed by device.
    pub(super) inverse: Vec<f64>,
    /// 1 ÷ `inverse`, so that no loop divides.
    pub(super) pace: Vec<f64>,
    /// Failure domain of each device, numbered from 0.
    pub(super) node: Vec<usize>,
    /// Failure domains.
    pub(super) nodes: usize,
    /// Place of each device when failure domains take turns.
    pub(super) turn: Vec<usize>,
    /// Sum of speeds.
    pub(super) speed: f64,
    /// Devices of equal speed, fastest first.
    pub(super) classes: Vec<Vec<usize>>,
    /// Devices in falling order of slots for their speed; none where all are alike.
    roomy: Vec<usize>,
    /// Devices that take nothing new.
    pub(super) closed: Vec<bool>,
}

impl Fleet {
    /// The devices in slot order. A speed that is no number above 0 counts as the least there is.
    #[must_use]
    pub fn new(sites: &[Site]) -> Self {
        let speed = |site: &Site| if site.speed.is_finite() { site.speed.max(1e-9) } else { 1e-9 };
        let (mut first, mut owner) = (vec![0], Vec::new());
        let mut numbers = BTreeMap::new();
        let mut node = Vec::with_capacity(sites.len());
        for (device, site) in sites.iter().enumerate() {
            owner.extend(std::iter::repeat_n(device, site.slots));
            first.push(owner.len());
            let next = numbers.len();
            node.push(*numbers.entry(site.node).or_insert(next));
        }
        let mut order: Vec<usize> = (0..sites.len()).collect();
        order.sort_by(|one, other| speed(&sites[*other]).total_cmp(&speed(&sites[*one])).then(one.cmp(other)));
        let mut classes: Vec<Vec<usize>> = Vec::new();
        for device in order {
            match classes.last_mut() {
                Some(class) if speed(&sites[class[0]]).total_cmp(&speed(&sites[device])).is_eq() => class.push(device),
                _ => classes.push(vec![device]),
            }
        }
        let turn = turns(&node);
        Self {
            first,
            owner,
            inverse: sites.iter().map(|site| 1.0 / speed(site)).collect(),
            pace: sites.iter().map(|site| 1.0 / (1.0 / speed(site))).collect(),
            node,
            nodes: numbers.len(),
            turn,
            speed: sites.iter().map(speed).sum(),
            roomy: roomy(sites, &speed),
            closed: sites.iter().map(|site| site.closed).collect(),
            sites: sites.to_vec(),
            classes,
        }
    }

    /// Devices.
    #[must_use]
    pub fn devices(&self) -> usize {
        self.sites.len()
    }

    /// Slots of all devices.
    #[must_use]
    pub fn slots(&self) -> usize {
        self.owner.len()
    }

    pub(super) fn range(&self, device: usize) -> std::ops::Range<usize> {
        self.first[device]..self.first[device + 1]
    }

    /// Slots that can hold one of `copies` required copies of each of `experts`: at most one of each expert
    /// on a device, or in a failure domain when `apart`.
    #[must_use]
    pub fn room(&self, experts: usize, copies: usize, apart: bool) -> usize {
        if copies < 2 || !apart {
            return self.sites.iter().map(|site| site.slots.min(experts)).sum();
        }
        let mut sums = vec![0_usize; self.nodes];
        for (site, node) in self.sites.iter().zip(&self.node) {
            sums[*node] += site.slots.min(experts);
        }
        sums.into_iter().map(|sum| sum.min(experts)).sum()
    }

    /// The least that the slowest device's load ÷ speed can be over the ideal (total load ÷ total speed),
    /// whatever the layout and however replicas share tokens; with it, how many of the hottest experts set it.
    /// `loads` need no order.
    ///
    /// The k hottest experts fit on at most S − E + k slots (the others need one each), hence on that many
    /// devices, and these take at least (their load ÷ their speed). What has no slot outside some devices is on
    /// these alone: as many of the coldest experts as the slots outside leave over, at least. And within a time T no
    /// replica carries more than T × the highest speed: an expert needs ⌈load ÷ that⌉ of them, on as many
    /// devices, and all experts together need no more than there are slots.
    #[must_use]
    pub fn bound(&self, loads: &[f64]) -> (f64, usize) {
        let total: f64 = loads.iter().sum();
        if total <= 0.0 || self.sites.is_empty() {
            return (1.0, loads.len());
        }
        let mut hottest = loads.to_vec();
        hottest.sort_unstable_by(|one, other| other.total_cmp(one));
        let (least, experts) = self.hottest(&hottest, total);
        let least = least.max(self.coldest(&hottest, total));
        let Some(fastest) = self.classes.first().and_then(|class| class.first()) else { return (least, experts) };
        // Load of a replica of which a device of the highest speed is full at time 1.
        let full = total / self.speed / self.inverse[*fastest];
        if total <= 0.0 || self.room(loads.len(), 1, false) < loads.len() || self.holds_at(loads, full * least) {
            return (least, experts);
        }
        let (mut low, mut high) = (least, least * 2.0);
        while !self.holds_at(loads, full * high) && high < 1e12 {
            (low, high) = (high, high * 2.0);
        }
        for _ in 0..HALVINGS {
            let middle = f64::midpoint(low, high);
            if self.holds_at(loads, full * middle) { high = middle } else { low = middle }
        }
        (low * (1.0 - 1e-12), 1)
    }

    /// Whether there are slots for as many replicas as experts need that carry at most `most` each.
    fn holds_at(&self, loads: &[f64], most: f64) -> bool {
        let mut slots = 0_usize;
        loads.iter().all(|load| {
            let copies = num::ceil(load / most).max(1);
            slots += copies;
            copies <= self.devices()
        }) && slots <= self.slots()
    }

    /// The bound of the hottest experts, `loads` being in falling order, and how many of them set it.
    fn hottest(&self, loads: &[f64], total: f64) -> (f64, usize) {
        let fastest: Vec<f64> = self
            .classes
            .iter()
            .flatten()
            .map(|device| 1.0 / self.inverse[*device])
            .scan(0.0, |sum, speed| {
                *sum += speed;
                Some(*sum)
            })
            .collect();
        let spare = self.slots().saturating_sub(loads.len());
        let (mut best, mut sum) = ((1.0, loads.len()), 0.0);
        for (at, load) in loads.iter().enumerate() {
            sum += load;
            let devices = (spare + at + 1).min(self.devices());
            let ratio = sum / fastest[devices - 1] * self.speed / total;
            if ratio > best.0 + 1e-12 {
                best = (ratio, at + 1);
            }
            if devices == self.devices() {
                break;
            }
        }
        best
    }

    /// The bound of the coldest experts, `loads` being in falling order: of devices with most slots for their speed, any
    /// number. Never above 1 where all are alike.
    fn coldest(&self, loads: &[f64], total: f64) -> f64 {
        let (mut best, mut outside, mut speed) = (1.0_f64, self.slots(), 0.0);
        let (mut least, mut experts) = (0.0, 0_usize);
        for device in self.roomy.iter().copied() {
            outside -= self.sites[device].slots;
            speed += self.pace[device];
            while experts + outside < loads.len() {
                experts += 1;
                least += loads[loads.len() - experts];
            }
            best = best.max(least / speed * self.speed / total);
        }
        best
    }

    /// The ideal time of a layer: total load ÷ total speed.
    pub(super) fn ideal(&self, loads: &[f64]) -> f64 {
        loads.iter().sum::<f64>() / self.speed.max(f64::MIN_POSITIVE)
    }

    /// Mean slots of a device.
    pub(super) fn depth(&self) -> f64 {
        num::real_size(self.slots()) / num::real_size(self.devices().max(1))
    }
}

/// The place of each device when failure domains take turns; `node` has the domain of each.
fn turns(node: &[usize]) -> Vec<usize> {
    let mut members = vec![0_usize; node.iter().max().map_or(0, |most| most + 1)];
    let mut order: Vec<(usize, usize, usize)> = Vec::with_capacity(node.len());
    for (device, node) in node.iter().enumerate() {
        order.push((members[*node], *node, device));
        members[*node] += 1;
    }
    order.sort_unstable();
    let mut turns = vec![0; node.len()];
    for (turn, (_, _, device)) in order.into_iter().enumerate() {
        turns[device] = turn;
    }
    turns
}

/// Devices in falling order of slots for their speed; none where all are alike.
fn roomy(sites: &[Site], speed: &dyn Fn(&Site) -> f64) -> Vec<usize> {
    let room: Vec<f64> = sites.iter().map(|site| num::real_size(site.slots) / speed(site)).collect();
    if room.windows(2).all(|pair| pair[0].total_cmp(&pair[1]).is_eq()) {
        return Vec::new();
    }
    let mut order: Vec<usize> = (0..sites.len()).collect();
    order.sort_by(|one, other| room[*other].total_cmp(&room[*one]).then(one.cmp(other)));
    order
}
