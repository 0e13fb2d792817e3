//! Names for code of stripped programs and of just-in-time compilers, end to end: debug files in a container's own root, and what a
//! compiler writes down.

use std::fs::{self, OpenOptions, Permissions};
use std::io::Write as _;
use std::os::unix::fs::{PermissionsExt as _, chown};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use anyhow::{Context as _, Result, ensure};
use leaktrace_tests::{Fixture, PATIENCE, Program, Session, has_frame, host, live_in, live_of, stacks, summary};
use serde_json::Value;

/// A user that is nobody here.
const USER: u32 = 54321;

fn run(program: &Path, args: &[&str]) -> Result<()> {
    let output =
        Command::new(program).args(args).output().with_context(|| format!("failed to run {}", program.display()))?;
    ensure!(output.status.success(), "{} {args:?}: {}", program.display(), String::from_utf8_lossy(&output.stderr));
    Ok(())
}

/// A root folder with one program in it, and the libraries that it needs.
struct Root {
    folder: tempfile::TempDir,
}

impl Root {
    fn with(program: &Path) -> Result<Self> {
        let folder = tempfile::tempdir()?;
        host::copy_libraries(program, folder.path())?;
        fs::copy(program, folder.path().join("program"))?;
        fs::create_dir(folder.path().join("tmp"))?;
        fs::set_permissions(folder.path(), Permissions::from_mode(0o755))?;
        Ok(Self { folder })
    }

    fn path(&self, inside: &str) -> PathBuf {
        self.folder.path().join(inside)
    }

    /// Starts the program in it as a user.
    fn start(&self, user: u32) -> Result<Fixture> {
        let path = self.folder.path().to_owned();
        let mut builder = Fixture::builder(Path::new("/program"));
        let enter = move || {
            std::os::unix::fs::chroot(&path)?;
            std::env::set_current_dir("/")?;
            // SAFETY: setresuid takes three numbers.
            if unsafe { libc::setresuid(user, user, user) } == 0 {
                Ok(())
            } else {
                Err(std::io::Error::last_os_error())
            }
        };
        // SAFETY: between fork and exec only chroot(2), chdir(2) and setresuid(2) are called, on what was made before.
        unsafe { builder.command().pre_exec(enter) };
        builder.start()
    }

    /// Adds to the process's perf map.
    fn write_map(&self, pid: u32, owner: u32, line: &str) -> Result<PathBuf> {
        let path = self.path(&format!("tmp/perf-{pid}.map"));
        let mut file = OpenOptions::new().create(true).append(true).open(&path)?;
        file.write_all(line.as_bytes())?;
        file.set_permissions(Permissions::from_mode(0o644))?;
        chown(&path, Some(owner), None)?;
        Ok(path)
    }
}

/// Has the fixture generate a function; a line of a perf map that calls it `name`.
fn generate(fixture: &mut Fixture, name: &str) -> Result<String> {
    Ok(format!("{} {name}\n", fixture.tell("generate")?))
}

/// The innermost frame of the first stack that begins in generated code.
fn innermost(report: &Value) -> Option<&Value> {
    stacks(report).map(|stack| &stack["frames"][0]).find(|frame| frame["module"] == "[anonymous]")
}

/// Generated code has the names that its compiler wrote down, also after they were seen without one, after the map has grown, and
/// where the last of them was written just before the end of the process.
#[test]
fn generated_code_has_names() -> Result<()> {
    if !host::can_trace("generated_code_has_names") {
        return Ok(());
    }
    let root = Root::with(&Program::c("jit").build()?)?;
    let mut fixture = root.start(USER)?;
    let pid = fixture.pid();
    // The pages of the generated code are mappings, and of no interest here.
    let mut session = Session::start(&[pid], &["--resource", "heap"])?;
    let (first, second) = (generate(&mut fixture, "JS:*first /a b.js:1:2")?, generate(&mut fixture, "JS:~second")?);
    fixture.tell("leak 0 10 100")?;
    let without = session.next_report(|report| innermost(report).is_some(), PATIENCE)?;
    let frame = innermost(&without).context("a frame")?;
    ensure!(frame["function"].is_null() && frame["module"] == "[anonymous]", "{frame}");
    ensure!(frame["reason"].as_str().is_some_and(|reason| reason.contains("no perf map")), "{frame}");

    root.write_map(pid, USER, &first)?;
    let first_name = "JS:*first /a b.js:1:2";
    let report = session.next_report(|report| live_in(report, first_name) == (1000, 10), PATIENCE)?;
    let frame = innermost(&report).context("a frame")?;
    ensure!(frame["language"] == "javascript" && frame["reason"].is_null(), "{frame}");

    // How to walk the stack in code that is new comes a moment after it, and nothing outside tells when.
    let mut more = 0;
    let whole =
        |stack: &Value| has_frame(stack, first_name) && has_frame(stack, "call_generated") && has_frame(stack, "main");
    loop {
        fixture.tell("leak 0 1 100")?;
        more += 1;
        let seen = |report: &Value| live_in(report, first_name) == (1000 + more * 100, 10 + more);
        let report = session.next_report(seen, PATIENCE)?;
        if stacks(&report).any(whole) {
            break;
        }
        ensure!(more < 50, "no stack through generated code is whole: {}", summary(&report));
    }

    fixture.tell("leak 1 20 100")?;
    let seen = |report: &Value| live_of(report, pid) == (3000 + more * 100, 30 + more);
    session.next_report(seen, PATIENCE)?;
    root.write_map(pid, USER, &second)?;
    fixture.send("exit")?;
    fixture.wait()?;
    let report = session.finish()?;
    assert_eq!(live_in(&report, first_name), (1000 + more * 100, 10 + more), "{}", summary(&report));
    assert_eq!(live_in(&report, "JS:~second"), (2000, 20), "{}", summary(&report));
    Ok(())
}

