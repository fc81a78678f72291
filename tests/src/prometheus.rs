//! A real Prometheus, fed from the pods' admin addresses: Debian's package, unpacked into the tool cache. No service
//! of the machine is installed or started, and no right is needed but to download; the process ends with this one.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use serde::Deserialize;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

use crate::address::free_ports;
use crate::cluster_tool::cache_root;
use crate::tied_process::TiedProcess;
use crate::{Error, Result};

/// Longest time for one answer, and for the start.
const PATIENCE: Duration = Duration::from_secs(20);
/// What to do when the package cannot be had.
const REMEDY: &str =
    "put a `prometheus` of version 2.42 or newer on the PATH, or let `apt-get download prometheus` work";

/// One thing to scrape: its address and the labels that every series of it gets.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Target {
    /// `ip:port` of its admin endpoints.
    pub address: SocketAddr,
    /// Labels, as a ServiceMonitor or PodMonitor would set them.
    pub labels: BTreeMap<String, String>,
}

/// One series of an answer: its labels and its value now.
#[derive(Clone, Debug, PartialEq)]
pub struct Sample {
    /// Labels, the name apart.
    pub labels: BTreeMap<String, String>,
    /// The value; may be NaN.
    pub value: f64,
}

/// A running Prometheus that scrapes every second.
#[derive(Debug)]
pub struct Prometheus {
    address: SocketAddr,
    targets: PathBuf,
    process: TiedProcess,
}

