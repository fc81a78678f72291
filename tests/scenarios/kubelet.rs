//! The process kubelet does to pods what a kubelet does: what runs, what ends, and what the status says.

use k8s_openapi::api::apps::v1::{DaemonSet, Deployment};
use k8s_openapi::api::core::v1::{Node, Pod};
use kube::Api;
use nix::sys::signal::Signal;

use crate::cluster::{eventually, first, has, is_alive, shared, waiting};

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
      - {name: main, image: 'registry.example:5000/tools/shell:1', args: [-c, 'echo here; sleep 1000 & sleep 1000']}
";
    cluster.apply("deployment", manifest).await;
    let deployments: Api<Deployment> = Api::namespaced(client.clone(), "deployment");
    eventually("three ready replicas", || async {
        let found = deployments.get("web").await.ok()?;
        (found.status?.ready_replicas == Some(3)).then_some(())
    })
    .await;
    let running = cluster.kubelet.running().into_iter().filter(|(ns, ..)| ns == "deployment");
    let mut started = Vec::new();
    for (ns, pod, container, _) in running {
        started.extend(cluster.kubelet.container_pids(&ns, &pod, &container).expect("pids"));
    }
    assert!(started.len() >= 6, "a shell and its child at least, three times: {started:?}");
    cluster.plane.kubectl(&["-n", "deployment", "delete", "deployment", "web"]).await.expect("deleted");
    let pods: Api<Pod> = Api::namespaced(client, "deployment");
    eventually("no pod left", || async { pods.list(&Default::default()).await.ok()?.items.is_empty().then_some(()) })
        .await;
    assert!(started.iter().all(|pid| !is_alive(*pid)), "processes left of {started:?}");
}

#[tokio::test]
async fn a_daemon_set_runs_on_each_node_with_the_nodes_own_variables() {
    let cluster = shared().await;
    let client = cluster.namespace("daemons").await;
    let manifest = "
apiVersion: apps/v1
kind: DaemonSet
metadata: {name: each}
spec:
  selector: {matchLabels: {app: each}}
  template:
    metadata: {labels: {app: each}}
    spec:
      terminationGracePeriodSeconds: 1
      containers:
      - name: main
        image: shell
        args: [-c, 'echo on $NODE as \"$NODE_VARIABLE\"; exec sleep 1000']
        env: [{name: NODE, valueFrom: {fieldRef: {fieldPath: spec.nodeName}}}]
";
    cluster.apply("daemons", manifest).await;
    let sets: Api<DaemonSet> = Api::namespaced(client.clone(), "daemons");
    eventually("two ready daemons", || async {
        (sets.get("each").await.ok()?.status?.number_ready == 2).then_some(())
    })
    .await;
    let pods: Api<Pod> = Api::namespaced(client, "daemons");
    let mut lines = Vec::new();
    for pod in pods.list(&Default::default()).await.expect("pods").items {
        let name = pod.metadata.name.unwrap_or_default();
        lines.push(cluster.kubelet.log("daemons", &name, "main").expect("a log"));
    }
    lines.sort();
    assert_eq!(lines, ["on a as of a\n", "on b as \n"]);
}

#[tokio::test]
async fn a_crashing_container_is_restarted_and_shown_in_crash_loop_back_off() {
    let cluster = shared().await;
    let client = cluster.namespace("crash").await;
    cluster.run_shell("crash", "echo once more; exit 3", "", "").await;
    let looping = |pod: &Pod| first(pod).restart_count >= 2 && waiting(first(pod).state).0 == "CrashLoopBackOff";
    let pod = cluster.pod(&client, "crash", "p", looping).await;
    let status = first(&pod);
    let (_, message) = waiting(status.state.clone());
    assert!(message.starts_with("back-off ") && message.contains("container=main pod=p_crash"), "{message}");
    let last = status.last_state.and_then(|s| s.terminated).expect("an end");
    assert_eq!((last.exit_code, last.reason.as_deref()), (3, Some("Error")));
    assert!(!has(&pod, "Ready") && pod.status.as_ref().and_then(|s| s.phase.as_deref()) == Some("Running"));
    let log = cluster.kubelet.log("crash", "p", "main").expect("a log");
    assert!(log.lines().count() >= 3, "one line a run: {log}");
}

