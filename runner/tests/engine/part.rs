//! The whole part, with a scheduler and workers that are real streams: what it says, what it obeys, how it ends.

use std::{net::SocketAddr, pin::Pin, sync::Arc, time::Duration};

use berth_kernels::Roots;
use berth_proto::{
    convert,
    v1::{
        AgentMessage, AgentOrder, DescribeRequest, DevicesGone, FinishReason, GenerateRequest, Routes, RunnerMessage,
        RunnerOrder, SchedulerHello, TokenIds,
        control_server::{Control, ControlServer},
        generate_event::Event,
        generate_request::Prompt,
        runner_message::Message,
        runner_order::Order,
        serve_client::ServeClient,
    },
};
use berth_runner::{Config, RunnerError, engine::EngineConfig, experts::ExpertsConfig, routes::RouteTable};
use futures::Stream;
use tokio::{
    net::{TcpListener, TcpStream},
    sync::mpsc,
    task::JoinHandle,
    time::timeout,
};
use tokio_stream::wrappers::{ReceiverStream, TcpListenerStream};
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status, Streaming, transport::Server};

use crate::{
    tiny,
    worker::{Crew, Mode},
};

const PROMPT: [u32; 5] = [0, 41, 7, 200, 13];

/// One runner's stream as its scheduler has it.
struct Talk {
    heard: Streaming<RunnerMessage>,
    say: mpsc::Sender<Result<RunnerOrder, Status>>,
}

impl Talk {
    async fn say(&self, order: Order) {
        self.say.send(Ok(RunnerOrder { order: Some(order) })).await.unwrap();
    }

    async fn hello(&self, epoch: u64) {
        self.say(Order::Hello(SchedulerHello { hello: None, epoch })).await;
    }

    /// The next message that `pick` wants.
    async fn hear<T>(&mut self, pick: impl Fn(Message) -> Option<T>) -> T {
        let find = async {
            loop {
                let message = self.heard.message().await.unwrap().expect("the runner ended its stream");
                if let Some(found) = pick(message.message.unwrap()) {
                    return found;
                }
            }
        };
        timeout(Duration::from_secs(10), find).await.expect("the runner did not say it")
    }

    async fn hear_in_use(&mut self, oldest: u64, current: u64) {
        self.hear(|message| match message {
            Message::InUse(in_use) if (in_use.oldest, in_use.current) == (oldest, current) => Some(()),
            _ => None,
        })
        .await;
    }
}

struct Scheduler(mpsc::Sender<Talk>);

#[tonic::async_trait]
impl Control for Scheduler {
    type AgentStream = Pin<Box<dyn Stream<Item = Result<AgentOrder, Status>> + Send>>;
    type RunnerStream = ReceiverStream<Result<RunnerOrder, Status>>;

    async fn agent(&self, _: Request<Streaming<AgentMessage>>) -> Result<Response<Self::AgentStream>, Status> {
        Err(Status::unimplemented("runners only"))
    }

    async fn runner(&self, request: Request<Streaming<RunnerMessage>>) -> Result<Response<Self::RunnerStream>, Status> {
        let (say, orders) = mpsc::channel(16);
        self.0.send(Talk { heard: request.into_inner(), say }).await.unwrap();
        Ok(Response::new(ReceiverStream::new(orders)))
    }
}

/// A runner of a random model, its scheduler and its workers.
struct Scene {
    talks: mpsc::Receiver<Talk>,
    crew: Crew,
    listen: SocketAddr,
    admin: SocketAddr,
    stop: CancellationToken,
    part: JoinHandle<Result<(), RunnerError>>,
    _dir: tempfile::TempDir,
}

async fn free() -> SocketAddr {
    TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap()
}

fn config(dir: &std::path::Path, listen: SocketAddr, admin_listen: SocketAddr, scheduler: SocketAddr) -> Config {
    Config {
        weights: format!("file://{}", dir.display()),
        roots: Roots::new([dir]).unwrap(),
        digest: None,
        placement: "models/tiny-0".parse().unwrap(),
        runner: "tiny-0-runner".to_owned(),
        listen,
        admin_listen,
        scheduler: Arc::new(scheduler),
        engine: EngineConfig::default(),
        experts: ExpertsConfig { deadline: Duration::from_secs(8), ..ExpertsConfig::default() },
        beat: Duration::from_millis(100),
        window: Duration::from_millis(200),
        linger: Duration::from_secs(2),
        drain: Duration::from_secs(10),
    }
}

