//! Who may have how many devices: quota, borrowing and the order of those who wait. A pure function over
//! all queues and deployments at once.
//!
//! It never takes back what was granted (preemption is not honoured yet) and never lets a later
//! deployment of a queue pass an earlier one that could be served.

use std::collections::{BTreeMap, BTreeSet};

use crate::fleet::Shortage;

/// Namespace and name of a ModelDeployment.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Key {
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
}

/// One CapacityQueue.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Queue {
    /// Devices its deployments are sure of.
    pub quota: u32,
    /// Most devices beyond it; `None` = no bound but the cluster's devices.
    pub borrow_limit: Option<u32>,
    /// Higher goes first.
    pub priority: i32,
    /// Namespaces that may name it; empty = all.
    pub namespaces: Vec<String>,
}

/// What one deployment asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Claim {
    /// The deployment.
    pub key: Key,
    /// When it was made, seconds since 1970: older goes first.
    pub created: i64,
    /// The queue that it names.
    pub queue: Option<String>,
    /// Devices of one instance.
    pub per_instance: Result<u32, Shortage>,
    /// Instances that it wants, one more while it is replacing old ones by new ones.
    pub wanted: u32,
    /// Instances that it was granted before or that exist.
    pub held: u32,
    /// Devices of these.
    pub held_devices: u32,
}

/// Why a deployment gets less than it wants.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WaitReason {
    /// The queue's quota and borrowing are used up.
    QuotaExceeded,
    /// An instance is larger than the queue will ever allow.
    QuotaTooSmall,
    /// The queue does not exist.
    QueueNotFound,
    /// The queue does not admit the namespace.
    QueueNotAllowed,
    /// There are not enough devices that fit.
    CapacityShort,
}

impl WaitReason {
    /// Every reason.
    pub const ALL: [Self; 5] =
        [Self::QuotaExceeded, Self::QuotaTooSmall, Self::QueueNotFound, Self::QueueNotAllowed, Self::CapacityShort];

    /// The word in metrics.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::QuotaExceeded => "QuotaExceeded",
            Self::QuotaTooSmall => "QuotaTooSmall",
            Self::QueueNotFound => "QueueNotFound",
            Self::QueueNotAllowed => "QueueNotAllowed",
            Self::CapacityShort => "CapacityShort",
        }
    }
}

/// Why, and in what words.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Waiting {
    /// For programs.
    pub reason: WaitReason,
    /// For people.
    pub message: String,
}

/// What a deployment gets.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Verdict {
    /// Instances it may have.
    pub allowed: u32,
    /// Devices of each new instance; 0 when that is unknown.
    pub per_instance: u32,
    /// Devices granted in its queue.
    pub devices: u32,
    /// Priority of its queue.
    pub priority: i32,
    /// Set when it wants more than it may have.
    pub waiting: Option<Waiting>,
}

/// How much of a queue is used.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Devices granted.
    pub used: u32,
    /// Of these, beyond the quota.
    pub borrowed: u32,
    /// Deployments that wait.
    pub waiting: u32,
}

/// The outcome for everybody.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Admission {
    /// By deployment.
    pub verdicts: BTreeMap<Key, Verdict>,
    /// By queue.
    pub usage: BTreeMap<String, Usage>,
}

/// Decides for all `claims` at once. `devices` is how many schedulable devices there are: what is borrowed
/// never makes all queues together use more.
#[must_use]
pub fn admit(queues: &BTreeMap<String, Queue>, claims: &[Claim], devices: u32) -> Admission {
    let mut order: Vec<&Claim> = claims.iter().collect();
    order.sort_by_key(|claim| (std::cmp::Reverse(priority(queues, claim)), claim.created, claim.key.clone()));
    let mut pass = Pass { queues, devices, used: BTreeMap::new(), allowed: BTreeMap::new() };
    for claim in &order {
        pass.hold(claim);
    }
    for borrowing in [false, true] {
        let mut blocked = BTreeSet::new();
        for claim in &order {
            pass.grant(claim, borrowing, &mut blocked);
        }
    }
    pass.finish(&order)
}

fn priority(queues: &BTreeMap<String, Queue>, claim: &Claim) -> i32 {
    claim.queue.as_ref().and_then(|name| queues.get(name)).map_or(0, |queue| queue.priority)
}

struct Pass<'a> {
    queues: &'a BTreeMap<String, Queue>,
    devices: u32,
    /// Devices used, by queue.
    used: BTreeMap<&'a str, u32>,
    /// Instances and their devices, by deployment.
    allowed: BTreeMap<&'a Key, (u32, u32)>,
}

impl<'a> Pass<'a> {
    /// What was granted before is kept.
    fn hold(&mut self, claim: &'a Claim) {
        self.allowed.insert(&claim.key, (claim.held, claim.held_devices));
        if let Some(queue) = &claim.queue {
            let used = self.used.entry(queue).or_default();
            *used = used.saturating_add(claim.held_devices);
        }
    }

