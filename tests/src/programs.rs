//! Programs of the system under load, as Debian built them: started with a load that goes on until they are dropped.

use std::fmt::Write as _;
use std::fs;
use std::io::{self, Read as _, Write as _};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::os::unix::fs::{PermissionsExt as _, chown};
use std::os::unix::process::CommandExt as _;
use std::path::PathBuf;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use tempfile::TempDir;

use crate::PATIENCE;
use crate::host::{find, wait_until};

/// A program of the system, and what it is made to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Loaded {
    /// Strings, dictionaries, JSON, compression, and modules of C.
    Python,
    /// Strings, hashes, regular expressions and sorting.
    Perl,
    /// Statements over a table in memory.
    Sqlite,
    /// Its own benchmark, over loopback.
    Redis,
    /// Requests, each over a connection of its own, answered compressed.
    Nginx,
    /// Queries that sort, aggregate and write, over a socket in a temporary cluster.
    Postgres,
    /// Buffers, JSON, compression, compiled scripts.
    Node,
}

impl Loaded {
    pub const ALL: [Self; 7] =
        [Self::Python, Self::Perl, Self::Sqlite, Self::Redis, Self::Nginx, Self::Postgres, Self::Node];

    /// The programs that it needs.
    pub fn needs(self) -> &'static [&'static str] {
        match self {
            Self::Python => &["python3"],
            Self::Perl => &["perl"],
            Self::Sqlite => &["sqlite3"],
            Self::Redis => &["redis-server", "redis-benchmark"],
            Self::Nginx => &["nginx"],
            Self::Postgres => &["postgres", "initdb", "pgbench"],
            Self::Node => &["node"],
        }
    }

    /// Starts it and its load.
    pub fn start(self) -> Result<Running> {
        let folder = tempfile::tempdir().context("failed to create a folder")?;
        let mut running =
            Running { pids: Vec::new(), children: Vec::new(), load: None, end_signal: libc::SIGTERM, folder };
        match self {
            Self::Python => running.script("python3", "-c", PYTHON)?,
            Self::Perl => running.script("perl", "-e", PERL)?,
            Self::Node => running.script("node", "-e", NODE)?,
            Self::Sqlite => running.sqlite()?,
            Self::Redis => running.redis()?,
            Self::Nginx => running.nginx()?,
            Self::Postgres => running.postgres()?,
        }
        ensure!(!running.pids.is_empty(), "{self:?} has no process");
        Ok(running)
    }
}

const PYTHON: &str = "
import json, re, zlib, sqlite3, hashlib, decimal, itertools, collections
def nested(depth):
    return [depth, {'k': 'x' * (600 + depth)}, nested(depth - 1)] if depth else []
i = 0
cache = {}
while True:
    i += 1
    cache[i % 500] = 'x' * (600 + i % 3000)
    json.loads(json.dumps({str(k): [k] * 20 for k in range(200)}))
    json.loads(json.dumps(nested(12)))
    sorted(bytes(700 + k) for k in range(50))
    zlib.decompress(zlib.compress(b'abc' * 5000))
    re.sub('a(b+)c', lambda m: m.group(1) * 400, 'xabbcx' * 50)
    db = sqlite3.connect(':memory:')
    db.execute('create table t(a, b)')
    db.executemany('insert into t values (?, ?)', ((k, 'y' * k) for k in range(100)))
    db.execute('select b, count(*) from t group by length(b) order by 1 desc').fetchall()
    db.close()
    decimal.Decimal(2) ** 500
    collections.Counter(itertools.chain(range(700), range(300)))
";

