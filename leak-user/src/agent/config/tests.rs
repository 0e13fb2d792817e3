use std::io::Write as _;

use super::*;

/// The settings of a file, variables and flags; or what is said of the mistakes.
fn load(file: &str, variables: &[(&str, &str)], flags: AgentFlags) -> Result<Settings, Vec<String>> {
    let mut written = tempfile::NamedTempFile::new().unwrap();
    written.write_all(file.as_bytes()).unwrap();
    let path = written.path().display().to_string();
    let flags = AgentFlags { config: Some(written.path().to_owned()), ..flags };
    let variables = variables.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned()));
    Settings::load_with(&flags, variables)
        .map_err(|refused| refused.iter().map(|refused| refused.to_string().replace(&path, "FILE")).collect())
}

fn set(values: &[&str]) -> AgentFlags {
    AgentFlags { set: values.iter().map(|value| (*value).to_owned()).collect(), ..AgentFlags::default() }
}

/// An empty file, and none where none was named, is the defaults of the manual.
#[test]
fn defaults() {
    let settings = load("", &[], AgentFlags::default()).unwrap();
    assert_eq!(settings.http.listen.to_string(), "127.0.0.1:9790");
    assert_eq!(settings.http.max_connections, 64);
    assert_eq!((settings.http.max_request, settings.http.timeout), (16 << 10, Duration::from_secs(10)));
    assert_eq!(settings.trace.interval, Duration::from_secs(10));
    assert_eq!(settings.trace.max_overhead, Some(config::Overhead { share: 0.02, of_processor: true }));
    assert_eq!((settings.trace.max_memory, settings.trace.kernel_memory), (512 << 20, 64 << 20));
    assert_eq!(settings.state.folder.as_deref(), Some(Path::new("/var/lib/leaktrace")));
    assert_eq!(settings.metrics, Limits::default());
    let none = AgentFlags { config: Some("/nonexistent/agent.toml".into()), ..AgentFlags::default() };
    let refused = Settings::load_with(&none, std::iter::empty()).err().unwrap();
    assert!(refused[0].0.starts_with("/nonexistent/agent.toml: cannot be read"), "{refused:?}");
}

/// Each key of the file arrives where it belongs, in each way to write it.
#[test]
fn every_key() {
    let folder = tempfile::tempdir().unwrap();
    let token = folder.path().join("token");
    std::fs::write(&token, "0123456789abcdef\n").unwrap();
    let file = format!(
        r#"
[trace]
interval = "30s"
max_overhead = 1
max_memory = 268435456
kernel_memory = "32MiB"
unwind_memory = "1MiB"
sample = "512K"
top = 3
most_traced = 5
min_size = 64
max_size = "1MiB"
older_than = "1min"
unwind = "fp"
resource = ["heap"]
allocator = "/opt/libx.so:je_"
children = true
comm = "nginx,redis*"
exclude = ["uid=1", "comm=sh"]
[http]
listen = "[::]:9000"
token_file = {token:?}
max_connections = 3
max_request_bytes = "8KiB"
timeout = "1s"
[state]
folder = "/srv/state"
max_bytes = "64KiB"
steady_after = "1h"
[metrics]
max_processes = 1
max_stacks = 2
"#
    );
    let settings = load(&file, &[], AgentFlags::default()).unwrap();
    let trace = &settings.trace;
    assert_eq!(trace.interval, Duration::from_secs(30));
    assert_eq!(trace.max_overhead, Some(config::Overhead { share: 0.01, of_processor: true }));
    assert_eq!((trace.max_memory, trace.kernel_memory, trace.unwind_memory), (256 << 20, 32 << 20, 1 << 20));
    assert_eq!((trace.top, trace.most_traced, trace.children), (3, Some(5), true));
    assert_eq!((trace.min_size, trace.max_size, trace.older_than), (64, 1 << 20, Duration::from_mins(1)));
    assert_eq!(
        (trace.unwind, trace.resources.heap, trace.resources.mmap),
        (config::Unwind::FramePointers, true, false)
    );
    assert_eq!(trace.allocators.len(), 1);
    let mut selection = crate::select::Selection::default();
    for comm in ["nginx", "redis*"] {
        selection.include(crate::select::Kind::Comm, comm).unwrap();
    }
    for text in ["uid=1", "comm=sh"] {
        selection.exclude(text).unwrap();
    }
    assert_eq!(trace.target, config::Target::System { selection: Box::new(selection), all: false });
    assert_eq!(settings.http.listen.to_string(), "[::]:9000");
    assert!(settings.http.security.token.is_some());
    assert_eq!((settings.http.max_connections, settings.http.max_request), (3, 8 << 10));
    assert_eq!(settings.state.folder.as_deref(), Some(Path::new("/srv/state")));
    assert_eq!((settings.state.max_bytes, settings.state.steady_after), (64 << 10, Duration::from_hours(1)));
    assert_eq!(settings.metrics, Limits { processes: 1, stacks: 2 });
}

