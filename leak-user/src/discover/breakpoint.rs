//! Where in a function its breakpoint stands.
//!
//! The kernel runs the instruction under a breakpoint either by emulation or by single-stepping a copy of it, which costs
//! several times as much. On arm64 it is what depends on the pc that is emulated (see `aarch64`). On x86-64 `arch_uprobe_analyze_insn` (arch/x86/kernel/uprobes.c) asks two functions whether they
//! can emulate: `branch_setup_xol_ops` takes nop and the relative jmp, jcc and call, `push_setup_xol_ops` takes push of a
//! register; all else is stepped. glibc's free begins with `test %rdi,%rdi` and only then has a `je`, so a breakpoint on the
//! `je` sees the same arguments at a fraction of the cost.
//!
//! [`place`] therefore chooses the first instruction that is emulated, provided that whoever calls the function always gets
//! there exactly once, with arguments, stack pointer, frame pointer and return address as they were at the entry. Where that
//! is not certain, the breakpoint stands at the entry. Which functions to look at, and where their code is, is
//! [`super::elf`]'s business.

/// How many bytes behind the entry of a function of unknown size are searched for jumps back to its beginning.
pub const UNKNOWN_SIZE_SCAN: usize = 4096;

/// Larger functions are not decoded whole.
pub const MAX_FUNCTION: usize = 1 << 20;

#[cfg(any(test, target_arch = "aarch64"))]
mod aarch64;

#[cfg(target_arch = "aarch64")]
pub use aarch64::loaded_address;

/// What the running kernel emulates beyond what all of them do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Emulation {
    /// On x86-64 the nops of more than one byte, since 6.18 (the comparison with `x86_nops` in `branch_setup_xol_ops`); on arm64
    /// the nop, since 6.14 (`simulate_nop`).
    pub nops: bool,
}

/// The release since which [`Emulation::nops`] are emulated.
const NOPS_SINCE: (u32, u32) = if cfg!(target_arch = "aarch64") { (6, 14) } else { (6, 18) };

impl Emulation {
    /// What the running kernel does, going by its release.
    pub fn of_this_kernel() -> Self {
        let release = nix::sys::utsname::uname().ok();
        Self::of_release(release.as_ref().and_then(|u| u.release().to_str()).unwrap_or_default())
    }

    /// What a kernel of that release, such as `6.18.44-cloud`, does. Of an unreadable release: what all do.
    fn of_release(release: &str) -> Self {
        let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(|n| n.parse::<u32>().ok());
        let version = (numbers.next().flatten().unwrap_or(0), numbers.next().flatten().unwrap_or(0));
        Self { nops: version >= NOPS_SINCE }
    }
}

/// Where a breakpoint stands, and why there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Placement {
    /// Bytes behind the function's entry.
    pub skipped: u64,
    pub reason: Reason,
}

/// Why a breakpoint stands where it does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reason {
    /// The first instruction is emulated.
    EntryEmulated,
    /// A later instruction is emulated, and nothing before it matters.
    LaterEmulated,
    /// At the entry, single-stepped: before any emulated instruction one changes a register or memory that matters.
    NotPreserved,
    /// At the entry: no emulated instruction is near.
    NoneNear,
    /// At the entry: a jump inside the function lands behind it, so a later breakpoint could be hit twice.
    BranchTarget,
    /// At the entry: the function has an indirect jump, whose targets are unknown.
    IndirectJump,
    /// At the entry: the function's size is unknown or too large to decode.
    UnknownExtent,
    /// At the entry: the code cannot be decoded.
    Undecodable,
}

impl Reason {
    /// For `doctor` and logs.
    pub fn text(self) -> &'static str {
        match self {
            Self::EntryEmulated => "the first instruction is emulated",
            Self::LaterEmulated => "the first emulated instruction",
            Self::NotPreserved => "single-stepped: an argument or the stack pointer changes first",
            Self::NoneNear => "single-stepped: no emulated instruction near",
            Self::BranchTarget => "single-stepped: a jump lands right behind the entry",
            Self::IndirectJump => "single-stepped: an indirect jump has unknown targets",
            Self::UnknownExtent => "single-stepped: the function's size is unknown",
            Self::Undecodable => "single-stepped: the code cannot be decoded",
        }
    }

    /// Whether the kernel emulates the instruction there, as far as is known.
    pub fn is_emulated(self) -> bool {
        matches!(self, Self::EntryEmulated | Self::LaterEmulated)
    }
}