impl Prometheus {
    /// Starts one with its files in `<dir>/prometheus`, scraping nothing yet. Downloads the package first if neither
    /// the PATH nor the cache has it. Blocks for the download.
    ///
    /// # Errors
    /// When the package cannot be had (the error says what to do), or it does not serve in time.
    pub async fn start(dir: &Path) -> Result<Self> {
        let program = tokio::task::spawn_blocking(locate).await.unwrap_or_else(|panic| {
            std::panic::resume_unwind(panic.into_panic());
        })?;
        let dir = dir.join("prometheus");
        fs::create_dir_all(&dir).map_err(Error::file("make", &dir))?;
        let (config, targets) = (dir.join("prometheus.yml"), dir.join("targets.json"));
        // JSON is YAML too.
        let text = json!({
            "global": {"scrape_interval": "1s", "scrape_timeout": "1s"},
            "scrape_configs": [{"job_name": "berth", "honor_labels": true, "file_sd_configs": [
                {"files": [targets.display().to_string()], "refresh_interval": "1s"}]}],
        });
        write(&config, &text)?;
        write(&targets, &json!([]))?;
        let [port] = free_ports()?;
        let address = SocketAddr::from(([127, 0, 0, 1], port));
        let command = command(&program, &config, &dir.join("data"), address);
        let mut process = TiedProcess::spawn("prometheus", command, &dir)?;
        let deadline = Instant::now() + PATIENCE;
        while !matches!(get(address, "/-/ready").await, Some((200, _))) {
            if process.has_ended() || Instant::now() > deadline {
                let (log, tail) = (process.log().to_owned(), process.log_tail());
                return Err(Error::Deadline { what: "prometheus".into(), waited: PATIENCE, log, tail });
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        Ok(Self { address, targets, process })
    }

    /// Its process.
    #[must_use]
    pub fn process(&self) -> &TiedProcess {
        &self.process
    }

    /// Scrapes these from now on, and nothing else.
    ///
    /// # Errors
    /// When the file that tells it cannot be written.
    pub fn scrape(&self, targets: &[Target]) -> Result<()> {
        let group = |target: &Target| json!({"targets": [target.address.to_string()], "labels": target.labels});
        write(&self.targets, &targets.iter().map(group).collect())
    }

    /// What a query gives now.
    ///
    /// # Errors
    /// When it is malformed or not answered; the error holds what Prometheus says.
    pub async fn query(&self, query: &str) -> Result<Vec<Sample>> {
        #[derive(Deserialize)]
        struct Series {
            metric: BTreeMap<String, String>,
            value: (f64, String),
        }
        let wrong = |why: String| Error::Runner { doing: format!("query {query}"), why };
        let path = format!("/api/v1/query?query={}", encoded(query));
        let (_, text) = get(self.address, &path).await.ok_or_else(|| wrong("no answer".into()))?;
        let answer: Value = serde_json::from_str(&text).map_err(|error| wrong(error.to_string()))?;
        if answer["status"] != "success" {
            return Err(wrong(answer["error"].to_string()));
        }
        let series: Vec<Series> =
            serde_json::from_value(answer["data"]["result"].clone()).map_err(|error| wrong(error.to_string()))?;
        let sample = |Series { mut metric, value: (_, value) }: Series| {
            metric.remove("__name__");
            // Prometheus writes +Inf and NaN as Rust reads them.
            Sample { labels: metric, value: value.parse().unwrap_or(f64::NAN) }
        };
        Ok(series.into_iter().map(sample).collect())
    }
}

/// The command line. Prometheus does not watch its standard input, so a shell does, and the kernel ends Prometheus
/// when the shell is gone.
fn command(program: &Path, config: &Path, data: &Path, address: SocketAddr) -> Command {
    const TIE: &str = "setpriv --pdeathsig KILL -- \"$@\" </dev/null & child=$!; cat >/dev/null; kill -KILL $child";
    let mut command = Command::new("sh");
    command
        .args(["-c", TIE, "tie"])
        .arg(program)
        .arg(format!("--config.file={}", config.display()))
        .arg(format!("--storage.tsdb.path={}", data.display()))
        .arg(format!("--web.listen-address={address}"))
        // Debian's package keeps its pages elsewhere; nobody looks at them here.
        .args(["--web.console.templates=/nonexistent", "--web.console.libraries=/nonexistent", "--log.level=warn"]);
    command
}

/// Reads `path` of the admin or API endpoint at `address`: its status and body.
pub async fn get(address: SocketAddr, path: &str) -> Option<(u16, String)> {
    let ask = async {
        let mut stream = TcpStream::connect(address).await.ok()?;
        // HTTP/1.0: the answer ends with the connection and comes in one piece.
        let request = format!("GET {path} HTTP/1.0\r\nHost: {address}\r\nAccept: application/openmetrics-text\r\n\r\n");
        stream.write_all(request.as_bytes()).await.ok()?;
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).await.ok()?;
        let answer = String::from_utf8_lossy(&answer).into_owned();
        let (head, body) = answer.split_once("\r\n\r\n")?;
        Some((head.split(' ').nth(1)?.parse().ok()?, body.to_owned()))
    };
    tokio::time::timeout(PATIENCE, ask).await.ok()?
}

fn encoded(text: &str) -> String {
    text.bytes()
        .map(|byte| if byte.is_ascii_alphanumeric() { char::from(byte).to_string() } else { format!("%{byte:02X}") })
        .collect()
}

/// Writes beside and moves, so that a reader sees the old or the new.
fn write(path: &Path, value: &Value) -> Result<()> {
    let part = path.with_extension("part");
    fs::write(&part, value.to_string()).map_err(Error::file("write", &part))?;
    fs::rename(&part, path).map_err(Error::file("rename", &part))
}

/// The tool that checks and tests rules, which comes with Prometheus. Blocks for the download.
///
/// # Errors
/// When the package cannot be had; the error says what to do.
pub fn promtool() -> Result<PathBuf> {
    program("promtool")
}

fn locate() -> Result<PathBuf> {
    program("prometheus")
}

/// A program of the package: of the PATH, of the cache, or downloaded into the cache.
fn program(name: &str) -> Result<PathBuf> {
    if works(Path::new(name)) {
        return Ok(name.into());
    }
    let cache = cache_root().join("prometheus");
    let program = cache.join("package/usr/bin").join(name);
    fs::create_dir_all(&cache).map_err(Error::file("create", &cache))?;
    let lock_path = cache.join("lock");
    let lock = File::create(&lock_path).map_err(Error::file("create", &lock_path))?;
    lock.lock().map_err(Error::file("lock", &lock_path))?;
    if !works(&program) {
        unpack(&cache)?;
    }
    if works(&program) {
        return Ok(program);
    }
    Err(Error::Unknown { what: "Prometheus that runs here", name: format!("{}: {REMEDY}", program.display()) })
}

fn works(program: &Path) -> bool {
    let version = Command::new(program).arg("--version").stdout(Stdio::null()).stderr(Stdio::null()).status();
    version.is_ok_and(|status| status.success())
}

/// Downloads the package and unpacks it; its scripts, which would start a service, do not run.
fn unpack(cache: &Path) -> Result<()> {
    let downloads = cache.join("download");
    let _ = fs::remove_dir_all(&downloads);
    fs::create_dir_all(&downloads).map_err(Error::file("create", &downloads))?;
    let download = || run(Command::new("apt-get").args(["download", "prometheus"]).current_dir(&downloads));
    if download().is_err() {
        // Without lists of packages there is nothing to download; to fetch them needs root.
        run(Command::new("apt-get").arg("update"))?;
        download()?;
    }
    let package = fs::read_dir(&downloads).map_err(Error::file("list", &downloads))?.flatten().next();
    let package = package.ok_or_else(|| Error::Unknown { what: "package", name: REMEDY.into() })?.path();
    let part = cache.join("part");
    let _ = fs::remove_dir_all(&part);
    run(Command::new("dpkg").arg("-x").arg(&package).arg(&part))?;
    let done = cache.join("package");
    let _ = fs::remove_dir_all(&done);
    fs::rename(&part, &done).map_err(Error::file("rename", &part))?;
    fs::remove_dir_all(&downloads).map_err(Error::file("remove", &downloads))
}

fn run(command: &mut Command) -> Result<()> {
    let line = format!("{command:?}");
    let failed = |status: String, stderr: String| Error::Command {
        command: line.clone(),
        status,
        stderr: format!("{}; to have a Prometheus: {REMEDY}", stderr.trim()),
    };
    let output =
        command.stdin(Stdio::null()).output().map_err(|error| failed("not started".into(), error.to_string()))?;
    if output.status.success() {
        return Ok(());
    }
    Err(failed(output.status.to_string(), String::from_utf8_lossy(&output.stderr).into_owned()))
}
