//! What the ledger promises, over facts in any order.

use std::time::Duration;

use berth_types::{Action, Admission, DeviceState, Health, Reason, Scope, Vendor};
use proptest::prelude::*;

use super::{
    device::Settings,
    fact::{DeviceInfo, Fact, Read, Reading, ResetStep, Rows, Source, Subject, What, Xid},
    ledger::{Ledger, Outcome, Report},
};

pub(super) const ONE: &str = "0000:3b:00.0";
pub(super) const TWO: &str = "0000:9d:00.0";

pub(super) fn ms(ms: u64) -> Duration {
    Duration::from_millis(ms)
}

pub(super) fn info(local: &str) -> DeviceInfo {
    DeviceInfo {
        local: local.to_owned(),
        vendor: Vendor::Nvidia,
        product: "H100".to_owned(),
        uuid: String::new(),
        memory_bytes: 80 << 30,
        interconnect_domain: None,
        card: local.to_owned(),
        pci: local.parse().ok(),
        reset_group: None,
        driver_branch: None,
    }
}

pub(super) fn reading(begun: Duration) -> Reading {
    Reading {
        begun,
        recovery: Read::Value(0),
        rows: Read::Value(Rows::default()),
        ecc_uncorrected: Read::Value(0),
        ..Reading::default()
    }
}

pub(super) fn xid(number: u16, pid: Option<u32>) -> What {
    What::Xid(Xid {
        number,
        source: Source::KernelLog,
        pid,
        process: String::new(),
        gpu_instance: None,
        message: "text".to_owned(),
    })
}

pub(super) fn started() -> Ledger {
    let mut ledger = Ledger::new(Settings::default());
    for local in [ONE, TWO] {
        ledger.take(ms(0), &Fact::device(local, What::Listed(info(local))));
        ledger.take(ms(0), &Fact::device(local, What::Reading(Box::new(reading(ms(0))))));
    }
    assert!(ledger.start(ms(0)).iter().all(|report| report.state == DeviceState::HEALTHY));
    ledger
}

fn take(ledger: &mut Ledger, at: u64, what: What) -> Vec<Report> {
    ledger.take(ms(at), &Fact::device(ONE, what)).reports
}

fn state(ledger: &Ledger) -> DeviceState {
    ledger.standing(&Subject::Device(ONE.to_owned())).state
}

#[test]
fn one_loss_told_three_times_is_one_report() {
    let mut ledger = started();
    let first = take(&mut ledger, 1, xid(79, None));
    assert_eq!((first.len(), first[0].state.reason), (1, Some(Reason::DeviceLost)));
    assert!(take(&mut ledger, 1, What::Event(0x4000)).is_empty());
    assert!(take(&mut ledger, 2, What::BusLoss("fallen off the bus".to_owned())).is_empty());
    assert!(take(&mut ledger, 200, What::Recovery(Some(1))).is_empty());
    assert_eq!((state(&ledger).action, state(&ledger).scope), (Action::RebootNode, Some(Scope::Device)));
}

#[test]
fn a_lost_device_comes_back_only_after_reset_reading_validation_and_probation() {
    let mut ledger = started();
    take(&mut ledger, 1, xid(79, None));
    take(&mut ledger, 1_000, What::Reading(Box::new(reading(ms(1_000)))));
    assert_eq!(state(&ledger).admission, Admission::Barred, "an answer is no cure");
    take(&mut ledger, 2_000, What::Reset(ResetStep::Started));
    take(&mut ledger, 9_000, What::Reset(ResetStep::Done));
    take(&mut ledger, 9_100, What::Reading(Box::new(reading(ms(9_050)))));
    assert_eq!(state(&ledger).admission, Admission::Barred, "nor is a reset");
    take(&mut ledger, 10_000, What::Validated(true));
    let watched = state(&ledger);
    assert_eq!(
        (watched.health, watched.admission, watched.action),
        (Health::Degraded, Admission::Draining, Action::None)
    );
    ledger.tick(ms(609_999));
    assert_eq!(state(&ledger).health, Health::Degraded);
    ledger.tick(ms(610_000));
    assert_eq!(state(&ledger), DeviceState::HEALTHY);
}

