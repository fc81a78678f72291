//! What a ledger promises over the end of its process: the same words afterwards, and none that is better.

use std::time::Duration;

use berth_types::{Admission, DeviceState, Health, Reason, Vendor};
use proptest::prelude::*;
use serde_json::Value;

use super::{
    device::Settings,
    fact::{DeviceInfo, Fact, Reading, ResetStep, Subject, What},
    ledger::{Ledger, Report},
    ledger_tests::{ONE, TWO, any_fact, info, ms, reading, started, xid},
};

fn memory(ledger: &Ledger) -> Value {
    serde_json::to_value(ledger).unwrap()
}

fn state(ledger: &Ledger, local: &str) -> DeviceState {
    ledger.standing(&Subject::Device(local.to_owned())).state
}

/// Lets time pass until `to`, turn by turn, as the keeper does.
fn advance(ledger: &mut Ledger, to: u64, said: &mut Vec<Report>) {
    while let Some(next) = ledger.deadline().filter(|next| *next < ms(to)) {
        said.extend(ledger.tick(next).reports);
    }
    said.extend(ledger.tick(ms(to)).reports);
}

/// Takes a fact, a reading as of now, and lets two seconds pass: no storm is in the way of what is said.
fn take(ledger: &mut Ledger, at: u64, local: &str, what: &What, said: &mut Vec<Report>) {
    let what = match what {
        What::Reading(values) => What::Reading(Box::new(Reading { begun: ms(at), ..*values.clone() })),
        other => other.clone(),
    };
    said.extend(ledger.take(ms(at), &Fact::device(local, what)).reports);
    advance(ledger, at + 2_000, said);
}

/// A ledger that goes on from `memory`, its devices listed again and nothing else read.
fn resumed(memory: Value, written: u64, now: u64, rebooted: bool) -> Ledger {
    let mut ledger = Ledger::resumed(Settings::default(), memory, ms(written), ms(now), rebooted).unwrap();
    for local in [ONE, TWO] {
        ledger.take(ms(now), &Fact::device(local, What::Listed(info(local))));
    }
    ledger
}

fn well(ledger: &mut Ledger, at: u64) {
    for local in [ONE, TWO] {
        ledger.take(ms(at), &Fact::device(local, What::Reading(Box::new(reading(ms(at))))));
    }
}

fn said(reports: &[Report]) -> Vec<(Subject, bool, DeviceState)> {
    reports.iter().map(|report| (report.of.clone(), report.note, report.state)).collect()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, ..ProptestConfig::default() })]

    #[test]
    fn a_restart_at_any_point_changes_nothing_that_is_said_afterwards(
        before in proptest::collection::vec((2_000u64..200_000, any_fact()), 0..25),
        after in proptest::collection::vec((2_000u64..200_000, any_fact()), 0..25),
    ) {
        let (mut one, mut at, mut ignored) = (started(), 10_000, Vec::new());
        for (pause, what) in &before {
            at += pause;
            take(&mut one, at, ONE, what, &mut ignored);
        }
        at += 2_000;
        let mut two = resumed(memory(&one), at, at, false);
        for report in two.start(ms(at)) {
            prop_assert_eq!(report.state, one.standing(&report.of).state);
            prop_assert_eq!(two.standing(&report.of), one.standing(&report.of), "since and evidence too");
        }
        let (mut from_one, mut from_two) = (Vec::new(), Vec::new());
        for (pause, what) in &after {
            at += pause;
            advance(&mut one, at, &mut from_one);
            advance(&mut two, at, &mut from_two);
            take(&mut one, at, ONE, what, &mut from_one);
            take(&mut two, at, ONE, what, &mut from_two);
        }
        advance(&mut one, at + 90_000_000, &mut from_one);
        advance(&mut two, at + 90_000_000, &mut from_two);
        prop_assert_eq!(said(&from_one), said(&from_two));
    }

    #[test]
    fn neither_a_restart_nor_a_reboot_cures_a_device(
        before in proptest::collection::vec((2_000u64..200_000, any_fact()), 0..25),
        away in 0u64..90_000_000,
        rebooted in any::<bool>(),
    ) {
        let (mut ledger, mut at, mut ignored) = (started(), 10_000, Vec::new());
        for (pause, what) in &before {
            at += pause;
            take(&mut ledger, at, ONE, what, &mut ignored);
        }
        at += 2_000;
        let (written, now) = (at, at + away);
        let mut again = resumed(memory(&ledger), written, now, rebooted);
        well(&mut again, now + 1);
        again.start(ms(now + 2));
        advance(&mut again, now + 3, &mut ignored);
        // One that was never away, asked the same.
        advance(&mut ledger, now, &mut ignored);
        well(&mut ledger, now + 1);
        advance(&mut ledger, now + 3, &mut ignored);
        let (stayed, returned) = (state(&ledger, ONE), state(&again, ONE));
        if !rebooted {
            prop_assert_eq!(returned, stayed);
        } else if stayed.health == Health::Unhealthy {
            prop_assert_ne!(returned.health, Health::Healthy, "it was {:?}", stayed);
        }
        prop_assert_eq!(state(&again, TWO), DeviceState::HEALTHY);
    }

    #[test]
    fn a_memory_with_anything_changed_in_it_is_refused_or_harmless(
        before in proptest::collection::vec((2_000u64..200_000, any_fact()), 1..15),
        paths in proptest::collection::vec((any::<u16>(), 0u8..6), 1..4),
    ) {
        let (mut ledger, mut at, mut ignored) = (started(), 10_000, Vec::new());
        for (pause, what) in &before {
            at += pause;
            take(&mut ledger, at, ONE, what, &mut ignored);
        }
        let mut kept = memory(&ledger);
        for (pick, change) in paths {
            let mut places = Vec::new();
            leaves(&kept, String::new(), &mut places);
            let place = places[usize::from(pick) % places.len()].clone();
            if let Some(value) = kept.pointer_mut(&place) {
                *value = match change {
                    0 => Value::Null,
                    1 => Value::from(u64::MAX),
                    2 => Value::from(-1),
                    3 => Value::from("x".repeat(300)),
                    4 => Value::from(0),
                    _ => Value::Array(Vec::new()),
                };
            }
        }
        if let Ok(mut ledger) = Ledger::resumed(Settings::default(), kept, ms(at), ms(at), false) {
            well(&mut ledger, at + 1);
            ledger.start(ms(at + 2));
            take(&mut ledger, at + 10, ONE, &xid(79, None), &mut ignored);
            advance(&mut ledger, at + 90_000_000, &mut ignored);
            prop_assert!(state(&ledger, ONE).admission >= Admission::Draining);
        }
    }
}

