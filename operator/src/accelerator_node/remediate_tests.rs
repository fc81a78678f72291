//! What remediation decides, case by case, and what it never does in any order of events.

use std::collections::BTreeMap;

use berth_crds::accelerator_node::OrderPhase;
use berth_types::{Action, Admission, DeviceId, Health};
use proptest::prelude::*;

use super::{
    book::{Book, Budget, Incident, Phase},
    remediate::{Decision, DeviceFacts, Mode, NodeFacts, PlacementFacts, Policy, World, remediate},
};

fn policy() -> Policy {
    Policy {
        mode: Mode::Act,
        budget: Budget { cluster: 3, pool: 2, domain: 1 },
        empty_limit: 100,
        order_limit: 100,
        validate_limit: 100,
        reboot: false,
        paused: false,
    }
}

fn healthy(pool: &str, group: &str) -> DeviceFacts {
    DeviceFacts {
        pool: pool.to_owned(),
        group: group.to_owned(),
        health: Health::Healthy,
        admission: Admission::Schedulable,
        action: Action::None,
        why: "EngineFault (Xid 46)".to_owned(),
        holds: false,
    }
}

fn unwell(pool: &str, group: &str, admission: Admission, action: Action) -> DeviceFacts {
    DeviceFacts { health: Health::Unhealthy, admission, action, ..healthy(pool, group) }
}

fn id(text: &str) -> DeviceId {
    text.parse().unwrap()
}

/// One native node of these devices.
fn node(name: &str, devices: Vec<DeviceFacts>) -> (String, NodeFacts) {
    let devices = devices.into_iter().enumerate().map(|(at, facts)| (id(&format!("{name}/{at}")), facts)).collect();
    (name.to_owned(), NodeFacts { native: true, domain: name.to_owned(), devices, ..NodeFacts::default() })
}

fn world(nodes: Vec<(String, NodeFacts)>) -> World {
    World { nodes: nodes.into_iter().collect(), placements: Vec::new() }
}

fn one(facts: DeviceFacts) -> World {
    world(vec![node("n1", vec![facts, healthy("h100", "")])])
}

fn draining() -> DeviceFacts {
    unwell("h100", "", Admission::Draining, Action::ResetDevice)
}

/// What the node pass and the agent make of a book: cordons and orders are in the spec, cordoned devices drain.
fn obey(world: &mut World, book: &Book) {
    for (name, node) in &mut world.nodes {
        let mine = || book.operations.iter().filter(|(_, one)| one.node() == name);
        let cordons = mine().flat_map(|(_, one)| one.cordons(node).cloned().collect::<Vec<_>>()).collect();
        let orders = mine().filter(|(id, one)| one.phase == Phase::Ordered && !one.recalled(id, node));
        let orders = orders.map(|(id, _)| id.clone()).collect();
        (node.cordons, node.orders) = (cordons, orders);
        for device in &node.cordons {
            let facts = node.devices.get_mut(device).unwrap();
            facts.admission = facts.admission.max(Admission::Draining);
        }
    }
}

fn only(book: &Book) -> (&String, &super::book::Operation) {
    assert_eq!(book.operations.len(), 1, "{book:?}");
    book.operations.iter().next().unwrap()
}

fn reasons(decision: &Decision) -> Vec<&str> {
    decision.told.iter().map(|told| told.reason).collect()
}

fn fate(world: &mut World, id: &str, phase: OrderPhase) {
    for node in world.nodes.values_mut() {
        node.fates.insert(id.to_owned(), (phase, "played".to_owned()));
    }
}

