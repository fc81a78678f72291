//! The worker on a real connection, and messages made of anything.

use std::{num::NonZeroUsize, path::Path, time::Duration};

use berth_kernels::{BackendKind, Roots};
use berth_proto::v1::{self, ForwardRequest, ForwardStatus, expert_client::ExpertClient, worker_client::WorkerClient};
use berth_runtime::Clock;
use berth_types::Bytes;
use proptest::prelude::*;
use tokio::{sync::mpsc, task::JoinHandle};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::{Code, Streaming, transport::Channel};

use super::{Gate, Gated, HIDDEN, assert_near, call, checkpoint, numbers, one_row, order, reference, request, shelf};
use crate::worker::{self, Config, WorkerError, codec::Dtype, forward, listen, shelf::Board};

const LONG: Duration = Duration::from_secs(60);

async fn soon<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(LONG, future).await.expect("in time")
}

/// A worker and its supervisor in this process.
struct Worker {
    channel: Channel,
    orders: mpsc::Sender<v1::WorkerOrder>,
    reports: Streaming<v1::WorkerReport>,
    task: JoinHandle<Result<(), WorkerError>>,
}

impl Worker {
    async fn start(root: &Path) -> Self {
        let listen_on = "127.0.0.1:0".parse().unwrap();
        let listener = listen(listen_on).await.unwrap();
        let endpoint = format!("http://{}", listener.local_addr().unwrap());
        let config = Config {
            device: "node-0/0000:3b:00.0".parse().unwrap(),
            backend: BackendKind::Cpu,
            listen: listen_on,
            admin: listen_on,
            memory: Bytes(1 << 20),
            roots: Roots::new([root]).unwrap(),
            threads: NonZeroUsize::new(1),
            call_limit: LONG,
            pci: None,
            pci_devices: root.join("pci"),
        };
        let stop = CancellationToken::new();
        let served = worker::Worker::open(config, Clock::real()).unwrap().serve(listener, stop.clone(), stop);
        let task = tokio::spawn(served);
        let channel = Channel::from_shared(endpoint).unwrap().connect().await.unwrap();
        let (orders, outbound) = mpsc::channel(4);
        let mut client = WorkerClient::new(channel.clone());
        let reports = soon(client.supervise(ReceiverStream::new(outbound))).await.unwrap().into_inner();
        Self { channel, orders, reports, task }
    }

    /// Reports until one satisfies `test`.
    async fn report(&mut self, test: impl Fn(&v1::WorkerReport) -> bool) -> v1::WorkerReport {
        loop {
            let report = soon(self.reports.message()).await.unwrap().expect("the worker reports");
            if test(&report) {
                return report;
            }
        }
    }
}

fn ready(report: &v1::WorkerReport) -> bool {
    report.shelves.iter().any(|state| state.phase() == v1::ShelfPhase::Ready)
}

async fn open_calls(channel: &Channel) -> (mpsc::Sender<ForwardRequest>, Streaming<v1::ForwardResponse>) {
    let (calls, outbound) = mpsc::channel(4);
    let mut client = ExpertClient::new(channel.clone());
    (calls, soon(client.forward(ReceiverStream::new(outbound))).await.unwrap().into_inner())
}

#[tokio::test]
async fn orders_become_shelves_and_calls_become_sums() {
    let dir = checkpoint(3);
    let mut worker = Worker::start(dir.path()).await;
    worker.orders.send(order(vec![shelf(dir.path(), 1, &[(1, &[0, 2])])])).await.unwrap();
    worker.report(ready).await;
    let (calls, mut answers) = open_calls(&worker.channel).await;
    let row = numbers(5, HIDDEN);
    calls.send(request(1, 1, &[(row.clone(), vec![(0, 0.5), (2, 0.25)])])).await.unwrap();
    let answer = soon(answers.message()).await.unwrap().unwrap();
    assert_eq!((answer.call_id, answer.status()), (1, ForwardStatus::Ok));
    assert_near(&Dtype::F32.decode(&answer.rows), &reference(3, 1, &row, &[(0, 0.5), (2, 0.25)]), 1e-5);
    let report = worker.report(|report| !report.loads.is_empty()).await;
    assert_eq!((report.calls, report.refused), (1, 0));
    assert_eq!(report.loads[0].layers[0].tokens, [1, 0, 1]);

    let barred = v1::WorkerOrder {
        barred: true,
        barred_reason: "XID 79".to_owned(),
        ..order(vec![shelf(dir.path(), 1, &[(1, &[0, 2])])])
    };
    worker.orders.send(barred).await.unwrap();
    // Calls are refused from the moment the order arrives, which no report tells.
    for call_id in 2.. {
        calls.send(one_row(call_id)).await.unwrap();
        let answer = soon(answers.message()).await.unwrap().unwrap();
        if answer.status() == ForwardStatus::DeviceLost {
            assert!(answer.detail.contains("XID 79") && answer.rows.is_empty());
            break;
        }
        assert!(call_id < 10_000, "the order has no effect");
    }
    drop(worker.orders);
    soon(worker.task).await.unwrap().unwrap();
}

