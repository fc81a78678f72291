//! What a person sees, as `kubectl berth …`: before Berth is installed, while a deployment serves, after a device is
//! lost. And the store is switched to etcd and back under it, as the chart's README says.

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use berth_crds::ExpertPlacement;
use berth_tests::{
    EtcdServer,
    demo::{
        Options,
        cluster::{self, Cluster},
        nodes::Fleet,
        objects::{self, NAMESPACE},
    },
    etcd::EtcdOptions,
};
use kube::{Api, api::ListParams};
use serde_json::{Value, json};

use crate::cluster::eventually;

/// Two nodes of one vendor.
const FLEET: Fleet = Fleet::NVIDIA;
const CHART: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../charts/berth");

/// The installed system, and the binary where kubectl finds plugins.
struct View {
    cluster: Cluster,
    plugins: PathBuf,
}

/// What a command answered.
#[derive(Debug)]
struct Answer {
    code: i32,
    out: String,
    err: String,
}

impl Answer {
    fn json(&self) -> Value {
        serde_json::from_str(&self.out).unwrap_or_else(|error| panic!("{error}: {self:?}"))
    }
}

impl View {
    async fn start() -> Self {
        let options = Options {
            name: "views".into(),
            fleet: FLEET,
            checkpoint: PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/data/reference/models/v3-tiny")),
            report: PathBuf::new(),
            kubeconfig: None,
            keep: false,
        };
        let cluster = Cluster::start(&options).await.expect("a cluster");
        let plugins = cluster.dir().join("plugins");
        std::fs::create_dir(&plugins).unwrap();
        std::os::unix::fs::symlink(cluster.berth(), plugins.join("kubectl-berth")).unwrap();
        Self { cluster, plugins }
    }

    /// `kubectl berth …`.
    async fn ask(&self, line: &str) -> Answer {
        self.ask_with(line, &self.cluster.plane().kubeconfig()).await
    }

    #[expect(clippy::print_stdout, reason = "what a person sees is kept with the test, for people")]
    async fn ask_with(&self, line: &str, kubeconfig: &Path) -> Answer {
        let mut command = self.cluster.plane().kubectl_command();
        command.arg("berth").args(line.split_whitespace()).env("PATH", &self.plugins);
        let output = command.env("KUBECONFIG", kubeconfig).output().await.expect("kubectl runs");
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        println!("$ kubectl berth {line}\n{}{}", text(&output.stdout), text(&output.stderr));
        Answer { code: output.status.code().unwrap_or(-1), out: text(&output.stdout), err: text(&output.stderr) }
    }

    /// The command's answer once it is as wanted.
    async fn answers(&self, line: &str, is: impl Fn(&Answer) -> bool) -> Answer {
        eventually(&format!("kubectl berth {line}"), || async {
            let answer = self.ask(line).await;
            is(&answer).then_some(answer)
        })
        .await
    }

    async fn placement(&self) -> ExpertPlacement {
        let api: Api<ExpertPlacement> = Api::namespaced(self.cluster.client().clone(), NAMESPACE);
        api.list(&ListParams::default()).await.unwrap().items.pop().expect("a placement")
    }

    async fn upgrade(&self, values: &[&str]) {
        let mut args = vec!["upgrade", "berth", CHART, "--namespace", cluster::NAMESPACE, "--reuse-values", "--wait"];
        args.extend(values.iter().flat_map(|value| ["--set", *value]));
        self.cluster.plane().helm(&args).await.expect("upgraded");
    }

