//! Loading: what is shared, what is refused, what is left behind.

use std::{num::NonZeroUsize, path::Path, sync::Arc, time::Duration};

use berth_kernels::{Backend, Roots, cpu::CpuBackend};
use berth_proto::{convert::Shelf, v1};
use berth_runtime::Clock;
use berth_types::{Bytes, LayerId, Revision};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use super::{EXPERT_BYTES, checkpoint, config, digest, order, shelf, write_checkpoint};
use crate::worker::{
    control::{Control, Published},
    load_error::LoadError,
    loader::Loader,
    metrics::Metrics,
    shelf::{Held, Progress, View},
};

fn loader_of(memory: Bytes, root: &Path) -> (Loader, Arc<dyn Backend>) {
    let backend: Arc<dyn Backend> = Arc::new(CpuBackend::new().unwrap());
    let threads = NonZeroUsize::new(2).unwrap();
    (Loader::new(Arc::clone(&backend), Roots::new([root]).unwrap(), memory, threads), backend)
}

fn load(loader: &Loader, wire: &v1::Shelf) -> Result<Held, LoadError> {
    load_with(loader, wire, &Progress::default())
}

fn load_with(loader: &Loader, wire: &v1::Shelf, progress: &Progress) -> Result<Held, LoadError> {
    loader.load_now(&Shelf::try_from(wire).unwrap(), progress, &CancellationToken::new())
}

#[test]
fn an_expert_in_several_slots_and_revisions_is_in_memory_once() {
    let dir = checkpoint(1);
    let (loader, backend) = loader_of(Bytes(1 << 20), dir.path());
    let progress = Progress::default();
    let first = load_with(&loader, &shelf(dir.path(), 1, &[(1, &[0, 2, 2]), (2, &[3, u32::MAX])]), &progress).unwrap();
    assert_eq!(progress.slots.into_inner(), 4);
    let alone = backend.memory().packed;
    assert_eq!(first.bytes(), Bytes(alone));
    let progress = Progress::default();
    let second = load_with(&loader, &shelf(dir.path(), 2, &[(1, &[2, 1]), (2, &[3])]), &progress).unwrap();
    let both = backend.memory().packed;
    assert_eq!(progress.bytes.into_inner(), both - alone);
    assert_eq!(both, alone / 3 * 4);
    drop(first);
    assert_eq!(backend.memory().packed, alone);
    drop(second);
    assert_eq!(backend.memory().packed, 0);
}

#[test]
fn another_format_is_other_memory_and_its_own_bytes() {
    let dir = checkpoint(1);
    let (loader, backend) = loader_of(Bytes(1 << 20), dir.path());
    let wire = shelf(dir.path(), 1, &[(1, &[0])]);
    let stored = load(&loader, &wire).unwrap();
    let one = backend.memory().packed;
    let as_int8 = v1::Shelf { format: "int8_per_channel".to_owned(), revision: 2, ..wire.clone() };
    let converted = load(&loader, &as_int8).unwrap();
    assert!(converted.bytes() < stored.bytes());
    assert_eq!(backend.memory().packed, one + converted.bytes().get());
    let as_mxfp4 = v1::Shelf { format: "mxfp4_group32_ue8m0".to_owned(), ..wire };
    let refused = load(&loader, &as_mxfp4).unwrap_err().to_string();
    assert!(refused.contains("layer 1 expert 0") && refused.contains("no conversion"), "{refused}");
}

#[test]
fn other_weights_at_the_same_path_are_not_shared() {
    let dir = checkpoint(1);
    let (loader, backend) = loader_of(Bytes(1 << 20), dir.path());
    let wire = shelf(dir.path(), 1, &[(1, &[0])]);
    let first = load(&loader, &wire).unwrap();
    let one = backend.memory().packed;
    write_checkpoint(dir.path(), 2, None);
    let second = load(&loader, &wire).unwrap();
    assert_ne!(first.digest, second.digest);
    assert_eq!(backend.memory().packed, 2 * one);
}

