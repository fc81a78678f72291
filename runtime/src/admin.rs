//! What a kubelet and a scraper ask: /livez, /startupz, /readyz and /metrics on one address, and further pages of
//! text that a part adds.
//!
//! Live means that each registered loop moved in time; ready, that every named check holds and the
//! process is not stopping. Who leads is irrelevant to both. Nothing here changes anything.

use std::{
    collections::BTreeMap,
    fmt::{self, Write as _},
    io,
    net::SocketAddr,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use axum::{
    Router,
    extract::State,
    http::{StatusCode, Uri, header::CONTENT_TYPE},
    response::{IntoResponse, Response},
    routing::get,
};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use crate::{Clock, telemetry::Metrics};

const OPENMETRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// The health of one process, as its parts report it. Clones share it.
#[derive(Clone, Debug)]
pub struct Admin(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    clock: Clock,
    metrics: Metrics,
    heartbeats: Mutex<Vec<Heartbeat>>,
    checks: Mutex<Vec<Check>>,
    pages: Mutex<BTreeMap<&'static str, Page>>,
    started: AtomicBool,
    stopping: AtomicBool,
}

/// A page that a part adds: its content type, and what writes it.
#[derive(Clone)]
struct Page(&'static str, Arc<dyn Fn() -> String + Send + Sync>);

impl fmt::Debug for Page {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Page").field(&self.0).finish()
    }
}

/// A loop's sign of life; see [`Admin::heartbeat`].
#[derive(Clone, Debug)]
pub struct Heartbeat {
    name: &'static str,
    within: Duration,
    clock: Clock,
    last_ms: Arc<AtomicU64>,
}

impl Heartbeat {
    /// The loop has made a turn.
    pub fn beat(&self) {
        self.last_ms.store(millis(self.clock.now()), Ordering::Relaxed);
    }

    /// Beats while `work` runs. It shows that the task that polls this gets its turns: nothing in it blocks or spins.
    /// A wait inside of it needs a deadline of its own.
    pub async fn during<F: Future>(&self, work: F) -> F::Output {
        let mut work = std::pin::pin!(work);
        loop {
            self.beat();
            // Cancel-safe: the work is only polled, never dropped.
            tokio::select! {
                biased;
                done = &mut work => return done,
                () = self.clock.sleep(self.within / 4) => {}
            }
        }
    }

    fn verdict(&self) -> Verdict {
        let silent = millis(self.clock.now()).saturating_sub(self.last_ms.load(Ordering::Relaxed));
        let reason = format!("no turn for {silent} ms, limit {} ms", millis(self.within));
        Verdict { name: self.name, failed: (silent > millis(self.within)).then_some(reason) }
    }
}

/// A condition for being ready; see [`Admin::check`].
#[derive(Clone, Debug)]
pub struct Check {
    name: &'static str,
    failed: Arc<Mutex<Option<String>>>,
}

impl Check {
    /// It holds.
    pub fn pass(&self) {
        *lock(&self.failed) = None;
    }

    /// It does not hold, for this reason.
    pub fn fail(&self, reason: impl Into<String>) {
        *lock(&self.failed) = Some(reason.into());
    }

    fn verdict(&self) -> Verdict {
        Verdict { name: self.name, failed: lock(&self.failed).clone() }
    }
}

struct Verdict {
    name: &'static str,
    failed: Option<String>,
}

impl Admin {
    /// Nothing registered: live and ready.
    #[must_use]
    pub fn new(clock: Clock, metrics: Metrics) -> Self {
        Self(Arc::new(Inner {
            clock,
            metrics,
            heartbeats: Mutex::default(),
            checks: Mutex::default(),
            pages: Mutex::default(),
            started: AtomicBool::new(false),
            stopping: AtomicBool::new(false),
        }))
    }

    /// Registers a loop that must call [`Heartbeat::beat`] at least every `within`, from now on. A loop
    /// that may wait longer beats by a timer.
    #[must_use]
    pub fn heartbeat(&self, name: &'static str, within: Duration) -> Heartbeat {
        let heartbeat = Heartbeat { name, within, clock: self.0.clock.clone(), last_ms: Arc::default() };
        heartbeat.beat();
        lock(&self.0.heartbeats).push(heartbeat.clone());
        heartbeat
    }

    /// Registers a condition for being ready. It fails until [`Check::pass`].
    #[must_use]
    pub fn check(&self, name: &'static str) -> Check {
        let check = Check { name, failed: Arc::new(Mutex::new(Some("not yet".to_owned()))) };
        lock(&self.0.checks).push(check.clone());
        check
    }

    /// Serves what `text` writes at `path` from now on, as `content_type`. `text` is called for every request and
    /// must not block.
    pub fn page(
        &self,
        path: &'static str,
        content_type: &'static str,
        text: impl Fn() -> String + Send + Sync + 'static,
    ) {
        lock(&self.0.pages).insert(path, Page(content_type, Arc::new(text)));
    }

    /// From now on the process is not ready, whatever its checks say.
    pub fn stop(&self) {
        self.0.stopping.store(true, Ordering::Relaxed);
    }

    /// Serves on `listener` until `stop`, then finishes the requests in hand.
    ///
    /// # Errors
    /// When the listener breaks.
    pub async fn serve(self, listener: TcpListener, stop: CancellationToken) -> io::Result<()> {
        axum::serve(listener, self.routes()).with_graceful_shutdown(stop.cancelled_owned()).await
    }

    fn routes(self) -> Router {
        Router::new()
            .route("/livez", get(async |State(admin): State<Self>| admin.livez()))
            .route("/readyz", get(async |State(admin): State<Self>| admin.readyz()))
            .route("/startupz", get(async |State(admin): State<Self>| admin.startupz()))
            .route("/metrics", get(async |State(admin): State<Self>| admin.metrics()))
            .fallback(get(async |State(admin): State<Self>, uri: Uri| admin.further(uri.path())))
            .with_state(self)
    }

    fn livez(&self) -> (StatusCode, String) {
        render(&lock(&self.0.heartbeats).iter().map(Heartbeat::verdict).collect::<Vec<_>>())
    }

    fn readyz(&self) -> (StatusCode, String) {
        let stopping = self.0.stopping.load(Ordering::Relaxed).then(|| "stopping".to_owned());
        let mut verdicts = vec![Verdict { name: "shutdown", failed: stopping }];
        verdicts.extend(lock(&self.0.checks).iter().map(Check::verdict));
        render(&verdicts)
    }

    /// Fails until the process was ready once.
    fn startupz(&self) -> (StatusCode, String) {
        let (status, text) = self.readyz();
        if status.is_success() {
            self.0.started.store(true, Ordering::Relaxed);
        }
        if self.0.started.load(Ordering::Relaxed) { (StatusCode::OK, "started\n".to_owned()) } else { (status, text) }
    }

    fn further(&self, path: &str) -> Response {
        let page = lock(&self.0.pages).get(path).cloned();
        match page {
            Some(Page(content_type, text)) => ([(CONTENT_TYPE, content_type)], text()).into_response(),
            None => StatusCode::NOT_FOUND.into_response(),
        }
    }

    fn metrics(&self) -> Response {
        ([(CONTENT_TYPE, OPENMETRICS)], self.0.metrics.encode()).into_response()
    }
}

/// One line a verdict, as Kubernetes' own endpoints print them.
fn render(verdicts: &[Verdict]) -> (StatusCode, String) {
    let mut text = String::new();
    let mut status = StatusCode::OK;
    for Verdict { name, failed } in verdicts {
        // Writing to a String cannot fail.
        let _ = match failed {
            None => writeln!(text, "[+]{name} ok"),
            Some(reason) => {
                status = StatusCode::SERVICE_UNAVAILABLE;
                writeln!(text, "[-]{name} failed: {reason}")
            }
        };
    }
    (status, text)
}

/// Binds the address of an admin or control server.
///
/// # Errors
/// When the address is taken or not ours; the error names it.
pub async fn bind(address: SocketAddr) -> io::Result<TcpListener> {
    let named = |error: io::Error| io::Error::new(error.kind(), format!("listening on {address}: {error}"));
    TcpListener::bind(address).await.map_err(named)
}

fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Plain values, whole between statements: a panic elsewhere cannot tear them.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    fn admin() -> (Admin, Clock) {
        let clock = Clock::discrete();
        (Admin::new(clock.clone(), Metrics::new("test")), clock)
    }

    #[test]
    fn a_loop_that_makes_no_turn_in_time_is_not_live() {
        let (admin, clock) = admin();
        let beat = admin.heartbeat("reconcile", Duration::from_secs(10));
        let sleeper = clock.clone();
        clock
            .run(async move {
                sleeper.sleep(Duration::from_secs(10)).await;
                assert_eq!(admin.livez().0, StatusCode::OK);
                sleeper.sleep(Duration::from_secs(1)).await;
                let (status, text) = admin.livez();
                assert_eq!(status, StatusCode::SERVICE_UNAVAILABLE);
                assert_eq!(text, "[-]reconcile failed: no turn for 11000 ms, limit 10000 ms\n");
                beat.beat();
                assert_eq!(admin.livez().0, StatusCode::OK);
            })
            .unwrap();
    }

    #[test]
    fn work_that_waits_beats_and_work_that_blocks_does_not() {
        let (admin, clock) = admin();
        let beat = admin.heartbeat("control", Duration::from_secs(10));
        clock
            .clone()
            .run(async move {
                let waits = clock.sleep(Duration::from_secs(60));
                let looks = async {
                    clock.sleep(Duration::from_secs(45)).await;
                    admin.livez().0
                };
                // Both arms only wait.
                let ((), while_waiting) = tokio::join!(beat.during(waits), looks);
                assert_eq!(while_waiting, StatusCode::OK);
                clock.sleep(Duration::from_secs(11)).await;
                assert_eq!(admin.livez().0, StatusCode::SERVICE_UNAVAILABLE, "nothing runs any more");
            })
            .unwrap();
    }

    #[test]
    fn started_stays_true_and_ready_follows_the_checks() {
        let (admin, _) = admin();
        let check = admin.check("caches");
        assert_eq!(admin.startupz().0, StatusCode::SERVICE_UNAVAILABLE);
        check.pass();
        assert_eq!((admin.startupz().0, admin.readyz().0), (StatusCode::OK, StatusCode::OK));
        check.fail("watch broke");
        assert_eq!(
            admin.readyz(),
            (StatusCode::SERVICE_UNAVAILABLE, "[+]shutdown ok\n[-]caches failed: watch broke\n".into())
        );
        assert_eq!(admin.startupz().0, StatusCode::OK);
        check.pass();
        admin.stop();
        assert_eq!(admin.readyz().0, StatusCode::SERVICE_UNAVAILABLE);
    }

    async fn get(address: SocketAddr, path: &str) -> String {
        let mut stream = tokio::net::TcpStream::connect(address).await.unwrap();
        let request = format!("GET {path} HTTP/1.1\r\nhost: test\r\nconnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        answer
    }

    #[tokio::test]
    async fn endpoints_answer_over_http_until_stopped() {
        let (admin, _) = admin();
        let listener = bind("127.0.0.1:0".parse().unwrap()).await.unwrap();
        let address = listener.local_addr().unwrap();
        let stop = CancellationToken::new();
        let server = tokio::spawn(admin.clone().serve(listener, stop.clone()));
        for path in ["/livez", "/readyz", "/startupz"] {
            assert!(get(address, path).await.starts_with("HTTP/1.1 200"), "{path}");
        }
        let metrics = get(address, "/metrics").await;
        assert!(metrics.contains(OPENMETRICS) && metrics.contains("berth_test_build_info"), "{metrics}");
        assert!(get(address, "/debug").await.starts_with("HTTP/1.1 404"));
        admin.page("/debug", "text/plain", || "a page\n".to_owned());
        let page = get(address, "/debug?now").await;
        assert!(page.starts_with("HTTP/1.1 200") && page.contains("content-type: text/plain"), "{page}");
        assert!(page.ends_with("a page\n"), "{page}");
        let taken = bind(address).await.unwrap_err().to_string();
        assert!(taken.contains(&address.to_string()), "{taken}");
        stop.cancel();
        server.await.unwrap().unwrap();
        assert!(tokio::net::TcpStream::connect(address).await.is_err());
    }
}