/// A flag stands over a variable, and that over the file; texts that look like numbers stay texts where such are wanted.
#[test]
fn order_of_sources() {
    let file = "[trace]\ninterval = '1s'\ntop = 4\n[http]\nlisten = '127.0.0.1:1'\n";
    let variables = [
        ("LEAKTRACE_TRACE_INTERVAL", "2s"),
        ("LEAKTRACE_HTTP_LISTEN", "127.0.0.1:2"),
        ("LEAKTRACE_TRACE_COMM", "123"),
        ("LEAKTRACE_TRACE_CHILDREN", "true"),
        ("LEAKTRACE_STATE_FOLDER", ""),
        // None of these is about the configuration.
        ("LEAKTRACE_LOG", "debug"),
        ("LEAKTRACE_MAX_OVERHEAD", "off"),
        ("LEAKTRACE_HTTP_SERVICE_HOST", "10.0.0.7"),
        ("LEAKTRACE_HTTP_PORT_9790_TCP", "tcp://10.0.0.7:9790"),
    ];
    let flags =
        AgentFlags { listen: Some("127.0.0.1:3".to_owned()), ..set(&["trace.interval=3s", "trace.max_overhead=off"]) };
    let settings = load(file, &variables, flags).unwrap();
    assert_eq!(settings.trace.interval, Duration::from_secs(3));
    assert_eq!((settings.trace.top, settings.trace.children, settings.trace.max_overhead), (4, true, None));
    assert_eq!(settings.http.listen.port(), 3);
    assert_eq!(settings.state.folder, None);
    let variable = load(file, &variables, AgentFlags::default()).unwrap();
    assert_eq!((variable.trace.interval, variable.http.listen.port()), (Duration::from_secs(2), 2));
}