impl Scene {
    async fn start() -> Self {
        let dir = tempfile::tempdir().unwrap();
        tiny::write(dir.path(), &tiny::grouped(), 7);
        let loaded = tiny::load(dir.path());
        let crew = tokio::task::spawn_blocking(move || Crew::new(&loaded, 2, ExpertsConfig::default())).await.unwrap();
        let (calls, talks) = mpsc::channel(4);
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let scheduler = listener.local_addr().unwrap();
        let service = ControlServer::new(Scheduler(calls));
        tokio::spawn(Server::builder().add_service(service).serve_with_incoming(TcpListenerStream::new(listener)));
        let (listen, admin, stop) = (free().await, free().await, CancellationToken::new());
        let part = tokio::spawn(berth_runner::run(config(dir.path(), listen, admin, scheduler), stop.clone()));
        Self { talks, crew, listen, admin, stop, part, _dir: dir }
    }

    async fn talk(&mut self) -> Talk {
        timeout(Duration::from_secs(20), self.talks.recv()).await.expect("no runner came").unwrap()
    }

    fn routes(&self, epoch: u64, revision: u64) -> Order {
        let RouteTable { placement_uid, devices, .. } = self.crew.table(revision, |_, _| true);
        let devices = devices.into_iter().map(|device| berth_proto::v1::RouteDevice {
            device: device.device.to_string(),
            endpoint: device.endpoint,
            layers: convert::slots_to_wire(&device.slots),
            weights: convert::weights_to_wire(&device.weights),
        });
        Order::Routes(Routes { epoch, placement_uid, revision, devices: devices.collect(), traceparent: String::new() })
    }

    async fn client(&self) -> ServeClient<tonic::transport::Channel> {
        ServeClient::connect(format!("http://{}", self.listen)).await.unwrap()
    }

