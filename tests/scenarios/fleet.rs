//! Twenty agents' own API code against a real API server, with the rights of an agent: what they write, and when they
//! write nothing. The same phases with a thousand agents are a benchmark, `berth-bench agents`.

use std::time::Duration;

use berth_tests::bench::agents::{self, Options, Phase};

const AGENTS: u32 = 20;
const RACK: u32 = 8;

fn phase<'a>(phases: &'a [Phase], name: &str) -> &'a Phase {
    let found = phases.iter().find(|phase| phase.name == name).unwrap();
    assert_eq!(found.throttled, 0, "{:?}", found.calls);
    assert!(found.calls.keys().all(|call| !call.contains(": ") || call.ends_with(": 409")), "{:?}", found.calls);
    found
}

#[tokio::test(flavor = "multi_thread")]
async fn agents_write_on_transitions_only_together_apart_and_never_too_often() {
    let options = Options {
        agents: AGENTS,
        devices: 8,
        ramp: Duration::from_secs(1),
        window: Duration::from_secs(6),
        failures_per_minute: 240,
        rack: RACK,
    };
    let report = agents::run("fleet", options, |_| {}).await.unwrap();

    let start = phase(&report.phases, "start");
    let (all, most) = (u64::from(AGENTS), u64::from(AGENTS) * 3);
    assert_eq!(start.calls.get("create acceleratornodes"), Some(&all), "each makes its object once");
    assert!((all..=most).contains(&start.writes), "{:?}", start.calls);

    let steady = phase(&report.phases, "steady");
    assert_eq!(steady.writes, 0, "readings and failing programs change no state: {:?}", steady.calls);

    let lost = phase(&report.phases, "rack lost");
    let rack = u64::from(RACK);
    assert!((rack..=rack * 3).contains(&lost.writes), "64 transitions of 8 nodes in {} writes", lost.writes);
    assert!(lost.spread() > Duration::from_millis(30), "all within {:?}: no jitter", lost.spread());

    let back = phase(&report.phases, "rack back");
    assert!((rack..=rack * 3).contains(&back.writes), "{:?}", back.calls);
    assert_eq!(back.calls.get("create acceleratornodes"), None, "the objects were there");

    for phase in &report.phases {
        let pause = phase.shortest_pause_s.unwrap_or(f64::INFINITY);
        assert!(pause >= 1.0 || phase.name == "rack back", "{}: one object twice within {pause} s", phase.name);
    }
}