const PERL: &str = "
use List::Util qw(sum);
my ($i, %cache) = (0);
while (1) {
    $i++;
    $cache{$i % 500} = 'x' x (100 + $i % 3000);
    my @words = map { join '', reverse split //, qq(word$_) } 1 .. 200;
    my %count;
    $count{lc $_}++ for @words, map { s/o(r)d/$1 x 20/er } @words;
    my @sorted = sort { $count{$a} <=> $count{$b} || $a cmp $b } keys %count;
    my $text = sprintf '%s-%d', join(',', @sorted), sum(1 .. 10);
    eval { die { text => $text } };
    (eval qq(sub { \\$_[0] + $i }))->(1);
}
";

const NODE: &str = "
const zlib = require('zlib'), crypto = require('crypto'), vm = require('vm');
let i = 0;
const cache = new Map();
function nested(depth) { return depth ? {depth, text: 'x'.repeat(depth * 10), inner: [nested(depth - 1)]} : null; }
function round() {
    i++;
    cache.set(i % 200, Buffer.alloc(3000 + i % 5000, i));
    JSON.parse(JSON.stringify(nested(30)));
    zlib.inflateSync(zlib.deflateSync(Buffer.alloc(20000, 'abc' + i)));
    crypto.createHash('sha256').update('x'.repeat(1000)).digest('hex');
    vm.runInNewContext('let a = []; for (let k = 0; k < 100; k++) a.push({k, s: `s${k}`}); a.sort((x, y) => y.k - x.k).length');
    'a,b,c'.repeat(300).split(',').map(w => w.toUpperCase() + i).sort().join(';').replace(/B(\\d)/g, (m, d) => d);
    zlib.gzip(Buffer.alloc(5000, i), () => {});
    setImmediate(round);
}
round();
";

/// A table that is filled and emptied again.
const SQL: &str = "INSERT INTO t(k, b) WITH RECURSIVE n(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM n WHERE x < 200) \
                   SELECT random() % 1000, randomblob(50 + abs(random()) % 4000) FROM n;\n\
                   SELECT k, sum(length(b)), group_concat(hex(substr(b, 1, 9))) FROM t GROUP BY k ORDER BY 2 DESC LIMIT 5;\n\
                   SELECT json_group_array(json_object('k', k, 'n', n)) FROM (SELECT k, count(*) AS n FROM t GROUP BY k);\n\
                   DELETE FROM t WHERE id <= (SELECT max(id) FROM t) - 1000;\n";

const PGBENCH: &str = "SELECT x % 17, count(*), string_agg(md5(x::text), ',' ORDER BY x DESC) FROM generate_series(1, 2000) x GROUP BY 1 ORDER BY 2;
SELECT jsonb_agg(jsonb_build_object('a', x, 'b', repeat('y', x))) FROM generate_series(1, 200) x;
WITH RECURSIVE n(x, t) AS (SELECT 1, 'a' UNION ALL SELECT x + 1, t || x FROM n WHERE x < 60) SELECT max(length(t)) FROM n;
BEGIN;
CREATE TEMP TABLE s AS SELECT x, regexp_replace(x::text, '(.)', '\\1\\1', 'g') AS t FROM generate_series(1, 300) x;
CREATE INDEX ON s(t);
SELECT a.t, b.x FROM s a JOIN s b ON a.t = b.t WHERE a.x > 250;
ROLLBACK;
";

/// A program under load; ended when dropped, and everything that it started.
pub struct Running {
    /// Those that allocate.
    pids: Vec<u32>,
    /// The one that others depend on first.
    children: Vec<Child>,
    load: Option<Load>,
    /// What makes the first child end its own children.
    end_signal: i32,
    folder: TempDir,
}

/// A thread of this process that is the program's client.
struct Load {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<u64>,
}

impl Running {
    pub fn pids(&self) -> &[u32] {
        &self.pids
    }

    fn script(&mut self, program: &str, option: &str, script: &str) -> Result<()> {
        let mut command = Command::new(required(program)?);
        command.args([option, script]).current_dir(self.folder.path());
        let pid = self.spawn(&mut command, Stdio::null())?;
        self.pids.push(pid);
        Ok(())
    }

    fn spawn(&mut self, command: &mut Command, stdin: Stdio) -> Result<u32> {
        command.stdin(stdin).stdout(Stdio::null()).stderr(Stdio::null());
        let die_with_parent = || {
            // SAFETY: prctl(PR_SET_PDEATHSIG) takes a number and touches no memory.
            match unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) } {
                0 => Ok(()),
                _ => Err(io::Error::last_os_error()),
            }
        };
        // SAFETY: between fork and exec only prctl(2) is called.
        unsafe { command.pre_exec(die_with_parent) };
        let child = command.spawn().with_context(|| format!("failed to start {}", command.get_program().display()))?;
        let pid = child.id();
        self.children.push(child);
        Ok(pid)
    }

    fn client(&mut self, mut round: impl FnMut() -> Result<()> + Send + 'static) {
        let stop = Arc::new(AtomicBool::new(false));
        let asked = Arc::clone(&stop);
        let thread = thread::spawn(move || {
            let mut rounds = 0;
            while !asked.load(Ordering::Relaxed) && round().is_ok() {
                rounds += 1;
            }
            rounds
        });
        self.load = Some(Load { stop, thread });
    }

    fn sqlite(&mut self) -> Result<()> {
        let pid = self.spawn(Command::new(required("sqlite3")?).arg(":memory:"), Stdio::piped())?;
        self.pids.push(pid);
        let mut stdin: ChildStdin = self.children[0].stdin.take().context("no standard input")?;
        stdin.write_all(b"CREATE TABLE t(id INTEGER PRIMARY KEY, k INTEGER, b BLOB); CREATE INDEX i ON t(k);\n")?;
        // The pipe makes it wait for sqlite3.
        self.client(move || Ok(stdin.write_all(SQL.as_bytes())?));
        Ok(())
    }

    fn redis(&mut self) -> Result<()> {
        let port = free_port()?;
        let mut server = Command::new(required("redis-server")?);
        server
            .args(["--port", &port.to_string(), "--bind", "127.0.0.1", "--save", "", "--dir"])
            .arg(self.folder.path());
        let pid = self.spawn(&mut server, Stdio::null())?;
        self.pids.push(pid);
        wait_for_port(port)?;
        let mut benchmark = Command::new(required("redis-benchmark")?);
        benchmark.args(["-p", &port.to_string(), "-l", "-c", "10", "-n", "20000", "-r", "5000", "-d", "200", "-q"]);
        benchmark.args(["-t", "set,get,incr,lpush,lpop,sadd,hset,spop,zadd,zpopmin,lrange_100,mset"]);
        self.spawn(&mut benchmark, Stdio::null())?;
        Ok(())
    }

    fn nginx(&mut self) -> Result<()> {
        let port = free_port()?;
        let folder = self.folder.path();
        fs::write(folder.join("index.html"), "<p>a page that is long enough to be compressed</p>\n".repeat(400))?;
        // Worker processes give up root, and have to reach the page.
        fs::set_permissions(folder, fs::Permissions::from_mode(0o755))?;
        let at = folder.display();
        let mut configuration = format!(
            "daemon off; pid {at}/pid; error_log {at}/errors; worker_processes 1; events {{ worker_connections 64; }}\n\
             http {{ access_log {at}/access; gzip on; gzip_types *; gzip_min_length 1;\n"
        );
        for path in ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"] {
            let _ = writeln!(configuration, "{path}_temp_path {at}/{path};");
        }
        let _ = writeln!(
            configuration,
            "server {{ listen 127.0.0.1:{port}; root {at};\n\
             location ~ ^/proxy/(.*) {{ proxy_pass http://127.0.0.1:{port}/$1; }}\n\
             location ~ ^/(old|new)/(.*)$ {{ rewrite ^/(old|new)/(.*)$ /$2 last; }} }} }}"
        );
        let file = folder.join("nginx.conf");
        fs::write(&file, configuration)?;
        let mut server = Command::new(required("nginx")?);
        server.arg("-p").arg(folder).arg("-c").arg(&file).args(["-e", "stderr"]);
        let master = self.spawn(&mut server, Stdio::null())?;
        wait_for_port(port)?;
        self.pids = wait_for_children(master, "worker process", 1)?;
        let mut count = 0_u64;
        self.client(move || {
            count += 1;
            let path = ["/", "/old/index.html", "/proxy/index.html", "/nothing"][count as usize % 4];
            let mut connection = TcpStream::connect((Ipv4Addr::LOCALHOST, port))?;
            connection.set_read_timeout(Some(PATIENCE))?;
            write!(
                connection,
                "GET {path} HTTP/1.1\r\nHost: test\r\nAccept-Encoding: gzip\r\nConnection: close\r\n\r\n"
            )?;
            let mut answer = Vec::new();
            connection.read_to_end(&mut answer)?;
            ensure!(answer.starts_with(b"HTTP/1.1 "), "no answer");
            Ok(())
        });
        Ok(())
    }

    fn postgres(&mut self) -> Result<()> {
        // It does not run as root.
        let (user, group) = account("postgres")?;
        let folder = self.folder.path().to_owned();
        chown(&folder, Some(user), Some(group)).context("failed to give the folder to postgres")?;
        let data = folder.join("data");
        let socket = folder.to_str().context("a path that is not UTF-8")?.to_owned();
        let as_user = |program: &str| -> Result<Command> {
            let mut command = Command::new(required(program)?);
            command
                .uid(user)
                .gid(group)
                .current_dir(&folder)
                .env_clear()
                .env("PATH", "/usr/bin:/bin")
                .env("LC_ALL", "C");
            command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
            Ok(command)
        };
        let done = |mut command: Command, what: &str| -> Result<()> {
            let status = command.status().with_context(|| format!("failed to start {what}"))?;
            ensure!(status.success(), "{what} ended with {status}");
            Ok(())
        };
        let mut initdb = as_user("initdb")?;
        initdb.arg("-D").arg(&data).args(["--no-sync", "--auth", "trust", "--username", "postgres"]);
        done(initdb, "initdb")?;
        let mut server = as_user("postgres")?;
        server.arg("-D").arg(&data).arg("-k").arg(&socket).args(["-c", "listen_addresses=", "-c", "fsync=off"]);
        let server = self.spawn(&mut server, Stdio::null())?;
        // Without waiting for its clients to leave.
        self.end_signal = libc::SIGINT;
        let up = wait_until(PATIENCE, || {
            // The last line of the file is the state.
            fs::read_to_string(data.join("postmaster.pid")).is_ok_and(|text| text.contains("ready"))
        });
        ensure!(up, "postgres did not start within {PATIENCE:?}");
        let script = folder.join("script.sql");
        fs::write(&script, PGBENCH)?;
        fs::set_permissions(&script, fs::Permissions::from_mode(0o644))?;
        let mut bench = as_user("pgbench")?;
        bench.args(["-h", &socket, "-U", "postgres", "-n", "-c", "2", "-T", "600", "-f"]).arg(&script).arg("postgres");
        self.spawn(&mut bench, Stdio::null())?;
        self.pids = wait_for_children(server, "[local]", 2)?;
        Ok(())
    }

    /// Ends the load and gives how many rounds the client of this process did, where it is one.
    pub fn stop_load(&mut self) -> Option<u64> {
        let load = self.load.take()?;
        load.stop.store(true, Ordering::Relaxed);
        // It may be waiting for the program, so that has to be there still.
        load.thread.join().ok()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // The load first, where it is a program; its failure with the server would not matter.
        for child in self.children.iter_mut().skip(1) {
            let _ = child.kill();
            let _ = child.wait();
        }
        if let Some(server) = self.children.first_mut() {
            // SAFETY: kill reads its two integers only. The child has not been waited for, so the pid is still its own.
            unsafe { libc::kill(server.id().cast_signed(), self.end_signal) };
            if !wait_until(Duration::from_secs(5), || server.try_wait().is_ok_and(|status| status.is_some())) {
                let _ = server.kill();
                let _ = server.wait();
            }
        }
        self.stop_load();
    }
}

