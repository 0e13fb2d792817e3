//! The Helm chart and the kustomize folders.

use std::collections::BTreeSet;
use std::fs;

use anyhow::{Context as _, Result, ensure};
use leaktrace_tests::deploy::{self, GENERATED, MONITORING, Tools};
use leaktrace_tests::{Leaktrace, PATIENCE};
use serde_json::{Value, json};

use crate::certificate;

/// The oldest version that the chart takes, and the newest that there are schemas for.
const VERSIONS: [&str; 2] = ["1.30", "1.37"];

const NON_ROOT: [&str; 2] = ["security.mode=nonRoot", "state.hostPath="];
const ALL: [&str; 10] = [
    "podMonitor.enabled=true",
    "rules.enabled=true",
    "dashboard.enabled=true",
    "security.sysAdmin=true",
    "kubernetes.events=true",
    "http.tlsSecret=leaktrace-tls",
    "podMonitor.tls.serverName=leaktrace",
    "podMonitor.tls.caSecret=leaktrace-ca",
    "priorityClassName=system-node-critical",
    "imagePullSecrets[0].name=registry",
];

/// What `kustomize/push` stands for.
const PUSH: [&str; 7] = [
    "push.otlp.url=https://collector.example:4318",
    "push.otlp.caSecret=collector-ca",
    "push.otlp.labels.cluster=west",
    "push.pyroscope.url=https://pyroscope.example",
    "push.pyroscope.interval=15s",
    "push.pyroscope.tokenSecret=pyroscope-token",
    "push.pyroscope.headers.X-Scope-OrgID=team-a",
];

/// The object of a kind, of which there is one.
fn one<'a>(objects: &'a [Value], kind: &str) -> Result<&'a Value> {
    let mut found = objects.iter().filter(|object| object["kind"] == kind);
    let object = found.next().with_context(|| format!("there is no {kind}"))?;
    ensure!(found.next().is_none(), "there are several of {kind}");
    Ok(object)
}

fn agent(objects: &[Value]) -> Result<&Value> {
    Ok(&one(objects, "DaemonSet")?["spec"]["template"]["spec"]["containers"][0])
}

fn in_order(mut objects: Vec<Value>) -> Vec<Value> {
    objects.sort_by_key(|object| format!("{} {}", object["kind"], object["metadata"]["name"]));
    objects
}

/// What is generated is what the chart makes now.
#[test]
fn generated_files_are_fresh() -> Result<()> {
    let Some(tools) = Tools::for_test("generated_files_are_fresh") else { return Ok(()) };
    for generated in GENERATED {
        let is = fs::read_to_string(deploy::folder().join(generated.file))?;
        ensure!(is == tools.generate(generated)?, "{} is stale: run `cargo xtask deploy`", generated.file);
    }
    Ok(())
}

/// Each kustomize folder makes the same objects as the chart with the values that it stands for.
#[test]
fn kustomize_and_the_chart_make_the_same() -> Result<()> {
    let Some(tools) = Tools::for_test("kustomize_and_the_chart_make_the_same") else { return Ok(()) };
    let privileged = ["security.mode=privileged"];
    for (folder, values) in [("base", &[][..]), ("privileged", &privileged), ("nonroot", &NON_ROOT), ("push", &PUSH)] {
        let by_kustomize = in_order(tools.documents(&tools.kustomize(folder)?)?);
        let by_helm = in_order(tools.documents(&tools.chart(values)?)?);
        ensure!(by_kustomize.len() == by_helm.len(), "{folder}: {} objects", by_kustomize.len());
        for (by_kustomize, by_helm) in by_kustomize.iter().zip(&by_helm) {
            assert_eq!(by_kustomize, by_helm, "{folder}");
        }
    }
    // Both together are all that the chart can make; the example has the namespace besides, and another image.
    let mut together = tools.documents(&tools.kustomize("base")?)?;
    together.extend(tools.documents(&tools.kustomize("monitoring")?)?);
    assert_eq!(in_order(together.clone()), in_order(tools.documents(&tools.chart(&MONITORING)?)?));
    let example = tools.documents(&tools.kustomize("example")?)?;
    assert_eq!(one(&example, "Namespace")?["metadata"]["labels"]["pod-security.kubernetes.io/enforce"], "privileged");
    let image = agent(&example)?["image"].as_str().context("no image")?;
    ensure!(image == "registry.example/leaktrace:0.1.0", "{image}");
    assert_eq!(example.len(), together.len() + 1);
    Ok(())
}