#[test]
fn a_device_is_emptied_then_reset_then_proves_itself() {
    let mut world = one(draining());
    world.placements = vec![PlacementFacts { name: "m/a".to_owned(), paused: false, devices: [id("n1/0")].into() }];
    let first = remediate(&world, &Book::default(), &policy(), 10);
    let (order, operation) = only(&first.book);
    assert_eq!((operation.phase, operation.members.len()), (Phase::Emptying, 1));
    let order = order.clone();
    obey(&mut world, &first.book);
    world.placements.clear();
    world.nodes.get_mut("n1").unwrap().devices.get_mut(&id("n1/0")).unwrap().holds = true;
    let still = remediate(&world, &first.book, &policy(), 20);
    assert_eq!(only(&still.book).1.phase, Phase::Emptying, "the old revision is still there");
    world.nodes.get_mut("n1").unwrap().devices.get_mut(&id("n1/0")).unwrap().holds = false;
    let ordered = remediate(&world, &still.book, &policy(), 30);
    assert_eq!((only(&ordered.book).1.phase, reasons(&ordered)), (Phase::Ordered, vec!["RemediationOrdered"]));
    obey(&mut world, &ordered.book);
    fate(&mut world, &order, OrderPhase::Succeeded);
    let proving = remediate(&world, &ordered.book, &policy(), 40);
    assert_eq!(only(&proving.book).1.phase, Phase::Validating);
    obey(&mut world, &proving.book);
    let facts = world.nodes.get_mut("n1").unwrap().devices.get_mut(&id("n1/0")).unwrap();
    (facts.health, facts.action) = (Health::Degraded, Action::None);
    let done = remediate(&world, &proving.book, &policy(), 50);
    assert_eq!((done.book.operations.len(), reasons(&done)), (0, vec!["RemediationSucceeded"]));
    assert_eq!(done.book.incidents.len(), 1, "it is remembered while it is on probation");
    *world.nodes.get_mut("n1").unwrap().devices.get_mut(&id("n1/0")).unwrap() = healthy("h100", "");
    assert!(remediate(&world, &done.book, &policy(), 60).book.incidents.is_empty());
}

#[test]
fn a_barred_device_is_ordered_at_once_and_its_group_is_emptied_first() {
    let barred = unwell("h100", "", Admission::Barred, Action::ResetDevice);
    let now = remediate(&one(barred), &Book::default(), &policy(), 10);
    assert_eq!(only(&now.book).1.phase, Phase::Ordered);
    let lost = unwell("a3", "module 0", Admission::Barred, Action::ResetDevice);
    let mut world = world(vec![node("n1", vec![lost, healthy("a3", "module 0"), healthy("a3", "module 1")])]);
    let begun = remediate(&world, &Book::default(), &policy(), 10);
    let (_, operation) = only(&begun.book);
    assert_eq!((operation.action, operation.members.len(), operation.phase), (Action::ResetGroup, 2, Phase::Emptying));
    obey(&mut world, &begun.book);
    assert_eq!(only(&remediate(&world, &begun.book, &policy(), 11).book).1.phase, Phase::Ordered);
}

#[test]
fn a_step_that_fails_or_expires_climbs_and_what_no_order_helps_is_a_person_s() {
    for phase in [OrderPhase::Failed, OrderPhase::Expired] {
        let mut world = one(unwell("h100", "", Admission::Barred, Action::ResetDevice));
        let ordered = remediate(&world, &Book::default(), &policy(), 10);
        let order = only(&ordered.book).0.clone();
        obey(&mut world, &ordered.book);
        fate(&mut world, &order, phase);
        let failed = remediate(&world, &ordered.book, &policy(), 20);
        assert_eq!(reasons(&failed), ["RemediationFailed"]);
        let (action, why) = &failed.advice[&id("n1/0")];
        assert_eq!(*action, Action::RebootNode, "{why}");
        let may = Policy { reboot: true, ..policy() };
        let reboot = remediate(&world, &failed.book, &may, 30);
        assert_eq!((only(&reboot.book).1.action, only(&reboot.book).1.members.len()), (Action::RebootNode, 2));
    }
    let silent =
        remediate(&one(unwell("h100", "", Admission::Barred, Action::ResetDevice)), &Book::default(), &policy(), 10);
    let mut world = one(unwell("h100", "", Admission::Barred, Action::ResetDevice));
    obey(&mut world, &silent.book);
    let expired = remediate(&world, &silent.book, &policy(), 10 + 100 + 120);
    assert_eq!(reasons(&expired), ["RemediationFailed"], "an agent that says nothing");
    let service =
        remediate(&one(unwell("h100", "", Admission::Barred, Action::ServiceHardware)), &Book::default(), &policy(), 1);
    assert!(service.book.operations.is_empty() && service.advice[&id("n1/0")].1.contains("a person"));
}

