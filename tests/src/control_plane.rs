//! A real control plane for tests and the demo: etcd, kube-apiserver, controller manager and scheduler as child
//! processes on free ports of 127.0.0.1, with RBAC, the Node authorizer, admission plugins and an audit log.
//!
//! Nothing of it may outlive the process that started it (see `tied_process`), and it must never be reachable
//! from another machine: etcd has no authentication.

pub(crate) mod components;
mod tools;

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use k8s_openapi::api::core::v1::ServiceAccount;
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::{Api, Client};

use crate::address::{AddressPool, free_ports};
use crate::tied_process::TiedProcess;
use crate::{ClusterTool, Error, Result};

pub use components::Ports;

/// What a control plane is to be like. `ControlPlaneConfig::named("x")` is a good one.
#[derive(Debug, Clone)]
pub struct ControlPlaneConfig {
    /// Names its folder, `<target>/cluster/<name>` unless `dir` is set.
    pub name: String,
    /// Where its files go; emptied at the start.
    pub dir: Option<PathBuf>,
    /// Further arguments of kube-apiserver; a later one wins.
    pub apiserver_args: Vec<String>,
    /// Further arguments of kube-controller-manager, such as `--node-monitor-grace-period=10s`.
    pub controller_manager_args: Vec<String>,
    /// Further arguments of kube-scheduler.
    pub scheduler_args: Vec<String>,
    /// How long the start may take, building the binaries not counted.
    pub deadline: Duration,
}

impl ControlPlaneConfig {
    /// The default control plane under this name.
    #[must_use]
    pub fn named(name: &str) -> Self {
        Self {
            name: name.into(),
            dir: None,
            apiserver_args: Vec::new(),
            controller_manager_args: Vec::new(),
            scheduler_args: Vec::new(),
            deadline: Duration::from_secs(120),
        }
    }
}

/// A running control plane; ended when dropped, or with this process however that ends.
#[derive(Debug)]
pub struct ControlPlane {
    tool: ClusterTool,
    dir: PathBuf,
    url: String,
    config: kube::Config,
    addresses: Arc<AddressPool>,
    // In the order of their start; ended in reverse.
    processes: Vec<TiedProcess>,
    _lock: File,
}

impl ControlPlane {
    /// Starts a control plane and waits until it serves and its controllers work (3 to 6 s). Builds the
    /// binaries first if the cache lacks them (minutes, once).
    ///
    /// # Errors
    /// When the binaries cannot be built, a process ends early, or the deadline passes; the error shows the
    /// last lines of the log to look at.
    pub async fn start(config: ControlPlaneConfig) -> Result<Self> {
        let mut attempts = 1..=3;
        loop {
            match Self::try_start(&config).await {
                // Another process took a port between the moment it was found free and its use.
                Err(Error::Deadline { tail, .. })
                    if tail.contains("address already in use") && attempts.next().is_some() => {}
                result => return result,
            }
        }
    }

    async fn try_start(config: &ControlPlaneConfig) -> Result<Self> {
        let tool = tokio::task::spawn_blocking(ClusterTool::locate).await.unwrap_or_else(|panic| {
            std::panic::resume_unwind(panic.into_panic());
        })?;
        let (dir, lock) = take_dir(config)?;
        let deadline = Instant::now() + config.deadline;
        let ports = Ports::from(free_ports()?);
        let url = format!("https://127.0.0.1:{}", ports.apiserver);
        components::write_keys(&tool, &dir, &url)?;
        let mut plane = Self {
            config: client_config(&dir.join("admin.kubeconfig")).await?,
            addresses: Arc::new(AddressPool::of_port(ports.apiserver)),
            tool,
            dir,
            url,
            processes: Vec::new(),
            _lock: lock,
        };
        plane.spawn(components::etcd(&plane.tool, &plane.dir, ports))?;
        plane.spawn(components::apiserver(&plane.tool, &plane.dir, ports, config)?)?;
        plane.wait_until_serving(deadline, config.deadline).await?;
        plane.spawn(components::controller_manager(&plane.tool, &plane.dir, config))?;
        plane.spawn(components::scheduler(&plane.tool, &plane.dir, config))?;
        plane.wait_until_working(deadline, config.deadline).await?;
        Ok(plane)
    }

    /// A control plane that runs already: `kubeconfig` is the admin's. Nothing of it is ended with this value.
    ///
    /// # Errors
    /// When the kubeconfig cannot be used, or the binaries (kubectl, helm) not built.
    pub async fn attach(config: ControlPlaneConfig, kubeconfig: &Path) -> Result<Self> {
        let tool = tokio::task::spawn_blocking(ClusterTool::locate).await.unwrap_or_else(|panic| {
            std::panic::resume_unwind(panic.into_panic());
        })?;
        let (dir, lock) = take_dir(&config)?;
        let own = dir.join("admin.kubeconfig");
        fs::copy(kubeconfig, &own).map_err(Error::file("copy", kubeconfig))?;
        let config = client_config(&own).await?;
        let [port] = free_ports()?;
        Ok(Self {
            url: config.cluster_url.to_string().trim_end_matches('/').to_owned(),
            config,
            addresses: Arc::new(AddressPool::of_port(port)),
            tool,
            dir,
            processes: Vec::new(),
            _lock: lock,
        })
    }

    /// A new client with all rights. Each belongs to the runtime it is made in.
    ///
    /// # Errors
    /// When the client cannot be set up.
    pub fn client(&self) -> Result<Client> {
        Client::try_from(self.config.clone()).map_err(Error::api("set up a client"))
    }

    /// The client configuration with all rights, to make another identity's from.
    #[must_use]
    pub fn client_config(&self) -> &kube::Config {
        &self.config
    }