    /// Waits until another scheduler leads, and sees that it moved nothing.
    async fn followed(&self, before: &ExpertPlacement) {
        let assignment = |one: &ExpertPlacement| one.status.clone().unwrap_or_default().assignment.expect("assigned");
        let before = assignment(before);
        let after = eventually("the next leader", || async {
            let now = assignment(&self.placement().await);
            (now.epoch > before.epoch).then_some(now)
        })
        .await;
        assert_eq!((after.revision, &after.digest), (before.revision, &before.digest), "a switch moves nothing");
        assert_eq!(after.devices, before.devices);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_person_sees_what_serves_what_was_lost_and_what_moved_whichever_store_holds_it() {
    let view = View::start().await;
    let early = view.ask("status").await;
    assert!(early.code == 2 && early.err.contains("helm install berth"), "{early:?}");
    view.cluster.install().await.expect("the chart installed");
    let client = view.cluster.client().clone();
    objects::nodes_are_healthy(&client, FLEET.len(), Duration::from_secs(60)).await.expect("healthy nodes");
    let checkpoint = concat!(env!("CARGO_MANIFEST_DIR"), "/data/reference/models/v3-tiny");
    let checkpoint = Path::new(checkpoint).canonicalize().unwrap();
    view.cluster.apply_profile(&checkpoint).await.expect("a profile");
    view.cluster.apply_deployment(objects::DEPLOYMENT, &checkpoint, &json!({})).await.expect("a deployment");

    let status = view.answers("status -A", |answer| answer.code == 0).await;
    assert!(
        status.out.contains("1 of 1 deployment ready") && status.out.contains("nothing wants attention"),
        "{status:?}"
    );
    let placement = view.placement().await;
    let (name, deployment) = (placement.metadata.name.clone().unwrap(), objects::DEPLOYMENT);
    everything_is_shown(&view, &name, deployment).await;
    questions_that_cannot_be_answered_say_what_to_do(&view).await;

    let etcd = EtcdServer::start(EtcdOptions { tls: true, ..EtcdOptions::default() }).await.unwrap();
    let flags = switch_to(&view, &etcd).await;
    view.followed(&placement).await;

    let lost = placement.status.unwrap_or_default().assignment.unwrap().devices.remove(0);
    let loss = view.cluster.loss_of(&lost).unwrap();
    loss.leave_bus().unwrap();
    loss.driver_notices().unwrap();
    let gone = view.answers(&format!("status -n {NAMESPACE}"), |answer| answer.out.contains("DeviceLost")).await;
    assert!(gone.code == 1 && gone.out.contains(&lost.to_string()), "{gone:?}");
    let diff = format!("placement {name} -n {NAMESPACE} --diff 1");
    let moved = view.answers(&format!("{diff} {flags}"), |answer| answer.code == 1).await;
    assert!(moved.out.contains("removed") && moved.out.contains("replicas load"), "{moved:?}");
    let elsewhere = view.ask(&diff).await;
    assert!(elsewhere.code == 2 && elsewhere.err.contains("--etcd-endpoints"), "{elsewhere:?}");

    let placement = view.placement().await;
    view.upgrade(&["scheduler.store.type=api"]).await;
    view.followed(&placement).await;
    let back = view.ask(&diff).await;
    assert_eq!((back.code, &back.out), (1, &moved.out), "the API server has the same maps again");
    view.cluster.end().await.expect("nothing left");
}

async fn everything_is_shown(view: &View, name: &str, deployment: &str) {
    let status = view.ask(&format!("status {deployment} -n {NAMESPACE} -o json")).await.json();
    assert_eq!((status["healthy"].as_bool(), status["instances"][0]["name"].as_str()), (Some(true), Some(name)));
    assert_eq!(status["instances"][0]["slotsReady"], status["instances"][0]["slotsTotal"]);
    assert!(status["deployments"][0]["conditions"].as_array().is_some_and(|conditions| !conditions.is_empty()));
    let top = view.ask("top -A -o json").await.json();
    let held: u64 = top["rows"].as_array().unwrap().iter().map(|row| row["expertBytes"].as_u64().unwrap()).sum();
    let nodes = view.ask("top nodes -A").await;
    assert!(held > 0 && nodes.code == 0 && nodes.out.starts_with("NODE"), "{nodes:?}");
    let models = view.ask("top models -A -o yaml").await;
    assert!(models.out.contains(&format!("name: {NAMESPACE}/{deployment}")), "{models:?}");
    for asked in [name, deployment] {
        let placement = view.ask(&format!("placement {asked} -n {NAMESPACE} -o json")).await.json();
        assert_eq!((placement["revision"].as_u64(), placement["expertBytes"].as_u64()), (Some(1), Some(held)));
    }
    let explained = view.ask(&format!("explain {deployment} -n {NAMESPACE} -o json")).await.json();
    assert_eq!(explained["waits"], json!([]), "{explained}");
    let instance = &explained["instances"][0];
    assert_eq!((instance["revision"].as_u64(), instance["decisions"][0]["cause"].as_str()), (Some(1), Some("first")));
    assert!(instance["certificate"]["bound"].as_f64().is_some_and(|bound| bound >= 1.0), "{explained}");
    let copies = view.ask(&format!("explain {name} -n {NAMESPACE} --layer 1 --expert 3")).await;
    assert!(copies.code == 0 && copies.out.contains("expert    3 of layer 1, revision 1: gpu-0"), "{copies:?}");
    let same = view.ask(&format!("placement {name} -n {NAMESPACE} --diff 1")).await;
    assert!(same.code == 0 && same.out.contains("no change"), "{same:?}");
}

async fn questions_that_cannot_be_answered_say_what_to_do(view: &View) {
    let unknown = view.ask("placement nobody -A").await;
    assert!(unknown.code == 2 && unknown.err.contains("there are: "), "{unknown:?}");
    let usage = view.ask("placement").await;
    assert!(usage.code == 2 && usage.err.contains("Usage: kubectl berth placement"), "{usage:?}");
    let nowhere = view.ask_with("status", Path::new("/nonexistent/kubeconfig")).await;
    assert!(nowhere.code == 2 && nowhere.err.contains("set KUBECONFIG"), "{nowhere:?}");
    // A user without rights, by a token of the default service account.
    let plane = view.cluster.plane();
    let token = plane.kubectl(&["create", "token", "default"]).await.unwrap();
    let admin = std::fs::read_to_string(plane.kubeconfig()).unwrap();
    let (before, user) = admin.split_once("  user: {").unwrap();
    let (_, after) = user.split_once('}').unwrap();
    let path = view.cluster.dir().join("powerless.kubeconfig");
    std::fs::write(&path, format!("{before}  user: {{token: {}}}{after}", token.trim())).unwrap();
    let refused = view.ask_with("status -A", &path).await;
    assert!(refused.code == 3 && refused.err.contains("kubectl auth can-i list modeldeployments"), "{refused:?}");
}

/// Switches the store as the chart's README says, and gives the flags for whoever reads it too.
async fn switch_to(view: &View, etcd: &EtcdServer) -> String {
    let file = |name: &str| etcd.file(name).display().to_string();
    let (ca, cert, key) = (file("ca.crt"), file("client.crt"), file("client.key"));
    let from = [
        format!("--from-file=ca.crt={ca}"),
        format!("--from-file=tls.crt={cert}"),
        format!("--from-file=tls.key={key}"),
    ];
    let mut secret = vec!["-n", cluster::NAMESPACE, "create", "secret", "generic", "etcd-client"];
    secret.extend(from.iter().map(String::as_str));
    view.cluster.kubectl(&secret).await.expect("a secret");
    let endpoint = format!("scheduler.store.etcd.endpoints={{{}}}", etcd.url());
    let tls = "scheduler.store.etcd.tls.secretName=etcd-client";
    view.upgrade(&["scheduler.store.type=etcd", &endpoint, tls]).await;
    format!("--etcd-endpoints {} --etcd-ca-file {ca} --etcd-cert-file {cert} --etcd-key-file {key}", etcd.url())
}