/// All objects, in every way they can be made, keep to the schemas of Kubernetes and of the Prometheus operator; and the schemas see
/// mistakes.
#[test]
fn objects_keep_to_their_schemas() -> Result<()> {
    let Some(tools) = Tools::for_test("objects_keep_to_their_schemas") else { return Ok(()) };
    let mut all = vec![tools.kustomize("example")?];
    for values in [&MONITORING[..], &NON_ROOT, &["security.mode=privileged", "kubernetes.labels=false"], &ALL, &PUSH] {
        all.push(tools.chart(values)?);
    }
    let all = all.join("\n---\n");
    let mistakes = tools.mistakes(&all, &VERSIONS)?;
    ensure!(mistakes.is_empty(), "{mistakes:#?}");

    // All in one, since Python takes seconds to begin.
    let right = tools.chart(&MONITORING)?;
    let mut wrong = Vec::new();
    let mut named = Vec::new();
    for (from, to, name) in [
        ("hostPID: true", "hostPid: true", "'hostPid' was unexpected"),
        ("hostPID: true", "hostPID: yes please", "spec.template.spec.hostPID: "),
        ("verbs: [list, watch]", "verbs: list", "verbs: "),
        ("honorLabels: true", "honourLabels: true", "honourLabels: unknown field"),
        ("keep_firing_for: 5m", "keep_firing_for: 5 minutes", "keep_firing_for: "),
        ("severity: critical", "severity: [critical]", "severity: "),
    ] {
        ensure!(right.contains(from), "{from} is not in the chart");
        wrong.push(right.replacen(from, to, 1));
        named.push((to, name));
    }
    let mistakes = tools.mistakes(&wrong.join("\n---\n"), &VERSIONS[1..])?;
    for (to, name) in &named {
        ensure!(mistakes.iter().any(|mistake| mistake.contains(name)), "{to} was taken: {mistakes:#?}");
    }
    assert_eq!(mistakes.len(), named.len(), "{mistakes:#?}");
    Ok(())
}

/// The agent may list and watch pods, and no more; it may make events where that is asked for; and without either it has no token and no
/// role.
#[test]
fn least_rights_in_the_cluster() -> Result<()> {
    let Some(tools) = Tools::for_test("least_rights_in_the_cluster") else { return Ok(()) };
    let rules = |values: &[&str]| -> Result<Value> {
        Ok(one(&tools.documents(&tools.chart(values)?)?, "ClusterRole")?["rules"].clone())
    };
    let pods = json!({"apiGroups": [""], "resources": ["pods"], "verbs": ["list", "watch"]});
    assert_eq!(rules(&[])?, json!([pods]));
    let events = json!({"apiGroups": ["events.k8s.io"], "resources": ["events"], "verbs": ["create"]});
    assert_eq!(rules(&["kubernetes.events=true"])?, json!([pods, events]));

    let without = tools.documents(&tools.chart(&["kubernetes.labels=false"])?)?;
    let kinds: BTreeSet<&str> = without.iter().filter_map(|object| object["kind"].as_str()).collect();
    assert_eq!(kinds, BTreeSet::from(["ConfigMap", "DaemonSet", "ServiceAccount"]));
    assert_eq!(one(&without, "DaemonSet")?["spec"]["template"]["spec"]["automountServiceAccountToken"], false);
    Ok(())
}

/// Of the node's rights the agent has five capabilities, one more where that is asked for, and all only if it is to be privileged.
#[test]
fn least_rights_on_the_node() -> Result<()> {
    let Some(tools) = Tools::for_test("least_rights_on_the_node") else { return Ok(()) };
    let security = |values: &[&str]| -> Result<Value> {
        Ok(agent(&tools.documents(&tools.chart(values)?)?)?["securityContext"].clone())
    };
    let few = json!(["BPF", "PERFMON", "SYS_PTRACE", "DAC_READ_SEARCH", "CHECKPOINT_RESTORE"]);
    let usual = security(&[])?;
    assert_eq!(usual["capabilities"], json!({"drop": ["ALL"], "add": few}));
    assert_eq!(usual["allowPrivilegeEscalation"], false);
    assert_eq!(usual["readOnlyRootFilesystem"], true);
    assert!(usual["privileged"].is_null());
    let old = security(&["security.sysAdmin=true"])?;
    assert_eq!(old["capabilities"]["add"][5], "SYS_ADMIN");
    let other_user = security(&NON_ROOT)?;
    assert_eq!(other_user["runAsNonRoot"], true);
    assert_eq!(other_user["capabilities"], usual["capabilities"]);
    assert_eq!(security(&["security.mode=privileged"])?["privileged"], true);
    let refused = tools.chart_refuses(&["security.mode=root"])?;
    ensure!(refused.contains("security.mode is none of"), "{refused}");
    let refused = tools.chart_refuses(&["podMonitor.enabled=true", "http.tlsSecret=x"])?;
    ensure!(refused.contains("podMonitor.tls.serverName is needed"), "{refused}");
    Ok(())
}