/// Each mistake is told with the place of the value, the key, and what is accepted.
#[test]
fn mistakes() {
    let of_file: &[(&str, &[&str])] = &[
        ("[http\n", &["FILE:1: ", "]"]),
        ("[http]\nlisten = \n", &["FILE:2: "]),
        ("[htp]\n", &["FILE:1: htp: ", "unknown field `htp`", "`http`"]),
        ("\n\n[http]\nlisen = 'x'\n", &["FILE:4: http.lisen: ", "unknown field `lisen`", "`listen`"]),
        ("[http]\nlisten = 7\n", &["FILE:2: http.listen: ", "invalid type: integer `7`", "a string"]),
        ("[http]\nlisten = 'x'\n", &["FILE:2: http.listen: invalid value 'x'", "127.0.0.1:9790"]),
        ("[http]\nlisten = 'localhost:80'\n", &["FILE:2: http.listen: ", "ADDRESS:PORT"]),
        ("[http]\n# any\nlisten = '0.0.0.0:9790'\n", &["FILE:3: http.listen: ", "other hosts", "http.token_file"]),
        ("[http]\ntoken_file = '/nonexistent'\n", &["FILE:2: http.token_file: /nonexistent: cannot be read"]),
        ("[http]\ntoken_file = 'token'\n", &["FILE:2: http.token_file: ", "begins with '/'"]),
        ("[http]\ntls_certificate = '/c'\n", &["FILE:2: http.tls_certificate: needs http.tls_key"]),
        ("[http]\ntls_key = '/c'\n", &["FILE:2: http.tls_key: needs http.tls_certificate"]),
        ("[http]\ntls_key = '/none'\ntls_certificate = '/none'", &["FILE:3: http.tls_certificate: /none: cannot be"]),
        ("[http]\nmax_connections = 0\n", &["FILE:2: http.max_connections: ", "1 to 4096"]),
        ("[http]\nmax_connections = -1\n", &["FILE:2: http.max_connections: ", "`-1`"]),
        ("[http]\nmax_request_bytes = 100\n", &["FILE:2: http.max_request_bytes: ", "8KiB to 1024KiB"]),
        ("[http]\ntimeout = 10\n", &["FILE:2: http.timeout: invalid value '10'", "unit"]),
        ("[trace]\ninterval = '1us'\n", &["FILE:2: trace.interval: invalid value '1us'", "100ms"]),
        ("[trace]\nmax_overhead = 101\n", &["FILE:2: trace.max_overhead: invalid value '101'", "0.01 to 100"]),
        ("[trace]\nmax_overhead = nan\n", &["FILE:2: trace.max_overhead: ", "0.01 to 100"]),
        ("[trace]\ntop = 0\n", &["FILE:2: trace.top: invalid value '0'", "10000"]),
        ("[trace]\nunwind = 'dwarf'\n", &["FILE:2: trace.unwind: invalid value 'dwarf'", "auto or fp"]),
        ("[trace]\nresource = ['heap', 'fds']\n", &["FILE:2: trace.resource: ", "'fds'", "heap or mmap"]),
        ("[trace]\nmost_traced = 0\n", &["FILE:2: trace.most_traced: ", "1 to 1024"]),
        ("[trace]\ncomm = ['a', 'a-name-of-16-byt']\n", &["FILE:2: trace.comm: ", "15 bytes"]),
        ("[trace]\nexclude = 'nginx'\n", &["FILE:2: trace.exclude: ", "KIND=VALUE"]),
        ("[trace]\ncomm = true\n", &["FILE:2: trace.comm: ", "a text or a list of texts"]),
        ("[trace]\nkernel_memory = '4MiB'\n", &["FILE:2: trace.kernel_memory: ", "18432KiB"]),
        ("[trace]\nallocator = ':je_'\n", &["FILE:2: trace.allocator: ", "path"]),
        ("[state]\nfolder = 'state'\n", &["FILE:2: state.folder: ", "begins with '/'"]),
        ("[state]\nmax_bytes = '1KiB'\n", &["FILE:2: state.max_bytes: ", "16KiB"]),
        ("[metrics]\nmax_stacks = 100000\n", &["FILE:2: metrics.max_stacks: ", "1 to 10000"]),
        ("[http]\nlisten = '127.0.0.1:1'\nlisten = '127.0.0.1:2'\n", &["FILE:3: ", "duplicate key"]),
    ];
    let check = |given: &str, refused: Result<Settings, Vec<String>>, parts: &[&str]| {
        let refused = refused.err().unwrap_or_else(|| panic!("{given} makes sense"));
        assert_eq!(refused.len(), 1, "{refused:?}");
        assert!(refused[0].starts_with(parts[0]), "{given}: {} does not begin with {}", refused[0], parts[0]);
        assert!(parts.iter().all(|part| refused[0].contains(part)), "{given}: {}", refused[0]);
        assert!(!refused[0].contains('\n'), "{}", refused[0]);
    };
    for (file, parts) in of_file {
        check(file, load(file, &[], AgentFlags::default()), parts);
    }
    for (name, value, parts) in [
        ("LEAKTRACE_HTTP_LISTEN", "here", &["LEAKTRACE_HTTP_LISTEN: http.listen: invalid value 'here'"][..]),
        ("LEAKTRACE_HTTP_LISEN", "x", &["LEAKTRACE_HTTP_LISEN: http.lisen: unknown field `lisen`", "`listen`"]),
        ("LEAKTRACE_HTTP_MAX_CONNECTIONS", "many", &["LEAKTRACE_HTTP_MAX_CONNECTIONS: http.max_connections: ", "many"]),
        ("LEAKTRACE_TRACE_INTERVAL", "0s", &["LEAKTRACE_TRACE_INTERVAL: trace.interval: ", "100ms"]),
        ("LEAKTRACE_TRACE_CHILDREN", "maybe", &["LEAKTRACE_TRACE_CHILDREN: trace.children: ", "maybe"]),
    ] {
        check(name, load("", &[(name, value)], AgentFlags::default()), parts);
    }
    for (flags, parts) in [
        (set(&["http.listen=x"]), &["--set http.listen=x: http.listen: invalid value 'x'"][..]),
        (set(&["http"]), &["--set http: must be KEY=VALUE"]),
        (set(&["listen=x"]), &["--set listen=x: listen: unknown field `listen`"]),
        (set(&["http.listen.x=1"]), &["--set http.listen.x=1: http.listen.x: ", "invalid type"]),
        (set(&["=1"]), &["--set =1: : unknown field"]),
        (
            AgentFlags { listen: Some("x".into()), ..AgentFlags::default() },
            &["--listen: http.listen: invalid value 'x'"],
        ),
        (AgentFlags { state: Some("x".into()), ..AgentFlags::default() }, &["--state: state.folder: ", "begins with"]),
    ] {
        check(&format!("{flags:?}"), load("", &[], flags), parts);
    }
    // Several sections, several mistakes.
    let refused = load("[http]\nlisten = 'x'\n[metrics]\nmax_stacks = 0\n", &[], AgentFlags::default()).err().unwrap();
    assert_eq!(refused.len(), 2, "{refused:?}");
    assert!(refused[0].starts_with("FILE:2: http.listen") && refused[1].starts_with("FILE:4: metrics.max_stacks"));
}