#[test]
fn a_device_that_a_line_calls_lost_and_that_answers_is_asked_again_until_it_is_seen_away() {
    for away in [false, true] {
        let asked = |ledger: &mut Ledger, at| ledger.tick(ms(at)).reread == [ONE];
        let mut ledger = started();
        assert_eq!(ledger.take(ms(1), &Fact::device(ONE, xid(79, None))).reread, [ONE]);
        take(&mut ledger, 2, What::Reading(Box::new(reading(ms(2)))));
        assert!(asked(&mut ledger, 151) && !asked(&mut ledger, 152) && asked(&mut ledger, 1_151));
        take(&mut ledger, 1_200, What::Reading(Box::new(Reading { lost: away, ..reading(ms(1_200)) })));
        assert!(asked(&mut ledger, 2_151) != away && asked(&mut ledger, 3_151) != away);
        assert!(!asked(&mut ledger, 60_000), "it stays, and only a reset can help");
    }
}

#[test]
fn a_validation_is_due_once_a_lost_device_is_found_again_and_once_more_after_a_reset() {
    let due = |ledger: &Ledger| ledger.awaiting_validation().map(String::as_str).collect::<Vec<_>>().join(" ");
    let lost = |begun| What::Reading(Box::new(Reading { lost: true, ..reading(begun) }));
    let mut ledger = started();
    take(&mut ledger, 1, xid(79, None));
    take(&mut ledger, 1_000, What::Reading(Box::new(reading(ms(1_000)))));
    assert_eq!(due(&ledger), "", "it was never gone: only a reset can help");
    take(&mut ledger, 2_000, lost(ms(2_000)));
    assert_eq!(due(&ledger), "");
    take(&mut ledger, 3_000, What::Reading(Box::new(reading(ms(3_000)))));
    assert_eq!(due(&ledger), ONE);
    take(&mut ledger, 4_000, What::Validated(false));
    take(&mut ledger, 5_000, What::Reading(Box::new(reading(ms(5_000)))));
    assert_eq!(due(&ledger), "", "nothing was done to it since");
    take(&mut ledger, 6_000, What::Reset(ResetStep::Started));
    take(&mut ledger, 7_000, What::Reset(ResetStep::Done));
    assert_eq!(due(&ledger), "", "no reading since");
    take(&mut ledger, 8_000, What::Reading(Box::new(reading(ms(7_500)))));
    assert_eq!(due(&ledger), ONE);
    take(&mut ledger, 9_000, What::Validated(true));
    assert_eq!(due(&ledger), "");
}

#[test]
fn how_long_a_device_is_watched_is_for_the_owner_to_say() {
    let mut ledger = Ledger::new(Settings { probation: ms(5_000) });
    ledger.take(ms(0), &Fact::device(ONE, What::Listed(info(ONE))));
    ledger.take(ms(0), &Fact::device(ONE, What::Reading(Box::new(reading(ms(0))))));
    ledger.start(ms(0));
    take(&mut ledger, 1, xid(79, None));
    take(&mut ledger, 2_000, What::Reset(ResetStep::Started));
    take(&mut ledger, 3_000, What::Reset(ResetStep::Done));
    take(&mut ledger, 4_000, What::Reading(Box::new(reading(ms(4_000)))));
    take(&mut ledger, 5_000, What::Validated(true));
    ledger.tick(ms(9_999));
    assert_eq!(state(&ledger).health, Health::Degraded);
    ledger.tick(ms(10_000));
    assert_eq!(state(&ledger), DeviceState::HEALTHY);
}

#[test]
fn a_failed_reset_and_a_failed_validation_climb_to_a_reboot() {
    for what in [What::Reset(ResetStep::Failed), What::Validated(false)] {
        let mut ledger = started();
        take(&mut ledger, 1, xid(119, Some(7)));
        assert_eq!(state(&ledger).action, Action::ResetDevice);
        take(&mut ledger, 1_000, What::Reset(ResetStep::Started));
        if what == What::Validated(false) {
            take(&mut ledger, 2_000, What::Reset(ResetStep::Done));
        }
        take(&mut ledger, 3_000, what);
        let climbed = state(&ledger);
        assert_eq!((climbed.admission, climbed.action), (Admission::Barred, Action::RebootNode));
        assert_eq!(climbed.reason, Some(Reason::FirmwareHang));
    }
}