/// Places of everything in a document that holds nothing else.
fn leaves(value: &Value, place: String, into: &mut Vec<String>) {
    match value {
        Value::Object(fields) if !fields.is_empty() => {
            let escaped = |key: &str| key.replace('~', "~0").replace('/', "~1");
            fields.iter().for_each(|(key, value)| leaves(value, format!("{place}/{}", escaped(key)), into));
        }
        Value::Array(values) if !values.is_empty() => {
            values.iter().enumerate().for_each(|(at, value)| leaves(value, format!("{place}/{at}"), into));
        }
        _ => into.push(place),
    }
}

#[test]
fn the_third_incident_of_a_day_counts_over_restarts_and_reboots() {
    let (mut ledger, mut ignored) = (started(), Vec::new());
    for turn in 0..3 {
        let at = 3_000_000 * (turn + 1);
        take(&mut ledger, at, ONE, &xid(48, None), &mut ignored);
        let told = state(&ledger, ONE).reason;
        assert_eq!(told == Some(Reason::RepeatedFault), turn == 2, "{told:?}");
        take(&mut ledger, at + 10_000, ONE, &What::Reset(ResetStep::Started), &mut ignored);
        take(&mut ledger, at + 20_000, ONE, &What::Reset(ResetStep::Done), &mut ignored);
        ledger = resumed(memory(&ledger), at + 22_000, at + 30_000, turn == 1);
        well(&mut ledger, at + 31_000);
        ledger.start(ms(at + 32_000));
        assert_eq!(ledger.awaiting_validation().collect::<Vec<_>>(), [ONE], "turn {turn}");
        take(&mut ledger, at + 33_000, ONE, &What::Validated(true), &mut ignored);
        advance(&mut ledger, at + 2_900_000, &mut ignored);
    }
}

#[test]
fn a_device_in_probation_stays_in_it_to_its_end_over_a_restart() {
    let (mut ledger, mut ignored) = (started(), Vec::new());
    take(&mut ledger, 10_000, ONE, &xid(79, None), &mut ignored);
    for (at, what) in [(20_000, What::Reset(ResetStep::Started)), (30_000, What::Reset(ResetStep::Done))] {
        take(&mut ledger, at, ONE, &what, &mut ignored);
    }
    well(&mut ledger, 40_000);
    take(&mut ledger, 50_000, ONE, &What::Validated(true), &mut ignored);
    let mut ledger = resumed(memory(&ledger), 52_000, 400_000, false);
    well(&mut ledger, 400_001);
    ledger.start(ms(400_002));
    assert_eq!((state(&ledger, ONE).health, state(&ledger, ONE).admission), (Health::Degraded, Admission::Draining));
    assert_eq!(ledger.standing(&Subject::Device(ONE.to_owned())).since, ms(50_000));
    ledger.tick(ms(649_999));
    assert_eq!(state(&ledger, ONE).health, Health::Degraded);
    ledger.tick(ms(650_000));
    assert_eq!(state(&ledger, ONE), DeviceState::HEALTHY);
}