/// A book whose operation of a device lost by itself, or with its sibling, is ordered in a world that shows it.
fn ordered(devices: Vec<DeviceFacts>) -> (World, Book, String) {
    let mut world = world(vec![node("n1", devices)]);
    let book = remediate(&world, &Book::default(), &policy(), 10).book;
    obey(&mut world, &book);
    let (order, operation) = only(&book);
    assert_eq!(operation.phase, Phase::Ordered);
    let order = order.clone();
    (world, book, order)
}

#[test]
fn an_order_whose_agent_died_in_the_middle_is_looked_at_then_given_once_more_then_climbs() {
    let lost = unwell("h100", "", Admission::Barred, Action::ResetDevice);
    let (mut world, book, order) = ordered(vec![lost]);
    fate(&mut world, &order, OrderPhase::Failed);
    world.nodes.get_mut("n1").unwrap().unclear.insert(order.clone());
    let looking = remediate(&world, &book, &policy(), 20);
    assert_eq!((only(&looking.book).0, reasons(&looking)), (&order, vec!["RemediationUnclear"]));
    obey(&mut world, &looking.book);
    assert_eq!(remediate(&world, &looking.book, &policy(), 79).book, looking.book, "not ordered again meanwhile");

    let mut well = world.clone();
    let facts = well.nodes.get_mut("n1").unwrap().devices.get_mut(&id("n1/0")).unwrap();
    (facts.health, facts.admission, facts.action) = (Health::Degraded, Admission::Draining, Action::None);
    assert_eq!(reasons(&remediate(&well, &looking.book, &policy(), 40)), ["RemediationSucceeded"]);

    let again = remediate(&world, &looking.book, &policy(), 80);
    let (second, operation) = only(&again.book);
    assert_eq!((operation.action, again.book.incidents[&id("n1/0")].failures), (Action::ResetDevice, 0));
    assert_ne!(*second, order, "an order of its own");
    let second = second.clone();
    obey(&mut world, &again.book);
    fate(&mut world, &second, OrderPhase::Failed);
    world.nodes.get_mut("n1").unwrap().unclear.insert(second);
    let climbed = remediate(&world, &again.book, &policy(), 90);
    assert_eq!(reasons(&climbed), ["RemediationFailed"]);
    assert_eq!(climbed.book.incidents[&id("n1/0")].step, Action::RebootNode);
}

#[test]
fn two_lost_devices_of_one_card_are_reset_once_whatever_comes_of_it() {
    let lost = || unwell("a3", "card 0", Admission::Barred, Action::ResetGroup);
    let (mut world, book, order) = ordered(vec![lost(), lost()]);
    let mut failed = world.clone();
    fate(&mut failed, &order, OrderPhase::Failed);
    let climbed = remediate(&failed, &book, &policy(), 20);
    assert!(climbed.book.operations.is_empty(), "the sibling's own order would be the same reset: {:?}", climbed.book);
    assert!(climbed.advice.values().all(|(action, _)| *action == Action::RebootNode), "{:?}", climbed.advice);

    fate(&mut world, &order, OrderPhase::Succeeded);
    let proving = remediate(&world, &book, &policy(), 20);
    obey(&mut world, &proving.book);
    let devices = &mut world.nodes.get_mut("n1").unwrap().devices;
    *devices.get_mut(&id("n1/0")).unwrap() = healthy("a3", "card 0");
    let waits = remediate(&world, &proving.book, &policy(), 30);
    assert_eq!(only(&waits.book).0, &order, "the other has not proven itself");
    *world.nodes.get_mut("n1").unwrap().devices.get_mut(&id("n1/1")).unwrap() = healthy("a3", "card 0");
    let done = remediate(&world, &waits.book, &policy(), 40);
    assert_eq!((done.book.operations.len(), reasons(&done)), (0, vec!["RemediationSucceeded"]));
}

