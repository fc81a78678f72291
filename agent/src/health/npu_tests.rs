//! The ledger over Ascend's facts: what a script cannot vary as freely as a test.

use std::time::Duration;

use berth_types::{Action, Admission, DeviceState, Health, Reason, Vendor};
use proptest::prelude::*;

use super::{
    alarms,
    device::Settings,
    fact::{Alarm, Assertion, DeviceInfo, Fact, NpuReading, Read, ResetStep, Subject, SwitchFault, What},
    ledger::{Ledger, Outcome},
};

const ONE: &str = "3.0";
const TWO: &str = "3.1";
const HBM: u32 = 0x80E0_1801;
const RESTART: u32 = 0x80C7_8008;

fn ms(ms: u64) -> Duration {
    Duration::from_millis(ms)
}

fn info(local: &str) -> DeviceInfo {
    DeviceInfo {
        local: local.to_owned(),
        vendor: Vendor::Ascend,
        product: "Ascend910_9392".to_owned(),
        uuid: String::new(),
        memory_bytes: 64 << 30,
        interconnect_domain: None,
        card: "card 3".to_owned(),
        pci: None,
        reset_group: Some("module 3".to_owned()),
        driver_branch: None,
    }
}

fn values(begun: u64, health: u32, codes: &[u32]) -> What {
    What::Npu(Box::new(NpuReading {
        begun: ms(begun),
        health: Read::Value(health),
        codes: Read::Value(codes.to_vec()),
        boot: Read::Value(16),
        network: Read::Value(0),
        ..NpuReading::default()
    }))
}

fn alarm(code: u32, assertion: Assertion, severity: u8, serial: i32) -> What {
    What::Alarm(Alarm { code, assertion, severity, serial })
}

fn started() -> Ledger {
    let mut ledger = Ledger::new(Settings::default());
    for local in [ONE, TWO] {
        ledger.take(ms(0), &Fact::device(local, What::Listed(info(local))));
        ledger.take(ms(0), &Fact::device(local, values(0, 0, &[])));
    }
    ledger.start(ms(0));
    ledger
}

fn take(ledger: &mut Ledger, at: u64, local: &str, what: What) -> Outcome {
    ledger.take(ms(at), &Fact::device(local, what))
}

fn state(ledger: &Ledger, local: &str) -> DeviceState {
    ledger.standing(&Subject::Device(local.to_owned())).state
}

#[test]
fn an_event_is_a_hint_until_the_list_bears_it_out() {
    let mut ledger = started();
    let outcome = take(&mut ledger, 1_000, ONE, alarm(HBM, Assertion::Occurred, 3, 1));
    assert!(outcome.reports.is_empty() && outcome.reread == [ONE]);
    take(&mut ledger, 1_001, ONE, values(1_001, 3, &[HBM]));
    assert_eq!(state(&ledger, ONE).reason, Some(Reason::MemoryUncorrectable));
    assert!(take(&mut ledger, 1_002, ONE, alarm(HBM, Assertion::Occurred, 3, 1)).reports.is_empty());
}

#[test]
fn an_event_that_no_reading_answers_is_believed_within_a_quarter_of_a_second() {
    let mut ledger = started();
    take(&mut ledger, 1_000, ONE, alarm(HBM, Assertion::Occurred, 3, 1));
    let at = ledger.deadline().unwrap();
    ledger.tick(at);
    let at = ledger.deadline().unwrap();
    assert!(at < ms(1_250), "{at:?}");
    ledger.tick(at);
    assert_eq!(state(&ledger, ONE).health, Health::Unhealthy);
}

#[test]
fn occurrences_count_from_the_first_of_their_window() {
    let day = 86_400_000;
    for (second, reason) in [(day - 1, Reason::RepeatedFault), (day + 2_000, Reason::MemoryUncorrectable)] {
        let mut ledger = started();
        for at in [1_000, second] {
            take(&mut ledger, at, ONE, values(at, 3, &[HBM]));
            assert_ne!(state(&ledger, ONE).health, Health::Healthy);
            if at == second {
                assert_eq!(state(&ledger, ONE).reason, Some(reason));
            }
            take(&mut ledger, at + 10, ONE, values(at + 10, 0, &[]));
            take(&mut ledger, at + 20, ONE, What::Validated(true));
            ledger.tick(ms(at + 700_000));
        }
    }
}

