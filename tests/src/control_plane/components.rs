//! The command line of each component of a control plane. Must never bind anything but 127.0.0.1.

use std::fs;
use std::path::Path;
use std::process::Command;

use super::ControlPlaneConfig;
use crate::tied_process::EXIT_ON_STDIN_EOF;
use crate::{ClusterTool, Error, Result};

/// Addresses of Services; nothing listens there.
const SERVICE_RANGE: &str = "10.96.0.0/16";

/// Every request that changes something, and every read but the cluster's own chatter, without bodies.
const AUDIT_POLICY: &str = "\
apiVersion: audit.k8s.io/v1
kind: Policy
omitStages: [RequestReceived]
rules:
- level: None
  nonResourceURLs: ['/readyz*', '/livez*', '/healthz*', '/openapi*', '/version']
- level: Metadata
";

/// The ports of one control plane, all on 127.0.0.1.
#[derive(Debug, Clone, Copy)]
pub struct Ports {
    /// etcd's clients.
    pub etcd: u16,
    /// etcd's peers, of which there are none.
    pub etcd_peer: u16,
    /// kube-apiserver.
    pub apiserver: u16,
}

impl From<[u16; 3]> for Ports {
    fn from([etcd, etcd_peer, apiserver]: [u16; 3]) -> Self {
        Self { etcd, etcd_peer, apiserver }
    }
}

/// Makes the certificates, keys and kubeconfigs in `dir`.
pub(crate) fn write_keys(tool: &ClusterTool, dir: &Path, url: &str) -> Result<()> {
    let output = component(tool, "keys")
        .arg(dir)
        .arg(url)
        .output()
        .map_err(|source| Error::Start { program: "cluster keys".into(), source })?;
    if output.status.success() {
        return Ok(());
    }
    Err(Error::Command {
        command: "cluster keys".into(),
        status: output.status.to_string(),
        stderr: String::from_utf8_lossy(&output.stderr).into(),
    })
}

pub(super) fn etcd(tool: &ClusterTool, dir: &Path, ports: Ports) -> (&'static str, Command) {
    let urls = [ports.etcd, ports.etcd_peer].map(|port| format!("http://127.0.0.1:{port}"));
    ("etcd", etcd_at(tool, &dir.join("etcd"), urls))
}

/// An etcd of one member with its data in `data`, at the addresses for clients and for peers.
pub(crate) fn etcd_at(tool: &ClusterTool, data: &Path, [client, peer]: [String; 2]) -> Command {
    let mut command = component(tool, "etcd");
    command
        .arg(format!("--data-dir={}", data.display()))
        .arg(format!("--listen-client-urls={client}"))
        .arg(format!("--advertise-client-urls={client}"))
        .arg(format!("--listen-peer-urls={peer}"))
        .arg(format!("--initial-advertise-peer-urls={peer}"))
        .arg(format!("--initial-cluster=default={peer}"))
        // What it holds is thrown away anyway.
        .args(["--unsafe-no-fsync", "--log-level=warn"]);
    command
}

pub(super) fn apiserver(
    tool: &ClusterTool,
    dir: &Path,
    ports: Ports,
    config: &ControlPlaneConfig,
) -> Result<(&'static str, Command)> {
    let policy = dir.join("audit-policy.yaml");
    fs::write(&policy, AUDIT_POLICY).map_err(Error::file("write", &policy))?;
    let at = |name: &str| dir.join(name).display().to_string();
    let mut command = component(tool, "kube-apiserver");
    command
        .arg(format!("--etcd-servers=http://127.0.0.1:{}", ports.etcd))
        .args(["--bind-address=127.0.0.1", "--advertise-address=127.0.0.1"])
        .arg(format!("--secure-port={}", ports.apiserver))
        // The `kubernetes` Service cannot have a loopback endpoint: it has none.
        .arg("--endpoint-reconciler-type=none")
        .arg(format!("--cert-dir={}", dir.display()))
        .arg(format!("--tls-cert-file={}", at("server.crt")))
        .arg(format!("--tls-private-key-file={}", at("server.key")))
        .arg(format!("--client-ca-file={}", at("ca.crt")))
        .arg("--service-account-issuer=https://kubernetes.default.svc")
        .arg(format!("--service-account-key-file={}", at("sa.pub")))
        .arg(format!("--service-account-signing-key-file={}", at("sa.key")))
        .arg(format!("--service-cluster-ip-range={SERVICE_RANGE}"))
        .args(["--authorization-mode=Node,RBAC", "--enable-admission-plugins=NodeRestriction"])
        .args(["--allow-privileged=true", "--profiling=false"])
        // For `kubectl logs`: nodes have no names that resolve.
        .arg("--kubelet-preferred-address-types=InternalIP")
        .arg(format!("--audit-log-path={}", at("audit.log")))
        .arg(format!("--audit-policy-file={}", policy.display()))
        .args(&config.apiserver_args);
    Ok(("kube-apiserver", command))
}

pub(super) fn controller_manager(
    tool: &ClusterTool,
    dir: &Path,
    config: &ControlPlaneConfig,
) -> (&'static str, Command) {
    let at = |name: &str| dir.join(name).display().to_string();
    let mut command = component(tool, "kube-controller-manager");
    command
        .arg(format!("--kubeconfig={}", at("kube-controller-manager.kubeconfig")))
        .arg(format!("--root-ca-file={}", at("ca.crt")))
        .arg(format!("--service-account-private-key-file={}", at("sa.key")))
        .arg(format!("--cluster-signing-cert-file={}", at("ca.crt")))
        .arg(format!("--cluster-signing-key-file={}", at("ca.key")))
        .args(["--use-service-account-credentials=true", "--leader-elect=false", "--secure-port=0"])
        .args(["--kube-api-qps=200", "--kube-api-burst=400"])
        .args(&config.controller_manager_args);
    ("kube-controller-manager", command)
}

pub(super) fn scheduler(tool: &ClusterTool, dir: &Path, config: &ControlPlaneConfig) -> (&'static str, Command) {
    let mut command = component(tool, "kube-scheduler");
    command
        .arg(format!("--kubeconfig={}", dir.join("kube-scheduler.kubeconfig").display()))
        .args(["--leader-elect=false", "--secure-port=0"])
        .args(["--kube-api-qps=200", "--kube-api-burst=400"])
        .args(&config.scheduler_args);
    ("kube-scheduler", command)
}

fn component(tool: &ClusterTool, name: &str) -> Command {
    let mut command = Command::new(tool.cluster());
    // A process that is tied says so when it is spawned; the keys are made by one that is not.
    command.arg(name).env_remove("KUBECONFIG").env_remove(EXIT_ON_STDIN_EOF);
    command
}
