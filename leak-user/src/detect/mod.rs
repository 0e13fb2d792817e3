//! Turns the history of a call stack into a verdict with its evidence, and the stacks' verdicts with the resident set into
//! the process's. Plain functions: no I/O, no clock, no symbols; the same history always gives the same verdict.
//!
//! # What makes a leak
//!
//! Two things together ([`judge`]):
//!
//! 1. *The floor rises*: the fewest live bytes of each window go up (Mann-Kendall test, Theil-Sen slope).
//! 2. *Cohorts stay*: of the blocks born in every earlier window a part is still there, and it no longer shrinks. How long
//!    blocks live is learned from the releases: the settling age is the age from which on hardly any are released any more.
//!    Only blocks older than that count as kept.
//!
//! A queue whose length wanders has rising floors at times, but its blocks do not stay; a full cache's blocks stay for
//! long, but its floor does not rise. A container that grows by being reallocated (a vector that doubles, a table that
//! rehashes) has few blocks and no cohorts to speak of, and is judged by its floor.
//!
//! This is judged at several scales, from windows of 1 s (the last half minute) to 256 s (the last hour), so that a leak
//! of a block every ten seconds is found too, only later.
//!
//! # How long it takes
//!
//! No verdict but [`Verdict::Warming`] comes within the first [`MIN_WATCH`] = 25 base windows (seconds) of a stack. A
//! steady leak with at least one kept block a second is called growing within 30 s. At slower pace it takes about ten
//! kept blocks, and no fewer than 25 s.
//!
//! What stops growing is no longer called growing 20 s later, or, where blocks came more slowly than one in four
//! seconds, after five times their mean distance.
//!
//! # What cannot be told
//!
//! Tracing does not see what was allocated before it began. A cache that is full already, but replaces its entries only
//! every ten minutes, looks for those ten minutes as one that fills: its stack is called growing until the first of its
//! blocks are seen to leave. A cache that does fill is called growing while it does, which is true.
//! [`judge_process`] says so when the resident set does not confirm the growth.

mod process;
mod stack;
mod stats;

pub use process::{Hint, ProcessJudgement, ProcessVerdict, StackSummary, judge_process};
pub use stack::{Evidence, Growth, Judgement, MIN_WATCH, Verdict, judge};