#[test]
fn the_driver_s_wish_joins_its_cause_whichever_comes_first() {
    for wish_first in [true, false] {
        let mut ledger = started();
        let mut facts = vec![What::Recovery(Some(1)), xid(48, None)];
        if !wish_first {
            facts.reverse();
        }
        for (at, what) in (1..).zip(facts) {
            take(&mut ledger, at, what);
        }
        let now = state(&ledger);
        assert_eq!((now.reason, now.admission), (Some(Reason::MemoryUncorrectable), Admission::Barred), "{wish_first}");
    }
}

#[test]
fn a_wish_that_the_driver_takes_back_without_a_reset_is_gone() {
    let mut ledger = started();
    for (value, reason) in [(1, Reason::ResetRequired), (3, Reason::FabricDegraded)] {
        take(&mut ledger, 1_000, What::Recovery(Some(value)));
        assert_eq!(state(&ledger).reason, Some(reason));
        take(&mut ledger, 3_000, What::Recovery(Some(0)));
        ledger.tick(ms(5_000));
        assert_eq!(state(&ledger), DeviceState::HEALTHY);
    }
}

#[test]
fn a_fault_after_the_probe_is_not_forgiven_by_it() {
    let mut ledger = started();
    take(&mut ledger, 1, xid(48, None));
    take(&mut ledger, 1_000, What::Reset(ResetStep::Done));
    // The probe passed, but the reading that would confirm it shows a new fault.
    take(&mut ledger, 2_000, What::Validated(true));
    take(&mut ledger, 2_100, xid(79, None));
    take(&mut ledger, 2_200, What::Reading(Box::new(reading(ms(2_200)))));
    assert_eq!((state(&ledger).reason, state(&ledger).admission), (Some(Reason::DeviceLost), Admission::Barred));
}

#[test]
fn the_driver_s_wish_outlives_the_cause_it_had_joined() {
    let mut ledger = started();
    let rows = |pending| Read::Value(Rows { pending, failed: false });
    take(&mut ledger, 1, What::Reading(Box::new(Reading { rows: rows(true), ..reading(ms(1)) })));
    take(&mut ledger, 1_000, What::Reset(ResetStep::Done));
    let wish = Reading { recovery: Read::Value(1), rows: rows(false), ..reading(ms(1_100)) };
    take(&mut ledger, 1_100, What::Reading(Box::new(wish)));
    assert_eq!((state(&ledger).reason, state(&ledger).admission), (Some(Reason::ResetRequired), Admission::Barred));
}

#[test]
fn an_event_waits_for_the_line_that_knows_the_process() {
    let mut ledger = started();
    let event = What::Xid(Xid {
        number: 31,
        source: Source::Event,
        pid: None,
        process: String::new(),
        gpu_instance: None,
        message: String::new(),
    });
    assert!(take(&mut ledger, 0, event.clone()).is_empty());
    let said = take(&mut ledger, 1, xid(31, Some(7001)));
    assert_eq!((said.len(), said[0].note), (1, true));
    assert!(said[0].evidence.contains("7001"), "{}", said[0].evidence);
    let mut alone = started();
    take(&mut alone, 0, event);
    let deadline = alone.deadline().unwrap();
    assert!(deadline < ms(250), "{deadline:?}");
    assert_eq!(alone.tick(deadline).reports.len(), 1);
}

#[test]
fn blindness_is_unknown_and_after_half_a_minute_draining() {
    let mut ledger = started();
    let blind = Reading { recovery: Read::Missed, ..reading(ms(1_000)) };
    take(&mut ledger, 2_000, What::Reading(Box::new(blind)));
    assert_eq!((state(&ledger).health, state(&ledger).admission), (Health::Unknown, Admission::Schedulable));
    let deadline = ledger.deadline().unwrap();
    ledger.tick(deadline);
    assert_eq!(state(&ledger).admission, Admission::Draining);
    take(&mut ledger, 40_000, What::Reading(Box::new(reading(ms(40_000)))));
    assert_eq!(state(&ledger), DeviceState::HEALTHY);
}

