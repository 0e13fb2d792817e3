//! Live memory as profiles, one for all processes of a service: for Pyroscope in the messages of `push.v1`, for Parca as its HTTP gateway
//! takes them.
//!
//! Only what is in use is pushed. What was allocated in all is a sum since the start, and both servers add up what they got over a time.
//! Samples carry no labels: Pyroscope would make a series of each call stack. The messages are written out with their tags, as in
//! [`crate::export::pprof::proto`]; they are those of <https://github.com/grafana/pyroscope/blob/v1.10.0/api/push/v1/push.proto> and
//! <https://github.com/parca-dev/parca/blob/v0.22.0/proto/parca/profilestore/v1alpha1/profilestore.proto>.

use std::collections::BTreeMap;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use prost::Message;
use serde_json::{Value, json};

use super::config::Endpoint;
use super::nanoseconds;
use crate::export::pprof;
use crate::report::{Labels, Process, Report};

/// What Pyroscope and Parca call the profile of a heap, as Go's clients do.
const NAME: &str = "memory";
/// Characters of a label's value.
const LONGEST: usize = 200;

/// A profile and the labels that name it, by their names.
pub struct Series {
    labels: BTreeMap<String, String>,
    /// Compressed.
    profile: Vec<u8>,
}

/// The profiles of the processes of a report, the worst of them; `None` where nothing is traced.
pub fn series(report: &Report, most: usize, endpoint: &Endpoint) -> Option<Vec<Series>> {
    // Processes with the same labels are one series, in which there may be one profile at a time.
    let mut services: BTreeMap<BTreeMap<String, String>, Vec<&Process>> = BTreeMap::new();
    for process in report.processes.iter().take(most).filter(|process| !process.stacks.is_empty()) {
        services.entry(labels(process, report, endpoint)).or_default().push(process);
    }
    let made = services.into_iter().filter_map(|(labels, processes)| {
        let mut profile = pprof::profile(report, processes);
        pprof::keep_in_use(&mut profile);
        profile.time_nanos = i64::try_from(nanoseconds(report, report.duration_s)).unwrap_or(i64::MAX);
        profile.duration_nanos = 0;
        Some(Series { labels, profile: pprof::compressed(&profile).ok()? })
    });
    let made: Vec<Series> = made.collect();
    (!made.is_empty()).then_some(made)
}

fn labels(process: &Process, report: &Report, endpoint: &Endpoint) -> BTreeMap<String, String> {
    let mut labels = endpoint.labels.clone();
    let mut add = |name: &str, value: Option<&str>| {
        if let Some(value) = value.filter(|value| !value.is_empty()) {
            labels.insert(name.to_owned(), crate::view::safe(value).chars().take(LONGEST).collect());
        }
    };
    add("__name__", Some(NAME));
    add("service_name", Some(service(&process.labels).unwrap_or(&process.comm)));
    add("process", Some(&process.comm));
    add("instance", report.host.hostname.as_deref());
    add("container_id", process.labels.container.as_deref());
    add("unit", process.labels.unit.as_deref());
    add("namespace", process.labels.namespace.as_deref());
    add("pod", process.labels.pod.as_deref());
    add("container", process.labels.container_name.as_deref());
    add("node", process.labels.node.as_deref());
    labels
}

/// The name of a service that outlives its processes.
fn service(labels: &Labels) -> Option<&str> {
    // A pod's name changes with each deploy, that of its container does not; a container's unit is named after its id.
    let unit = labels.unit.as_deref().filter(|_| labels.container.is_none());
    let unit = unit.map(|unit| unit.trim_end_matches(".service"));
    labels.container_name.as_deref().or(unit)
}

#[derive(Clone, PartialEq, Message)]
pub struct PushRequest {
    #[prost(message, repeated, tag = "1")]
    pub series: Vec<RawProfileSeries>,
}

#[derive(Clone, PartialEq, Message)]
pub struct RawProfileSeries {
    #[prost(message, repeated, tag = "1")]
    pub labels: Vec<LabelPair>,
    #[prost(message, repeated, tag = "2")]
    pub samples: Vec<RawSample>,
}

#[derive(Clone, PartialEq, Eq, Message)]
pub struct LabelPair {
    #[prost(string, tag = "1")]
    pub name: String,
    #[prost(string, tag = "2")]
    pub value: String,
}

#[derive(Clone, PartialEq, Eq, Message)]
pub struct RawSample {
    /// A profile, which may be compressed.
    #[prost(bytes = "vec", tag = "1")]
    pub raw_profile: Vec<u8>,
}

/// The body of a push to Pyroscope.
pub fn pyroscope(series: &[Series]) -> Vec<u8> {
    let series = series.iter().map(|series| RawProfileSeries {
        labels: series
            .labels
            .iter()
            .map(|(name, value)| LabelPair { name: name.clone(), value: value.clone() })
            .collect(),
        samples: vec![RawSample { raw_profile: series.profile.clone() }],
    });
    PushRequest { series: series.collect() }.encode_to_vec()
}

/// The body of a push to Parca: the JSON form of its messages, with bytes in base64.
pub fn parca(series: &[Series]) -> Vec<u8> {
    let series: Vec<Value> = series
        .iter()
        .map(|series| {
            let labels: Vec<Value> =
                series.labels.iter().map(|(name, value)| json!({"name": name, "value": value})).collect();
            json!({"labels": {"labels": labels}, "samples": [{"rawProfile": STANDARD.encode(&series.profile)}]})
        })
        .collect();
    json!({"series": series, "normalized": false}).to_string().into_bytes()
}