    /// The kubeconfig file with all rights.
    #[must_use]
    pub fn kubeconfig(&self) -> PathBuf {
        self.dir.join("admin.kubeconfig")
    }

    /// The API server's address as `https://127.0.0.1:<port>`.
    #[must_use]
    pub fn url(&self) -> &str {
        &self.url
    }

    /// The folder with its logs, pids and keys.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The API server's audit log: one JSON event a line, level Metadata.
    #[must_use]
    pub fn audit_log(&self) -> PathBuf {
        self.dir.join("audit.log")
    }

    /// The addresses that are this control plane's alone.
    #[must_use]
    pub fn addresses(&self) -> &Arc<AddressPool> {
        &self.addresses
    }

    /// The binaries it runs on.
    #[must_use]
    pub fn tool(&self) -> &ClusterTool {
        &self.tool
    }

    /// The processes of its components, by name and pid.
    pub fn processes(&self) -> impl Iterator<Item = (&str, u32)> {
        self.processes.iter().map(|p| (p.name(), p.pid()))
    }

    fn spawn(&mut self, (name, command): (&str, std::process::Command)) -> Result<()> {
        self.processes.push(TiedProcess::spawn(name, command, &self.dir)?);
        Ok(())
    }

    async fn wait_until_serving(&mut self, deadline: Instant, waited: Duration) -> Result<()> {
        let client = self.client()?;
        while !is_ready(&client).await {
            self.check("kube-apiserver", deadline, waited)?;
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        Ok(())
    }

    /// Pods can be made once the controllers gave the default namespace its service account and the
    /// certificate bundle that goes with it.
    async fn wait_until_working(&mut self, deadline: Instant, waited: Duration) -> Result<()> {
        let client = self.client()?;
        let accounts: Api<ServiceAccount> = Api::namespaced(client.clone(), "default");
        let bundles: Api<k8s_openapi::api::core::v1::ConfigMap> = Api::namespaced(client, "default");
        loop {
            let account = accounts.get_opt("default").await;
            if let (Ok(Some(_)), Ok(Some(_))) = (account, bundles.get_opt("kube-root-ca.crt").await) {
                return Ok(());
            }
            self.check("kube-controller-manager", deadline, waited)?;
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    /// Errs when the deadline passed, or any process ended already: waiting longer is no use then.
    fn check(&mut self, awaited: &str, deadline: Instant, waited: Duration) -> Result<()> {
        let late = Instant::now() > deadline;
        let culprit = self.processes.iter_mut().find_map(|p| {
            let ended = p.has_ended();
            (ended || (late && p.name() == awaited)).then_some((p, ended))
        });
        match culprit {
            None => Ok(()),
            Some((process, ended)) => Err(Error::Deadline {
                what: format!("{}{}", process.name(), if ended { " (it ended)" } else { "" }),
                waited,
                log: process.log().to_owned(),
                tail: process.log_tail(),
            }),
        }
    }
}

impl Drop for ControlPlane {
    fn drop(&mut self) {
        while let Some(process) = self.processes.pop() {
            drop(process);
        }
    }
}

async fn is_ready(client: &Client) -> bool {
    let Ok(request) = http::Request::get("/readyz").body(Vec::new()) else { return false };
    let answer = tokio::time::timeout(Duration::from_secs(2), client.request_text(request)).await;
    matches!(answer, Ok(Ok(text)) if text == "ok")
}

async fn client_config(kubeconfig: &Path) -> Result<kube::Config> {
    let wrong =
        |why: kube::config::KubeconfigError| Error::Kubeconfig { path: kubeconfig.into(), why: why.to_string() };
    let file = Kubeconfig::read_from(kubeconfig).map_err(wrong)?;
    kube::Config::from_custom_kubeconfig(file, &KubeConfigOptions::default()).await.map_err(wrong)
}

/// Takes an empty folder of its own: the named one, or `<name>.2` and so on while another process uses it.
fn take_dir(config: &ControlPlaneConfig) -> Result<(PathBuf, File)> {
    let wanted = config.dir.clone().unwrap_or_else(|| target_dir().join("cluster").join(&config.name));
    let wanted = std::path::absolute(&wanted).map_err(Error::file("find", &wanted))?;
    for attempt in 1..100 {
        let dir = match attempt {
            1 => wanted.clone(),
            n => PathBuf::from(format!("{}.{n}", wanted.display())),
        };
        fs::create_dir_all(&dir).map_err(Error::file("create", &dir))?;
        let path = dir.join("lock");
        let lock = File::create(&path).map_err(Error::file("create", &path))?;
        if lock.try_lock().is_err() {
            continue;
        }
        for entry in fs::read_dir(&dir).map_err(Error::file("list", &dir))? {
            let entry = entry.map_err(Error::file("list", &dir))?;
            let is_dir = entry.file_type().is_ok_and(|t| t.is_dir());
            let old = entry.path();
            if old == path {
                continue;
            }
            let removed = if is_dir { fs::remove_dir_all(&old) } else { fs::remove_file(&old) };
            removed.map_err(Error::file("remove", &old))?;
        }
        return Ok((dir, lock));
    }
    Err(Error::Unknown { what: "free folder", name: wanted.display().to_string() })
}

/// The cargo target this program was built in, by the tag that cargo puts there; `target` elsewhere.
#[must_use]
pub fn target_dir() -> PathBuf {
    let exe = std::env::current_exe().unwrap_or_default();
    let tagged = exe.ancestors().find(|dir| dir.join("CACHEDIR.TAG").exists());
    tagged.map_or_else(|| PathBuf::from("target"), Path::to_owned)
}