/// Chooses the place in the function whose code begins at `code[0]`.
///
/// `size` is the function's length in bytes, if known. `code` should hold that many bytes, or [`UNKNOWN_SIZE_SCAN`] where the
/// size is unknown; with fewer the choice is only more cautious.
#[cfg(target_arch = "x86_64")]
pub fn place(code: &[u8], size: Option<usize>, kernel: Emulation) -> Placement {
    x86_64::place(code, size, kernel)
}

/// As above, for arm64.
#[cfg(target_arch = "aarch64")]
pub fn place(code: &[u8], size: Option<usize>, kernel: Emulation) -> Placement {
    aarch64::place(code, size, kernel)
}

#[cfg(target_arch = "x86_64")]
pub(super) use x86_64::preserves as preserves_arguments;

#[cfg(target_arch = "x86_64")]
mod x86_64 {
    use super::{Emulation, MAX_FUNCTION, Placement, Reason};
    use iced_x86::{
        Code, Decoder, DecoderOptions, FlowControl, Instruction, InstructionInfoFactory, OpAccess, OpKind, Register,
    };

    /// An emulated instruction further away than this many instructions is not looked for.
    const NEAR: usize = 16;

    /// What must be at the breakpoint as it was at the entry: the arguments, the stack pointer, and the frame pointer that
    /// the stack is walked with.
    const PRESERVED: [Register; 8] = [
        Register::RDI,
        Register::RSI,
        Register::RDX,
        Register::RCX,
        Register::R8,
        Register::R9,
        Register::RSP,
        Register::RBP,
    ];

    pub fn place(code: &[u8], size: Option<usize>, kernel: Emulation) -> Placement {
        let entry = |reason| Placement { skipped: 0, reason };
        let body = size.filter(|&s| s <= MAX_FUNCTION).and_then(|s| code.get(..s));
        let candidate = match first_emulated(body.unwrap_or(code), kernel) {
            Ok(Candidate { offset: 0, .. }) => return entry(Reason::EntryEmulated),
            Ok(candidate) => candidate,
            Err(reason) => return entry(reason),
        };
        let branches = Branches::scan(body.unwrap_or(code), candidate.offset);
        let obstacle = if branches.lands_before {
            Some(Reason::BranchTarget)
        } else if candidate.only_landing_pad {
            // Nobody jumps past an endbr64 other than by a direct jump, and there was none: the compiler puts it there for
            // indirect ones.
            None
        } else if body.is_none() {
            Some(Reason::UnknownExtent)
        } else if branches.undecodable {
            Some(Reason::Undecodable)
        } else if branches.indirect {
            Some(Reason::IndirectJump)
        } else {
            None
        };
        match obstacle {
            Some(reason) => entry(reason),
            None => Placement { skipped: candidate.offset, reason: Reason::LaterEmulated },
        }
    }

    /// The first instruction that is emulated, if all before it leave alone what must stay.
    struct Candidate {
        offset: u64,
        /// Nothing but endbr64 is before it.
        only_landing_pad: bool,
    }

    fn first_emulated(code: &[u8], kernel: Emulation) -> Result<Candidate, Reason> {
        let mut info = InstructionInfoFactory::new();
        let mut only_landing_pad = true;
        for instruction in Decoder::with_ip(64, code, 0, DecoderOptions::NONE).iter().take(NEAR) {
            if instruction.is_invalid() {
                return Err(Reason::Undecodable);
            }
            let offset = instruction.ip();
            let bytes = code.get(offset as usize..offset as usize + instruction.len()).ok_or(Reason::Undecodable)?;
            if is_emulated(bytes, kernel) {
                return Ok(Candidate { offset, only_landing_pad });
            }
            if !preserves(&instruction, &mut info) {
                return Err(Reason::NotPreserved);
            }
            only_landing_pad &= instruction.code() == Code::Endbr64;
        }
        Err(Reason::NoneNear)
    }

    /// Whether `branch_setup_xol_ops` or `push_setup_xol_ops` takes the instruction.
    ///
    /// Stricter than they are: no prefixes but the one of push r8..r15. With 0x66 older kernels refuse the probe altogether.
    fn is_emulated(bytes: &[u8], kernel: Emulation) -> bool {
        match *bytes {
            [0x50..=0x57 | 0x90]                        // push r64; nop
            | [0x41, 0x50..=0x57]                       // push r8..r15
            | [0xeb | 0x70..=0x7f, _]                   // jmp rel8; jcc rel8
            | [0xe8 | 0xe9, _, _, _, _]                 // call rel32; jmp rel32
            | [0x0f, 0x80..=0x8f, _, _, _, _] => true,  // jcc rel32
            // x86_nops[3, 4, 5, 7, 8]: only these very bytes.
            [0x0f, 0x1f, 0x00]
            | [0x0f, 0x1f, 0x40, 0]
            | [0x0f, 0x1f, 0x44, 0, 0]
            | [0x0f, 0x1f, 0x80, 0, 0, 0, 0]
            | [0x0f, 0x1f, 0x84, 0, 0, 0, 0, 0] => kernel.nops,
            _ => false,
        }
    }

