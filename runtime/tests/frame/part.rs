//! A part from start to end: what it answers, what it holds, and in which order it lets go.

use std::{
    net::SocketAddr,
    sync::{Arc, Mutex},
    time::Duration,
};

use crate::store::Store;
use berth_runtime::{
    Clock, Part, PartConfig, PartError,
    election::Timing,
    lease::{LeaseConfig, next_term},
};
use berth_types::Epoch;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio_util::sync::CancellationToken;

async fn part(clock: &Clock, stop: &CancellationToken) -> Part {
    let config =
        PartConfig { name: "test", admin_listen: "127.0.0.1:0".parse().unwrap(), drain_limit: Duration::from_secs(10) };
    Part::start(config, clock.clone(), stop.clone()).await.unwrap()
}

fn lease() -> LeaseConfig {
    LeaseConfig {
        namespace: "berth-system".into(),
        name: "berth-test".into(),
        identity: "pod@127.0.0.1:7400".into(),
        timing: Timing::default(),
        floor: Epoch(0),
    }
}

async fn ask(address: SocketAddr, path: &str) -> String {
    let mut stream = tokio::net::TcpStream::connect(address).await.unwrap();
    stream.write_all(format!("GET {path} HTTP/1.0\r\n\r\n").as_bytes()).await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    answer
}

#[tokio::test]
async fn an_orderly_end_drains_before_it_releases() {
    let (clock, stop, store) = (Clock::real(), CancellationToken::new(), Store::default());
    let part = part(&clock, &stop).await;
    let address = part.admin_address;
    let mut leadership = part.lead_in(store.line(), lease());
    let log = Arc::new(Mutex::new(Vec::new()));
    let (stopping, noted, held) = (part.tasks.stopping().clone(), Arc::clone(&log), store.clone());
    let (led, leads) = tokio::sync::oneshot::channel();
    part.tasks.keep("leader", async move {
        let term = next_term(&mut leadership, &stopping).await.ok_or("never led")?;
        led.send(()).map_err(|()| "nobody waits")?;
        term.ended().cancelled().await;
        let ready = ask(address, "/readyz").await;
        noted.lock().unwrap().push((ready.contains("[-]shutdown failed: stopping"), held.holder().is_some()));
        term.check().map_err(|_| "deposed while draining")?;
        Ok::<_, &str>(())
    });
    leads.await.unwrap();
    assert!(ask(address, "/readyz").await.starts_with("HTTP/1.0 200"));
    let metrics = ask(address, "/metrics").await;
    assert!(metrics.contains("berth_test_lease_leading{lease=\"berth-test\"} 1"), "{metrics}");
    assert!(metrics.contains("berth_test_lease_terms_total{lease=\"berth-test\"} 1"), "{metrics}");
    stop.cancel();
    part.finish().await.unwrap();
    // While draining: not ready, and the Lease still ours. Afterwards: released, and nobody listens.
    assert_eq!(*log.lock().unwrap(), [(true, true)]);
    assert_eq!(store.holder(), None);
    assert!(tokio::net::TcpStream::connect(address).await.is_err());
}

#[tokio::test]
async fn a_failing_task_ends_the_part_with_its_error() {
    let (clock, stop) = (Clock::real(), CancellationToken::new());
    let part = part(&clock, &stop).await;
    let stopping = part.tasks.stopping().clone();
    part.tasks.keep("steady", async move {
        stopping.cancelled().await;
        Ok::<_, &str>(())
    });
    part.tasks.keep("watch", async { Err("the watch broke") });
    let error = part.finish().await.unwrap_err();
    assert!(matches!(error, PartError::Task(_)));
    assert_eq!(error.to_string(), "task watch failed: the watch broke");
}

#[test]
fn a_task_that_does_not_drain_leaves_the_lease_to_expire() {
    let (clock, store) = (Clock::discrete(), Store::default());
    let (main, kept) = (clock.clone(), store.clone());
    let outcome = clock.run(async move {
        let stop = CancellationToken::new();
        let part = part(&main, &stop).await;
        let mut leadership = part.lead_in(store.line(), lease());
        part.tasks.keep("stuck", std::future::pending::<Result<(), &str>>());
        next_term(&mut leadership, part.tasks.stopping()).await.unwrap();
        stop.cancel();
        part.finish().await.unwrap_err().to_string()
    });
    assert_eq!(outcome.unwrap(), "still busy 10s after it was asked to stop: [\"stuck\"]");
    assert!(kept.holder().is_some());
}

#[tokio::test]
async fn an_address_that_is_taken_is_named() {
    let (clock, stop) = (Clock::real(), CancellationToken::new());
    let first = part(&clock, &stop).await;
    let config = PartConfig { name: "test", admin_listen: first.admin_address, drain_limit: Duration::ZERO };
    let error = Part::start(config, clock, stop).await.unwrap_err().to_string();
    assert!(error.contains(&first.admin_address.to_string()), "{error}");
}
