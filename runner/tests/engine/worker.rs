//! Workers to call: real streams over loopback, the real maths, and misbehaviour on demand.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex},
};

use berth_proto::{
    MESSAGE_LIMIT,
    v1::{
        DType, ForwardRequest, ForwardResponse, ForwardStatus,
        expert_server::{Expert, ExpertServer},
    },
};
use berth_runner::{
    experts::{ExpertCalls, Experts, ExpertsConfig, LayerCall, LocalExperts},
    routes::{RouteDevice, RouteTable},
};
use berth_types::{Epoch, ExpertId, LayerId, Revision};
use tokio::{net::TcpListener, runtime::Runtime};
use tokio_stream::wrappers::{ReceiverStream, TcpListenerStream};
use tonic::{Request, Response, Status, Streaming, transport::Server};

use crate::tiny::Loaded;

/// What a worker does with a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mode {
    Serve,
    Refuse(ForwardStatus),
    Hang,
}

/// What a worker was asked.
#[derive(Clone, Debug)]
pub(crate) struct Asked {
    pub(crate) revision: u64,
    pub(crate) tokens: u32,
}

#[derive(Clone)]
struct Service {
    local: LocalExperts,
    mode: Arc<Mutex<Mode>>,
    asked: Arc<Mutex<Vec<Asked>>>,
}

/// One worker on a runtime of its own, so that it can die as a process does.
pub(crate) struct FakeWorker {
    pub(crate) endpoint: String,
    service: Service,
    runtime: Option<Runtime>,
}

impl FakeWorker {
    pub(crate) fn start(local: &LocalExperts) -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let listener = runtime.block_on(TcpListener::bind("127.0.0.1:0")).unwrap();
        let endpoint = listener.local_addr().unwrap().to_string();
        let service = Service { local: local.clone(), mode: Arc::new(Mutex::new(Mode::Serve)), asked: Arc::default() };
        let expert = ExpertServer::new(service.clone())
            .max_decoding_message_size(MESSAGE_LIMIT)
            .max_encoding_message_size(MESSAGE_LIMIT);
        runtime.spawn(Server::builder().add_service(expert).serve_with_incoming(TcpListenerStream::new(listener)));
        Self { endpoint, service, runtime: Some(runtime) }
    }

    pub(crate) fn set(&self, mode: Mode) {
        *self.service.mode.lock().unwrap() = mode;
    }

    pub(crate) fn asked(&self) -> Vec<Asked> {
        self.service.asked.lock().unwrap().clone()
    }

    /// Ends all its connections at once.
    pub(crate) fn kill(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

impl Drop for FakeWorker {
    fn drop(&mut self) {
        self.kill();
    }
}

#[tonic::async_trait]
impl Expert for Service {
    type ForwardStream = ReceiverStream<Result<ForwardResponse, Status>>;

    async fn forward(
        &self,
        request: Request<Streaming<ForwardRequest>>,
    ) -> Result<Response<Self::ForwardStream>, Status> {
        let (send, answers) = tokio::sync::mpsc::channel(16);
        let (service, mut calls) = (self.clone(), request.into_inner());
        tokio::spawn(async move {
            while let Ok(Some(call)) = calls.message().await {
                if let Some(answer) = service.answer(&call)
                    && send.send(Ok(answer)).await.is_err()
                {
                    return;
                }
            }
        });
        Ok(Response::new(ReceiverStream::new(answers)))
    }
}

impl Service {
    fn answer(&self, call: &ForwardRequest) -> Option<ForwardResponse> {
        self.asked.lock().unwrap().push(Asked { revision: call.revision, tokens: call.tokens });
        let mode = *self.mode.lock().unwrap();
        match mode {
            Mode::Hang => None,
            Mode::Refuse(status) => Some(ForwardResponse {
                call_id: call.call_id,
                status: status.into(),
                detail: "as the test wants".to_owned(),
                ..Default::default()
            }),
            Mode::Serve => Some(self.compute(call)),
        }
    }

    fn compute(&self, call: &ForwardRequest) -> ForwardResponse {
        let values: Vec<f32> = call.rows.as_chunks::<4>().0.iter().map(|value| f32::from_le_bytes(*value)).collect();
        let hidden = usize::try_from(call.hidden).unwrap();
        let mut rows = Vec::new();
        for (row, bounds) in values.chunks_exact(hidden).zip(call.offsets.windows(2)) {
            let own = usize::try_from(bounds[0]).unwrap()..usize::try_from(bounds[1]).unwrap();
            let mut step = self.local.begin().unwrap();
            let layer = LayerCall {
                layer: LayerId(call.layer),
                hidden,
                rows: row,
                top_k: own.len(),
                experts: &call.experts[own.clone()],
                weights: &call.weights[own],
                spread: &[0],
            };
            let sums = step.start(&layer).unwrap().wait().unwrap();
            rows.extend(sums.iter().flat_map(|value| value.to_le_bytes()));
        }
        ForwardResponse {
            call_id: call.call_id,
            status: ForwardStatus::Ok.into(),
            detail: String::new(),
            dtype: DType::DtypeF32.into(),
            rows: rows.into(),
        }
    }
}

/// Workers that share one model, and a client of theirs.
pub(crate) struct Crew {
    pub(crate) workers: Vec<FakeWorker>,
    pub(crate) experts: Experts,
    layers: Vec<LayerId>,
    count: u32,
    _runtime: Runtime,
}

impl Crew {
    pub(crate) fn new(loaded: &Loaded, workers: usize, config: ExpertsConfig) -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        Self {
            workers: (0..workers).map(|_| FakeWorker::start(&loaded.local)).collect(),
            experts: Experts::new(config, runtime.handle().clone()),
            layers: loaded.model.expert_layers(),
            count: u32::try_from(loaded.model.experts()).unwrap(),
            _runtime: runtime,
        }
    }

    /// Routes at `revision` in which worker `w` holds the experts for which `holds(w, expert)`.
    pub(crate) fn table(&self, revision: u64, holds: impl Fn(usize, u32) -> bool) -> RouteTable {
        let device = |(index, worker): (usize, &FakeWorker)| {
            let slots: Vec<_> =
                (0..self.count).filter(|expert| holds(index, *expert)).map(|e| Some(ExpertId(e))).collect();
            RouteDevice {
                device: format!("node-{index}/0.0").parse().unwrap(),
                endpoint: worker.endpoint.clone(),
                slots: self.layers.iter().map(|layer| (*layer, slots.clone())).collect::<BTreeMap<_, _>>(),
                weights: BTreeMap::new(),
            }
        };
        RouteTable {
            placement_uid: "6c1f".to_owned(),
            epoch: Epoch(1),
            revision: Revision(revision),
            devices: self.workers.iter().enumerate().map(device).collect(),
        }
    }

    /// Calls that all workers together were asked.
    pub(crate) fn asked(&self) -> usize {
        self.workers.iter().map(|worker| worker.asked().len()).sum()
    }
}
