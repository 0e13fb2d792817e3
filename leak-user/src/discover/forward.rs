//! Which functions only call another one, by their code.
//!
//! A function that hands its arguments on as they are and ends in a jump is another name of the function that it jumps to
//! ([`same_call`]), so a probe there would be hit twice for each call. And operator new as libstdc++ has it gets everything
//! from malloc ([`always_reaches`]): where malloc is probed it costs a second trap and tells nothing.
//!
//! Both only say yes where the code proves it; a no costs a breakpoint, never a block. On machines other than x86-64 the answer
//! is always no.

/// Reads code, and tells where calls through the global offset table lead.
#[cfg_attr(not(target_arch = "x86_64"), allow(dead_code, reason = "the answer is always no there"))]
pub trait Program {
    /// Up to `len` bytes of code at an address, fewer at its end.
    fn code(&self, address: u64, len: usize) -> Vec<u8>;
    /// What the dynamic linker puts into the slot at an address.
    fn slot(&self, address: u64) -> Option<Target>;
}

/// Where a call or jump leads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Target {
    /// An address of the same file.
    Inside(u64),
    /// Another file's function that has this shape ([`super::names`]).
    Outside(u8),
    /// Somewhere in another file from where it does not come back.
    NoReturn,
}

#[cfg(target_arch = "x86_64")]
pub use x86_64::{always_reaches, same_call};

#[cfg(not(target_arch = "x86_64"))]
pub fn same_call(_program: &dyn Program, _entry: u64) -> Option<Target> {
    None
}

#[cfg(not(target_arch = "x86_64"))]
pub fn always_reaches(_: &dyn Program, _: u64, _: &dyn Fn(Target) -> bool, _: &dyn Fn(Target) -> bool) -> bool {
    false
}

#[cfg(target_arch = "x86_64")]
mod x86_64 {
    use super::super::breakpoint::preserves_arguments;
    use super::{Program, Target};
    use iced_x86::{Code, Decoder, DecoderOptions, FlowControl, Instruction, InstructionInfoFactory, OpKind};
    use std::collections::HashSet;

    /// A function that hands its arguments on does not do more than this before, instructions.
    const NEAR: usize = 6;

    /// Wrappers are short: past this the answer is no, instructions.
    const MAX_INSTRUCTIONS: usize = 2000;

    /// How deep calls are followed: through the layers of code that was not optimised.
    const MAX_CALLS: usize = 4;

    /// Bytes that are read at once.
    const PIECE: usize = 512;

    /// The longest instruction, bytes.
    const LONGEST: usize = 15;

    /// The function that the one at `entry` is another name of.
    pub fn same_call(program: &dyn Program, entry: u64) -> Option<Target> {
        let code = program.code(entry, NEAR * LONGEST);
        let mut info = InstructionInfoFactory::new();
        for instruction in Decoder::with_ip(64, &code, entry, DecoderOptions::NONE).iter().take(NEAR) {
            if is_jump(&instruction) {
                return destination(program, &instruction);
            }
            if instruction.is_invalid() || !preserves_arguments(&instruction, &mut info) {
                return None;
            }
        }
        None
    }

    /// Whether whoever calls the function at `entry` comes by what `wanted` accepts, itself or in what it calls, unless it
    /// leaves by `ends`, from where nobody comes back.
    pub fn always_reaches(
        program: &dyn Program,
        entry: u64,
        wanted: &dyn Fn(Target) -> bool,
        ends: &dyn Fn(Target) -> bool,
    ) -> bool {
        Search { program, wanted, ends, left: MAX_INSTRUCTIONS }.reaches(entry, MAX_CALLS)
    }