    /// Whether after the instruction comes the next one, with all that matters as it was.
    pub fn preserves(instruction: &Instruction, info: &mut InstructionInfoFactory) -> bool {
        if instruction.flow_control() != FlowControl::Next || instruction.is_stack_instruction() {
            return false;
        }
        let writes =
            |access| !matches!(access, OpAccess::None | OpAccess::Read | OpAccess::CondRead | OpAccess::NoMemAccess);
        let used = info.info(instruction);
        let registers = used.used_registers().iter();
        // A write to memory could be one to the return address.
        !used.used_memory().iter().any(|m| writes(m.access()))
            && !registers.filter(|r| writes(r.access())).any(|r| PRESERVED.contains(&r.register().full_register()))
    }

    /// What the jumps of a function do to its beginning.
    struct Branches {
        /// One lands behind the entry, up to and including the candidate.
        lands_before: bool,
        indirect: bool,
        undecodable: bool,
    }

    impl Branches {
        fn scan(code: &[u8], candidate: u64) -> Self {
            let mut found = Self { lands_before: false, indirect: false, undecodable: false };
            for instruction in &mut Decoder::with_ip(64, code, 0, DecoderOptions::NONE) {
                found.undecodable |= instruction.is_invalid();
                found.indirect |= instruction.flow_control() == FlowControl::IndirectBranch;
                if instruction.op_count() > 0
                    && matches!(
                        instruction.op0_kind(),
                        OpKind::NearBranch16 | OpKind::NearBranch32 | OpKind::NearBranch64
                    )
                {
                    let target = instruction.near_branch_target();
                    found.lands_before |= target > 0 && target <= candidate;
                }
            }
            found
        }
    }
}