#[test]
fn what_a_person_takes_back_is_left_alone_until_the_device_is_healthy() {
    for take_order in [false, true] {
        let mut world = one(draining());
        let mut book = remediate(&world, &Book::default(), &policy(), 10).book;
        for now in 11..14 {
            obey(&mut world, &book);
            book = remediate(&world, &book, &policy(), now).book;
        }
        assert!(only(&book).1.ordered && !only(&book).1.cordoned.is_empty());
        let node = world.nodes.get_mut("n1").unwrap();
        if take_order {
            node.orders.clear()
        } else {
            node.cordons.clear()
        }
        let cancelled = remediate(&world, &book, &policy(), 20);
        assert_eq!(reasons(&cancelled), ["RemediationCancelled"]);
        let again = remediate(&world, &cancelled.book, &policy(), 5_000);
        assert!(again.book.operations.is_empty() && again.advice[&id("n1/0")].1.contains("a person"));
        *world.nodes.get_mut("n1").unwrap().devices.get_mut(&id("n1/0")).unwrap() = healthy("h100", "");
        let well = remediate(&world, &again.book, &policy(), 6_000);
        let mut next = one(draining());
        next.placements = world.placements.clone();
        assert_eq!(remediate(&next, &well.book, &policy(), 7_000).book.operations.len(), 1, "a new incident");
    }
}

#[test]
fn who_may_not_act_only_advises() {
    let with = |change: &dyn Fn(&mut NodeFacts)| {
        let mut world = one(draining());
        change(world.nodes.get_mut("n1").unwrap());
        remediate(&world, &Book::default(), &policy(), 1)
    };
    let advise = Policy { mode: Mode::Advise, ..policy() };
    let paused = Policy { paused: true, ..policy() };
    for (decision, word) in [
        (remediate(&one(draining()), &Book::default(), &advise, 1), "Advise"),
        (remediate(&one(draining()), &Book::default(), &paused, 1), "paused"),
        (with(&|node| node.other = Some("x=draining".to_owned())), "x=draining"),
        (with(&|node| node.native = false), "not native"),
        (with(&|node| node.silent = true), "not heard"),
    ] {
        assert!(decision.book.operations.is_empty());
        assert!(decision.advice[&id("n1/0")].1.contains(word), "{:?}", decision.advice);
    }
    let mut held = one(draining());
    held.placements = vec![PlacementFacts { name: "m/a".to_owned(), paused: true, devices: [id("n1/0")].into() }];
    assert!(remediate(&held, &Book::default(), &policy(), 1).advice[&id("n1/0")].1.contains("m/a is paused"));
}

#[test]
fn what_cannot_be_emptied_is_given_up_without_climbing_and_tried_again_later() {
    let mut world = one(draining());
    world.placements = vec![PlacementFacts { name: "m/a".to_owned(), paused: false, devices: [id("n1/0")].into() }];
    let mut decision = remediate(&world, &Book::default(), &policy(), 10);
    obey(&mut world, &decision.book);
    decision = remediate(&world, &decision.book, &policy(), 110);
    assert_eq!(reasons(&decision), ["RemediationStuck"]);
    assert!(decision.told[0].note.contains("m/a is assigned to n1/0"));
    let incident = &decision.book.incidents[&id("n1/0")];
    assert_eq!((incident.step, incident.failures), (Action::None, 0));
    assert!(decision.advice[&id("n1/0")].1.contains("a while ago"));
    assert_eq!(remediate(&world, &decision.book, &policy(), 211).book.operations.len(), 1);
}

