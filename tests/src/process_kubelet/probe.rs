//! Startup, liveness and readiness probes: HTTP GET, TCP connect, and a command in the container. They speak to
//! the pod's own address; what a probe finds is told through `Findings`, what to do about it is decided elsewhere.

use std::time::Duration;

use k8s_openapi::api::core::v1::{Container, HTTPGetAction, Probe};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::process::Command;

/// Receives what the probes find.
pub(super) trait Findings {
    /// The container has started: its other probes begin.
    fn started(&self);
    /// The container is ready, or is no longer; `why` says what the last probe met.
    fn ready(&self, ready: bool, why: &str);
}

/// Where and in what a container's probes run.
#[derive(Debug, Clone)]
pub(super) struct Target {
    pub ip: String,
    /// The container's first process.
    pub pid: i32,
}

/// Runs a container's probes until one asks for a restart.
///
/// Returns why, and the grace that the probe allows. Never returns for a healthy container. Cancel-safe.
pub(super) async fn watch(container: &Container, target: &Target, findings: &impl Findings) -> (String, Option<i64>) {
    if let Some(probe) = &container.startup_probe
        && let Err(why) = until_started(probe, container, target).await
    {
        return (format!("Startup probe failed: {why}"), probe.termination_grace_period_seconds);
    }
    findings.started();
    let liveness = async {
        let Some(probe) = &container.liveness_probe else { return std::future::pending().await };
        let why = until_dead(probe, container, target).await;
        (format!("Liveness probe failed: {why}"), probe.termination_grace_period_seconds)
    };
    let readiness = async {
        match &container.readiness_probe {
            Some(probe) => follow_readiness(probe, container, target, findings).await,
            None => findings.ready(true, ""),
        }
        std::future::pending().await
    };
    tokio::select! {
        // Both only look; dropping the other loses nothing but its counts.
        end = liveness => end,
        end = readiness => end,
    }
}

async fn until_started(probe: &Probe, container: &Container, target: &Target) -> Result<(), String> {
    let mut failures = 0;
    sleep_seconds(probe.initial_delay_seconds.unwrap_or(0)).await;
    loop {
        match try_once(probe, container, target).await {
            Ok(()) => return Ok(()),
            Err(why) => {
                failures += 1;
                if failures >= probe.failure_threshold.unwrap_or(3) {
                    return Err(why);
                }
            }
        }
        sleep_seconds(probe.period_seconds.unwrap_or(10)).await;
    }
}

async fn until_dead(probe: &Probe, container: &Container, target: &Target) -> String {
    let mut failures = 0;
    sleep_seconds(probe.initial_delay_seconds.unwrap_or(0)).await;
    loop {
        match try_once(probe, container, target).await {
            Ok(()) => failures = 0,
            Err(why) => {
                failures += 1;
                if failures >= probe.failure_threshold.unwrap_or(3) {
                    return why;
                }
            }
        }
        sleep_seconds(probe.period_seconds.unwrap_or(10)).await;
    }
}

async fn follow_readiness(probe: &Probe, container: &Container, target: &Target, findings: &impl Findings) {
    let (mut failures, mut successes) = (0, 0);
    sleep_seconds(probe.initial_delay_seconds.unwrap_or(0)).await;
    loop {
        match try_once(probe, container, target).await {
            Ok(()) => {
                (failures, successes) = (0, successes + 1);
                if successes >= probe.success_threshold.unwrap_or(1) {
                    findings.ready(true, "");
                }
            }
            Err(why) => {
                (failures, successes) = (failures + 1, 0);
                if failures >= probe.failure_threshold.unwrap_or(3) {
                    findings.ready(false, &why);
                }
            }
        }
        sleep_seconds(probe.period_seconds.unwrap_or(10)).await;
    }
}

async fn sleep_seconds(seconds: i32) {
    tokio::time::sleep(seconds_of(seconds)).await;
}

fn seconds_of(seconds: i32) -> Duration {
    Duration::from_secs(u64::try_from(seconds).unwrap_or(0))
}

async fn try_once(probe: &Probe, container: &Container, target: &Target) -> Result<(), String> {
    let limit = seconds_of(probe.timeout_seconds.unwrap_or(1).max(1));
    let attempt = async {
        if let Some(get) = &probe.http_get {
            http_get(get, container, target).await
        } else if let Some(tcp) = &probe.tcp_socket {
            connect(tcp.host.as_deref(), &tcp.port, container, target).await.map(drop)
        } else if let Some(exec) = &probe.exec {
            execute(exec.command.as_deref().unwrap_or_default(), target).await
        } else {
            Err("this kind of probe is not supported by the process kubelet".into())
        }
    };
    tokio::time::timeout(limit, attempt).await.unwrap_or_else(|_| Err(format!("no answer within {limit:?}")))
}

async fn connect(
    host: Option<&str>,
    port: &IntOrString,
    container: &Container,
    target: &Target,
) -> Result<TcpStream, String> {
    let number = match port {
        IntOrString::Int(number) => Some(*number),
        IntOrString::String(name) => {
            let named = container.ports.iter().flatten().find(|p| p.name.as_ref() == Some(name));
            named.map(|p| p.container_port).or_else(|| name.parse().ok())
        }
    };
    let number = number.and_then(|n| u16::try_from(n).ok()).ok_or_else(|| format!("no port {port:?}"))?;
    let host = host.unwrap_or(&target.ip);
    TcpStream::connect((host, number)).await.map_err(|e| format!("dial tcp {host}:{number}: {e}"))
}