/// The files and variables that the pod gives the agent make sense to it: they are checked by its own check, with the files where the
/// volumes put them.
#[test]
fn the_agent_takes_its_settings() -> Result<()> {
    const NAME: &str = "the_agent_takes_its_settings";
    let Some(tools) = Tools::for_test(NAME) else { return Ok(()) };
    // Names and values that are no plain words in TOML, in YAML or on the way there.
    let odd = [
        "push.parca.url=http://parca:7070",
        "push.parca.tokenSecret=parca",
        "push.parca.headers.X-Note=it's \"{{ quoted }}\" = #7",
        "push.parca.labels.stage=a\\,b",
        "push.otlp.url=https://collector",
        "push.otlp.caSecret=collector",
    ];
    for values in [&[][..], &ALL, &["kubernetes.labels=false"], &PUSH, &odd] {
        let objects = tools.documents(&tools.chart(values)?)?;
        let folder = tempfile::tempdir()?;
        let settings = one(&objects, "ConfigMap").ok().or_else(|| {
            objects.iter().find(|object| object["kind"] == "ConfigMap" && object["metadata"]["name"] == "leaktrace")
        });
        let settings = settings.and_then(|map| map["data"]["agent.toml"].as_str()).context("no settings")?;
        fs::write(folder.path().join("agent.toml"), settings)?;
        let sources =
            one(&objects, "DaemonSet")?["spec"]["template"]["spec"]["volumes"][0]["projected"]["sources"].clone();
        let projected: Vec<&str> = sources
            .as_array()
            .context("no sources")?
            .iter()
            .flat_map(|source| source["secret"]["items"].as_array().into_iter().flatten())
            .filter_map(|item| item["path"].as_str())
            .collect();
        if !certificate(NAME, folder.path())? {
            return Ok(());
        }
        for name in projected.iter().filter(|name| !name.starts_with("tls.")) {
            let file = folder.path().join(name);
            if name.ends_with("ca.crt") {
                fs::copy(folder.path().join("tls.crt"), file)?;
            } else {
                fs::write(file, "0123456789abcdef0123456789abcdef")?;
            }
        }
        let container = agent(&objects)?;
        let here = |text: &str| text.replace("/etc/leaktrace", &folder.path().to_string_lossy());
        let args = container["args"].as_array().context("no arguments")?;
        let mut command = Leaktrace::new()?
            .args(args.iter().filter_map(Value::as_str).map(here).collect::<Vec<_>>())
            .arg("--check-config");
        for variable in container["env"].as_array().context("no variables")? {
            let name = variable["name"].as_str().context("a variable without a name")?;
            let value = variable["value"].as_str().unwrap_or("node-1");
            let value = here(value);
            let is_file = value.starts_with(&*folder.path().to_string_lossy());
            ensure!(!is_file || projected.iter().any(|name| value.ends_with(&format!("/{name}"))), "{name}={value}");
            command.command().env(name, value);
        }
        // Every container is told of the API server.
        command.command().env("KUBERNETES_SERVICE_HOST", "10.0.0.1").env("KUBERNETES_SERVICE_PORT", "443");
        let outcome = command.run(PATIENCE)?;
        ensure!(outcome.code()? == 0, "{values:?}: {}", outcome.stderr);
    }
    Ok(())
}

/// What is pushed is told by variables, with files of the Secrets where those are put; without a url nothing is, and settings that would
/// then do nothing are refused, as is another system.
#[test]
fn pushes() -> Result<()> {
    let Some(tools) = Tools::for_test("pushes") else { return Ok(()) };
    let pushed = |values: &[&str]| -> Result<Vec<(String, String)>> {
        let objects = tools.documents(&tools.chart(values)?)?;
        let variables = agent(&objects)?["env"].as_array().context("no variables")?.clone();
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        let pairs = variables.iter().map(|one| (text(&one["name"]), text(&one["value"])));
        Ok(pairs.filter(|(name, _)| name.contains("_PUSH_")).collect())
    };
    assert_eq!(pushed(&[])?, []);
    let expected = [
        ("LEAKTRACE_PUSH_OTLP_URL", "https://collector.example:4318"),
        ("LEAKTRACE_PUSH_OTLP_INTERVAL", "1min"),
        ("LEAKTRACE_PUSH_OTLP_CA_FILE", "/etc/leaktrace/otlp-ca.crt"),
        ("LEAKTRACE_PUSH_OTLP_LABELS", r#"{ "cluster" = "west" }"#),
        ("LEAKTRACE_PUSH_PYROSCOPE_URL", "https://pyroscope.example"),
        ("LEAKTRACE_PUSH_PYROSCOPE_INTERVAL", "15s"),
        ("LEAKTRACE_PUSH_PYROSCOPE_TOKEN_FILE", "/etc/leaktrace/pyroscope-token"),
        ("LEAKTRACE_PUSH_PYROSCOPE_HEADERS", r#"{ "X-Scope-OrgID" = "team-a" }"#),
    ];
    assert_eq!(pushed(&PUSH)?, expected.map(|(name, value)| (name.to_owned(), value.to_owned())));
    for (values, said) in [
        (&["push.parca.tokenSecret=parca"][..], "push.parca.url is empty"),
        (&["push.parka.url=http://parca"], "push.parka is none of pyroscope, parca, otlp"),
    ] {
        let refused = tools.chart_refuses(values)?;
        ensure!(refused.contains(said), "{values:?}: {refused}");
    }
    Ok(())
}

/// Helm finds nothing to say about the chart.
#[test]
fn the_chart_is_in_order() -> Result<()> {
    let Some(tools) = Tools::for_test("the_chart_is_in_order") else { return Ok(()) };
    let said = tools.lint()?;
    ensure!(said.contains("0 chart(s) failed"), "{said}");
    Ok(())
}