#[cfg(all(test, target_arch = "x86_64"))]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const OLD: Emulation = Emulation { nops: false };
    const NEW: Emulation = Emulation { nops: true };

    fn placed(code: &[u8]) -> (u64, Reason) {
        let p = place(code, Some(code.len()), OLD);
        (p.skipped, p.reason)
    }

    /// glibc 2.36's free: `test %rdi,%rdi; je` puts the breakpoint on the `je`.
    #[test]
    fn free_of_glibc_2_36() {
        let code = [0x48, 0x85, 0xff, 0x74, 0x04, 0x53, 0x48, 0x89, 0xfb, 0x5b, 0xc3];
        assert_eq!(placed(&code), (3, Reason::LaterEmulated));
    }

    /// A first push stays where it is, also one of r8 to r15, and even if a loop jumps behind it.
    #[test]
    fn first_push_is_the_entry() {
        assert_eq!(placed(&[0x55, 0x48, 0x89, 0xe5, 0x5d, 0xc3]), (0, Reason::EntryEmulated));
        assert_eq!(placed(&[0x41, 0x54, 0xeb, 0xfe]), (0, Reason::EntryEmulated));
    }

    /// endbr64 is single-stepped: the push after it is taken, even where the size is unknown or an indirect jump follows.
    #[test]
    fn landing_pad_is_skipped() {
        let code = [0xf3, 0x0f, 0x1e, 0xfa, 0x41, 0x54, 0xff, 0xe0];
        assert_eq!(placed(&code), (4, Reason::LaterEmulated));
        assert_eq!(place(&code, None, OLD), Placement { skipped: 4, reason: Reason::LaterEmulated });
    }

    /// A loop that jumps back behind the landing pad keeps the breakpoint at the entry, also where the size is unknown.
    #[test]
    fn loop_behind_the_landing_pad() {
        let code = [0xf3, 0x0f, 0x1e, 0xfa, 0x50, 0x58, 0xeb, 0xfc];
        assert_eq!(placed(&code), (0, Reason::BranchTarget));
        assert_eq!(place(&code, None, OLD).reason, Reason::BranchTarget);
    }

    /// A jump back to the chosen instruction or between keeps the breakpoint at the entry; one to the entry does not matter.
    #[test]
    fn loops_back() {
        let with_target = |rel: u8| [0x48, 0x85, 0xff, 0x74, 0x02, 0xeb, rel, 0xc3];
        assert_eq!(placed(&with_target(0xfc)), (0, Reason::BranchTarget), "to the je at 3");
        assert_eq!(placed(&with_target(0xfa)), (0, Reason::BranchTarget), "to 1");
        assert_eq!(placed(&with_target(0xf9)), (3, Reason::LaterEmulated), "to the entry");
    }

    /// Copying an argument elsewhere before the push is allowed, as is reading memory.
    #[test]
    fn harmless_instructions() {
        assert_eq!(placed(&[0x48, 0x89, 0xf8, 0x53, 0x5b, 0xc3]), (3, Reason::LaterEmulated), "mov %rdi,%rax");
        assert_eq!(placed(&[0x48, 0x8b, 0x07, 0x53, 0x5b, 0xc3]), (3, Reason::LaterEmulated), "mov (%rdi),%rax");
    }

    /// Nothing that changes an argument, the stack pointer, the frame pointer or memory may come before the breakpoint.
    #[test]
    fn harmful_instructions() {
        let cases: [(&str, &[u8]); 8] = [
            ("sub $8,%rsp", &[0x48, 0x83, 0xec, 0x08]),
            ("xor %edi,%edi", &[0x31, 0xff]),
            ("mov %sil,%cl", &[0x40, 0x88, 0xf1]),
            ("mov %rsp,%rbp", &[0x48, 0x89, 0xe5]),
            ("mov %rax,(%rsp)", &[0x48, 0x89, 0x04, 0x24]),
            ("mul %rsi, which writes rdx", &[0x48, 0xf7, 0xe6]),
            ("pop %rax", &[0x58]),
            ("rep stosb", &[0xf3, 0xaa]),
        ];
        for (name, bytes) in cases {
            let code = [bytes, &[0x53, 0x5b, 0xc3]].concat();
            assert_eq!(placed(&code), (0, Reason::NotPreserved), "{name}");
        }
    }

    /// ret, an indirect jump and a system call end the straight line.
    #[test]
    fn straight_line_only() {
        for bytes in [&[0xc3_u8][..], &[0xff, 0xe0], &[0x0f, 0x05], &[0xcc]] {
            let code = [&[0x48, 0x85, 0xff], bytes, &[0x53, 0x5b, 0xc3]].concat();
            assert_eq!(placed(&code), (0, Reason::NotPreserved), "{bytes:x?}");
        }
    }

    /// Behind a test, an indirect jump anywhere in the function or an unknown size keep the breakpoint at the entry.
    #[test]
    fn unknown_targets() {
        let code = [0x48, 0x85, 0xff, 0x74, 0x02, 0xff, 0xe0, 0xc3];
        assert_eq!(placed(&code), (0, Reason::IndirectJump));
        assert_eq!(place(&code[..5], None, OLD).reason, Reason::UnknownExtent);
        assert_eq!(place(&code[..5], Some(8), OLD).reason, Reason::UnknownExtent, "code that could not be read");
        assert_eq!(place(&code, Some(usize::MAX), OLD).reason, Reason::UnknownExtent);
    }

    /// Long nops count only where the kernel emulates them, and branches with an operand size prefix never.
    #[test]
    fn nops_and_prefixes() {
        let nop5 = [0x0f, 0x1f, 0x44, 0x00, 0x00, 0x53, 0x5b, 0xc3];
        assert_eq!(place(&nop5, Some(8), NEW), Placement { skipped: 0, reason: Reason::EntryEmulated });
        assert_eq!(place(&nop5, Some(8), OLD), Placement { skipped: 5, reason: Reason::LaterEmulated });
        assert_eq!(placed(&[0x66, 0x90, 0x53, 0x5b, 0xc3]), (2, Reason::LaterEmulated));
        assert_eq!(placed(&[0x66, 0x50, 0xc3]), (0, Reason::NotPreserved), "pushw");
        assert_eq!(placed(&[0x49, 0x90, 0x53, 0xc3]), (0, Reason::NotPreserved), "xchg %rax,%r8 is no nop");
    }

    /// The release decides about long nops.
    #[test]
    fn releases() {
        for (release, nops) in
            [("6.18.44-fc", true), ("6.17.0", false), ("7.3.0-rc1", true), ("5.10", false), ("", false)]
        {
            assert_eq!(Emulation::of_release(release), Emulation { nops }, "{release}");
        }
    }

    proptest! {
        /// Arbitrary code of any claimed size gives a place inside it, never a panic.
        #[test]
        fn total_on_arbitrary_code(code in proptest::collection::vec(any::<u8>(), 0..512), size in proptest::option::of(0_usize..600)) {
            let p = place(&code, size, NEW);
            prop_assert!(p.skipped == 0 || (p.skipped as usize) < code.len());
            prop_assert_eq!(p.reason == Reason::LaterEmulated, p.skipped > 0);
        }
    }
}