#[test]
fn who_waits_for_a_budget_is_counted_by_it_and_who_may_not_begin_is_not() {
    let failing = |name: &str| node(name, vec![draining(), draining()]);
    let world = world(vec![failing("n1"), failing("n2"), failing("n3")]);
    let decision = remediate(&world, &Book::default(), &policy(), 0);
    assert_eq!(decision.waiting, BTreeMap::from([("domain", 1), ("pool", 3)]));
    let two_pools = {
        let other = unwell("a3", "", Admission::Draining, Action::ResetDevice);
        World { nodes: [failing("n1"), node("n2", vec![other])].into(), placements: Vec::new() }
    };
    let decision = remediate(&two_pools, &Book::default(), &policy(), 0);
    assert_eq!(decision.waiting, BTreeMap::from([("domain", 1)]));
    let advising = Policy { mode: Mode::Advise, ..policy() };
    assert!(remediate(&world, &Book::default(), &advising, 0).waiting.is_empty());
}

#[test]
fn a_book_survives_being_written_down() {
    let world = one(unwell("h100", "", Admission::Barred, Action::ResetDevice));
    let mut book = remediate(&world, &Book::default(), &policy(), 10).book;
    book.incidents.insert(id("n1/1"), Incident { released: true, ..Incident::default() });
    let text = serde_json::to_string_pretty(&book).unwrap();
    assert_eq!(serde_json::from_str::<Book>(&text).unwrap(), book);
}

/// Nodes of two pools in three racks; on some, pairs of devices reset together.
fn fleet() -> World {
    let nodes = (0..6).map(|at| {
        let group = |pair: usize| if at % 2 == 0 { String::new() } else { format!("pair {pair}") };
        let pool = if at % 2 == 0 { "h100" } else { "a3" };
        let (name, mut facts) = node(&format!("n{at}"), (0..4).map(|slot| healthy(pool, &group(slot / 2))).collect());
        facts.domain = format!("rack {}", at / 2);
        (name, facts)
    });
    world(nodes.collect())
}

fn within(book: &Book, budget: Budget) -> bool {
    let count = |of: &dyn Fn(&super::book::Operation) -> bool| {
        u32::try_from(book.operations.values().filter(|one| of(one)).count()).unwrap()
    };
    let domains = (0..3).all(|rack| count(&|one| one.domain == format!("rack {rack}")) <= budget.domain);
    let pools = ["h100", "a3"].iter().all(|pool| count(&|one| one.pools.contains(*pool)) <= budget.pool);
    domains && pools && count(&|_| true) <= budget.cluster
}

/// One thing that happens in a fleet.
#[derive(Clone, Debug)]
enum Happening {
    Health(usize, usize, u8, u8),
    Place(usize, usize, bool),
    Holds(usize, usize, bool),
    Fate(usize, u8),
    Hand(usize, bool),
    Native(usize, bool),
    Obey,
    Wait(i64),
    Paused(bool),
}

fn happening() -> impl Strategy<Value = Happening> {
    use Happening::*;
    prop_oneof![
        4 => (0usize..6, 0usize..4, 0u8..3, 0u8..6).prop_map(|(n, d, admission, action)| Health(n, d, admission, action)),
        2 => (0usize..6, 0usize..4, any::<bool>()).prop_map(|(n, d, on)| Place(n, d, on)),
        1 => (0usize..6, 0usize..4, any::<bool>()).prop_map(|(n, d, on)| Holds(n, d, on)),
        3 => (0usize..4, 0u8..6).prop_map(|(at, fate)| Fate(at, fate)),
        1 => (0usize..6, any::<bool>()).prop_map(|(n, order)| Hand(n, order)),
        1 => (0usize..6, any::<bool>()).prop_map(|(n, native)| Native(n, native)),
        4 => Just(Obey),
        3 => (1i64..130).prop_map(Wait),
        1 => any::<bool>().prop_map(Paused),
    ]
}

const PHASES: [OrderPhase; 6] = [
    OrderPhase::Pending,
    OrderPhase::Started,
    OrderPhase::Succeeded,
    OrderPhase::Failed,
    OrderPhase::Cancelled,
    OrderPhase::Expired,
];

