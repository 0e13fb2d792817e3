//! The ledger's time: nanoseconds become ticks (stored with each block) and windows (in which histories count). Both are
//! numbered from the first time that the ledger was told of.

use super::history::{BASE_WINDOW_NS, Window};

/// Length of a tick, and the granularity of a block's birth: 32 bits of them last 198 days, after which all births are
/// the last tick. As fine as the kernel's coarse clock at 250 Hz, and windows are whole numbers of them.
pub(super) const TICK_NS: u64 = 4_000_000;

const TICKS_PER_WINDOW: u32 = (BASE_WINDOW_NS / TICK_NS) as u32;
const _: () = assert!(BASE_WINDOW_NS.is_multiple_of(TICK_NS));

/// A time in ticks.
pub(super) type Tick = u32;

/// The window that a tick lies in.
#[inline]
pub(super) fn window_of(tick: Tick) -> Window {
    tick / TICKS_PER_WINDOW
}

#[derive(Clone, Debug, Default)]
pub(super) struct Clock {
    origin: Option<u64>,
    latest: Tick,
}

impl Clock {
    /// Ticks since the first time; zero for what is earlier.
    #[inline]
    pub fn tick(&self, time: u64) -> Tick {
        let since = time.saturating_sub(self.origin.unwrap_or(time));
        Tick::try_from(since / TICK_NS).unwrap_or(Tick::MAX)
    }

    /// The tick of `time`, which is also remembered if it is the latest yet. Records of several processors may come a
    /// little out of order.
    #[inline]
    pub fn advance(&mut self, time: u64) -> Tick {
        if self.origin.is_none() {
            self.origin = Some(time);
        }
        let tick = self.tick(time);
        self.latest = self.latest.max(tick);
        tick
    }

    /// The latest tick yet.
    #[inline]
    pub fn latest(&self) -> Tick {
        self.latest
    }

    /// The first time, in nanoseconds.
    pub fn origin(&self) -> Option<u64> {
        self.origin
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Ticks count from the first time, what is earlier is tick zero, and the latest never goes back.
    #[test]
    fn counts_from_the_first_time() {
        let mut clock = Clock::default();
        assert_eq!(clock.advance(7 * BASE_WINDOW_NS), 0);
        assert_eq!(window_of(clock.advance(9 * BASE_WINDOW_NS - 1)), 1);
        assert_eq!(window_of(clock.advance(9 * BASE_WINDOW_NS)), 2);
        assert_eq!(clock.advance(BASE_WINDOW_NS), 0);
        assert_eq!(window_of(clock.latest()), 2);
        assert_eq!(clock.advance(u64::MAX), Tick::MAX);
    }
}