#[test]
fn a_device_that_is_gone_when_the_agent_returns_is_lost_and_one_nobody_could_ask_is_unknown() {
    let inventory = |locals: &[&str]| {
        let locals = locals.iter().map(|local| (*local).to_owned()).collect();
        Fact::node(What::Inventory { vendor: Vendor::Nvidia, locals })
    };
    let go_on = |rebooted| Ledger::resumed(Settings::default(), memory(&started()), ms(5), ms(9), rebooted).unwrap();
    let mut ledger = go_on(false);
    ledger.take(ms(9), &Fact::device(TWO, What::Listed(info(TWO))));
    ledger.take(ms(9), &inventory(&[TWO]));
    ledger.start(ms(10));
    assert_eq!((state(&ledger, ONE).reason, state(&ledger, TWO).reason), (Some(Reason::DeviceLost), None));

    let mut ledger = go_on(false);
    ledger.start(ms(10));
    assert_eq!((state(&ledger, ONE).health, state(&ledger, ONE).reason), (Health::Unknown, Some(Reason::AgentBlind)));

    let mut ledger = go_on(true);
    ledger.start(ms(10));
    assert_eq!(ledger.devices().count(), 0, "what was well before a reboot may have been taken out of the node");
}

#[test]
fn another_device_in_the_same_place_has_a_record_of_its_own() {
    let named = |uuid: &str| What::Listed(DeviceInfo { uuid: uuid.to_owned(), ..info(ONE) });
    let (mut ledger, mut ignored) = (started(), Vec::new());
    take(&mut ledger, 1_000, ONE, &named("GPU-1"), &mut ignored);
    take(&mut ledger, 5_000, ONE, &xid(64, None), &mut ignored);
    take(&mut ledger, 10_000, ONE, &named("GPU-1"), &mut ignored);
    assert_eq!(state(&ledger, ONE).reason, Some(Reason::MemoryRemapFailed));
    take(&mut ledger, 15_000, ONE, &named("GPU-2"), &mut ignored);
    assert_eq!(state(&ledger, ONE), DeviceState::HEALTHY);
}

#[test]
fn a_person_frees_a_device_of_what_was_and_only_a_validation_brings_it_back() {
    let (mut ledger, mut ignored) = (started(), Vec::new());
    take(&mut ledger, 1_000, ONE, &xid(64, None), &mut ignored);
    take(&mut ledger, 5_000, ONE, &What::Released(ms(500)), &mut ignored);
    assert!(ledger.awaiting_validation().next().is_none(), "vouched for before it failed");
    take(&mut ledger, 10_000, ONE, &What::Released(ms(9_000)), &mut ignored);
    assert_eq!(state(&ledger, ONE).admission, Admission::Draining);
    well(&mut ledger, 15_000);
    assert_eq!(ledger.awaiting_validation().collect::<Vec<_>>(), [ONE]);
    take(&mut ledger, 20_000, ONE, &What::Validated(true), &mut ignored);
    assert_eq!(state(&ledger, ONE).health, Health::Degraded);
    advance(&mut ledger, 700_000, &mut ignored);
    assert_eq!(state(&ledger, ONE), DeviceState::HEALTHY);
}

#[test]
fn an_idle_device_that_computes_wrong_is_reset_and_validated() {
    let (mut ledger, mut ignored) = (started(), Vec::new());
    take(&mut ledger, 1_000, ONE, &What::Unsound("expert 3 differs".to_owned()), &mut ignored);
    let now = state(&ledger, ONE);
    assert_eq!((now.health, now.reason), (Health::Unhealthy, Some(Reason::EngineFault)));
    assert!(ledger.standing(&Subject::Device(ONE.to_owned())).evidence.contains("expert 3 differs"));
}

#[test]
fn a_time_that_has_not_come_makes_a_memory_useless() {
    let ledger = started();
    let mut kept = memory(&ledger);
    let future = serde_json::to_value(Duration::from_secs(10 * 86_400)).unwrap();
    *kept.pointer_mut("/switch_fault").unwrap() = future;
    let error = Ledger::resumed(Settings::default(), kept, ms(5), ms(5), false).unwrap_err();
    assert!(error.to_string().contains("after it was written"), "{error}");
}
