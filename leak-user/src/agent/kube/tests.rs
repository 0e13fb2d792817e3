use super::*;
use crate::report::{self, sample};

const ID: &str = "4b1ae0e2c8a94d5f9f8f6f2b3f6f7c9f0f8a7b6c5d4e3f2a1b0c9d8e7f6a5b4c";
const OLD: &str = "00ffee2c8a94d5f9f8f6f2b3f6f7c9f0f8a7b6c5d4e3f2a1b0c9d8e7f6a5b4c1";

fn pod(json: &serde_json::Value) -> pods::Pod {
    serde_json::from_value(json.clone()).expect("a pod")
}

/// A pod as the API server sends it, cut down.
fn orders() -> serde_json::Value {
    serde_json::json!({
        "metadata": { "name": "orders-1", "namespace": "shop", "uid": "uid-1", "labels": { "app": "orders" },
            "annotations": { "kubernetes.io/config.hash": "hash-1" }, "managedFields": [{ "manager": "kubelet" }] },
        "spec": { "nodeName": "node-1", "initContainers": null,
            "containers": [{ "name": "api", "image": "shop/orders:1.4", "env": [{ "name": "SECRET", "value": "x" }] }] },
        "status": { "phase": "Running", "containerStatuses": [
            { "name": "api", "image": "sha256:77", "containerID": format!("containerd://{ID}"),
              "lastState": { "terminated": { "containerID": format!("containerd://{OLD}"), "exitCode": 137 } } }],
            "initContainerStatuses": [{ "name": "wait", "image": "busybox", "containerID": "" }] },
    })
}

fn labels(container: Option<&str>, pod_uid: Option<&str>) -> Labels {
    Labels { container: container.map(str::to_owned), pod_uid: pod_uid.map(str::to_owned), ..Labels::default() }
}

fn off() -> Kubernetes {
    Kubernetes::start(&Settings {
        server: Err(Off::Unwanted("test".to_owned())),
        node: Some("node-1".to_owned()),
        events: false,
        watch: WATCH,
        longest_wait: LONGEST_WAIT,
        confirm: events::CONFIRM,
    })
}

fn names(labels: &Labels) -> [Option<&str>; 5] {
    [&labels.namespace, &labels.pod, &labels.container_name, &labels.image, &labels.node].map(Option::as_deref)
}

/// A container is found by its id, whole or cut short, by that of the run before, and its pod by its uid or, for pods from files, its
/// hash; a container of no pod stays without a name.
#[test]
fn who_that_is() {
    let mut kubernetes = off();
    locked(&kubernetes.shared.pods).put(pod(&orders()), "node-1");
    let full = [Some("shop"), Some("orders-1"), Some("api"), Some("shop/orders:1.4"), Some("node-1")];
    let only_pod = [Some("shop"), Some("orders-1"), None, None, Some("node-1")];
    for (container, uid, expected) in [
        (Some(ID), Some("uid-1"), full),
        (Some(&ID[..12]), None, full),
        (Some(OLD), Some("uid-1"), full),
        (Some(OLD), Some("hash-1"), full),
        (Some("abcdefabcde1"), Some("uid-1"), only_pod),
        (None, Some("uid-1"), only_pod),
        (Some("abcdefabcdef"), None, [None; 5]),
        (Some("abcdefabcde2"), Some("uid-2"), [None, None, None, None, Some("node-1")]),
        (None, None, [None; 5]),
    ] {
        let mut labels = labels(container, uid);
        kubernetes.label(&mut labels);
        assert_eq!(names(&labels), expected, "{container:?} {uid:?}");
    }
}

/// Everything in a report that has labels gets its names, the processes that were killed too, and keeps them when the pod is gone.
#[test]
fn whole_report() {
    let mut kubernetes = off();
    locked(&kubernetes.shared.pods).put(pod(&orders()), "node-1");
    let mut report = sample::system();
    let mut system = report.system.take().expect("a system");
    system.processes[0].labels = labels(Some(ID), Some("uid-1"));
    report.system = Some(system);
    report.processes[0].labels = labels(Some(ID), Some("uid-1"));
    report.oom_kills[0].labels = labels(Some(OLD), Some("uid-1"));
    report.oom_kills[0].process.as_mut().expect("a process").labels = labels(Some(OLD), Some("uid-1"));
    for gone in [false, true] {
        if gone {
            locked(&kubernetes.shared.pods).remove(&pod(&orders()));
        }
        let mut report = report.clone();
        kubernetes.enrich(&mut report);
        let killed = &report.oom_kills[0];
        for labels in [
            &report.processes[0].labels,
            &report.system.as_ref().expect("a system").processes[0].labels,
            &killed.labels,
            &killed.process.as_ref().expect("a process").labels,
        ] {
            assert_eq!(names(labels)[..3], [Some("shop"), Some("orders-1"), Some("api")], "{gone}");
        }
        assert_eq!(names(&report.processes[1].labels), [None; 5]);
    }
    // What is remembered is bounded, the oldest goes.
    for n in 0..2 * REMEMBERED {
        kubernetes.remembered.keep(&n.to_string(), &Found::default());
    }
    assert_eq!((kubernetes.remembered.found.len(), kubernetes.remembered.order.len()), (REMEMBERED, REMEMBERED));
    let mut late = labels(Some(ID), Some("uid-1"));
    kubernetes.label(&mut late);
    assert_eq!(late.pod, None);
}

