//! A stream of calls on a device that is slow, full, lost or broken.

use std::{convert::Infallible, sync::Arc, time::Duration};

use berth_proto::v1::{ForwardRequest, ForwardResponse, ForwardStatus};
use berth_runtime::Clock;
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;

use super::{Gate, Gated, call::shelves, one_row};
use crate::worker::{
    calls::{self, Door},
    metrics::Metrics,
    queue::{Bench, Queue, QueueLimits},
    shelf::Shelves,
    tally::Tally,
};

/// A device with one computing thread and one stream of calls.
struct Device {
    backend: Arc<Gated>,
    shelves: watch::Sender<Arc<Shelves>>,
    queue: Arc<Queue>,
    door: Door,
    calls: mpsc::Sender<Result<ForwardRequest, Infallible>>,
    answers: mpsc::Receiver<ForwardResponse>,
    stop: CancellationToken,
}

impl Drop for Device {
    fn drop(&mut self) {
        self.backend.set(Gate::Open);
        self.queue.close();
    }
}

impl Device {
    fn new(gate: Gate, limits: QueueLimits) -> Self {
        Self::on(Clock::real(), gate, limits)
    }

    fn on(clock: Clock, gate: Gate, limits: QueueLimits) -> Self {
        let backend = Gated::new(gate);
        let (send, see) = watch::channel(Arc::new(shelves(&*backend)));
        let (queue, metrics) = (Arc::new(Queue::new(limits)), Arc::new(Metrics::default()));
        let bench = Bench {
            queue: Arc::clone(&queue),
            shelves: see.clone(),
            backend: Arc::<Gated>::clone(&backend),
            presence: Arc::default(),
            tally: Arc::new(Tally::default()),
            metrics: Arc::clone(&metrics),
        };
        bench.start(1).unwrap();
        let limit = Duration::from_secs(30);
        let door = Door { queue: Arc::clone(&queue), shelves: see, metrics, clock, limit };
        let stop = CancellationToken::new();
        let (calls, inbound) = mpsc::channel(16);
        let (outbound, answers) = mpsc::channel(16);
        tokio::spawn(calls::serve(ReceiverStream::new(inbound), outbound, door.clone(), stop.clone()));
        Self { backend, shelves: send, queue, door, calls, answers, stop }
    }

    async fn call(&self, request: ForwardRequest) {
        self.calls.send(Ok(request)).await.unwrap();
    }

    async fn answer(&mut self) -> (u64, ForwardStatus) {
        let answer = self.door.clock.timeout(Duration::from_secs(60), self.answers.recv()).await;
        let answer = answer.expect("an answer in time").expect("an open stream");
        (answer.call_id, answer.status())
    }
}

fn wide() -> QueueLimits {
    QueueLimits::default()
}

#[tokio::test]
async fn a_barred_device_answers_waiting_and_new_calls_while_its_kernel_hangs() {
    let mut device = Device::new(Gate::Closed, wide());
    device.call(one_row(1)).await;
    device.backend.wait_for_calls(1).await;
    device.call(one_row(2)).await;
    device.shelves.send_modify(|shelves| *shelves = Arc::new(Shelves::default().bar("XID 79")));
    let mut lost = [device.answer().await, device.answer().await];
    lost.sort_by_key(|(id, _)| *id);
    assert_eq!(lost, [(1, ForwardStatus::DeviceLost), (2, ForwardStatus::DeviceLost)]);
    device.call(one_row(3)).await;
    assert_eq!(device.answer().await, (3, ForwardStatus::DeviceLost));
    assert_eq!(device.backend.calls(), 1);
}

#[tokio::test]
async fn a_full_queue_refuses_at_once_and_counts() {
    let mut device = Device::new(Gate::Closed, QueueLimits { calls: 1, bytes: 1 << 20 });
    device.call(one_row(1)).await;
    device.backend.wait_for_calls(1).await;
    device.call(one_row(2)).await;
    device.call(one_row(3)).await;
    assert_eq!(device.answer().await, (3, ForwardStatus::Overloaded));
    assert_eq!(device.door.metrics.queue_full.get(), 1);
    device.backend.set(Gate::Open);
    assert_eq!(device.answer().await, (1, ForwardStatus::Ok));
    assert_eq!(device.answer().await, (2, ForwardStatus::Ok));
    assert_eq!(device.door.metrics.totals(), (2, 1));
}

