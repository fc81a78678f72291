//! What a container of the process kubelet finds around it: variables, volumes, tokens, the host's files.

use k8s_openapi::api::core::v1::{Node, Pod};
use kube::Api;

use crate::cluster::{eventually, first, has, shared, waiting};

#[tokio::test]
async fn a_pod_uses_a_token_that_is_bound_to_it_and_its_node() {
    let cluster = shared().await;
    cluster.namespace("token").await;
    // kubectl without a kubeconfig uses what is mounted, and the API server's address in its variables.
    let more = "command: [kubectl], args: [auth, whoami, -o, yaml],";
    let manifest = format!(
        "{{apiVersion: v1, kind: Pod, metadata: {{name: p}}, spec: {{nodeName: a, restartPolicy: Never, \
         containers: [{{name: main, image: kubectl, {more}}}]}}}}"
    );
    cluster.apply("token", &manifest).await;
    let log = cluster.log_with("token", "p", "username").await;
    assert!(log.contains("username: system:serviceaccount:token:default"), "{log}");
    for (claim, value) in [("node-name", "a"), ("pod-name", "p")] {
        let lines = format!("authentication.kubernetes.io/{claim}:\n      - {value}\n");
        assert!(log.contains(&lines), "{claim} in {log}");
    }
}

#[tokio::test]
async fn a_container_finds_the_pods_fields_in_variables_arguments_and_files() {
    let cluster = shared().await;
    let client = cluster.namespace("fields").await;
    let field = |name: &str, path: &str| format!("{{name: {name}, valueFrom: {{fieldRef: {{fieldPath: {path}}}}}}}");
    let env = [
        field("POD", "metadata.name"),
        field("NS", "metadata.namespace"),
        field("NODE", "spec.nodeName"),
        field("IP", "status.podIP"),
        field("HOST_IP", "status.hostIP"),
        field("LABEL", "\"metadata.labels['l']\""),
        "{name: URL, value: 'http://$(IP):80/$(POD)'}".into(),
    ]
    .join(", ");
    let more = format!("env: [{env}], volumeMounts: [{{name: d, mountPath: /etc/berth-fields, readOnly: true}}],");
    let volume = "nodeName: a, volumes: [{name: d, downwardAPI: {items: [{path: labels, fieldRef: {fieldPath: metadata.labels}}]}}],";
    let script = "echo $(URL) $NS $NODE $HOST_IP $LABEL; cat /etc/berth-fields/labels; echo; echo $$$$; \
                  touch /etc/berth-fields/x || echo read only; sleep 1000";
    cluster.run_shell("fields", script, &more, volume).await;
    let pod = cluster.pod(&client, "fields", "p", |pod| has(pod, "Ready")).await;
    let log = cluster.log_with("fields", "p", "read only").await;
    let status = pod.status.expect("a status");
    let (ip, host) = (status.pod_ip.expect("an address"), status.host_ip.expect("an address"));
    assert!(ip.starts_with("127.") && host == cluster.kubelet.node_ip("a").expect("a node").to_string());
    let lines: Vec<&str> = log.lines().collect();
    assert_eq!(lines[0], format!("http://{ip}:80/p fields a {host} value"));
    assert_eq!((lines[1], lines[2]), ("l=\"value\"", "1"), "the program is process 1");
    assert!(!std::path::Path::new("/etc/berth-fields").exists(), "nothing is made on the machine");
}

#[tokio::test]
async fn a_config_map_volume_is_waited_for_and_follows_its_object() {
    let cluster = shared().await;
    let client = cluster.namespace("config").await;
    let mounts = "volumeMounts: [{name: c, mountPath: /etc/berth-config}, {name: s, mountPath: /secret, readOnly: true}], \
                  env: [{name: S, valueFrom: {secretKeyRef: {name: s, key: k}}}],";
    let volumes = "volumes: [{name: c, configMap: {name: c, items: [{key: k, path: sub/file}]}}, \
                   {name: s, projected: {sources: [{secret: {name: s}}]}}],";
    let script = "cat /secret/k; echo $S; while :; do cat /etc/berth-config/sub/file; sleep 0.1; done";
    cluster.run_shell("config", script, mounts, volumes).await;
    eventually("an event that names the ConfigMap", || async {
        let events = cluster.plane.kubectl(&["-n", "config", "get", "events"]).await.ok()?;
        events.contains("configmap \"c\" not found").then_some(())
    })
    .await;
    let pod = cluster.pod(&client, "config", "p", |_| true).await;
    assert_eq!(waiting(first(&pod).state).0, "ContainerCreating");
    let object = |value: &str| {
        format!(
            "{{apiVersion: v1, kind: List, items: [{{apiVersion: v1, kind: ConfigMap, metadata: {{name: c}}, data: \
             {{k: \"{value}\\n\"}}}}, {{apiVersion: v1, kind: Secret, metadata: {{name: s}}, stringData: {{k: hidden}}}}]}}"
        )
    };
    cluster.apply("config", &object("one")).await;
    let log = cluster.log_with("config", "p", "one").await;
    assert!(log.starts_with("hiddenhidden\none\n"), "{log}");
    cluster.apply("config", &object("two")).await;
    cluster.log_with("config", "p", "two").await;
}

#[tokio::test]
async fn a_missing_key_is_a_config_error_until_it_is_there() {
    let cluster = shared().await;
    let client = cluster.namespace("key").await;
    let env = "env: [{name: K, valueFrom: {configMapKeyRef: {name: c, key: k}}}],";
    cluster.run_shell("key", "echo $K; sleep 1000", env, "").await;
    let refused = |pod: &Pod| waiting(first(pod).state).0 == "CreateContainerConfigError";
    let pod = cluster.pod(&client, "key", "p", refused).await;
    assert_eq!(waiting(first(&pod).state).1, "configmap \"c\" not found");
    cluster.plane.kubectl(&["-n", "key", "create", "configmap", "c", "--from-literal=k=v"]).await.expect("made");
    cluster.pod(&client, "key", "p", |pod| has(pod, "Ready")).await;
}

#[tokio::test]
async fn a_node_shows_its_own_host_files_labels_and_resources() {
    let cluster = shared().await;
    let client = cluster.namespace("host").await;
    let more = "volumeMounts: [{name: k, mountPath: /dev/kmsg}], resources: {limits: {example.com/device: 2}},";
    let volume = "volumes: [{name: k, hostPath: {path: /dev/kmsg}}], nodeSelector: {rack: r1},";
    cluster.run_shell("host", "head -n 1 /dev/kmsg; sleep 1000", more, volume).await;
    let log = cluster.log_with("host", "p", "\n").await;
    assert_eq!(log, "a line of the kernel\n");
    let node = Api::<Node>::all(client).get("a").await.expect("a node");
    let allocatable = node.status.and_then(|s| s.allocatable).expect("resources");
    assert_eq!(allocatable.get("example.com/device").map(|q| q.0.as_str()), Some("4"));
}

#[tokio::test]
async fn kubectl_shows_a_log_and_its_end() {
    let cluster = shared().await;
    let client = cluster.namespace("logs").await;
    cluster.run_shell("logs", "echo one; echo two; exec sleep 1000", "", "").await;
    cluster.pod(&client, "logs", "p", |pod| has(pod, "Ready")).await;
    cluster.log_with("logs", "p", "two").await;
    let logs = |more: &'static str| async move { cluster.plane.kubectl(&["-n", "logs", "logs", "p", more]).await };
    assert_eq!(logs("--tail=-1").await.expect("a log"), "one\ntwo\n");
    assert_eq!(logs("--tail=1").await.expect("a log"), "two\n");
}
