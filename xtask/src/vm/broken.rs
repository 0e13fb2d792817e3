//! Mistakes made on purpose (`cargo xtask vm --broken`), to see that the suite finds them: where, and nowhere else.

use clap::ValueEnum;

use super::kernels::Kernel;
use super::machine::Outcome;

/// A mistake in the BPF programs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Broken {
    /// `aligned_alloc` and its like are given the size that is in another argument's register.
    Argument,
    /// The entry programs call a helper that 5.10 does not have.
    Helper,
}

impl Broken {
    /// As leak-user's build script has it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Argument => "argument",
            Self::Helper => "helper",
        }
    }

    /// Whether this test must fail on this kernel.
    fn breaks(self, kernel: &Kernel, test: &str) -> bool {
        match self {
            // Those that look at sizes of that function.
            Self::Argument => {
                ["sizes_and_addresses_of_each_function", "filtered_sizes_then_a_killed_tracer"].contains(&test)
            }
            // Nothing can be traced there.
            Self::Helper => kernel.version == "5.10" && test != "doctor_finds_what_there_is",
        }
    }

    /// Whether those tests failed that must, and no others. What does not concern the tests must be as ever.
    pub fn is_found(self, kernel: &Kernel, outcome: &Outcome) -> bool {
        let expected = |(test, result): (&String, &Option<bool>)| *result == Some(!self.breaks(kernel, test));
        outcome.complete
            && outcome.complaints.is_empty()
            && !outcome.tests.is_empty()
            && outcome.tests.iter().all(expected)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vm::arch::Arch;

    /// A mistake is found where the tests that can see it fail, and only those.
    #[test]
    fn found_where_the_right_tests_fail() {
        let kernels = Kernel::choose(&["5.10".to_owned(), "6.1".to_owned()], &[Arch::X86_64]);
        let outcome = |sizes, jumps| Outcome {
            tests: [
                ("sizes_and_addresses_of_each_function".to_owned(), Some(sizes)),
                ("calls_left_by_a_jump".to_owned(), Some(jumps)),
            ]
            .into(),
            complete: true,
            ..Outcome::default()
        };
        for kernel in &kernels {
            assert!(Broken::Argument.is_found(kernel, &outcome(false, true)));
            for (sizes, jumps) in [(true, true), (false, false)] {
                assert!(!Broken::Argument.is_found(kernel, &outcome(sizes, jumps)));
            }
            let is_old = kernel.version == "5.10";
            assert_eq!(Broken::Helper.is_found(kernel, &outcome(false, false)), is_old);
            assert_eq!(Broken::Helper.is_found(kernel, &outcome(true, true)), !is_old);
        }
        assert!(!Broken::Argument.is_found(&kernels[0], &Outcome { complete: false, ..outcome(false, true) }));
    }
}