#[test]
fn a_sibling_that_was_not_reset_is_free_at_once_and_one_that_was_is_watched() {
    for reset in [false, true] {
        let mut ledger = started();
        take(&mut ledger, 1_000, ONE, values(1_000, 2, &[RESTART]));
        assert_eq!((state(&ledger, TWO).health, state(&ledger, TWO).admission), (Health::Healthy, Admission::Draining));
        if reset {
            take(&mut ledger, 2_000, ONE, What::Reset(ResetStep::Started));
            take(&mut ledger, 3_000, ONE, What::Reset(ResetStep::Done));
        }
        for local in [ONE, TWO] {
            take(&mut ledger, 4_000, local, values(4_000, 0, &[]));
        }
        take(&mut ledger, 4_100, ONE, What::Validated(true));
        let expected = if reset { Admission::Draining } else { Admission::Schedulable };
        assert_eq!(state(&ledger, TWO).admission, expected);
        take(&mut ledger, 4_200, TWO, What::Validated(true));
        ledger.tick(ms(700_000));
        assert_eq!((state(&ledger, ONE), state(&ledger, TWO)), (DeviceState::HEALTHY, DeviceState::HEALTHY));
    }
}

#[test]
fn a_reset_whose_maker_died_blocks_nobody_and_cures_nobody() {
    for made in [false, true] {
        let mut ledger = started();
        take(&mut ledger, 1_000, ONE, values(1_000, 2, &[RESTART]));
        take(&mut ledger, 2_000, ONE, What::Reset(ResetStep::Started));
        let memory = serde_json::to_value(&ledger).unwrap();
        let mut ledger = Ledger::resumed(Settings::default(), memory, ms(2_500), ms(3_000), false).unwrap();
        for local in [ONE, TWO] {
            take(&mut ledger, 3_000, local, What::Listed(info(local)));
        }
        take(&mut ledger, 3_000, ONE, What::Reset(ResetStep::Left));
        ledger.start(ms(3_000));
        let (health, codes) = if made { (0, vec![]) } else { (2, vec![RESTART]) };
        take(&mut ledger, 4_000, ONE, values(4_000, health, &codes));
        take(&mut ledger, 4_000, TWO, values(4_000, 0, &[]));
        let due: Vec<_> = ledger.awaiting_validation().cloned().collect();
        assert_eq!(due, if made { vec![ONE, TWO] } else { vec![TWO] });
        take(&mut ledger, 4_100, ONE, What::Validated(true));
        take(&mut ledger, 4_100, TWO, What::Validated(true));
        ledger.tick(ms(700_000));
        let expected = if made { Admission::Schedulable } else { Admission::Barred };
        assert_eq!(state(&ledger, ONE).admission, expected, "made: {made}");
    }
}

#[test]
fn a_device_whose_driver_took_a_fault_back_is_due_for_validation() {
    let due = |ledger: &Ledger| ledger.awaiting_validation().cloned().collect::<Vec<_>>();
    let mut ledger = started();
    take(&mut ledger, 1_000, ONE, values(1_000, 3, &[HBM]));
    assert!(due(&ledger).is_empty());
    take(&mut ledger, 2_000, ONE, values(2_000, 3, &[]));
    assert!(due(&ledger).is_empty(), "health does not agree");
    take(&mut ledger, 3_000, ONE, values(3_000, 0, &[]));
    assert_eq!(due(&ledger), [ONE]);
    take(&mut ledger, 3_100, ONE, What::Validated(false));
    assert!(due(&ledger).is_empty());
    assert_eq!(state(&ledger, ONE).action, Action::ResetGroup, "one step up");
}

#[test]
fn a_chip_that_does_not_finish_starting_hangs() {
    let mut ledger = started();
    let health = Read::Value(0);
    let booting = |begun| {
        What::Npu(Box::new(NpuReading { begun: ms(begun), health, boot: Read::Value(2), ..NpuReading::default() }))
    };
    take(&mut ledger, 1_000, ONE, booting(1_000));
    assert_eq!(state(&ledger, ONE), DeviceState::HEALTHY);
    ledger.tick(ledger.deadline().unwrap());
    assert_eq!(state(&ledger, ONE).reason, Some(Reason::FirmwareHang));
}

