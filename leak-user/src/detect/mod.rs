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
//! No verdict but [`Verdict::Warming`] comes within the first [`MIN_WATCH`] = 28 base windows (seconds) of a stack: that is
//! how long it takes to tell a leak from sessions of 20 s that follow a set-up of 5 s, which both only pile up at first.
//! Above about two kept blocks a second every simulated leak is called growing at 30 s, also as a hundredth of a churn of
//! blocks that live for a second. At a block a second, at random, it is 98.5 of 100 at 30 s (95 beside such churn), all but
//! one in some hundreds at 35 s, and all if they come evenly. Slower leaks need five kept blocks at least and as much time
//! as the coarser windows take: a block each 8 s 80 s; one each 10 s, at random, three minutes in nine of ten cases and five
//! minutes in 98 of 100. A leak beside longer-lived blocks of the same stack shows once those have gone, after about twice
//! their life.
//!
//! What stops growing is no longer called growing 20 s later, or, where blocks came more slowly than one in four
//! seconds, after five times their mean distance. Beside churn in the same stack a few in ten thousand verdicts come later.
//!
//! # What cannot be told
//!
//! Tracing does not see what was allocated before it began. A cache that is full already, but replaces its entries only
//! every ten minutes, looks for those ten minutes as one that fills: its stack is called growing until the first of its
//! blocks are seen to leave. A cache that does fill is called growing while it does, which is true.
//! [`judge_process`] says so when the resident set does not confirm the growth.
//!
//! Blocks that live longer than 20 s at a steady rate pile up for as long as tracing is younger than they get. Of pools that
//! release last what came first, and whose size wanders by chance, about a quarter are called growing at some time, while
//! they are larger than ever: their oldest blocks do stay.
//!
//! A container that doubles has no steps between its doublings, and is called growing for 20 s after each, if at all.

mod process;
mod stack;
mod stats;

pub use process::{Hint, ProcessJudgement, ProcessVerdict, Sample, StackSummary, judge_process};
pub use stack::{Evidence, Growth, Judgement, MIN_WATCH, Verdict, judge};
pub use stats::around;
pub(crate) use stats::normal_below;

#[cfg(test)]
mod sampled_tests;
#[cfg(test)]
pub(crate) mod simulation;
#[cfg(test)]
mod tests;