#[tokio::test]
async fn a_queue_full_of_bytes_refuses_but_takes_any_single_call() {
    let mut device = Device::new(Gate::Closed, QueueLimits { calls: 8, bytes: 1 });
    device.call(one_row(1)).await;
    device.backend.wait_for_calls(1).await;
    device.call(one_row(2)).await;
    device.call(one_row(3)).await;
    assert_eq!(device.answer().await, (3, ForwardStatus::Overloaded));
}

#[test]
fn a_call_that_is_not_computed_by_its_deadline_says_so() {
    let clock = Clock::discrete();
    let time = clock.clone();
    let run = async move {
        let mut device = Device::on(time.clone(), Gate::Closed, wide());
        let mut call = one_row(1);
        call.deadline_ms = 40;
        device.call(call).await;
        assert_eq!(device.answer().await, (1, ForwardStatus::Deadline));
        assert_eq!(time.now(), Duration::from_millis(40));
        device.call(one_row(2)).await;
        assert_eq!(device.answer().await, (2, ForwardStatus::Deadline));
        assert_eq!(time.now(), Duration::from_millis(30_040));
    };
    clock.run(run).unwrap();
}

#[tokio::test]
async fn a_repeated_id_is_answered_again_and_computed_once() {
    let mut device = Device::new(Gate::Closed, wide());
    device.call(one_row(1)).await;
    device.call(one_row(1)).await;
    device.backend.wait_for_calls(1).await;
    device.backend.set(Gate::Open);
    assert_eq!(device.answer().await, (1, ForwardStatus::Ok));
    assert_eq!(device.answer().await, (1, ForwardStatus::Ok));
    device.call(one_row(1)).await;
    assert_eq!(device.answer().await, (1, ForwardStatus::Ok));
    assert_eq!(device.backend.calls(), 1);
    let mut other = one_row(1);
    other.layer = 2;
    device.call(other).await;
    assert_eq!(device.answer().await, (1, ForwardStatus::Invalid));
}

#[tokio::test]
async fn a_refused_id_may_be_tried_again() {
    let mut device = Device::new(Gate::Open, wide());
    let held = device.shelves.borrow().clone();
    device.shelves.send_replace(Arc::new(Shelves::default()));
    device.call(one_row(1)).await;
    assert_eq!(device.answer().await, (1, ForwardStatus::NotHeld));
    device.shelves.send_replace(held);
    device.call(one_row(1)).await;
    assert_eq!(device.answer().await, (1, ForwardStatus::Ok));
}

#[tokio::test]
async fn calls_of_a_stream_that_ended_are_not_computed() {
    let mut device = Device::new(Gate::Closed, wide());
    device.call(one_row(1)).await;
    device.backend.wait_for_calls(1).await;
    device.call(one_row(2)).await;
    device.answers.close();
    device.calls.closed().await;
    device.backend.set(Gate::Open);
    // A new stream's call comes after them in the queue; when it is computed, they were passed over.
    let answer = device.door.clone().call(one_row(3)).await;
    assert_eq!(answer.status(), ForwardStatus::Ok);
    assert_eq!(device.backend.calls(), 2);
}

#[tokio::test]
async fn a_stopping_worker_answers_what_it_has_and_reads_no_more() {
    let mut device = Device::new(Gate::Closed, wide());
    device.call(one_row(1)).await;
    device.backend.wait_for_calls(1).await;
    device.stop.cancel();
    device.backend.set(Gate::Open);
    assert_eq!(device.answer().await, (1, ForwardStatus::Ok));
    assert!(device.answers.recv().await.is_none());
}

#[tokio::test]
async fn a_kernel_that_panics_costs_one_call() {
    let mut device = Device::new(Gate::Panics, wide());
    device.call(one_row(1)).await;
    assert_eq!(device.answer().await, (1, ForwardStatus::Failed));
    device.call(one_row(2)).await;
    assert_eq!(device.answer().await, (2, ForwardStatus::Ok));
}