fn happen(world: &mut World, book: &Book, policy: &mut Policy, now: &mut i64, what: Happening) {
    let mut names: Vec<String> = world.nodes.keys().cloned().collect();
    names.sort();
    match what {
        Happening::Health(n, d, admission, action) => {
            let facts =
                world.nodes.get_mut(&names[n]).unwrap().devices.get_mut(&id(&format!("{}/{d}", names[n]))).unwrap();
            facts.action = Action::ALL[usize::from(action)];
            facts.admission = Admission::ALL[usize::from(admission)];
            let sick = facts.action != Action::None || facts.admission != Admission::Schedulable;
            facts.health = if sick { Health::Unhealthy } else { Health::Healthy };
        }
        Happening::Place(n, d, on) => {
            let device = id(&format!("{}/{d}", names[n]));
            if world.placements.is_empty() {
                world.placements.push(PlacementFacts { name: "m/a".to_owned(), ..PlacementFacts::default() });
            }
            let devices = &mut world.placements[0].devices;
            if on {
                devices.insert(device)
            } else {
                devices.remove(&device)
            };
        }
        Happening::Holds(n, d, on) => {
            world.nodes.get_mut(&names[n]).unwrap().devices.get_mut(&id(&format!("{}/{d}", names[n]))).unwrap().holds =
                on;
        }
        Happening::Fate(at, phase) => {
            let Some((order, operation)) = book.operations.iter().nth(at) else { return };
            let node = world.nodes.get_mut(operation.node()).unwrap();
            node.fates.insert(order.clone(), (PHASES[usize::from(phase)], String::new()));
        }
        Happening::Hand(n, order) => {
            let node = world.nodes.get_mut(&names[n]).unwrap();
            if order { node.orders.clear() } else { node.cordons.clear() }
        }
        Happening::Native(n, native) => world.nodes.get_mut(&names[n]).unwrap().native = native,
        Happening::Obey => obey(world, book),
        Happening::Wait(seconds) => *now += seconds,
        Happening::Paused(paused) => policy.paused = paused,
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]

    /// In any order of events: the budget holds, nothing that serves is ordered, the same in gives the same out.
    #[test]
    fn no_order_of_events_spends_too_much_or_touches_what_serves(events in proptest::collection::vec(happening(), 0..80), reboot: bool) {
        let (mut world, mut book, mut now) = (fleet(), Book::default(), 1_000);
        let mut policy = Policy { reboot, ..policy() };
        for event in events {
            happen(&mut world, &book, &mut policy, &mut now, event);
            let decision = remediate(&world, &book, &policy, now);
            prop_assert_eq!(&decision, &remediate(&world, &book, &policy, now));
            prop_assert!(within(&decision.book, policy.budget), "{:?}", decision.book);
            let mut seen: BTreeMap<&DeviceId, usize> = BTreeMap::new();
            for (order, operation) in &decision.book.operations {
                operation.members.iter().for_each(|member| *seen.entry(member).or_default() += 1);
                let before = book.operations.get(order).map(|operation| operation.phase);
                if operation.phase != Phase::Ordered || before == Some(Phase::Ordered) {
                    continue;
                }
                prop_assert!(!policy.paused && world.nodes[operation.node()].native);
                for member in &operation.members {
                    let facts = &world.nodes[operation.node()].devices[member];
                    let assigned = world.placements.iter().any(|placement| placement.devices.contains(member));
                    let idle = facts.admission >= Admission::Draining && !facts.holds && !assigned;
                    prop_assert!(idle || facts.admission == Admission::Barred, "{member} of {order}: {facts:?}");
                }
            }
            prop_assert!(seen.values().all(|count| *count == 1), "a device in two operations");
            let again = remediate(&world, &decision.book, &policy, now);
            prop_assert!(again.book.operations.len() <= decision.book.operations.len() + 3);
            book = decision.book;
        }
    }
}