    /// Grants instance by instance until the claim is served or the queue is full. Who waits for room that
    /// may come blocks the rest of its queue.
    fn grant(&mut self, claim: &'a Claim, borrowing: bool, blocked: &mut BTreeSet<&'a str>) {
        let Ok(need) = claim.per_instance else { return };
        let (mut instances, mut granted) = self.allowed.get(&claim.key).copied().unwrap_or_default();
        if self.refusal(claim, need).is_some() {
            return;
        }
        while instances < claim.wanted {
            if let Some(name) = &claim.queue {
                if blocked.contains(name.as_str()) || !self.has_room(name, need, borrowing) {
                    blocked.insert(name);
                    break;
                }
                *self.used.entry(name).or_default() += need;
            }
            instances += 1;
            granted = granted.saturating_add(need);
        }
        self.allowed.insert(&claim.key, (instances, granted));
    }

    fn has_room(&self, name: &str, need: u32, borrowing: bool) -> bool {
        let Some(queue) = self.queues.get(name) else { return false };
        let after = self.used.get(name).copied().unwrap_or(0).saturating_add(need);
        if after <= queue.quota {
            return true;
        }
        let everywhere: u32 = self.used.values().fold(0, |sum, used| sum.saturating_add(*used));
        borrowing
            && after <= queue.quota.saturating_add(queue.borrow_limit.unwrap_or(u32::MAX))
            && everywhere.saturating_add(need) <= self.devices
    }

    /// Why the claim can never be granted as things are.
    fn refusal(&self, claim: &Claim, need: u32) -> Option<Waiting> {
        let name = claim.queue.as_ref()?;
        let waiting = |reason, message| Some(Waiting { reason, message });
        let Some(queue) = self.queues.get(name) else {
            let message = format!("queue {name} does not exist: create the CapacityQueue or change spec.queue");
            return waiting(WaitReason::QueueNotFound, message);
        };
        if !queue.namespaces.is_empty() && !queue.namespaces.contains(&claim.key.namespace) {
            let message = format!(
                "queue {name} does not admit namespace {}: add it to the queue's spec.namespaces or change spec.queue",
                claim.key.namespace
            );
            return waiting(WaitReason::QueueNotAllowed, message);
        }
        let most = queue.quota.saturating_add(queue.borrow_limit.unwrap_or(u32::MAX));
        if need > most {
            let message = format!(
                "queue {name}: an instance needs {need} devices and the queue allows {most}: raise its quota or borrow limit"
            );
            return waiting(WaitReason::QuotaTooSmall, message);
        }
        None
    }

    fn finish(&self, order: &[&Claim]) -> Admission {
        let mut outcome = Admission::default();
        for (name, queue) in self.queues {
            let used = self.used.get(name.as_str()).copied().unwrap_or(0);
            let usage = Usage { used, borrowed: used.saturating_sub(queue.quota), waiting: 0 };
            outcome.usage.insert(name.clone(), usage);
        }
        for claim in order {
            let (allowed, devices) = self.allowed.get(&claim.key).copied().unwrap_or_default();
            let waiting = if allowed < claim.wanted { Some(self.why(claim, claim.wanted - allowed)) } else { None };
            if waiting.is_some()
                && let Some(usage) = claim.queue.as_ref().and_then(|name| outcome.usage.get_mut(name))
            {
                usage.waiting += 1;
            }
            let per_instance = claim.per_instance.as_ref().copied().unwrap_or(0);
            let priority = priority(self.queues, claim);
            let verdict = Verdict { allowed, per_instance, devices, priority, waiting };
            outcome.verdicts.insert(claim.key.clone(), verdict);
        }
        outcome
    }