#[test]
fn too_little_memory_is_refused_in_numbers_before_anything_is_read() {
    let dir = checkpoint(1);
    // 92 % of 1000 are 920: three experts of 288 bytes fit, four do not.
    let (loader, backend) = loader_of(Bytes(1_000), dir.path());
    let progress = Progress::default();
    let error = load_with(&loader, &shelf(dir.path(), 1, &[(1, &[0, 1]), (2, &[0, 1])]), &progress).unwrap_err();
    let expected = "4 more experts need 1.1 kB and 920 B are free (device 1.0 kB × 0.92 − workspace 0 B − held 0 B): free \
                    a revision or plan fewer slots for this device";
    assert_eq!(error.to_string(), expected);
    assert_eq!((backend.memory().packed, progress.bytes.into_inner()), (0, 0));
    assert!(matches!(error, LoadError::Memory { needed, .. } if needed == Bytes(4 * EXPERT_BYTES)));
    // What was refused is not held against the next order.
    assert!(load(&loader, &shelf(dir.path(), 1, &[(1, &[0, 1])])).is_ok());
}

#[test]
fn a_cancelled_load_leaves_nothing_behind() {
    let dir = checkpoint(1);
    let (loader, backend) = loader_of(Bytes(1 << 20), dir.path());
    let stop = CancellationToken::new();
    stop.cancel();
    let wire = shelf(dir.path(), 1, &[(1, &[0, 1, 2, 3])]);
    let outcome = loader.load_now(&Shelf::try_from(&wire).unwrap(), &Progress::default(), &stop);
    assert!(matches!(outcome, Err(LoadError::Cancelled)));
    assert_eq!(backend.memory().packed, 0);
}

#[test]
fn every_damage_has_its_sentence_and_leaves_nothing_behind() {
    type Damage<'a> = &'a dyn Fn(&Path, &mut v1::Shelf);
    let wire = |dir: &Path| shelf(dir, 1, &[(1, &[0, 1]), (2, &[3])]);
    let refused = |damage: Damage<'_>| {
        let dir = checkpoint(1);
        let (loader, backend) = loader_of(Bytes(1 << 20), dir.path());
        let mut wire = wire(dir.path());
        damage(dir.path(), &mut wire);
        let error = load(&loader, &wire).unwrap_err().to_string();
        assert_eq!(backend.memory().packed, 0, "{error}");
        error.replace(&*dir.path().to_string_lossy(), "DIR")
    };
    let config_with = |field: &'static str, value: serde_json::Value| {
        move |dir: &Path, _: &mut v1::Shelf| {
            let mut config = config();
            config[field] = value.clone();
            std::fs::write(dir.join("config.json"), config.to_string()).unwrap();
        }
    };
    let cases: [(&str, Damage<'_>); 11] = [
        ("experts.1.up_proj.weight is missing", &|dir, _| write_checkpoint(dir, 1, Some("layers.1.mlp.experts.1.up"))),
        ("experts.3.gate_proj.weight", &|dir, _| write_checkpoint(dir, 1, Some("layers.2.mlp.experts.3.gate"))),
        ("DIR/model.safetensors: ", &|dir, _| {
            std::fs::write(dir.join("model.safetensors"), b"short").unwrap();
        }),
        ("DIR/config.json: ", &|dir, _| std::fs::remove_file(dir.join("config.json")).unwrap()),
        ("config.json: field n_routed_experts", &config_with("n_routed_experts", serde_json::json!(-1))),
        ("has shape [6, 8], expected", &config_with("hidden_size", serde_json::json!(16))),
        ("swiglu_limit is -1", &config_with("swiglu_limit", serde_json::json!(-1))),
        ("is outside the allowed roots (DIR)", &|_, wire| {
            wire.weights.as_mut().unwrap().uri = "file:///usr".to_owned();
        }),
        ("the order wants sha256:00: put the right checkpoint there", &|_, wire| {
            wire.weights.as_mut().unwrap().digest = "sha256:00".to_owned();
        }),
        ("layer 0 has no experts, layers 1 to 2 have", &|_, wire| wire.layers[0].layer = 0),
        ("layer 1 has experts 0 to 3, the order names 4", &|_, wire| wire.layers[0].experts[0] = 4),
    ];
    for (expected, damage) in cases {
        let error = refused(damage);
        assert!(error.contains(expected), "{error}\nhas no {expected:?}");
    }
}

/// A control with its loader on a task, as `serve` runs it.
fn start(memory: Bytes, root: &Path) -> (mpsc::Sender<v1::WorkerOrder>, Published, Arc<dyn Backend>) {
    let (loader, backend) = loader_of(memory, root);
    let (control, published) = Control::new(Arc::new(loader), Arc::new(Metrics::default()), Clock::real());
    let (orders, inbox) = mpsc::channel(4);
    tokio::spawn(control.run(inbox, CancellationToken::new()));
    (orders, published, backend)
}