#[test]
fn a_worker_that_does_not_end_bars_its_device_until_it_does() {
    let mut ledger = started();
    take(&mut ledger, 1, What::WorkerStuck(Some("worker process 7 does not end".to_owned())));
    assert_eq!((state(&ledger).health, state(&ledger).admission), (Health::Unknown, Admission::Barred));
    take(&mut ledger, 5_000, What::Reading(Box::new(reading(ms(5_000)))));
    assert_eq!(state(&ledger).admission, Admission::Barred, "a reading knows nothing of it");
    take(&mut ledger, 6_000, What::WorkerStuck(None));
    assert_eq!(state(&ledger), DeviceState::HEALTHY);
}

#[test]
fn a_storm_is_at_most_two_reports_a_second_and_its_last_state_is_said() {
    let mut ledger = started();
    let mut said = 0;
    for at in 0..200 {
        let value = if at % 2 == 0 { 3 } else { 0 };
        said += take(&mut ledger, at, What::Recovery(Some(value))).len();
    }
    assert!(said <= 2, "{said}");
    take(&mut ledger, 200, What::Recovery(Some(3)));
    let deadline = ledger.deadline().unwrap();
    ledger.tick(deadline);
    assert_eq!(state(&ledger).reason, Some(Reason::FabricDegraded));
}

#[test]
fn two_notes_hold_no_draining_back() {
    let mut ledger = started();
    for pid in [7, 8] {
        assert_eq!(take(&mut ledger, u64::from(pid), xid(31, Some(pid))).len(), 1);
    }
    let said = take(&mut ledger, 20, xid(46, None));
    assert_eq!((said.len(), said[0].note, said[0].state.admission), (1, false, Admission::Draining));
}

#[test]
fn the_third_incident_of_a_day_is_a_repeated_fault() {
    let mut ledger = started();
    let mut at = 0;
    for _ in 0..3 {
        at += 3_000_000;
        take(&mut ledger, at, xid(48, None));
        take(&mut ledger, at + 3_000, What::Reset(ResetStep::Started));
        take(&mut ledger, at + 5_000, What::Reset(ResetStep::Done));
        take(&mut ledger, at + 5_100, What::Reading(Box::new(reading(ms(at + 5_100)))));
        take(&mut ledger, at + 6_000, What::Validated(true));
        while let Some(next) = ledger.deadline().filter(|next| *next < ms(at + 2_900_000)) {
            ledger.tick(next);
        }
    }
    let now = state(&ledger);
    assert_eq!((now.reason, now.action), (Some(Reason::RepeatedFault), Action::ServiceHardware));
}

pub(super) fn any_fact() -> impl Strategy<Value = What> {
    let rows = (any::<bool>(), any::<bool>()).prop_map(|(pending, failed)| Rows { pending, failed });
    let values = (any::<bool>(), 0u32..7, rows, 0u64..3, 0u64..5000, 0u64..0x200);
    let readings = values.prop_map(|(lost, recovery, rows, unc, cor, reasons)| {
        What::Reading(Box::new(Reading {
            lost,
            recovery: if recovery == 6 { Read::Missed } else { Read::Value(recovery) },
            rows: Read::Value(rows),
            ecc_uncorrected: Read::Value(unc),
            ecc_corrected: Read::Value(cor),
            clock_reasons: Read::Value(reasons),
            ..Reading::default()
        }))
    });
    prop_oneof![
        (0u16..180, proptest::option::of(1u32..9)).prop_map(|(number, pid)| xid(number, pid)),
        proptest::option::of(0u32..8).prop_map(What::Recovery),
        (0u32..16).prop_map(|bit| What::Event(1 << bit)),
        Just(What::BusLoss("fallen off the bus".to_owned())),
        readings,
        prop_oneof![Just(ResetStep::Started), Just(ResetStep::Done), Just(ResetStep::Failed)].prop_map(What::Reset),
        any::<bool>().prop_map(What::Validated),
    ]
}