#[tokio::test]
async fn an_unknown_image_and_an_unbuilt_binary_are_shown_as_pull_errors() {
    let cluster = shared().await;
    let client = cluster.namespace("image").await;
    let pod = |name: &str, image: &str| {
        format!(
            "{{apiVersion: v1, kind: Pod, metadata: {{name: {name}}}, spec: {{containers: [{{name: c, image: '{image}'}}]}}}}"
        )
    };
    cluster.apply("image", &pod("unknown", "no/such:1")).await;
    cluster.apply("image", &pod("unbuilt", "unbuilt:1")).await;
    for (name, why) in [("unknown", "\"no/such:1\""), ("unbuilt", "/nonexistent/binary does not exist")] {
        let backing_off = |pod: &Pod| waiting(first(pod).state).0 == "ImagePullBackOff";
        let pod = cluster.pod(&client, "image", name, backing_off).await;
        let (_, message) = waiting(first(&pod).state);
        assert!(message.starts_with("Back-off pulling image") && message.contains(why), "{message}");
        assert_eq!(pod.status.and_then(|s| s.phase).as_deref(), Some("Pending"));
    }
    let events = cluster.plane.kubectl(&["-n", "image", "get", "events"]).await.expect("events");
    assert!(events.contains("Failed to pull image"), "{events}");
}

#[tokio::test]
async fn a_program_that_does_not_exist_is_a_start_error() {
    let cluster = shared().await;
    let client = cluster.namespace("start").await;
    cluster.run_shell("start", "", "command: [/no/such/program],", "").await;
    let failed = |pod: &Pod| first(pod).last_state.is_some_and(|s| s.terminated.is_some());
    let pod = cluster.pod(&client, "start", "p", failed).await;
    let end = first(&pod).last_state.and_then(|s| s.terminated).expect("an end");
    assert_eq!((end.exit_code, end.reason.as_deref()), (128, Some("StartError")));
    assert!(end.message.as_deref().is_some_and(|m| m.contains("/no/such/program")), "{end:?}");
}

#[tokio::test]
async fn a_container_whose_liveness_probe_fails_is_restarted() {
    let cluster = shared().await;
    let client = cluster.namespace("liveness").await;
    let probe = "livenessProbe: {exec: {command: [test, -e, /run/berth-alive/yes]}, periodSeconds: 1, failureThreshold: 1}, \
                 volumeMounts: [{name: v, mountPath: /run/berth-alive}],";
    let script = "touch /run/berth-alive/yes; echo up; sleep 1; rm /run/berth-alive/yes; sleep 1000";
    cluster.run_shell("liveness", script, probe, "volumes: [{name: v, emptyDir: {}}],").await;
    let pod = cluster.pod(&client, "liveness", "p", |pod| first(pod).restart_count >= 1).await;
    let last = first(&pod).last_state.and_then(|s| s.terminated).expect("an end");
    assert_eq!(last.exit_code, 137, "a shell as process 1 ignores SIGTERM and is killed after its grace");
    let events = cluster.plane.kubectl(&["-n", "liveness", "get", "events"]).await.expect("events");
    assert!(events.contains("Liveness probe failed"), "{events}");
}

#[tokio::test]
async fn readiness_follows_its_probe() {
    let cluster = shared().await;
    let client = cluster.namespace("readiness").await;
    let probe = "readinessProbe: {exec: {command: [test, -e, /berth-scenario/ready]}, periodSeconds: 1, failureThreshold: 1}, \
                 volumeMounts: [{name: v, mountPath: /berth-scenario}],";
    let script = "echo up; read line < /berth-scenario/go; sleep 1000";
    let volumes = "volumes: [{name: v, hostPath: {path: /berth-scenario, type: DirectoryOrCreate}}], nodeName: b,";
    cluster.run_shell("readiness", script, probe, volumes).await;
    let pod = cluster.pod(&client, "readiness", "p", |pod| first(pod).state.is_some_and(|s| s.running.is_some())).await;
    assert!(!has(&pod, "Ready"));
    let dir = cluster.kubelet.node_root("b").expect("a node").join("berth-scenario");
    assert!(!std::path::Path::new("/berth-scenario").exists(), "made for the node, not on the machine");
    std::fs::write(dir.join("ready"), "").expect("written");
    cluster.pod(&client, "readiness", "p", |pod| has(pod, "Ready") && has(pod, "ContainersReady")).await;
    std::fs::remove_file(dir.join("ready")).expect("removed");
    cluster.pod(&client, "readiness", "p", |pod| !has(pod, "Ready")).await;
}

#[tokio::test]
async fn a_deleted_pod_is_asked_to_end_and_killed_after_its_grace() {
    let cluster = shared().await;
    let client = cluster.namespace("grace").await;
    let script = "trap 'echo asked; sleep 0.2; echo done; exit 0' TERM; echo up; while :; do sleep 0.05; done";
    cluster.run_shell("grace", script, "", "").await;
    cluster.log_with("grace", "p", "up").await;
    cluster.plane.kubectl(&["-n", "grace", "delete", "pod", "p", "--grace-period=30"]).await.expect("deleted");
    assert_eq!(cluster.kubelet.log("grace", "p", "main").expect("a log"), "up\nasked\ndone\n");
    cluster.gone(&client, "grace", "p").await;

    cluster.run_shell("grace", "trap '' TERM; echo deaf; while :; do sleep 0.05; done", "", "").await;
    cluster.log_with("grace", "p", "deaf").await;
    cluster.pod(&client, "grace", "p", |pod| has(pod, "Ready")).await;
    let pids = cluster.kubelet.container_pids("grace", "p", "main").expect("pids");
    let before = std::time::Instant::now();
    cluster.plane.kubectl(&["-n", "grace", "delete", "pod", "p", "--grace-period=1"]).await.expect("deleted");
    assert!(before.elapsed() >= std::time::Duration::from_secs(1), "it had its grace");
    cluster.gone(&client, "grace", "p").await;
    assert!(!is_alive(pids[0]));
}