/// The shelves' states once they satisfy `test`.
async fn reach(published: &mut Published, test: impl Fn(&[v1::ShelfState]) -> bool) -> Vec<v1::ShelfState> {
    let to_wire = |views: &[View]| views.iter().map(View::to_wire).collect::<Vec<_>>();
    let views = published.views.wait_for(|views| test(&to_wire(views)));
    let views = tokio::time::timeout(Duration::from_secs(60), views).await.expect("in time").unwrap();
    to_wire(&views)
}

/// The same once there are `shelves` of them, all in `phase`.
async fn states(published: &mut Published, phase: v1::ShelfPhase, shelves: usize) -> Vec<v1::ShelfState> {
    let all = |states: &[v1::ShelfState]| states.len() == shelves && states.iter().all(|state| state.phase() == phase);
    reach(published, all).await
}

#[tokio::test]
async fn a_revision_that_replaces_another_takes_over_what_they_share() {
    let dir = checkpoint(1);
    let (orders, mut published, backend) = start(Bytes(1 << 20), dir.path());
    let pinned = |revision, layers: &[(u32, &[u32])]| {
        let mut wire = shelf(dir.path(), revision, layers);
        wire.weights.as_mut().unwrap().digest = digest(dir.path());
        wire
    };
    orders.send(order(vec![pinned(1, &[(1, &[0, 1, 2])])])).await.unwrap();
    let first = states(&mut published, v1::ShelfPhase::Ready, 1).await;
    assert_eq!((first[0].revision, first[0].slots_ready, first[0].slots_total), (1, 3, 3));
    assert_eq!(first[0].digest, digest(dir.path()));
    // Revision 1 is not named any more: its experts must survive until revision 2 has taken them.
    orders.send(order(vec![pinned(2, &[(1, &[2, 0])])])).await.unwrap();
    let second = reach(&mut published, |states| {
        states.len() == 1 && states[0].revision == 2 && states[0].phase() == v1::ShelfPhase::Ready
    });
    let second = second.await;
    assert_eq!((second[0].revision, second[0].loaded_bytes), (2, 0));
    assert_eq!(backend.memory().packed, second[0].bytes);
    let shelves = Arc::clone(&published.shelves.borrow());
    assert!(shelves.find("uid", Revision(1)).is_err());
    let held = shelves.find("uid", Revision(2)).unwrap();
    assert_eq!(held.layers[&LayerId(1)].experts().len(), 2);
    // A call that holds the snapshot keeps the memory; without one it is freed.
    orders.send(order(vec![])).await.unwrap();
    states(&mut published, v1::ShelfPhase::Ready, 0).await;
    assert_eq!(backend.memory().packed, second[0].bytes);
    drop(shelves);
    assert_eq!(backend.memory().packed, 0);
}

#[tokio::test]
async fn a_failed_load_is_tried_again_and_heals() {
    let dir = checkpoint(1);
    write_checkpoint(dir.path(), 1, Some("layers.1.mlp.experts.0"));
    let (orders, mut published, _backend) = start(Bytes(1 << 20), dir.path());
    orders.send(order(vec![shelf(dir.path(), 1, &[(1, &[0])])])).await.unwrap();
    let failed = states(&mut published, v1::ShelfPhase::Failed, 1).await;
    assert!(failed[0].error.contains("experts.0"), "{}", failed[0].error);
    write_checkpoint(dir.path(), 1, None);
    let ready = states(&mut published, v1::ShelfPhase::Ready, 1).await;
    assert_eq!((ready[0].slots_ready, ready[0].error.as_str()), (1, ""));
}

#[tokio::test]
async fn an_order_that_cannot_be_read_fails_alone() {
    let dir = checkpoint(1);
    let (orders, mut published, _backend) = start(Bytes(1 << 20), dir.path());
    let mut broken = shelf(dir.path(), 2, &[(1, &[0])]);
    broken.placement = "nonsense".to_owned();
    orders.send(order(vec![broken, shelf(dir.path(), 1, &[(1, &[0])])])).await.unwrap();
    let of = |states: &[v1::ShelfState], revision| {
        states
            .iter()
            .find(|state| state.revision == revision)
            .map(|state| (state.phase(), state.error.clone()))
            .unwrap()
    };
    let ready = |states: &[v1::ShelfState]| states.iter().any(|state| state.phase() == v1::ShelfPhase::Ready);
    let states = reach(&mut published, ready).await;
    let (phase, error) = of(&states, 2);
    assert_eq!(phase, v1::ShelfPhase::Failed);
    assert!(error.contains("field placement is \"nonsense\""), "{error}");
}
