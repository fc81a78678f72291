//! The process kubelet does to pods what a kubelet does.

use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::core::v1::Pod;
use kube::Api;

use crate::cluster::{eventually, is_alive, shared};

#[tokio::test]
async fn a_deployment_runs_and_its_deletion_leaves_no_process() {
    let cluster = shared().await;
    let client = cluster.namespace("deployment").await;
    let manifest = "
apiVersion: apps/v1
kind: Deployment
metadata: {name: web}
spec:
  replicas: 3
  selector: {matchLabels: {app: web}}
  template:
    metadata: {labels: {app: web}}
    spec:
      terminationGracePeriodSeconds: 1
      containers:
      - {name: main, image: 'registry.example:5000/tools/shell:1', args: [-c, 'echo here; sleep 1000']}
";
    cluster.apply("deployment", manifest).await;
    let deployments: Api<Deployment> = Api::namespaced(client.clone(), "deployment");
    eventually("three ready replicas", || async {
        let found = deployments.get("web").await.ok()?;
        (found.status?.ready_replicas == Some(3)).then_some(())
    })
    .await;
    let pids = || -> Vec<i32> {
        let running = cluster.kubelet.running().into_iter();
        running.filter(|(ns, ..)| ns == "deployment").map(|(.., pid)| pid).collect()
    };
    let started = pids();
    assert_eq!(started.len(), 3);
    assert!(started.iter().all(|pid| is_alive(*pid)));
    cluster.plane.kubectl(&["-n", "deployment", "delete", "deployment", "web"]).await.expect("deleted");
    let pods: Api<Pod> = Api::namespaced(client, "deployment");
    eventually("no pod left", || async { pods.list(&Default::default()).await.ok()?.items.is_empty().then_some(()) })
        .await;
    assert!(started.iter().all(|pid| !is_alive(*pid)), "processes left of {started:?}");
}