/// Whatever the server sends, what is kept stays within its bounds: pods of other nodes, too many, without names, of endless names.
#[test]
fn bounded() {
    let mut pods = Pods::default();
    for n in 0..3000 {
        let mut json = orders();
        json["metadata"]["uid"] = format!("uid-{n}").into();
        json["metadata"]["name"] = "n".repeat(if n % 500 == 0 { 100_000 } else { 300 }).into();
        json["spec"]["nodeName"] = if n < 100 { "node-2" } else { "node-1" }.into();
        let status = json["status"]["containerStatuses"][0].clone();
        if n == 100 {
            json["status"]["containerStatuses"] = vec![status; 1000].into();
        }
        if n == 101 {
            json["metadata"]["name"] = serde_json::Value::Null;
        }
        pods.put(pod(&json), "node-1");
    }
    assert_eq!(pods.count(), 1024);
    assert_eq!(pods.left_out(), 3000 - 100 - 1 - 1024);
    assert!(pods.find(None, Some("uid-5")).is_none() && pods.find(None, Some("uid-101")).is_none());
    let found = pods.find(Some(ID), Some("uid-100")).expect("the pod");
    assert_eq!(found.pod.map(|name| name.len()), Some(253));
    pods.put(pod(&serde_json::json!({})), "node-1");
    for wrong in ["3", "{\"metadata\": 3}", "{\"status\": {\"containerStatuses\": {}}}"] {
        assert!(serde_json::from_str::<pods::Pod>(wrong).is_err(), "{wrong}");
    }
}

/// Which server is asked, if any, and each mistake by its key.
#[test]
fn configuration() {
    let file = tempfile::NamedTempFile::new().expect("a file");
    let file = file.path().to_str().expect("a path");
    let check = |json: serde_json::Value, variables: &[(&str, &str)]| {
        let config: Config = serde_json::from_value(json).expect("the types fit");
        config.check_with(|name| variables.iter().find(|(of, _)| *of == name).map(|(_, value)| (*value).to_owned()))
    };
    let cluster = [("KUBERNETES_SERVICE_HOST", "10.0.0.1"), ("NODE_NAME", "node-1")];
    let server = |json, variables: &[(&str, &str)]| check(json, variables).expect("no mistake").server;
    assert_eq!(server(serde_json::json!({}), &cluster), Ok(Server::InCluster));
    assert_eq!(server(serde_json::json!({ "enabled": true }), &cluster), Ok(Server::InCluster));
    assert!(server(serde_json::json!({ "enabled": false }), &cluster).is_err());
    assert!(server(serde_json::json!({}), &[]).is_err_and(|why| matches!(why, Off::Unwanted(_))));
    assert!(server(serde_json::json!({}), &cluster[..1]).is_err_and(|why| matches!(why, Off::Impossible(_))));
    let url = "https://api.example:6443";
    let at = serde_json::json!({ "api_server": url, "token_file": file, "node_name": "n", "events": true });
    let settings = check(at, &[]).expect("no mistake");
    assert!(settings.events && settings.node.as_deref() == Some("n"));
    let token_file = Some(file.into());
    assert_eq!(settings.server, Ok(Server::At { url: url.to_owned(), token_file, certificate_authority: None }));
    for (json, key) in [
        (serde_json::json!({ "enabled": true }), "enabled"),
        (serde_json::json!({ "enabled": true, "api_server": url }), "node_name"),
        (serde_json::json!({ "node_name": "a,metadata.name!=b" }), "node_name"),
        (serde_json::json!({ "api_server": "api.example" }), "api_server"),
        (serde_json::json!({ "api_server": "http://api.example", "token_file": file }), "api_server"),
        (serde_json::json!({ "token_file": file }), "token_file"),
        (serde_json::json!({ "api_server": url, "certificate_authority": "/nowhere" }), "certificate_authority"),
        (serde_json::json!({ "watch": "2h" }), "watch"),
    ] {
        let mistake = check(json.clone(), &[]).expect_err("a mistake");
        assert_eq!(mistake.key, key, "{json}");
    }
    for wrong in [serde_json::json!({ "enabled": "perhaps" }), serde_json::json!({ "evens": true })] {
        assert!(serde_json::from_value::<Config>(wrong).is_err());
    }
}

/// Labels of a report that nobody could name stay as they were.
#[test]
fn without_a_server() {
    let mut kubernetes = off();
    let mut report = sample::leaking();
    let before = report.processes[0].labels.clone();
    kubernetes.enrich(&mut report);
    assert_eq!(report.processes[0].labels, before);
    assert!(matches!(kubernetes.shared().state(), State::Off(_)));
    assert_eq!(report.schema, report::SCHEMA);
}