    struct Search<'a> {
        program: &'a dyn Program,
        wanted: &'a dyn Fn(Target) -> bool,
        ends: &'a dyn Fn(Target) -> bool,
        /// Instructions that may still be looked at.
        left: usize,
    }

    impl Search<'_> {
        /// `depth`: how far calls are followed.
        fn reaches(&mut self, entry: u64, depth: usize) -> bool {
            let mut seen = HashSet::new();
            let mut from = vec![entry];
            let mut reached = false;
            while let Some(start) = from.pop() {
                let mut code = Instructions::new(self.program, start);
                while let Some(instruction) = code.next() {
                    if !seen.insert(instruction.ip()) {
                        break;
                    }
                    if instruction.is_invalid() || self.left == 0 {
                        return false;
                    }
                    self.left -= 1;
                    let control = instruction.flow_control();
                    match control {
                        FlowControl::Next => continue,
                        FlowControl::Exception => break,
                        FlowControl::ConditionalBranch
                        | FlowControl::UnconditionalBranch
                        | FlowControl::IndirectBranch
                        | FlowControl::Call
                        | FlowControl::IndirectCall => {}
                        // It returns without having been there, or does what is not understood.
                        _ => return false,
                    }
                    let calls = matches!(control, FlowControl::Call | FlowControl::IndirectCall);
                    let target = destination(self.program, &instruction);
                    let arrives = target.is_some_and(self.wanted);
                    reached |= arrives;
                    let mut over = arrives || target.is_some_and(self.ends);
                    match target {
                        _ if over => {}
                        Some(Target::Inside(address)) if calls => {
                            // What is called may come by; if not, it comes back here.
                            over = depth > 0 && self.reaches(address, depth - 1);
                            reached |= over;
                        }
                        _ if calls => {}
                        Some(Target::Inside(address)) => from.push(address),
                        _ => return false,
                    }
                    let goes_on = match control {
                        FlowControl::ConditionalBranch => true,
                        _ if calls => !over,
                        _ => false,
                    };
                    if !goes_on {
                        break;
                    }
                }
                if code.at_end {
                    return false;
                }
            }
            reached
        }
    }

    fn is_jump(instruction: &Instruction) -> bool {
        matches!(instruction.flow_control(), FlowControl::UnconditionalBranch | FlowControl::IndirectBranch)
    }

    /// Where a jump or call leads, past a stub of the procedure linkage table.
    fn destination(program: &dyn Program, instruction: &Instruction) -> Option<Target> {
        let near = matches!(instruction.op0_kind(), OpKind::NearBranch16 | OpKind::NearBranch32 | OpKind::NearBranch64);
        if !near {
            return through_slot(program, instruction);
        }
        let address = instruction.near_branch_target();
        let stub = program.code(address, 2 * LONGEST);
        let mut decoder = Decoder::with_ip(64, &stub, address, DecoderOptions::NONE);
        let mut first = decoder.decode();
        if first.code() == Code::Endbr64 {
            first = decoder.decode();
        }
        let jumps = first.flow_control() == FlowControl::IndirectBranch;
        Some(jumps.then(|| through_slot(program, &first)).flatten().unwrap_or(Target::Inside(address)))
    }

    fn through_slot(program: &dyn Program, instruction: &Instruction) -> Option<Target> {
        let by_slot = instruction.op0_kind() == OpKind::Memory && instruction.is_ip_rel_memory_operand();
        by_slot.then(|| program.slot(instruction.ip_rel_memory_address())).flatten()
    }

    /// Instructions from an address on, read in pieces.
    struct Instructions<'a> {
        program: &'a dyn Program,
        piece: Vec<u8>,
        start: u64,
        next: u64,
        /// There was no code where the next instruction should have been.
        at_end: bool,
    }

    impl<'a> Instructions<'a> {
        fn new(program: &'a dyn Program, address: u64) -> Self {
            Self { program, piece: program.code(address, PIECE), start: address, next: address, at_end: false }
        }

        fn next(&mut self) -> Option<Instruction> {
            let mut at = (self.next - self.start) as usize;
            if self.piece.len() < at + LONGEST {
                (self.piece, self.start, at) = (self.program.code(self.next, PIECE), self.next, 0);
            }
            let code = self.piece.get(at..).filter(|code| !code.is_empty());
            let Some(code) = code else {
                self.at_end = true;
                return None;
            };
            let instruction = Decoder::with_ip(64, code, self.next, DecoderOptions::NONE).decode();
            self.next = instruction.next_ip();
            Some(instruction)
        }
    }

    #[cfg(test)]
    mod tests {
        use super::*;
        use proptest::prelude::*;
        use std::collections::HashMap;

        /// Code at address 0x1000, and slots.
        struct Made {
            code: Vec<u8>,
            slots: HashMap<u64, Target>,
        }

        impl Program for Made {
            fn code(&self, address: u64, len: usize) -> Vec<u8> {
                let rest = address.checked_sub(0x1000).and_then(|at| self.code.get(at as usize..)).unwrap_or_default();
                rest[..rest.len().min(len)].to_vec()
            }

            fn slot(&self, address: u64) -> Option<Target> {
                self.slots.get(&address).copied()
            }
        }

        fn made(code: &[u8]) -> Made {
            Made { code: code.to_vec(), slots: HashMap::new() }
        }

        const TO: Target = Target::Inside(0x1100);

        fn reaches(code: &[u8]) -> bool {
            always_reaches(&made(code), 0x1000, &|target| target == TO, &|target| target == Target::Inside(0x1200))
        }

        /// A jump with the arguments as they came is the same call; after a change of an argument, or as a call, it is not.
        #[test]
        fn same_calls() {
            let to = |code: &[u8]| same_call(&made(code), 0x1000);
            assert_eq!(to(&[0xe9, 0xfb, 0, 0, 0]), Some(TO));
            assert_eq!(
                to(&[0xf3, 0x0f, 0x1e, 0xfa, 0x31, 0xc0, 0xe9, 0xf5, 0, 0, 0]),
                Some(TO),
                "endbr64; xor %eax,%eax"
            );
            assert_eq!(to(&[0x48, 0x89, 0xf7, 0xe9, 0xf8, 0, 0, 0]), None, "mov %rsi,%rdi");
            assert_eq!(to(&[0x48, 0x83, 0xec, 8, 0xe9, 0xf7, 0, 0, 0]), None, "sub $8,%rsp");
            assert_eq!(to(&[0xe8, 0xfb, 0, 0, 0, 0xc3]), None);
            assert_eq!(to(&[0x48, 0x85, 0xff, 0x74, 2, 0xeb, 0x10]), None, "a test of an argument before");
        }

        /// Through a stub of the procedure linkage table, with a landing pad and without, to what its slot holds.
        #[test]
        fn through_stubs() {
            for pad in [&[0xf3, 0x0f, 0x1e, 0xfa][..], &[]] {
                let mut code = vec![0xe9, 0x0b, 0, 0, 0];
                code.resize(0x10, 0xcc);
                code.extend(pad);
                let jump = 0x1000 + code.len() as u64;
                code.extend([0xff, 0x25, 0, 0x10, 0, 0]);
                let mut program = made(&code);
                program.slots.insert(jump + 6 + 0x1000, Target::Outside(8));
                assert_eq!(same_call(&program, 0x1000), Some(Target::Outside(8)));
                program.slots.clear();
                assert_eq!(same_call(&program, 0x1000), Some(Target::Inside(0x1010)), "an unknown slot");
            }
        }

        /// Every way through has to come by; one that returns before does not.
        #[test]
        fn every_way() {
            assert!(reaches(&[0xe8, 0xfb, 0, 0, 0, 0xc3]), "call; ret");
            assert!(reaches(&[0x74, 5, 0xe8, 0xf9, 0, 0, 0, 0xe9, 0xf4, 0, 0, 0]), "je over a call to a jump");
            assert!(!reaches(&[0x74, 5, 0xe8, 0xf9, 0, 0, 0, 0xc3]), "je over a call to a ret");
            assert!(!reaches(&[0xc3]), "ret");
            assert!(!reaches(&[0xff, 0xe0]), "jmp *%rax");
            assert!(!reaches(&[0x90, 0x90]), "the code ends");
            assert!(!reaches(&[0xeb, 0xfe]), "for ever");
            assert!(reaches(&[0x74, 5, 0xe8, 0xf9, 0, 0, 0, 0xe8, 0xf4, 1, 0, 0]), "the other way never returns");
            assert!(reaches(&[0xe8, 0, 3, 0, 0, 0xe9, 0xf6, 0, 0, 0]), "a call of something else before");
            assert!(reaches(&[0xe8, 1, 0, 0, 0, 0xc3, 0xe8, 0xf5, 0, 0, 0, 0xc3]), "in what it calls");
            assert!(!reaches(&[0xe8, 1, 0, 0, 0, 0xc3, 0xc3]), "not even there");
            assert!(!reaches(&[0xe8, 0xfb, 0xff, 0xff, 0xff, 0xc3]), "a call of itself");
        }

        proptest! {
            /// Any code has an answer, within bounds.
            #[test]
            fn total(code in proptest::collection::vec(any::<u8>(), 0..300)) {
                let _ = (same_call(&made(&code), 0x1000), reaches(&code));
            }
        }
    }
}
