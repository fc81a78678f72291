//! `berth-cluster`: a real control plane with simulated nodes, to look at by hand or to build a demo on. Prints
//! how to use it and runs until Ctrl-C; nothing of it outlives this process, however it ends.

use std::collections::BTreeMap;
use std::io::Write as _;
use std::path::PathBuf;

use anyhow::Context as _;
use berth_tests::control_plane::ControlPlaneConfig;
use berth_tests::process_kubelet::{KubeletConfig, SimulatedNode};
use berth_tests::tied_process::EXIT_ON_STDIN_EOF;
use berth_tests::{ControlPlane, ProcessKubelet};
use clap::Parser;
use tokio::signal::unix::{SignalKind, signal};

/// Starts a real Kubernetes control plane on loopback, with simulated nodes whose pods are local processes.
#[derive(Debug, Parser)]
struct Args {
    /// Names the folder of its files, `target/cluster/<NAME>`.
    #[arg(long, default_value = "by-hand")]
    name: String,
    /// How many simulated nodes, `node-0` and on.
    #[arg(long, default_value_t = 2)]
    nodes: u32,
    /// An image and the binary it stands for, as NAME=PATH; may be given several times.
    #[arg(long = "image", value_parser = image)]
    images: Vec<(String, PathBuf)>,
}

fn image(text: &str) -> Result<(String, PathBuf), String> {
    let (name, path) = text.split_once('=').ok_or("write it as NAME=PATH")?;
    let path = std::path::absolute(path).map_err(|e| e.to_string())?;
    Ok((name.into(), path))
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let Args { name, nodes, images } = Args::parse();
    let mut end = signal(SignalKind::terminate()).context("listen for SIGTERM")?;
    let up = async {
        let plane = ControlPlane::start(ControlPlaneConfig::named(&name)).await?;
        let nodes = (0..nodes).map(|n| SimulatedNode::named(&format!("node-{n}"))).collect();
        let images = BTreeMap::from_iter(images);
        let kubelet = ProcessKubelet::start(&plane, KubeletConfig { nodes, images, ..Default::default() }).await?;
        let mut out = std::io::stdout();
        writeln!(out, "export KUBECONFIG={}", plane.kubeconfig().display())?;
        writeln!(out, "export PATH={}:$PATH  # kubectl, helm", plane.tool().dir().display())?;
        writeln!(out, "logs of the control plane and of pods: {}", plane.dir().display())?;
        writeln!(out, "Ctrl-C ends it")?;
        out.flush()?;
        std::future::pending::<()>().await;
        drop((kubelet, plane));
        anyhow::Ok(())
    };
    tokio::select! {
        // Dropping what is up, or half up, ends all of it.
        result = up => result,
        interrupted = tokio::signal::ctrl_c() => interrupted.context("listen for Ctrl-C"),
        _ = end.recv() => Ok(()),
        () = starter_is_gone() => Ok(()),
    }
}

/// Ends when standard input closes, for a starter that asks for it; never for another.
async fn starter_is_gone() {
    if std::env::var_os(EXIT_ON_STDIN_EOF).is_none() {
        return std::future::pending().await;
    }
    let (gone, told) = tokio::sync::oneshot::channel();
    // A thread of its own: the runtime would wait for one of its threads that reads until it has read.
    std::thread::spawn(move || {
        // An input that cannot be read is as good as closed.
        let _ = std::io::copy(&mut std::io::stdin(), &mut std::io::sink());
        let _ = gone.send(());
    });
    let _ = told.await;
}