/// Makes a map one that is not trusted.
type Spoil = fn(&Path) -> std::io::Result<()>;

/// A map that is another user's, or everybody's, or too large names nothing, and the report says why.
#[test]
fn perf_maps_that_are_not_trusted() -> Result<()> {
    if !host::can_trace("perf_maps_that_are_not_trusted") {
        return Ok(());
    }
    let cases: [(&str, Spoil); 3] = [
        ("not its user's", |path| chown(path, Some(USER + 1), None)),
        ("written by anybody", |path| fs::set_permissions(path, Permissions::from_mode(0o666))),
        ("over 64 MiB", |path| OpenOptions::new().write(true).open(path)?.set_len((64 << 20) + 1)),
    ];
    let root = Root::with(&Program::c("jit").build()?)?;
    for (reason, spoil) in cases {
        let mut fixture = root.start(USER)?;
        let session = Session::start(&[fixture.pid()], &[])?;
        let line = generate(&mut fixture, "a_name")?;
        spoil(&root.write_map(fixture.pid(), USER, &line)?)?;
        fixture.tell("leak 0 10 100")?;
        let report = session.stop()?;
        let frame = innermost(&report).with_context(|| summary(&report))?;
        ensure!(frame["function"].is_null(), "{frame}");
        ensure!(frame["reason"].as_str().is_some_and(|text| text.contains(reason)), "{reason}: {frame}");
    }
    Ok(())
}

/// A stripped program in a root of its own, as in a container, has functions and lines from the debug file in that root that has its
/// build id; also in the report that comes when it has ended.
#[test]
fn a_debug_file_in_the_programs_own_root() -> Result<()> {
    let test = "a_debug_file_in_the_programs_own_root";
    let (Some(objcopy), true) = (host::program(test, "objcopy"), host::can_trace(test)) else { return Ok(()) };
    let root = Root::with(&Program::c("allocators").flag("-Wl,--build-id=0x0123456789abcdef").build()?)?;
    let (program, debug) = (root.path("program"), root.path("usr/lib/debug/.build-id/01/23456789abcdef.debug"));
    fs::create_dir_all(debug.parent().context("no folder")?)?;
    let (program, debug) = (program.to_str().context("a path")?, debug.to_str().context("a path")?);
    run(&objcopy, &["--only-keep-debug", program, debug])?;
    run(&objcopy, &["--strip-all", program])?;
    let mut fixture = root.start(0)?;
    let session = Session::start(&[fixture.pid()], &[])?;
    fixture.tell("leak malloc 10 100")?;
    assert!(fixture.finish()?.success());
    let report = session.finish()?;
    assert_eq!(live_in(&report, "leak_via_malloc"), (1000, 10), "{}", summary(&report));
    let stack = stacks(&report).find(|stack| has_frame(stack, "leak_via_malloc")).context("a stack")?;
    let frame = &stack["frames"][0];
    ensure!(frame["file"].as_str().is_some_and(|file| file.ends_with("allocators.c")), "{frame}");
    ensure!(frame["line"].is_u64() && frame["build_id"] == "0123456789abcdef", "{frame}");
    Ok(())
}

/// node with `--perf-basic-prof`; ended, and its perf map removed, when dropped.
struct Node {
    child: Child,
}

impl Drop for Node {
    fn drop(&mut self) {
        // Each fails only when there is nothing left to do.
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = fs::remove_file(format!("/tmp/perf-{}.map", self.child.id()));
    }
}

/// Functions of a script that node compiles stand in the stacks of what they allocate.
#[test]
fn node_functions_have_names() -> Result<()> {
    let test = "node_functions_have_names";
    let (Some(node), true) = (host::program(test, "node"), host::can_trace(test)) else { return Ok(()) };
    // Blocks of the C library, from a function that is compiled at once and never inlined.
    let script = "
const kept = [];
function rememberSession() { kept.push(Buffer.allocUnsafeSlow(10000).fill(1)); }
setInterval(() => { for (let i = 0; i < 10; i++) rememberSession(); }, 10);
";
    let mut command = Command::new(node);
    command.args(["--perf-basic-prof", "--interpreted-frames-native-stack", "-e", script]).stdin(Stdio::null());
    // It writes a log to where it is.
    let folder = tempfile::tempdir()?;
    command.current_dir(folder.path());
    let node = Node { child: command.spawn().context("failed to start node")? };
    let mut session = Session::start(&[node.child.id()], &["--interval", "1s"])?;
    let in_script = |frame: &Value| {
        frame["language"] == "javascript"
            && frame["function"].as_str().is_some_and(|name| name.contains("rememberSession"))
    };
    let named = |report: &Value| {
        stacks(report).any(|stack| stack["frames"].as_array().is_some_and(|frames| frames.iter().any(in_script)))
    };
    session.next_report(named, PATIENCE)?;
    session.stop().map(drop)
}
