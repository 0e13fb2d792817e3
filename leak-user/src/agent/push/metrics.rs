//! The metrics for an OpenTelemetry collector: those that Prometheus would scrape, since they are made of that very page.
//!
//! So there is one list of metrics, and a dashboard works on both ways. Names keep their units at the end, which a collector that exports to
//! Prometheus does not add twice. Counters are cumulative since the agent's start. The messages are a part of those of
//! <https://github.com/open-telemetry/opentelemetry-proto/tree/v1.8.0/opentelemetry/proto>, written out with their tags; the crate with all
//! of them brings tonic.

use std::collections::BTreeMap;

use prost::Message;

use super::config::Endpoint;
use super::nanoseconds;
use crate::export::openmetrics::{self, Figures, Limits, Own};
use crate::report::Report;

/// `AGGREGATION_TEMPORALITY_CUMULATIVE`.
const CUMULATIVE: i32 = 2;

/// The body of an export.
pub fn request(report: &Report, limits: Limits, figures: &Figures, endpoint: &Endpoint) -> Vec<u8> {
    let page = openmetrics::text(report, limits, Own::read(), figures).unwrap_or_default();
    let start = nanoseconds(report, 0.0);
    let metrics = metrics(&page, start, nanoseconds(report, report.duration_s));
    let mut attributes =
        vec![attribute("service.name", "leaktrace"), attribute("service.version", &report.tool.version)];
    attributes.extend(report.host.hostname.as_deref().map(|name| attribute("host.name", name)));
    attributes.extend(endpoint.labels.iter().map(|(name, value)| attribute(name, value)));
    let scope = Scope { name: report.tool.name.clone(), version: report.tool.version.clone() };
    let resource_metrics = vec![ResourceMetrics {
        resource: Some(Resource { attributes }),
        scope_metrics: vec![ScopeMetrics { scope: Some(scope), metrics }],
    }];
    ExportRequest { resource_metrics }.encode_to_vec()
}

fn attribute(key: &str, value: &str) -> KeyValue {
    KeyValue { key: key.to_owned(), value: Some(AnyValue { value: Some(any_value::Value::Text(value.to_owned())) }) }
}

/// What a page in the text form of `OpenMetrics`, our own, holds.
fn metrics(page: &str, start: u64, now: u64) -> Vec<Metric> {
    let mut found: Vec<Metric> = Vec::new();
    let mut types: BTreeMap<&str, &str> = BTreeMap::new();
    for line in page.lines() {
        if let Some(rest) = line.strip_prefix("# ") {
            let mut parts = rest.splitn(3, ' ');
            let (Some(what), Some(name), Some(text)) = (parts.next(), parts.next(), parts.next()) else { continue };
            if found.last().is_none_or(|metric| metric.name != name) {
                found.push(Metric { name: name.to_owned(), ..Metric::default() });
            }
            let Some(metric) = found.last_mut() else { continue };
            match what {
                "HELP" => text.trim_end_matches('.').clone_into(&mut metric.description),
                "UNIT" => unit(text).clone_into(&mut metric.unit),
                "TYPE" => drop(types.insert(name, text)),
                _ => {}
            }
            continue;
        }
        let (Some(metric), Some((name, attributes, value))) = (found.last_mut(), sample(line)) else { continue };
        let counts = types.get(metric.name.as_str()) == Some(&"counter");
        // The family's name with what its type puts behind it.
        if !name.starts_with(metric.name.as_str()) {
            continue;
        }
        let point = NumberDataPoint {
            attributes,
            start_time_unix_nano: if counts { start } else { 0 },
            time_unix_nano: now,
            value: Some(number_data_point::Value::AsDouble(value)),
        };
        let points = match metric.data.get_or_insert_with(|| {
            if counts {
                metric::Data::Sum(Sum { aggregation_temporality: CUMULATIVE, is_monotonic: true, ..Sum::default() })
            } else {
                metric::Data::Gauge(Gauge::default())
            }
        }) {
            metric::Data::Sum(sum) => &mut sum.data_points,
            metric::Data::Gauge(gauge) => &mut gauge.data_points,
        };
        points.push(point);
    }
    found.retain(|metric| metric.data.is_some());
    found
}

/// As the Unified Code for Units of Measure writes it.
fn unit(name: &str) -> &str {
    match name {
        "bytes" => "By",
        "seconds" => "s",
        "ratios" | "ratio" => "1",
        "bytes_per_second" => "By/s",
        other => other,
    }
}

/// A line `name{label="value",...} number`.
fn sample(line: &str) -> Option<(&str, Vec<KeyValue>, f64)> {
    let name_end = line.find(['{', ' '])?;
    let (name, mut rest) = line.split_at(name_end);
    let mut attributes = Vec::new();
    if let Some(labels) = rest.strip_prefix('{') {
        rest = labels;
        while !rest.starts_with('}') {
            let (key, quoted) = rest.split_once("=\"")?;
            let (value, behind) = unquote(quoted)?;
            attributes.push(attribute(key, &value));
            rest = behind.strip_prefix(',').unwrap_or(behind);
        }
        rest = &rest[1..];
    }
    let value = rest.trim_start().split(' ').next()?.parse().ok()?;
    Some((name, attributes, value))
}

/// The text up to the quote that ends it, and what is behind that.
fn unquote(quoted: &str) -> Option<(String, &str)> {
    let mut text = String::new();
    let mut chars = quoted.char_indices();
    while let Some((at, c)) = chars.next() {
        match c {
            '"' => return Some((text, &quoted[at + 1..])),
            '\\' => text.push(match chars.next()?.1 {
                'n' => '\n',
                other => other,
            }),
            other => text.push(other),
        }
    }
    None
}

