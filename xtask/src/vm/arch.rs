//! The two machines that kernels are booted on, by the names that each tool has for them.

use clap::ValueEnum;

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, ValueEnum)]
pub enum Arch {
    #[value(name = "x86_64")]
    X86_64,
    #[value(name = "aarch64")]
    Aarch64,
}

impl Arch {
    pub const ALL: [Self; 2] = [Self::X86_64, Self::Aarch64];

    /// The one that this program was built for.
    pub fn host() -> Self {
        if cfg!(target_arch = "aarch64") { Self::Aarch64 } else { Self::X86_64 }
    }

    /// As rustc, uname and qemu have it.
    pub fn name(self) -> &'static str {
        match self {
            Self::X86_64 => "x86_64",
            Self::Aarch64 => "aarch64",
        }
    }

    /// As Debian has it.
    pub fn debian(self) -> &'static str {
        match self {
            Self::X86_64 => "amd64",
            Self::Aarch64 => "arm64",
        }
    }

    /// The Rust target whose programs run without any library, and are linked without another compiler.
    pub fn rust_target(self) -> String {
        format!("{}-unknown-linux-musl", self.name())
    }

    /// The folder under `lib` with its libraries, and the prefix of its compilers.
    pub fn triplet(self) -> String {
        format!("{}-linux-gnu", self.name())
    }

    /// What Debian's package of the cross compiler has for the triplet, whose underscore a package name cannot have.
    pub fn package_triplet(self) -> String {
        self.triplet().replace('_', "-")
    }

    /// The dynamic linker, by the path that is written into programs.
    pub fn interpreter(self) -> &'static str {
        match self {
            Self::X86_64 => "lib64/ld-linux-x86-64.so.2",
            Self::Aarch64 => "lib/ld-linux-aarch64.so.1",
        }
    }

    /// The Debian package of the emulator.
    pub fn emulator_package(self) -> &'static str {
        match self {
            Self::X86_64 => "qemu-system-x86",
            Self::Aarch64 => "qemu-system-arm",
        }
    }

    /// The emulated machine: every feature that the emulator knows, and the processor's console where the kernel looks for it.
    pub fn machine(self) -> &'static [&'static str] {
        match self {
            Self::X86_64 => &["-machine", "q35", "-cpu", "max"],
            // Addresses of 52 bits stop kernels before 5.12 at boot; pointer authentication by the book takes most of the time.
            Self::Aarch64 => &["-machine", "virt", "-cpu", "max,lpa2=off,pauth-impdef=on"],
        }
    }

    /// What the kernel must be told to start here, whatever else the host does.
    pub fn parameters(self) -> &'static str {
        match self {
            // Else it counts the timer's ticks for a moment, and gives up where the host has no time for the emulator then.
            Self::X86_64 => "no_timer_check",
            Self::Aarch64 => "",
        }
    }

    /// The kernel's name of the first serial line.
    pub fn console(self) -> &'static str {
        match self {
            Self::X86_64 => "ttyS0",
            Self::Aarch64 => "ttyAMA0",
        }
    }
}