async fn http_get(get: &HTTPGetAction, container: &Container, target: &Target) -> Result<(), String> {
    if get.scheme.as_deref().is_some_and(|s| s != "HTTP") {
        return Err("HTTPS probes are not supported by the process kubelet".into());
    }
    let mut stream = connect(get.host.as_deref(), &get.port, container, target).await?;
    let path = get.path.as_deref().filter(|p| !p.is_empty()).unwrap_or("/");
    let host = get.host.as_deref().unwrap_or(&target.ip);
    let mut request =
        format!("GET {path} HTTP/1.1\r\nHost: {host}\r\nUser-Agent: kube-probe/1.36\r\nConnection: close\r\n");
    for header in get.http_headers.iter().flatten() {
        request.push_str(&format!("{}: {}\r\n", header.name, header.value));
    }
    request.push_str("\r\n");
    stream.write_all(request.as_bytes()).await.map_err(|e| e.to_string())?;
    // The status line is all that counts; a probed server must not be able to fill our memory.
    let mut head = Vec::new();
    stream.take(1024).read_to_end(&mut head).await.map_err(|e| e.to_string())?;
    let head = String::from_utf8_lossy(&head);
    let status = head.split(' ').nth(1).and_then(|code| code.parse::<u16>().ok());
    match status {
        Some(200..400) => Ok(()),
        Some(code) => Err(format!("HTTP probe failed with statuscode: {code}")),
        None => Err("the answer is not HTTP".into()),
    }
}

/// Runs a command inside the container's namespaces.
async fn execute(command: &[String], target: &Target) -> Result<(), String> {
    let output = Command::new("nsenter")
        .args(["--target", &target.pid.to_string(), "--mount", "--pid", "--root", "--"])
        .args(command)
        .kill_on_drop(true)
        .output()
        .await
        .map_err(|e| format!("nsenter: {e}"))?;
    if output.status.success() {
        return Ok(());
    }
    Err(format!("{}: {}", output.status, String::from_utf8_lossy(&output.stdout).trim()))
}

#[cfg(test)]
mod tests {
    use k8s_openapi::api::core::v1::{ContainerPort, TCPSocketAction};
    use tokio::net::TcpListener;

    use super::*;

    fn target() -> Target {
        Target { ip: "127.0.0.1".into(), pid: 0 }
    }

    /// A container whose port `web` is where an answer is given to each of `answers` requests in turn.
    async fn serving(answers: Vec<&'static str>) -> Container {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let port = listener.local_addr().expect("an address").port();
        tokio::spawn(async move {
            for answer in answers {
                let (mut stream, _) = listener.accept().await.expect("a client");
                let mut request = [0; 256];
                let length = stream.read(&mut request).await.expect("a request");
                assert!(request[..length].starts_with(b"GET /ready HTTP/1.1\r\nHost: 127.0.0.1"));
                stream.write_all(answer.as_bytes()).await.expect("sent");
            }
        });
        let port = ContainerPort { name: Some("web".into()), container_port: port.into(), ..Default::default() };
        Container { ports: Some(vec![port]), ..Container::default() }
    }

    fn get(port: IntOrString) -> Probe {
        let get = HTTPGetAction { path: Some("/ready".into()), port, ..HTTPGetAction::default() };
        Probe { http_get: Some(get), ..Probe::default() }
    }

    #[tokio::test]
    async fn an_http_probe_takes_a_named_port_and_every_status_from_200_to_399() {
        let web = || get(IntOrString::String("web".into()));
        let answers = vec!["HTTP/1.1 200 OK\r\n\r\n", "HTTP/1.1 302 Found\r\n\r\n", "HTTP/1.1 503 No\r\n\r\n", "?"];
        let container = serving(answers).await;
        assert_eq!(try_once(&web(), &container, &target()).await, Ok(()));
        assert_eq!(try_once(&web(), &container, &target()).await, Ok(()));
        let refused = try_once(&web(), &container, &target()).await;
        assert_eq!(refused, Err("HTTP probe failed with statuscode: 503".into()));
        assert_eq!(try_once(&web(), &container, &target()).await, Err("the answer is not HTTP".into()));
        let unknown = try_once(&get(IntOrString::String("other".into())), &container, &target()).await;
        assert!(unknown.is_err_and(|why| why.starts_with("no port")));
    }

    #[tokio::test]
    async fn a_tcp_probe_needs_a_listener() {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let port = IntOrString::Int(listener.local_addr().expect("an address").port().into());
        let probe = Probe { tcp_socket: Some(TCPSocketAction { port, host: None }), ..Probe::default() };
        assert_eq!(try_once(&probe, &Container::default(), &target()).await, Ok(()));
        drop(listener);
        let refused = try_once(&probe, &Container::default(), &target()).await;
        assert!(refused.is_err_and(|why| why.starts_with("dial tcp 127.0.0.1")));
    }

    #[tokio::test]
    async fn a_probe_that_gets_no_answer_fails_at_its_timeout() {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let port = IntOrString::Int(listener.local_addr().expect("an address").port().into());
        let silent = try_once(&get(port), &Container::default(), &target()).await;
        assert_eq!(silent, Err("no answer within 1s".into()));
    }
}
