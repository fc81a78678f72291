//! An etcd of a test's own, from the same binary as the control plane's, so that a test may stop, fill or break it
//! without harming an API server. Must never be reachable from another machine: it may have no authentication.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::address::free_ports;
use crate::control_plane::{components, target_dir};
use crate::tied_process::TiedProcess;
use crate::{ClusterTool, Error, Result};

/// How long a start may take.
const DEADLINE: Duration = Duration::from_secs(30);

/// What an etcd is to be like.
#[derive(Debug, Clone, Default)]
pub struct EtcdOptions {
    /// Bytes that it may hold; `None` = its default, 2 GiB.
    pub quota: Option<u64>,
    /// Serves TLS and asks clients for certificates.
    pub tls: bool,
}

/// A running etcd; ended when dropped, or with this process however that ends.
#[derive(Debug)]
pub struct EtcdServer {
    options: EtcdOptions,
    tool: ClusterTool,
    ports: [u16; 2],
    process: Option<TiedProcess>,
    dir: tempfile::TempDir,
}

impl EtcdServer {
    /// Starts one with an empty store and waits until it takes connections.
    ///
    /// # Errors
    /// When the binary cannot be built, or etcd does not start; the error shows its log.
    pub async fn start(options: EtcdOptions) -> Result<Self> {
        let tool = tokio::task::spawn_blocking(ClusterTool::locate).await.unwrap_or_else(|panic| {
            std::panic::resume_unwind(panic.into_panic());
        })?;
        let parent = target_dir().join("etcd");
        std::fs::create_dir_all(&parent).map_err(Error::file("make", &parent))?;
        let dir = tempfile::tempdir_in(&parent).map_err(Error::file("make a folder in", &parent))?;
        if options.tls {
            write_keys(&tool, dir.path())?;
        }
        let mut server = Self { options, tool, ports: free_ports()?, process: None, dir };
        server.launch().await?;
        Ok(server)
    }

    /// Its URL for clients.
    #[must_use]
    pub fn url(&self) -> String {
        let scheme = if self.options.tls { "https" } else { "http" };
        format!("{scheme}://127.0.0.1:{}", self.ports[0])
    }

    /// Its port for clients.
    #[must_use]
    pub fn port(&self) -> u16 {
        self.ports[0]
    }

    /// A file of its folder: with TLS `ca.crt`, and `client.crt` and `client.key` of a client.
    #[must_use]
    pub fn file(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Kills it; what it holds stays.
    pub fn kill(&mut self) {
        self.process = None;
    }

    /// Starts it again, with what it held.
    ///
    /// # Errors
    /// As [`Self::start`].
    pub async fn launch(&mut self) -> Result<()> {
        let mut process = TiedProcess::spawn("etcd", self.command(), self.dir.path())?;
        let deadline = Instant::now() + DEADLINE;
        while tokio::net::TcpStream::connect(("127.0.0.1", self.ports[0])).await.is_err() {
            if process.has_ended() || Instant::now() > deadline {
                let (log, tail) = (process.log().to_owned(), process.log_tail());
                return Err(Error::Deadline { what: "etcd".into(), waited: DEADLINE, log, tail });
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        self.process = Some(process);
        Ok(())
    }

    /// Stops it as it is: it holds its connections and answers nothing.
    pub fn pause(&self) {
        self.signal(Signal::SIGSTOP);
    }

    /// Lets it go on.
    pub fn resume(&self) {
        self.signal(Signal::SIGCONT);
    }

    fn signal(&self, signal: Signal) {
        if let Some(pid) = self.process.as_ref().and_then(|process| i32::try_from(process.pid()).ok()) {
            // A process that ended is what its clients will notice.
            let _ = kill(Pid::from_raw(pid), signal);
        }
    }

    fn command(&self) -> Command {
        let urls = [self.url(), format!("http://127.0.0.1:{}", self.ports[1])];
        let mut command = components::etcd_at(&self.tool, &self.file("data"), urls);
        if let Some(quota) = self.options.quota {
            command.arg(format!("--quota-backend-bytes={quota}"));
        }
        if self.options.tls {
            command
                .arg("--client-cert-auth")
                .arg(format!("--trusted-ca-file={}", self.file("ca.crt").display()))
                .arg(format!("--cert-file={}", self.file("server.crt").display()))
                .arg(format!("--key-file={}", self.file("server.key").display()));
        }
        command
    }
}

/// The certificates of a control plane serve here too; the admin's is the client's.
fn write_keys(tool: &ClusterTool, dir: &Path) -> Result<()> {
    components::write_keys(tool, dir, "https://127.0.0.1")?;
    let path = dir.join("admin.kubeconfig");
    let config = std::fs::read_to_string(&path).map_err(Error::file("read", &path))?;
    for (name, field) in [("client.crt", "client-certificate-data: "), ("client.key", "client-key-data: ")] {
        let wrong = |why: &str| Error::Kubeconfig { path: path.clone(), why: format!("{field}{why}") };
        let (_, rest) = config.split_once(field).ok_or_else(|| wrong("is missing"))?;
        let text = rest.split([',', '}']).next().unwrap_or_default();
        let pem = STANDARD.decode(text).map_err(|error| wrong(&error.to_string()))?;
        std::fs::write(dir.join(name), pem).map_err(Error::file("write", dir.join(name)))?;
    }
    Ok(())
}