    /// Status line of an admin endpoint.
    async fn probe(&self, path: &str) -> String {
        use tokio::io::{AsyncReadExt, AsyncWriteExt};
        let mut stream = TcpStream::connect(self.admin).await.unwrap();
        let request = format!("GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        answer
    }

    async fn end(self) {
        // Dropping runtimes blocks, which a test's own runtime does not allow.
        let crew = self.crew;
        self.stop.cancel();
        timeout(Duration::from_secs(20), self.part).await.expect("it did not end").unwrap().unwrap();
        tokio::task::spawn_blocking(move || drop(crew)).await.unwrap();
    }
}

fn request(max_tokens: u32) -> GenerateRequest {
    GenerateRequest {
        request_id: "r".to_owned(),
        prompt: Some(Prompt::Ids(TokenIds { ids: PROMPT.to_vec() })),
        max_tokens,
        deadline_ms: 0,
        ignore_eos: true,
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn it_says_what_it_uses_and_serves_what_it_is_routed() {
    let mut scene = Scene::start().await;
    let mut talk = scene.talk().await;
    let hello = talk.hear(|message| if let Message::Hello(hello) = message { Some(hello) } else { None }).await;
    assert_eq!((hello.placement.as_str(), hello.runner.as_str()), ("models/tiny-0", "tiny-0-runner"));
    assert!(scene.probe("/readyz").await.contains("routes"), "ready without routes");
    talk.hello(1).await;
    talk.say(scene.routes(1, 1)).await;
    talk.hear_in_use(1, 1).await;
    let mut client = scene.client().await;
    let mut events = client.generate(request(6)).await.unwrap().into_inner();
    let (mut tokens, mut finished) = (0, None);
    while let Some(event) = events.message().await.unwrap() {
        match event.event.unwrap() {
            Event::Prompt(prompt) => assert_eq!(prompt.ids, PROMPT),
            Event::Token(token) => tokens += u32::from(token.revision == 1),
            Event::Finished(end) => finished = Some(end),
        }
    }
    let finished = finished.unwrap();
    assert_eq!((tokens, finished.reason()), (6, FinishReason::Length), "{}", finished.error);
    let window = talk.hear(|message| match message {
        Message::Load(window) if !window.layers.is_empty() => Some(window),
        _ => None,
    });
    let window = window.await;
    let counted: u64 = window.layers[0].tokens.iter().sum();
    assert!(counted > 0 && counted.is_multiple_of(2), "two experts a token");
    let answered = window.devices.iter().flat_map(|device| &device.layers).map(|layer| layer.tokens).sum::<u64>();
    assert!(answered > 0 && window.length_ms > 0, "devices answered: {window:?}");
    let declared = hello.hello.map(|hello| hello.features).unwrap_or_default();
    assert_eq!(declared, [berth_proto::FEATURE_WEIGHTS]);
    talk.hear(|message| matches!(message, Message::Beat(_)).then_some(())).await;
    talk.say(Order::Gone(DevicesGone { devices: vec!["node-0/0.0".to_owned()] })).await;
    let gone = async {
        loop {
            let now = client.describe(DescribeRequest {}).await.unwrap().into_inner();
            if !now.gone.is_empty() {
                return now;
            }
        }
    };
    let now = timeout(Duration::from_secs(5), gone).await.unwrap();
    assert_eq!((now.revision, now.epoch, now.gone.as_slice()), (1, 1, ["node-0/0.0".to_owned()].as_slice()));
    assert!(now.revision_since_unix_ms > 0 && now.calls > 0);
    assert!(scene.probe("/readyz").await.starts_with("HTTP/1.1 200"));
    assert!(scene.probe("/metrics").await.contains("berth_runner_tokens_total 6"));
    scene.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn it_serves_on_without_a_scheduler_and_refuses_a_deposed_one() {
    let mut scene = Scene::start().await;
    let talk = scene.talk().await;
    talk.hello(5).await;
    talk.say(scene.routes(5, 2)).await;
    let mut talk = talk;
    talk.hear_in_use(2, 2).await;
    drop(talk);
    let mut client = scene.client().await;
    let mut events = client.generate(request(3)).await.unwrap().into_inner();
    while let Some(event) = events.message().await.unwrap() {
        if let Event::Finished(end) = event.event.unwrap() {
            assert_eq!(end.reason(), FinishReason::Length, "{}", end.error);
        }
    }
    let mut talk = scene.talk().await;
    talk.hear_in_use(2, 2).await;
    talk.hello(4).await;
    talk.say(scene.routes(4, 9)).await;
    let mut talk = scene.talk().await;
    talk.hear_in_use(2, 2).await;
    talk.hello(6).await;
    talk.say(scene.routes(6, 3)).await;
    talk.hear_in_use(3, 3).await;
    scene.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn asked_to_stop_it_lingers_then_takes_nothing_new_and_finishes_what_it_has() {
    let mut scene = Scene::start().await;
    let mut talk = scene.talk().await;
    talk.hello(1).await;
    talk.say(scene.routes(1, 1)).await;
    talk.hear_in_use(1, 1).await;
    scene.crew.workers.iter().for_each(|worker| worker.set(Mode::Hang));
    let mut client = scene.client().await;
    let mut events = client.generate(request(4)).await.unwrap().into_inner();
    assert!(matches!(events.message().await.unwrap().unwrap().event, Some(Event::Prompt(_))));
    scene.stop.cancel();
    let unready = async {
        while !scene.probe("/readyz").await.starts_with("HTTP/1.1 503") {
            tokio::task::yield_now().await;
        }
    };
    timeout(Duration::from_secs(1), unready).await.expect("it is still ready");
    // A client that has not heard of it yet.
    let mut late = scene.client().await.generate(request(4)).await.unwrap().into_inner();
    let refused = async {
        while TcpStream::connect(scene.listen).await.is_ok() {
            tokio::task::yield_now().await;
        }
    };
    timeout(Duration::from_secs(5), refused).await.expect("it still accepts connections");
    assert!(scene.probe("/readyz").await.starts_with("HTTP/1.1 503"));
    scene.crew.workers.iter().for_each(|worker| worker.set(Mode::Serve));
    for events in [&mut events, &mut late] {
        let mut reason = None;
        while let Some(event) = events.message().await.unwrap() {
            if let Some(Event::Finished(end)) = event.event {
                reason = Some(end.reason());
            }
        }
        assert_eq!(reason, Some(FinishReason::Length));
    }
    scene.end().await;
}

#[tokio::test]
async fn weights_with_another_digest_are_not_served() {
    let dir = tempfile::tempdir().unwrap();
    tiny::write(dir.path(), &tiny::grouped(), 7);
    let (listen, admin, scheduler) = (free().await, free().await, free().await);
    let config = Config { digest: Some("sha256:00".to_owned()), ..config(dir.path(), listen, admin, scheduler) };
    let error = berth_runner::run(config, CancellationToken::new()).await.unwrap_err().to_string();
    assert!(error.contains("ordered is sha256:00"), "{error}");
}
