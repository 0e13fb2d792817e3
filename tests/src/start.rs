//! Starting programs that a test has just written.

use std::io;
use std::process::{Child, Command};
use std::thread;
use std::time::{Duration, Instant};

use crate::patience;

/// Starts a command. A program that this process has just copied may still be open for writing in a child that another test's thread has
/// forked and that has not executed its own program yet; the kernel then refuses it, and it goes by.
pub fn start(command: &mut Command) -> io::Result<Child> {
    let began = Instant::now();
    loop {
        match command.spawn() {
            Err(error) if error.kind() == io::ErrorKind::ExecutableFileBusy && began.elapsed() < patience() => {
                thread::sleep(Duration::from_millis(5));
            }
            started => return started,
        }
    }
}