#[tokio::test]
async fn a_killed_container_takes_its_descendants_along_and_starts_anew() {
    let cluster = shared().await;
    let client = cluster.namespace("killed").await;
    cluster.run_shell("killed", "setsid sleep 1000 & echo up; exec sleep 1000", "", "").await;
    cluster.log_with("killed", "p", "up").await;
    cluster.pod(&client, "killed", "p", |pod| has(pod, "Ready")).await;
    let pids = cluster.kubelet.container_pids("killed", "p", "main").expect("pids");
    assert_eq!(pids.len(), 2, "the daemon is in the container");
    let pid = cluster.kubelet.kill_pod_container("killed", "p", "main", Signal::SIGKILL).expect("killed");
    assert_eq!(pid, pids[0]);
    let again = |pod: &Pod| first(pod).restart_count == 1 && has(pod, "Ready");
    let pod = cluster.pod(&client, "killed", "p", again).await;
    assert!(pids.iter().all(|pid| !is_alive(*pid)));
    let last = first(&pod).last_state.and_then(|s| s.terminated).expect("an end");
    assert_eq!(last.exit_code, 137);
}

#[tokio::test]
async fn init_containers_run_in_order_and_a_finished_job_succeeds() {
    let cluster = shared().await;
    let client = cluster.namespace("job").await;
    let init = "restartPolicy: OnFailure, volumes: [{name: v, emptyDir: {}}], initContainers: [\
        {name: i1, image: shell, args: [-c, 'echo one >> /v/f'], volumeMounts: [{name: v, mountPath: /v}]},\
        {name: i2, image: shell, args: [-c, 'echo two >> /v/f'], volumeMounts: [{name: v, mountPath: /v}]}],";
    cluster.run_shell("job", "cat /v/f", "volumeMounts: [{name: v, mountPath: /v}],", init).await;
    let done = |pod: &Pod| pod.status.as_ref().and_then(|s| s.phase.as_deref()) == Some("Succeeded");
    let pod = cluster.pod(&client, "job", "p", done).await;
    assert!(has(&pod, "Initialized") && !has(&pod, "Ready"));
    assert_eq!(cluster.kubelet.log("job", "p", "main").expect("a log"), "one\ntwo\n");
    cluster.plane.kubectl(&["-n", "job", "delete", "pod", "p"]).await.expect("deleted");
    cluster.gone(&client, "job", "p").await;
}

#[tokio::test]
async fn a_silent_node_is_unknown_and_a_dark_one_loses_its_processes() {
    let cluster = shared().await;
    let client = cluster.namespace("nodes").await;
    let on_gone = "nodeName: gone, tolerations: [{operator: Exists}],";
    cluster.run_shell("nodes", "echo up; exec sleep 1000", "", on_gone).await;
    cluster.pod(&client, "nodes", "p", |pod| has(pod, "Ready")).await;
    let pid = cluster.kubelet.container_pid("nodes", "p", "main").expect("a pid");
    let nodes: Api<Node> = Api::all(client.clone());
    let ready_is = |status: &'static str| {
        let nodes = nodes.clone();
        move || {
            let nodes = nodes.clone();
            async move {
                let conditions = nodes.get("gone").await.ok()?.status?.conditions?;
                conditions.iter().any(|c| c.type_ == "Ready" && c.status == status).then_some(())
            }
        }
    };
    cluster.kubelet.stop_heartbeats("gone").expect("a node");
    eventually("an unknown node", ready_is("Unknown")).await;
    assert!(is_alive(pid), "a node that is only silent runs on");
    cluster.kubelet.resume_heartbeats("gone").expect("a node");
    eventually("a ready node", ready_is("True")).await;

    cluster.kubelet.power_off("gone").expect("a node");
    eventually("no process", || async move { (!is_alive(pid)).then_some(()) }).await;
    eventually("an unknown node", ready_is("Unknown")).await;
    cluster.kubelet.power_on("gone").expect("a node");
    eventually("a ready node", ready_is("True")).await;
    let again = |pod: &Pod| has(pod, "Ready") && first(pod).restart_count == 1;
    cluster.pod(&client, "nodes", "p", again).await;
    assert_ne!(cluster.kubelet.container_pid("nodes", "p", "main").expect("a pid"), pid);
}