    fn why(&self, claim: &Claim, missing: u32) -> Waiting {
        let need = match &claim.per_instance {
            Ok(need) => *need,
            Err(short) => return Waiting { reason: WaitReason::CapacityShort, message: short.message.clone() },
        };
        if let Some(refusal) = self.refusal(claim, need) {
            return refusal;
        }
        let name = claim.queue.as_deref().unwrap_or_default();
        let used = self.used.get(name).copied().unwrap_or(0);
        let quota = self.queues.get(name).map_or(0, |queue| queue.quota);
        let more = need.saturating_mul(missing);
        let message = format!("queue {name}: {used} of {quota} devices used; needs {more} more");
        Waiting { reason: WaitReason::QuotaExceeded, message }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn queue(quota: u32, borrow_limit: Option<u32>, priority: i32) -> Queue {
        Queue { quota, borrow_limit, priority, namespaces: Vec::new() }
    }

    fn claim(name: &str, created: i64, queue: &str, need: u32, wanted: u32, held: u32) -> Claim {
        Claim {
            key: Key { namespace: "models".to_owned(), name: name.to_owned() },
            created,
            queue: (!queue.is_empty()).then(|| queue.to_owned()),
            per_instance: Ok(need),
            wanted,
            held,
            held_devices: held * need,
        }
    }

    fn allowed(admission: &Admission, name: &str) -> u32 {
        admission.verdicts[&Key { namespace: "models".to_owned(), name: name.to_owned() }].allowed
    }

    fn message(admission: &Admission, name: &str) -> String {
        let key = Key { namespace: "models".to_owned(), name: name.to_owned() };
        admission.verdicts[&key].waiting.as_ref().map(|waiting| waiting.message.clone()).unwrap_or_default()
    }

    #[test]
    fn a_full_queue_says_what_is_used_and_what_is_missing() {
        let queues = [("batch".to_owned(), queue(12, Some(0), 0))].into();
        let claims = [claim("a", 1, "batch", 4, 3, 0), claim("b", 2, "batch", 4, 1, 0)];
        let admission = admit(&queues, &claims, 100);
        assert_eq!((allowed(&admission, "a"), allowed(&admission, "b")), (3, 0));
        assert_eq!(message(&admission, "b"), "queue batch: 12 of 12 devices used; needs 4 more");
        assert_eq!(admission.usage["batch"], Usage { used: 12, borrowed: 0, waiting: 1 });
    }

    #[test]
    fn older_goes_first_and_is_not_passed_by_a_smaller_one() {
        let queues = [("q".to_owned(), queue(8, Some(0), 0))].into();
        let claims =
            [claim("small", 3, "q", 2, 1, 0), claim("running", 1, "q", 2, 1, 1), claim("big", 2, "q", 8, 1, 0)];
        let admission = admit(&queues, &claims, 100);
        assert_eq!((allowed(&admission, "running"), allowed(&admission, "big")), (1, 0));
        assert_eq!(allowed(&admission, "small"), 0);
    }

    #[test]
    fn one_that_can_never_fit_blocks_nobody() {
        let queues = [("q".to_owned(), queue(8, Some(0), 0))].into();
        let claims = [claim("huge", 1, "q", 9, 1, 0), claim("small", 2, "q", 2, 1, 0)];
        let admission = admit(&queues, &claims, 100);
        assert_eq!(allowed(&admission, "small"), 1);
        assert!(message(&admission, "huge").contains("needs 9 devices and the queue allows 8"));
    }

    #[test]
    fn quota_comes_before_borrowing_whatever_the_priority() {
        let queues = [("a".to_owned(), queue(2, None, 10)), ("b".to_owned(), queue(4, Some(0), 0))].into();
        let claims = [claim("greedy", 1, "a", 2, 4, 0), claim("sure", 2, "b", 4, 1, 0)];
        let admission = admit(&queues, &claims, 8);
        assert_eq!((allowed(&admission, "greedy"), allowed(&admission, "sure")), (2, 1));
        assert_eq!(admission.usage["a"], Usage { used: 4, borrowed: 2, waiting: 1 });
    }

    #[test]
    fn unknown_queues_and_foreign_namespaces_are_named() {
        let mut closed = queue(8, None, 0);
        closed.namespaces = vec!["other".to_owned()];
        let queues = [("q".to_owned(), closed)].into();
        let admission = admit(&queues, &[claim("a", 1, "q", 1, 1, 0), claim("b", 1, "nope", 1, 1, 0)], 8);
        assert!(message(&admission, "a").contains("does not admit namespace models"));
        assert!(message(&admission, "b").contains("queue nope does not exist"));
    }

    proptest! {
        #[test]
        fn quotas_hold_and_a_second_pass_changes_nothing(
            quota in 0u32..20,
            borrow in proptest::option::of(0u32..10),
            devices in 0u32..40,
            asks in proptest::collection::vec((0i64..5, 1u32..6, 0u32..5), 1..12),
        ) {
            let queues: BTreeMap<_, _> = [("q".to_owned(), queue(quota, borrow, 0))].into();
            let mut claims: Vec<_> = asks
                .iter()
                .enumerate()
                .map(|(index, (created, need, wanted))| claim(&format!("d{index}"), *created, "q", *need, *wanted, 0))
                .collect();
            let first = admit(&queues, &claims, devices);
            let used = first.usage["q"].used;
            prop_assert!(used <= quota.saturating_add(borrow.unwrap_or(u32::MAX)));
            prop_assert!(used <= quota.max(devices));
            prop_assert_eq!(used, first.verdicts.values().map(|verdict| verdict.devices).sum::<u32>());
            for claim in &mut claims {
                let verdict = &first.verdicts[&claim.key];
                prop_assert!(verdict.allowed <= claim.wanted);
                prop_assert_eq!(verdict.waiting.is_some(), verdict.allowed < claim.wanted);
                (claim.held, claim.held_devices) = (verdict.allowed, verdict.devices);
            }
            prop_assert_eq!(admit(&queues, &claims, devices), first);
        }

        #[test]
        fn nothing_granted_is_ever_taken_back(held in 0u32..8, quota in 0u32..8, wanted in 0u32..8) {
            let queues: BTreeMap<_, _> = [("q".to_owned(), queue(quota, Some(0), 0))].into();
            let admission = admit(&queues, &[claim("a", 1, "q", 1, wanted, held)], 8);
            prop_assert!(allowed(&admission, "a") >= held);
        }
    }
}
