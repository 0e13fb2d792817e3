//! Where the reports of a run go.

use std::time::Duration;

use anyhow::Result;

use crate::process::ProcessId;
use crate::report::{Labels, Report};
use crate::view::{Input, Outcome, Output};

/// A process that is watched, as of the last look at it. Which of them are traced, and what is known of those, is in the report.
#[derive(Clone, Copy, Debug)]
pub struct Observed<'a> {
    pub id: ProcessId,
    pub comm: &'a str,
    pub exe: Option<&'a str>,
    /// Of the executable; found once the process has been watched for a while.
    pub build_id: Option<&'a str>,
    pub labels: &'a Labels,
    pub resident_bytes: u64,
    /// Growth of its own pages; `None` while too little was seen.
    pub growth_bytes_per_s: Option<f64>,
    /// For how long it has been watched.
    pub watched: Duration,
}

/// Takes the reports of a run.
pub trait Sink {
    /// Whether somebody looks at it: then the first report comes soon.
    fn is_live(&self) -> bool {
        false
    }

    /// Whether there are keys to wait for: then [`Self::poll_input`] is called often.
    fn has_keys(&self) -> bool {
        false
    }

    /// What the user wants, waiting up to `timeout` for it.
    fn poll_input(&mut self, _timeout: Duration) -> Result<Option<Input>> {
        Ok(None)
    }

    /// Whether [`Self::observe`] does something.
    fn observes(&self) -> bool {
        false
    }

    /// Everything that is watched, before the report of an interval is given: for what a report does not list. May add to the report what
    /// is known from elsewhere. Only where the whole system is traced.
    fn observe(&mut self, _processes: &mut dyn Iterator<Item = Observed<'_>>, _report: &mut Report) {}

    /// The report of an interval.
    fn interval(&mut self, report: Report) -> Result<Outcome>;

    /// The final report.
    fn finish(self, report: &Report) -> Result<Outcome>;
}

impl Sink for Output {
    fn is_live(&self) -> bool {
        self.is_live()
    }

    fn has_keys(&self) -> bool {
        self.is_live()
    }

    fn poll_input(&mut self, timeout: Duration) -> Result<Option<Input>> {
        self.poll_input(timeout)
    }

    fn interval(&mut self, report: Report) -> Result<Outcome> {
        self.interval(&report)
    }

    fn finish(self, report: &Report) -> Result<Outcome> {
        self.finish(report)
    }
}