#[derive(Clone, PartialEq, Message)]
pub struct ExportRequest {
    #[prost(message, repeated, tag = "1")]
    pub resource_metrics: Vec<ResourceMetrics>,
}

#[derive(Clone, PartialEq, Message)]
pub struct ResourceMetrics {
    #[prost(message, optional, tag = "1")]
    pub resource: Option<Resource>,
    #[prost(message, repeated, tag = "2")]
    pub scope_metrics: Vec<ScopeMetrics>,
}

#[derive(Clone, PartialEq, Message)]
pub struct Resource {
    #[prost(message, repeated, tag = "1")]
    pub attributes: Vec<KeyValue>,
}

#[derive(Clone, PartialEq, Message)]
pub struct KeyValue {
    #[prost(string, tag = "1")]
    pub key: String,
    #[prost(message, optional, tag = "2")]
    pub value: Option<AnyValue>,
}

#[derive(Clone, PartialEq, Message)]
pub struct AnyValue {
    #[prost(oneof = "any_value::Value", tags = "1")]
    pub value: Option<any_value::Value>,
}

pub mod any_value {
    #[derive(Clone, PartialEq, Eq, prost::Oneof)]
    pub enum Value {
        #[prost(string, tag = "1")]
        Text(String),
    }
}

#[derive(Clone, PartialEq, Message)]
pub struct ScopeMetrics {
    #[prost(message, optional, tag = "1")]
    pub scope: Option<Scope>,
    #[prost(message, repeated, tag = "2")]
    pub metrics: Vec<Metric>,
}

/// `InstrumentationScope`.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct Scope {
    #[prost(string, tag = "1")]
    pub name: String,
    #[prost(string, tag = "2")]
    pub version: String,
}

#[derive(Clone, PartialEq, Message)]
pub struct Metric {
    #[prost(string, tag = "1")]
    pub name: String,
    #[prost(string, tag = "2")]
    pub description: String,
    #[prost(string, tag = "3")]
    pub unit: String,
    #[prost(oneof = "metric::Data", tags = "5, 7")]
    pub data: Option<metric::Data>,
}

pub mod metric {
    #[derive(Clone, PartialEq, prost::Oneof)]
    pub enum Data {
        #[prost(message, tag = "5")]
        Gauge(super::Gauge),
        #[prost(message, tag = "7")]
        Sum(super::Sum),
    }
}

#[derive(Clone, PartialEq, Message)]
pub struct Gauge {
    #[prost(message, repeated, tag = "1")]
    pub data_points: Vec<NumberDataPoint>,
}

#[derive(Clone, PartialEq, Message)]
pub struct Sum {
    #[prost(message, repeated, tag = "1")]
    pub data_points: Vec<NumberDataPoint>,
    #[prost(int32, tag = "2")]
    pub aggregation_temporality: i32,
    #[prost(bool, tag = "3")]
    pub is_monotonic: bool,
}

#[derive(Clone, PartialEq, Message)]
pub struct NumberDataPoint {
    #[prost(message, repeated, tag = "7")]
    pub attributes: Vec<KeyValue>,
    #[prost(fixed64, tag = "2")]
    pub start_time_unix_nano: u64,
    #[prost(fixed64, tag = "3")]
    pub time_unix_nano: u64,
    #[prost(oneof = "number_data_point::Value", tags = "4")]
    pub value: Option<number_data_point::Value>,
}

pub mod number_data_point {
    #[derive(Clone, PartialEq, prost::Oneof)]
    pub enum Value {
        #[prost(double, tag = "4")]
        AsDouble(f64),
    }
}

#[derive(Clone, PartialEq, Eq, Message)]
pub struct ExportResponse {
    #[prost(message, optional, tag = "1")]
    pub partial_success: Option<PartialSuccess>,
}

#[derive(Clone, PartialEq, Eq, Message)]
pub struct PartialSuccess {
    #[prost(int64, tag = "1")]
    pub rejected_data_points: i64,
    #[prost(string, tag = "2")]
    pub error_message: String,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::sample;

    /// Every series of the page is a point, with its labels, value and unit; names with quotes and the like arrive as they are.
    #[test]
    fn all_of_the_page() {
        let mut report = sample::system();
        let odd = "a\"b\\c}, {x=\"1\"} 7";
        report.processes[0].comm = odd.to_owned();
        let figures = Figures { degraded: vec![("http", false)], counts: vec![("http", "refused", 3)] };
        let page = openmetrics::text(&report, Limits::default(), None, &figures).unwrap();
        let metrics = metrics(&page, 7, 9);
        let points = |metric: &Metric| match metric.data.clone().unwrap() {
            metric::Data::Gauge(gauge) => gauge.data_points,
            metric::Data::Sum(sum) => {
                assert!(sum.is_monotonic && sum.aggregation_temporality == CUMULATIVE);
                assert!(sum.data_points.iter().all(|point| point.start_time_unix_nano == 7));
                sum.data_points
            }
        };
        let series = page.lines().filter(|line| !line.starts_with('#')).count();
        assert_eq!(metrics.iter().map(|metric| points(metric).len()).sum::<usize>(), series);
        let metric = |name: &str| metrics.iter().find(|metric| metric.name == name).unwrap();
        let live = metric("leaktrace_process_live_bytes");
        assert_eq!(live.unit, "By");
        let process = attribute("process", odd);
        let point = points(live).into_iter().find(|point| point.attributes.contains(&process)).unwrap();
        assert_eq!(point.time_unix_nano, 9);
        assert_eq!(point.value, Some(number_data_point::Value::AsDouble(report.processes[0].live_bytes as f64)));
        assert!(matches!(metric("leaktrace_events").data, Some(metric::Data::Sum(_))));
        assert_eq!(metric("leaktrace_process_growth_bytes_per_second").unit, "By/s");
    }
}