/// Feeds facts with their times; a reading begins when it comes.
fn feed(ledger: &mut Ledger, facts: &[(u64, What)], from: u64) -> (u64, Outcome) {
    let (mut at, mut last) = (from, Outcome::default());
    for (pause, what) in facts {
        at += pause;
        let what = match what {
            What::Reading(values) => What::Reading(Box::new(Reading { begun: ms(at), ..*values.clone() })),
            other => other.clone(),
        };
        last = ledger.take(ms(at), &Fact::device(ONE, what));
        assert!(ledger.forgotten().is_empty(), "{:?} changed and was not said", ledger.forgotten());
    }
    (at, last)
}

#[test]
fn a_storm_of_programs_is_remembered_in_bounded_space() {
    let mut ledger = started();
    let mut size_after = |pids: std::ops::Range<u32>| {
        for pid in pids {
            ledger.take(ms(10_000 + u64::from(pid)), &Fact::device(ONE, xid(31, Some(pid))));
        }
        format!("{ledger:?}").len()
    };
    let (some, many) = (size_after(1_000..1_500), size_after(1_500..9_000));
    assert!(many < some + some / 10, "{some} grew to {many}");
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 256, ..ProptestConfig::default() })]

    #[test]
    fn no_order_of_facts_leaves_a_dead_device_schedulable(
        before in proptest::collection::vec((0u64..200_000, any_fact()), 0..30),
        after in proptest::collection::vec((0u64..200_000, any_fact()), 0..30),
    ) {
        let mut ledger = started();
        // Neither an announced reset nor a probe hides the loss that comes now.
        let (at, _) = feed(&mut ledger, &before, 1);
        feed(&mut ledger, &[(1, What::Reset(ResetStep::Failed)), (1, xid(79, None))], at);
        let unproven = after.into_iter().filter(|(_, what)| !matches!(what, What::Validated(true))).collect::<Vec<_>>();
        let (end, _) = feed(&mut ledger, &unproven, at + 2);
        ledger.tick(ms(end + 90_000_000));
        prop_assert!(state(&ledger).admission >= Admission::Draining, "{:?}", state(&ledger));
        prop_assert_eq!(state(&ledger).health, Health::Unhealthy);
    }

    #[test]
    fn the_neighbour_of_a_device_is_never_touched(facts in proptest::collection::vec((0u64..5_000, any_fact()), 0..60)) {
        let mut ledger = started();
        feed(&mut ledger, &facts, 1);
        prop_assert_eq!(ledger.standing(&Subject::Device(TWO.to_owned())).state, DeviceState::HEALTHY);
    }

    #[test]
    fn the_same_reading_twice_changes_nothing_more(
        facts in proptest::collection::vec((0u64..5_000, any_fact()), 0..30),
        values in any_fact().prop_filter("a reading", |what| matches!(what, What::Reading(_))),
    ) {
        let mut ledger = started();
        let (at, _) = feed(&mut ledger, &facts, 1);
        let (at, _) = feed(&mut ledger, &[(3_000, values.clone())], at);
        let once = state(&ledger);
        let (_, outcome) = feed(&mut ledger, &[(0, values)], at);
        prop_assert_eq!(state(&ledger), once);
        prop_assert!(outcome.reports.is_empty());
    }

    #[test]
    fn history_alone_never_accuses_a_device_that_says_it_is_well(
        history in proptest::collection::vec((Just(0u64), any_fact()), 0..40),
    ) {
        let mut ledger = Ledger::new(Settings::default());
        ledger.take(ms(0), &Fact::device(ONE, What::Listed(info(ONE))));
        let lines: Vec<_> = history
            .into_iter()
            .filter(|(_, what)| matches!(what, What::Xid(_) | What::Recovery(_) | What::BusLoss(_)))
            .collect();
        feed(&mut ledger, &lines, 0);
        ledger.take(ms(1), &Fact::device(ONE, What::Reading(Box::new(reading(ms(1))))));
        ledger.start(ms(1));
        prop_assert_eq!(state(&ledger), DeviceState::HEALTHY);
    }
}