#[tokio::test]
async fn the_end_of_the_first_supervisor_ends_the_worker_and_a_second_is_refused() {
    let dir = checkpoint(3);
    let worker = Worker::start(dir.path()).await;
    let (_second, outbound) = mpsc::channel::<v1::WorkerOrder>(1);
    let refused = soon(WorkerClient::new(worker.channel.clone()).supervise(ReceiverStream::new(outbound))).await;
    assert_eq!(refused.unwrap_err().code(), Code::AlreadyExists);
    let (_calls, mut answers) = open_calls(&worker.channel).await;
    drop(worker.orders);
    soon(worker.task).await.unwrap().unwrap();
    assert!(matches!(soon(answers.message()).await, Ok(None) | Err(_)));
}

#[tokio::test]
async fn plaintext_is_served_on_loopback_only() {
    let error = listen("0.0.0.0:0".parse().unwrap()).await.unwrap_err().to_string();
    assert!(error.contains("serves loopback only"), "{error}");
}

/// A call that is nearly right: every field may be off.
fn any_call() -> impl Strategy<Value = ForwardRequest> {
    let small = || prop::collection::vec(0_u32..6, 0..6);
    let shape = (0_u32..4, prop_oneof![Just(8_u32), 0_u32..10, any::<u32>()], 0_i32..4, 0_usize..140);
    (shape, small(), small(), prop::collection::vec(any::<f32>(), 0..6), 0_u64..3, 0_u32..3).prop_map(
        |((tokens, hidden, dtype, bytes), mut offsets, experts, weights, revision, layer)| {
            offsets.sort_unstable();
            ForwardRequest {
                call_id: 1,
                placement_uid: "uid".to_owned(),
                revision,
                layer,
                tokens,
                hidden,
                dtype,
                rows: vec![0x3f; bytes].into(),
                offsets,
                experts,
                weights,
                deadline_ms: 0,
            }
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    #[test]
    fn any_call_is_answered_in_its_own_size_or_refused_with_a_sentence(call in any_call()) {
        let backend = Gated::new(Gate::Open);
        match forward::answer(&call, &call::shelves(&*backend), &*backend) {
            Ok((response, _)) => prop_assert_eq!(response.rows.len(), call.rows.len()),
            Err(refusal) => {
                prop_assert_ne!(refusal.status, ForwardStatus::Failed);
                prop_assert!(!refusal.detail.is_empty());
            }
        }
    }

    #[test]
    fn any_bytes_are_refused_or_answered(bytes in prop::collection::vec(any::<u8>(), 0..256)) {
        let backend = Gated::new(Gate::Open);
        if let Ok(call) = <ForwardRequest as prost::Message>::decode(bytes.as_slice()) {
            let _ = forward::answer(&call, &call::shelves(&*backend), &*backend);
        }
        if let Ok(order) = <v1::WorkerOrder as prost::Message>::decode(bytes.as_slice()) {
            let mut board = Board::default();
            board.desire(&order);
            prop_assert!(board.views().len() <= order.shelves.len());
        }
    }

    #[test]
    fn the_same_order_twice_starts_nothing(revisions in prop::collection::vec(0_u64..4, 0..6), uid in "[a-b]{0,1}") {
        let shelf = |revision: &u64| {
            v1::Shelf { placement_uid: uid.clone(), ..shelf(Path::new("/models"), *revision, &[(1, &[0])]) }
        };
        let order = order(revisions.iter().map(shelf).collect());
        let mut board = Board::default();
        let first = board.desire(&order);
        let valid: std::collections::BTreeSet<_> = revisions.iter().filter(|revision| **revision > 0).collect();
        prop_assert_eq!(first.loads.len(), if uid.is_empty() { 0 } else { valid.len() });
        prop_assert!(board.desire(&order).loads.is_empty());
    }
}