fn required(program: &str) -> Result<PathBuf> {
    find(program).with_context(|| format!("{program} is not installed"))
}

/// A port of loopback that was free a moment ago.
fn free_port() -> Result<u16> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).context("failed to find a free port")?;
    Ok(listener.local_addr()?.port())
}

fn wait_for_port(port: u16) -> Result<()> {
    if !wait_until(PATIENCE, || TcpStream::connect((Ipv4Addr::LOCALHOST, port)).is_ok()) {
        bail!("nothing listens on port {port} after {PATIENCE:?}");
    }
    Ok(())
}

/// User and group of an account.
fn account(name: &str) -> Result<(u32, u32)> {
    let accounts = fs::read_to_string("/etc/passwd").context("failed to read /etc/passwd")?;
    let line = accounts.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
    let fields: Vec<&str> = line.with_context(|| format!("there is no user {name}"))?.split(':').collect();
    match fields[..] {
        [_, user, group, ..] => Ok((user.parse()?, group.parse()?)),
        _ => bail!("failed to read the user {name} from /etc/passwd"),
    }
}

/// The children of a process whose command lines say `what`, once there are so many that stay.
fn wait_for_children(parent: u32, what: &str, count: usize) -> Result<Vec<u32>> {
    // pgbench first makes a connection of which it soon lets go, and nothing tells that one from the others.
    const SETTLED: Duration = Duration::from_millis(300);
    let mut found = Vec::new();
    let mut since = Instant::now();
    let there = wait_until(PATIENCE, || {
        let listed = fs::read_to_string(format!("/proc/{parent}/task/{parent}/children")).unwrap_or_default();
        let pids = listed.split_whitespace().filter_map(|pid| pid.parse::<u32>().ok());
        let says = |pid: &u32| {
            fs::read(format!("/proc/{pid}/cmdline")).is_ok_and(|line| String::from_utf8_lossy(&line).contains(what))
        };
        let now: Vec<u32> = pids.filter(says).collect();
        if now != found {
            found = now;
            since = Instant::now();
        }
        found.len() >= count && since.elapsed() >= SETTLED
    });
    ensure!(there, "only {found:?} of process {parent}'s children are {what:?}");
    Ok(found)
}