/// A file that is none is refused, however large it is.
#[test]
fn no_configuration() {
    for file in ["\u{0}\u{1}", "= = =", &"x".repeat(2 << 20)] {
        assert_eq!(load(file, &[], AgentFlags::default()).err().map(|refused| refused.len()), Some(1));
    }
}

/// A reload takes over what it can and names the rest; an address that waits keeps what guards it.
#[test]
fn reloads() {
    let folder = tempfile::tempdir().unwrap();
    let token = folder.path().join("token");
    std::fs::write(&token, "0123456789abcdef\n").unwrap();
    let guarded = format!("[http]\nlisten = '0.0.0.0:9790'\ntoken_file = {token:?}\n");
    let old = load(&format!("{guarded}[trace]\ninterval = '1s'\n"), &[], AgentFlags::default()).unwrap();
    let new =
        "[trace]\ninterval = '2s'\nmax_overhead = 1\ncomm = 'x'\nkernel_memory = '32MiB'\n[metrics]\nmax_stacks = 7\n";
    let open = load(new, &[], AgentFlags::default()).unwrap();
    let (settings, waiting) = old.go_on_with(open);
    assert_eq!(waiting, ["http.listen", "http.token_file", "trace.kernel_memory"]);
    assert!(settings.http.security.token.is_some() && settings.http.listen.ip().is_unspecified());
    assert_eq!((settings.trace.interval, settings.metrics.stacks), (Duration::from_secs(2), 7));
    assert_eq!(settings.trace.max_overhead.map(|overhead| overhead.share), Some(0.01));
    assert_ne!(settings.trace.target, old.trace.target);
    assert_eq!(settings.trace.kernel_memory, 64 << 20);
    // Against what the agent was started with, so that what waits is named each time.
    let again = load(&format!("{guarded}[trace]\ninterval = '1s'\n"), &[], AgentFlags::default()).unwrap();
    let (settings, waiting) = settings.go_on_with(again);
    assert!(waiting.is_empty(), "{waiting:?}");
    assert_eq!(settings.trace.interval, Duration::from_secs(1));
    let off = load(&format!("{guarded}[trace]\nmax_overhead = 'off'\n"), &[], AgentFlags::default()).unwrap();
    assert_eq!(settings.go_on_with(off).1, ["trace.max_overhead"]);
}
