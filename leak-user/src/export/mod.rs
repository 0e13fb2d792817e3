//! The report in the formats of other tools. Like [`crate::view`], reads nothing but [`crate::report::Report`].
//!
//! - [`pprof`]: a profile for `go tool pprof`, Pyroscope and Parca;
//! - [`openmetrics`]: a page for Prometheus, which the agent serves.

pub mod openmetrics;
pub mod pprof;

use std::hash::Hasher as _;

use fnv::FnvHasher;

use crate::report::Stack;

/// An id of a stack by the places of its code in their files, 16 hexadecimal digits: the same in every run of the same build, and in
/// every process of it, whatever addresses they have. Files are known by build id, those without one by path.
///
/// The hash is FNV-1a, which is the same in all versions and on all machines; dashboards keep these ids.
pub fn stable_id(stack: &Stack) -> String {
    let mut hasher = FnvHasher::default();
    // Inlined functions are at the place of the function that they are in.
    for frame in stack.frames.iter().filter(|frame| !frame.inlined) {
        let file = frame.build_id.as_ref().or(frame.module.as_ref()).map_or("", String::as_str);
        hasher.write(file.as_bytes());
        // No byte of UTF-8, so that the end of a name is told from its middle.
        hasher.write(&[0xff]);
        hasher.write(&frame.offset.unwrap_or(u64::MAX).to_le_bytes());
    }
    hasher.write(stack.op.as_deref().unwrap_or_default().as_bytes());
    format!("{:016x}", hasher.finish())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::sample;

    /// The id does not follow addresses or names, but the places in the files.
    #[test]
    fn stable_ids() {
        let mut process = sample::leaking().processes.remove(0);
        let stack = &mut process.stacks[0];
        let id = stable_id(stack);
        // Computed by another program; a change would break every dashboard.
        assert_eq!(id, "69b26b86a180aaa6");
        stack.id = "another".to_owned();
        stack.frames[2].function = None;
        stack.frames[2].module = Some("/elsewhere".to_owned());
        assert_eq!(stable_id(stack), id);
        stack.frames[2].offset = Some(1);
        assert_ne!(stable_id(stack), id);
    }
}
