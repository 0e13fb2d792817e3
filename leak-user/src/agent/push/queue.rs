//! What waits to be sent: bounded in number and in bytes, and where it is full the oldest goes.

use std::collections::VecDeque;
use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use tokio::sync::Notify;

use crate::view::bytes;
use crate::view::units::plural;

/// The body of a request; a clone shares it.
#[derive(Clone, Debug)]
pub struct Payload(Bytes);

impl Payload {
    pub fn new(body: Vec<u8>) -> Self {
        Self(body.into())
    }

    pub fn body(&self) -> Bytes {
        self.0.clone()
    }

    /// Whether it is this very payload, not one with the same bytes.
    fn is(&self, other: &Self) -> bool {
        self.0.as_ptr() == other.0.as_ptr() && self.0.len() == other.0.len()
    }
}

/// How much waits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Held {
    pub payloads: usize,
    pub bytes: usize,
}

impl fmt::Display for Held {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} of {}", plural(self.payloads as u64, "payload"), bytes(self.bytes as u64))
    }
}

pub struct Queue {
    waiting: Mutex<VecDeque<Payload>>,
    /// Nothing comes any more.
    closed: AtomicBool,
    came: Notify,
    most: usize,
    most_bytes: usize,
}

impl Queue {
    pub fn new(most: usize, most_bytes: usize) -> Self {
        Self { waiting: Mutex::default(), closed: AtomicBool::new(false), came: Notify::new(), most, most_bytes }
    }

    fn waiting(&self) -> MutexGuard<'_, VecDeque<Payload>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Puts a payload behind the others; gives how many went for it, itself included if it is too large by itself.
    pub fn put(&self, payload: Payload) -> u64 {
        if payload.0.len() > self.most_bytes {
            return 1;
        }
        let mut waiting = self.waiting();
        waiting.push_back(payload);
        let mut dropped = 0;
        while waiting.len() > self.most || waiting.iter().map(|one| one.0.len()).sum::<usize>() > self.most_bytes {
            waiting.pop_front();
            dropped += 1;
        }
        drop(waiting);
        self.came.notify_one();
        dropped
    }

    /// The oldest, once there is one. It stays in the queue. `None` where there is none and none will come.
    pub async fn first(&self) -> Option<Payload> {
        loop {
            // Looked at before what waits is, or the last one could come in between.
            let closed = self.closed.load(Ordering::Acquire);
            if let Some(payload) = self.waiting().front().cloned() {
                return Some(payload);
            }
            if closed {
                return None;
            }
            self.came.notified().await;
        }
    }

    /// Nothing is put in after this.
    pub fn close(&self) {
        self.closed.store(true, Ordering::Release);
        self.came.notify_one();
    }

    pub fn held(&self) -> Held {
        let waiting = self.waiting();
        Held { payloads: waiting.len(), bytes: waiting.iter().map(|one| one.0.len()).sum() }
    }

    /// Takes a payload out, if it has not gone for a newer one meanwhile.
    pub fn remove(&self, payload: &Payload) {
        self.waiting().retain(|one| !one.is(payload));
    }

    #[cfg(test)]
    fn lengths(&self) -> Vec<usize> {
        self.waiting().iter().map(|one| one.0.len()).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(bytes: usize) -> Payload {
        Payload::new(vec![0; bytes])
    }

    /// The oldest go where there are too many, or too many bytes; one that is too large by itself takes no others with it.
    #[tokio::test]
    async fn bounds() {
        let queue = Queue::new(3, 100);
        assert_eq!([1, 2, 3, 4].map(|bytes| queue.put(of(bytes))), [0, 0, 0, 1]);
        assert_eq!(queue.lengths(), [2, 3, 4]);
        assert_eq!(queue.put(of(101)), 1);
        assert_eq!(queue.lengths(), [2, 3, 4]);
        assert_eq!(queue.put(of(95)), 2);
        assert_eq!(queue.lengths(), [4, 95]);
        let first = queue.first().await.unwrap();
        queue.put(of(100));
        // It went meanwhile, and nothing else goes in its place.
        queue.remove(&first);
        assert_eq!(queue.lengths(), [100]);
        let last = queue.first().await.unwrap();
        queue.remove(&last);
        assert_eq!(queue.lengths(), [0_usize; 0]);
        queue.put(of(7));
        queue.close();
        assert_eq!(queue.held().to_string(), "1 payload of 7.00 B");
        let last = queue.first().await.unwrap();
        queue.remove(&last);
        assert!(queue.first().await.is_none());
    }
}