fn any_fact() -> impl Strategy<Value = (&'static str, What)> {
    let codes =
        prop::sample::select(vec![HBM, RESTART, alarms::CARD_DROP, alarms::LINK_DOWN, 0x80FE_8008, 0x80C9_8008]);
    let kinds = prop::sample::select(vec![Assertion::Occurred, Assertion::Recovered, Assertion::Once]);
    let what = prop_oneof![
        (codes.clone(), kinds, 0u8..4, 1i32..5)
            .prop_map(|(code, kind, severity, serial)| alarm(code, kind, severity, serial)),
        (0u32..4, prop::collection::vec(codes, 0..3)).prop_map(|(health, codes)| values(0, health, &codes)),
        prop::sample::select(vec![-8012, -8005, -8002, -8008]).prop_map(|code| What::Npu(Box::new(NpuReading {
            health: Read::Failed(code),
            codes: Read::Failed(code),
            ..NpuReading::default()
        }))),
        prop::sample::select(vec![ResetStep::Started, ResetStep::Done, ResetStep::Failed]).prop_map(What::Reset),
        any::<bool>().prop_map(What::Validated),
    ];
    (prop::sample::select(vec![ONE, TWO]), what)
}

/// The fact with the time at which it is taken.
fn dated(at: u64, what: What) -> What {
    match what {
        What::Npu(reading) => What::Npu(Box::new(NpuReading { begun: ms(at), ..*reading })),
        other => other,
    }
}

proptest! {
    #[test]
    fn no_order_of_facts_leaves_a_device_that_is_gone_schedulable(
        facts in prop::collection::vec((any_fact(), 1u64..20_000), 0..30),
    ) {
        let (mut ledger, mut at) = (started(), 0);
        for ((local, what), later) in facts {
            at += later;
            take(&mut ledger, at, local, dated(at, what));
            if ledger.deadline().is_some_and(|deadline| deadline <= ms(at)) {
                ledger.tick(ms(at));
            }
        }
        // Beyond what any reset explains.
        at += 700_000;
        take(&mut ledger, at, ONE, dated(at, values(at, u32::MAX, &[])));
        prop_assert_eq!(state(&ledger, ONE).admission, Admission::Barred);
    }

    #[test]
    fn time_is_asked_for_only_when_it_changes_something(
        facts in prop::collection::vec((any_fact(), 0u64..5_000), 0..30),
    ) {
        let (mut ledger, mut at) = (started(), 0);
        for ((local, what), later) in facts {
            at += later;
            take(&mut ledger, at, local, dated(at, what));
            ledger.tick(ms(at));
            ledger.tick(ms(at));
            prop_assert!(ledger.deadline().is_none_or(|deadline| deadline > ms(at)), "{:?} at {at}", ledger.deadline());
        }
    }

    #[test]
    fn a_fact_told_twice_changes_nothing(facts in prop::collection::vec((any_fact(), 1u64..20_000), 0..30)) {
        let (mut once, mut twice, mut at) = (started(), started(), 0);
        for ((local, what), later) in facts {
            at += later;
            // An order or a validation is given once; what is seen may be seen again.
            let again = matches!(what, What::Npu(_) | What::Alarm(_));
            let what = dated(at, what);
            take(&mut once, at, local, what.clone());
            take(&mut twice, at, local, what.clone());
            if again {
                take(&mut twice, at, local, what);
            }
            once.tick(ms(at));
            twice.tick(ms(at));
        }
        once.tick(ms(at + 5_000));
        twice.tick(ms(at + 5_000));
        for local in [ONE, TWO] {
            prop_assert_eq!(state(&once, local).health, state(&twice, local).health);
            prop_assert_eq!(state(&once, local).admission, state(&twice, local).admission);
        }
    }

    #[test]
    fn a_switch_fault_holds_until_it_is_over(port in 0u16..8, late in 0u64..60_000) {
        let mut ledger = started();
        let of = SwitchFault { alarm: 0x0852_0003, fault: None, peer: "npu", chip: 0, port };
        let told = |assertion| Fact::node(What::Fabric { of, assertion, severity: 3 });
        ledger.take(ms(1_000), &told(Assertion::Occurred));
        prop_assert_eq!(ledger.standing(&Subject::Node).state.admission, Admission::Barred);
        ledger.take(ms(2_000 + late), &told(Assertion::Recovered));
        ledger.tick(ms(10_000 + late));
        prop_assert_eq!(ledger.standing(&Subject::Node).state, DeviceState::HEALTHY);
    }
}
