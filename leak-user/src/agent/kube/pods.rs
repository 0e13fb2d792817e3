//! The pods of this node: of each only what names a process. Bounded in number and in the length of names, whatever the server says.

use std::borrow::Cow;
use std::collections::HashMap;

use k8s_openapi::NamespaceResourceScope;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::Resource;
use serde::Deserialize;

/// Pods that are kept. The kubelet runs 110 unless it is told otherwise, and more than 500 a node are not known to work.
const MOST_PODS: usize = 1024;
/// Containers of a pod, those that ended included.
const MOST_CONTAINERS: usize = 64;
/// Bytes of a name (RFC 1123 allows 253), and of an image with its digest.
const MAX_NAME: usize = 253;
const MAX_IMAGE: usize = 512;
/// Pods from files on the node are in control groups that are named by this and not by the uid that the API server knows.
const CONFIG_HASH: &str = "kubernetes.io/config.hash";

/// As the API server sends it. Of the rest of a pod (its environment, its volumes) nothing is even kept while it is read.
#[derive(Clone, Debug, Default, Deserialize)]
pub struct Pod {
    #[serde(default)]
    metadata: ObjectMeta,
    #[serde(default)]
    spec: Option<Spec>,
    #[serde(default)]
    status: Option<Status>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct Spec {
    node_name: Option<String>,
    containers: Option<Vec<Container>>,
    init_containers: Option<Vec<Container>>,
    ephemeral_containers: Option<Vec<Container>>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
struct Container {
    name: String,
    image: Option<String>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
struct Status {
    #[serde(rename = "containerStatuses")]
    containers: Option<Vec<ContainerStatus>>,
    #[serde(rename = "initContainerStatuses")]
    init_containers: Option<Vec<ContainerStatus>>,
    #[serde(rename = "ephemeralContainerStatuses")]
    ephemeral_containers: Option<Vec<ContainerStatus>>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
struct ContainerStatus {
    name: String,
    image: Option<String>,
    #[serde(rename = "containerID")]
    container_id: Option<String>,
    #[serde(rename = "lastState")]
    last_state: Option<ContainerState>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
struct ContainerState {
    terminated: Option<Terminated>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
struct Terminated {
    #[serde(rename = "containerID")]
    container_id: Option<String>,
}

impl Resource for Pod {
    type DynamicType = ();
    type Scope = NamespaceResourceScope;

    fn kind((): &()) -> Cow<'_, str> {
        "Pod".into()
    }

    fn group((): &()) -> Cow<'_, str> {
        "".into()
    }

    fn version((): &()) -> Cow<'_, str> {
        "v1".into()
    }

    fn plural((): &()) -> Cow<'_, str> {
        "pods".into()
    }

    fn meta(&self) -> &ObjectMeta {
        &self.metadata
    }

    fn meta_mut(&mut self) -> &mut ObjectMeta {
        &mut self.metadata
    }
}

/// What names a process.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Found {
    pub pod: Option<String>,
    pub namespace: Option<String>,
    /// Not known of a container that the API server has not been told of yet, and of the pod's own (pause).
    pub container: Option<String>,
    pub image: Option<String>,
}

/// A pod that is kept.
#[derive(Debug)]
struct Kept {
    name: String,
    namespace: String,
    config_hash: Option<String>,
    containers: Vec<KeptContainer>,
}

#[derive(Debug)]
struct KeptContainer {
    /// Without the runtime's name.
    id: String,
    name: String,
    image: Option<String>,
}

/// The pods of this node, by uid.
#[derive(Debug, Default)]
pub struct Pods {
    pods: HashMap<String, Kept>,
    /// For which there was no room.
    left_out: u64,
}

impl Pods {
    pub fn count(&self) -> usize {
        self.pods.len()
    }

    pub fn left_out(&self) -> u64 {
        self.left_out
    }

    /// The pod is there, or is different now; ignored if it is not of this node.
    pub fn put(&mut self, pod: Pod, node: &str) {
        let spec = pod.spec.unwrap_or_default();
        let metadata = pod.metadata;
        let (Some(uid), Some(name), Some(namespace)) = (metadata.uid, metadata.name, metadata.namespace) else {
            return;
        };
        if spec.node_name.is_some_and(|of| of != node) || uid.len() > MAX_NAME {
            return;
        }
        if self.pods.len() >= MOST_PODS && !self.pods.contains_key(&uid) {
            self.left_out += 1;
            return;
        }
        let images: Vec<Container> = [spec.containers, spec.init_containers, spec.ephemeral_containers]
            .into_iter()
            .flatten()
            .flatten()
            .collect();
        let status = pod.status.unwrap_or_default();
        let statuses = [status.containers, status.init_containers, status.ephemeral_containers];
        let mut containers = Vec::new();
        for status in statuses.into_iter().flatten().flatten() {
            let before = status.last_state.and_then(|state| state.terminated).and_then(|ended| ended.container_id);
            // As the pod asks for it: a runtime may tell it by its digest.
            let asked = images.iter().find(|container| container.name == status.name);
            let image = asked.and_then(|container| container.image.as_ref()).or(status.image.as_ref());
            for id in [status.container_id, before].into_iter().flatten() {
                let id = id.split_once("://").map_or(id.as_str(), |(_, id)| id);
                if id.is_empty() || containers.len() >= MOST_CONTAINERS {
                    continue;
                }
                containers.push(KeptContainer {
                    id: bounded(id, MAX_NAME),
                    name: bounded(&status.name, MAX_NAME),
                    image: image.map(|image| bounded(image, MAX_IMAGE)),
                });
            }
        }
        containers.shrink_to_fit();
        let annotations = metadata.annotations.unwrap_or_default();
        let kept = Kept {
            name: bounded(&name, MAX_NAME),
            namespace: bounded(&namespace, MAX_NAME),
            config_hash: annotations.get(CONFIG_HASH).map(|hash| bounded(hash, MAX_NAME)),
            containers,
        };
        self.pods.insert(uid, kept);
    }

    /// The pod is gone.
    pub fn remove(&mut self, pod: &Pod) {
        if let Some(uid) = &pod.metadata.uid {
            self.pods.remove(uid);
        }
    }

    /// Who that is; by the container's id if it is known, and otherwise by the pod's uid.
    pub fn find(&self, container: Option<&str>, pod_uid: Option<&str>) -> Option<Found> {
        // The control group may be named by the beginning of the id.
        let named = |kept: &Kept| {
            let id = container?;
            kept.containers.iter().position(|of| of.id.starts_with(id))
        };
        let by_uid = pod_uid.and_then(|uid| {
            self.pods.get(uid).or_else(|| self.pods.values().find(|kept| kept.config_hash.as_deref() == Some(uid)))
        });
        let (kept, container) = match by_uid {
            Some(kept) => (kept, named(kept)),
            None => self.pods.values().find_map(|kept| Some((kept, Some(named(kept)?))))?,
        };
        let container = container.map(|at| &kept.containers[at]);
        Some(Found {
            pod: Some(kept.name.clone()),
            namespace: Some(kept.namespace.clone()),
            container: container.map(|container| container.name.clone()),
            image: container.and_then(|container| container.image.clone()),
        })
    }
}

fn bounded(text: &str, most: usize) -> String {
    text[..text.floor_char_boundary(most)].to_owned()
}
