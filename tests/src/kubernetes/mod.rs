//! A node of a cluster as far as an agent sees it: an API server, and containers in control groups as runtimes make them.

mod server;

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use serde_json::{Value, json};

pub use server::{Mood, Server};

use crate::cgroup::enter;
use crate::host::wait_until;

/// The node that all pods are on.
pub const NODE: &str = "node-1";

/// The control group of a container, the only one of its pod; removed when dropped, which is to be after its processes have ended.
pub struct Container {
    pub number: usize,
    /// The pod's.
    pub uid: String,
    /// The container's id as the API server names it, with the runtime.
    pub id: String,
    /// By the innermost to be removed first.
    folders: Vec<PathBuf>,
}

impl Drop for Container {
    fn drop(&mut self) {
        for folder in &self.folders {
            // The kernel takes a moment to see that a process has ended; groups that others still have are left to them.
            wait_until(Duration::from_secs(2), || {
                fs::remove_dir(folder).is_ok() || !folder.exists() || has_groups(folder)
            });
        }
    }
}

fn has_groups(folder: &Path) -> bool {
    fs::read_dir(folder).is_ok_and(|entries| entries.flatten().any(|entry| entry.path().is_dir()))
}

/// The paths of runtimes, by both drivers, with the runtime as the API server names it.
fn shapes(uid: &str, id: &str) -> Vec<(&'static str, String)> {
    let slice = uid.replace('-', "_");
    let burstable = format!("kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod{slice}.slice");
    let guaranteed = format!("kubepods.slice/kubepods-pod{slice}.slice");
    let best = format!("kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-pod{slice}.slice");
    vec![
        ("containerd", format!("{burstable}/cri-containerd-{id}.scope")),
        ("containerd", format!("kubepods/burstable/pod{uid}/{id}")),
        ("containerd", format!("system.slice/kubepods-burstable-pod{slice}.slice:cri-containerd:{id}")),
        ("cri-o", format!("{guaranteed}/crio-{id}.scope/container")),
        ("cri-o", format!("kubepods/besteffort/pod{uid}/crio-{id}")),
        ("docker", format!("{best}/docker-{id}.scope")),
        ("docker", format!("kubepods/pod{uid}/{id}")),
    ]
}

/// Where groups can be made: of version 2, and of version 1 with the memory controller. Both where both are there.
fn hierarchies() -> Vec<PathBuf> {
    let second = ["/sys/fs/cgroup", "/sys/fs/cgroup/unified"]
        .into_iter()
        .find(|root| Path::new(root).join("cgroup.procs").exists() && !Path::new(root).join("tasks").exists());
    let first = Some("/sys/fs/cgroup/memory").filter(|root| Path::new(root).join("memory.limit_in_bytes").exists());
    second.into_iter().chain(first).map(PathBuf::from).collect()
}

impl Container {
    /// Makes the group under one of the name `top`; the number decides on ids, runtime and version. `None` where none can be made.
    pub fn new(top: &str, number: usize) -> Option<Self> {
        let roots = hierarchies();
        let uid = format!("1f0a9c3e-6d2b-4a7e-9c51-{number:012x}");
        let id = format!("{number:032x}{:032x}", number * 7919 + 1);
        let shapes = shapes(&uid, &id);
        let (runtime, path) = &shapes[number % shapes.len()];
        let root = roots.get(number / shapes.len() % roots.len().max(1))?.join(top);
        let folder = root.join(path);
        let folders = folder.ancestors().take_while(|above| above.starts_with(&root)).map(Path::to_owned).collect();
        let container = Self { number, uid, id: format!("{runtime}://{id}"), folders };
        fs::create_dir_all(&folder).ok()?;
        Some(container)
    }

    fn processes(&self) -> PathBuf {
        self.folders[0].join("cgroup.procs")
    }

    /// Moves a process into it.
    pub fn take(&self, pid: u32) -> io::Result<()> {
        fs::write(self.processes(), pid.to_string())
    }

    /// Has a program started in it.
    pub fn enter(&self, command: &mut Command) -> io::Result<()> {
        enter(command, &self.processes())
    }

    /// The pod as the API server tells it, with names by the container's number and an image of this tag.
    pub fn pod(&self, tag: &str) -> Value {
        let n = self.number;
        let container = json!({ "name": format!("main-{n}"), "image": format!("registry.example/app-{n}:{tag}") });
        let status = json!({ "name": format!("main-{n}"), "image": "sha256:1", "containerID": self.id });
        json!({
            "kind": "Pod", "apiVersion": "v1",
            "metadata": { "name": format!("app-{n}-{tag}"), "namespace": format!("team-{}", n % 7), "uid": self.uid,
                "managedFields": [{ "manager": "kubelet", "fieldsV1": { "f:status": { "x": "y".repeat(2000) } } }] },
            "spec": { "nodeName": NODE, "containers": [container] },
            "status": { "phase": "Running", "containerStatuses": [status] },
        })
    }
}
