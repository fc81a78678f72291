//! What happens to an etcd, and what the store says of it and does when it is over.

use std::time::{Duration, Instant};

use berth_scheduler::store::{Store as _, StoreError};
use berth_tests::{EtcdServer, etcd::EtcdOptions};
use berth_types::Revision;
use etcd_client::{AlarmAction, AlarmOptions, AlarmType, Client};
use tokio::{io::copy_bidirectional, net::TcpListener, sync::watch, task::JoinSet};

use super::{config, create, leader, revisions, subject};
use crate::cluster::eventually;

/// The longest that a call may take.
const CALL: Duration = Duration::from_secs(7);

/// A way to etcd that can be cut.
struct Wire {
    port: u16,
    whole: watch::Sender<bool>,
    _task: JoinSet<()>,
}

impl Wire {
    async fn to(server: &EtcdServer) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let (port, target) = (listener.local_addr().unwrap().port(), server.port());
        let (whole, seen) = watch::channel(true);
        let mut task = JoinSet::new();
        task.spawn(async move {
            let mut lines = JoinSet::new();
            loop {
                let (mut near, _) = listener.accept().await.unwrap();
                let mut seen = seen.clone();
                lines.spawn(async move {
                    if !*seen.borrow_and_update() {
                        return;
                    }
                    let Ok(mut far) = tokio::net::TcpStream::connect(("127.0.0.1", target)).await else { return };
                    tokio::select! {
                        _ = copy_bidirectional(&mut near, &mut far) => {}
                        _ = seen.changed() => {}
                    }
                });
            }
        });
        Self { port, whole, _task: task }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_etcd_that_is_cut_off_is_told_in_time_and_used_again() {
    let server = EtcdServer::start(EtcdOptions::default()).await.unwrap();
    let wire = Wire::to(&server).await;
    let mut through = config(&server);
    through.endpoints = vec![format!("http://127.0.0.1:{}", wire.port)];
    let store = berth_scheduler::store::Etcd::new(through, berth_runtime::Clock::real())
        .of_term(berth_types::Epoch(1), "pod@127.0.0.1:7400");
    create(&store, 1).await.unwrap();

    wire.whole.send_replace(false);
    for _ in 0..2 {
        let since = Instant::now();
        let error = create(&store, 2).await.unwrap_err();
        assert!(matches!(error, StoreError::Unavailable { .. } | StoreError::Elapsed { .. }), "{error}");
        assert!(since.elapsed() < CALL, "{:?}", since.elapsed());
    }
    wire.whole.send_replace(true);
    eventually("the cut is healed", || async { create(&store, 2).await.ok() }).await;

    // Not cut, but silent: what was asked may have been done, and counts once.
    server.pause();
    let since = Instant::now();
    let error = create(&store, 3).await.unwrap_err();
    assert!(matches!(error, StoreError::Elapsed { .. } | StoreError::Unavailable { .. }), "{error}");
    assert!(since.elapsed() < CALL, "{:?}", since.elapsed());
    server.resume();
    let outcome = eventually("an answer", || async {
        match create(&store, 3).await {
            Err(StoreError::Elapsed { .. } | StoreError::Unavailable { .. }) => None,
            outcome => Some(outcome),
        }
    })
    .await;
    assert!(matches!(outcome, Ok(()) | Err(StoreError::Exists { .. })), "{outcome:?}");
    assert_eq!(revisions(&store).await, [1, 2, 3]);
}

#[tokio::test(flavor = "multi_thread")]
async fn compaction_and_restarts_lose_nothing() {
    let mut server = EtcdServer::start(EtcdOptions::default()).await.unwrap();
    let store = leader(&server, 1);
    for revision in 1..=3 {
        create(&store, revision).await.unwrap();
    }
    store.delete(&subject().name, &subject().uid, Revision(1)).await.unwrap();
    let mut admin = Client::connect([server.url()], None).await.unwrap();
    let now = admin.get("/berth/leader", None).await.unwrap().header().unwrap().revision();
    admin.compact(now, None).await.unwrap();
    admin.defragment().await.unwrap();
    assert_eq!(revisions(&store).await, [2, 3]);
    assert!(matches!(create(&store, 2).await, Err(StoreError::Exists { .. })), "the fence outlives a compaction");

    server.kill();
    let error = create(&store, 4).await.unwrap_err();
    assert!(matches!(error, StoreError::Unavailable { .. } | StoreError::Elapsed { .. }), "{error}");
    server.launch().await.unwrap();
    eventually("etcd is used again", || async { create(&store, 4).await.ok() }).await;
    assert!(matches!(create(&store, 3).await, Err(StoreError::Exists { .. })), "the fence outlives a restart");
    assert_eq!(revisions(&store).await, [2, 3, 4]);

    // Its data are lost: whoever leads goes on.
    admin.delete("/berth/", Some(etcd_client::DeleteOptions::new().with_prefix())).await.unwrap();
    create(&store, 5).await.unwrap();
    assert_eq!(revisions(&store).await, [5]);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_half_written_or_damaged_is_no_map() {
    let server = EtcdServer::start(EtcdOptions::default()).await.unwrap();
    let (old, new, subject) = (leader(&server, 1), leader(&server, 2), subject());
    let large = subject.sized_map(1, 1, 61, 9_000).unwrap();
    old.create(&subject.uid, &large).await.unwrap();
    let mut raw = Client::connect([server.url()], None).await.unwrap();
    let all = etcd_client::GetOptions::new().with_prefix().with_keys_only();
    let keys = |answer: etcd_client::GetResponse| -> Vec<String> {
        answer.kvs().iter().map(|pair| pair.key_str().unwrap().to_owned()).collect()
    };
    let parts = keys(raw.get("/berth/parts/", Some(all.clone())).await.unwrap());
    let heads = keys(raw.get("/berth/maps/", Some(all)).await.unwrap());
    assert_eq!((parts.len(), heads.len()), (2, 1), "{parts:?}");

    // A leader that ended between the parts and the head: the next one writes the revision as its own.
    raw.delete(heads[0].as_str(), None).await.unwrap();
    assert!(revisions(&new).await.is_empty());
    let own = subject.sized_map(2, 1, 61, 9_000).unwrap();
    new.create(&subject.uid, &own).await.unwrap();
    assert!(new.list().await.unwrap().iter().all(|(_, map)| map.spec == own.spec));

    // A part that is gone or another's: the revision is not read, and never written again.
    for damage in [None, Some("{}")] {
        match damage {
            None => drop(raw.delete(parts[1].as_str(), None).await.unwrap()),
            Some(text) => drop(raw.put(parts[1].as_str(), text, None).await.unwrap()),
        }
        assert!(revisions(&new).await.is_empty(), "{damage:?}");
        assert!(matches!(create(&new, 1).await, Err(StoreError::Exists { .. })), "{damage:?}");
    }
    create(&new, 2).await.unwrap();
    assert_eq!(revisions(&new).await, [2]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_etcd_says_so_and_is_used_again_when_it_has_room() {
    let server = EtcdServer::start(EtcdOptions { quota: Some(8 << 20), ..EtcdOptions::default() }).await.unwrap();
    let (store, subject) = (leader(&server, 1), subject());
    let mut written = 0;
    let full = loop {
        let map = subject.sized_map(1, written + 1, 61, 9_000).unwrap();
        match store.create(&subject.uid, &map).await {
            Ok(()) => written += 1,
            Err(error) => break error,
        }
        assert!(written < 20, "8 MiB hold no 20 maps of 1.5 MB");
    };
    assert!(matches!(full, StoreError::Full { .. }) && full.to_string().contains("--quota-backend-bytes"), "{full}");
    assert!(written > 0);

    // The next leader cannot put its name down, and yet reads what there is.
    let next = leader(&server, 2);
    assert_eq!(revisions(&next).await, (1..=written).collect::<Vec<_>>());
    assert!(matches!(create(&next, written + 1).await, Err(StoreError::Full { .. })));
    for revision in 1..=written {
        store.delete(&subject.name, &subject.uid, Revision(revision)).await.expect("room can be made");
    }
    let mut admin = Client::connect([server.url()], None).await.unwrap();
    let now = admin.get("/berth/leader", None).await.unwrap().header().unwrap().revision();
    admin.compact(now, None).await.unwrap();
    admin.defragment().await.unwrap();
    for alarm in admin.alarm(AlarmAction::Get, AlarmType::Nospace, None).await.unwrap().alarms() {
        let mut member = AlarmOptions::new();
        member.with_member(alarm.member_id());
        admin.alarm(AlarmAction::Deactivate, AlarmType::Nospace, Some(member)).await.unwrap();
    }
    create(&next, written + 1).await.unwrap();
    assert_eq!(revisions(&next).await, [written + 1]);
    assert!(matches!(create(&store, written + 2).await, Err(StoreError::Deposed { .. })));
}
