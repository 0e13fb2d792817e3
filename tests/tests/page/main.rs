//! The agent's page in a real browser. To look at it with made-up reports:
//! `cargo test -p leaktrace-tests --test page -- --ignored --nocapture look`.

mod chromium;
/// The library's own; the rest of the agent, and what it brings with it, is not needed here.
#[path = "../../../leak-user/src/agent/page/mod.rs"]
mod page;
mod report;
mod server;

use std::time::Duration;
use std::{env, fs, thread};

use anyhow::{Context as _, Result, ensure};
use chromium::Chromium;
use leak_user::view::{names, units, words};
use leaktrace_tests::kubernetes::{Container, NODE, Server as Cluster};
use leaktrace_tests::{Traced, host};
use report::{Frame, Labels, Report, Verdict, sample};
use serde_json::json;
use server::{Answer, Server};

/// Names a folder in which the tests leave what they see.
const PICTURES_VARIABLE: &str = "LEAKTRACE_PICTURES";

/// A whole system as a page would show it on a bad night: two leaks, one of them in a pod that is soon dead.
fn bad_night() -> Report {
    let mut report = sample::system();
    let mut second = report.processes[0].clone();
    second.pid = 777;
    "billing".clone_into(&mut second.comm);
    second.stacks.truncate(1);
    second.growing_stacks = 1;
    second.seconds_to_limit = Some(540.0);
    second.affected_by_loss = false;
    second.labels = Labels { unit: Some("billing.service".to_owned()), ..Labels::default() };
    report.processes.insert(1, second);
    report
}

/// A sample of what is on a quiet host.
fn quiet() -> Report {
    let mut report = sample::system();
    report.processes.clear();
    report.losses.clear();
    let system = report.system.as_mut().unwrap();
    system.watched = 312;
    system.traced = 0;
    system.decisions.clear();
    system.growing.clear();
    system.processes.clear();
    report
}

/// Names as a hostile program would choose them.
const NAMES: [&str; 4] = [
    "<script>document.body.dataset.owned=1</script>",
    "<img src=x onerror=document.body.dataset.owned=1>",
    "safe\u{202e}gnp.exe\u{2066}\u{200b}",
    "\u{1b}[2J\n\r\t\u{0}\"'&lt;",
];

fn hostile() -> Report {
    let mut report = bad_night();
    let name = |n: usize| NAMES[n % NAMES.len()].to_owned();
    let spoil = |frame: &mut Frame, n: usize| {
        frame.function = Some(name(n));
        frame.module = Some(format!("/srv/{}", name(n + 1)));
        frame.file = Some(name(n + 2));
        frame.reason = Some(name(n));
    };
    for (n, process) in report.processes.iter_mut().enumerate() {
        process.comm = name(n);
        process.exe = Some(name(n + 1));
        process.cgroup = Some(name(n + 2));
        process.hint = Some(name(n));
        process.labels.container = Some(name(n));
        process.labels.unit = Some(name(n + 1));
        process.allocators[0].family = name(n);
        for stack in &mut process.stacks {
            stack.op = Some(name(n));
            stack.frames.iter_mut().enumerate().for_each(|(n, frame)| spoil(frame, n));
        }
    }
    report.losses.insert(NAMES[0].to_owned(), 3);
    report.host.hostname = Some(NAMES[1].to_owned());
    let system = report.system.as_mut().unwrap();
    NAMES[0].clone_into(&mut system.processes[0].comm);
    NAMES[1].clone_into(&mut system.growing[0].comm);
    spoil(&mut system.growing[0].stacks[0].frames[0], 0);
    NAMES[2].clone_into(&mut system.decisions[0].comm);
    report
}

fn browser(test: &str) -> Result<Option<Chromium>> {
    host::program(test, "chromium").map(|program| Chromium::start(&program)).transpose()
}

/// Leaves a picture where a person asked for it.
fn picture(browser: &mut Chromium, name: &str) -> Result<()> {
    let Some(folder) = env::var_os(PICTURES_VARIABLE) else { return Ok(()) };
    let folder = std::path::PathBuf::from(folder);
    fs::create_dir_all(&folder)?;
    let picture = browser.screenshot()?;
    fs::write(folder.join(format!("{name}.png.base64")), picture).context("failed to keep a picture")
}

/// Serves made-up reports, one after the other, until it is stopped.
#[test]
#[ignore = "for a person to look at the page"]
fn look() -> Result<()> {
    let server = Server::start(9791)?;
    println!("look at {} (Ctrl-C ends it)", server.url());
    loop {
        for report in [bad_night(), hostile(), quiet(), sample::sampled(), sample::warming(), sample::steady()] {
            server.report(&report);
            thread::sleep(Duration::from_mins(1));
        }
    }
}

/// The page says what leaks, where, how fast and until when; asks nobody but its server, and has nothing to complain of.
#[test]
fn shows_what_leaks() -> Result<()> {
    let Some(mut browser) = browser("shows_what_leaks")? else { return Ok(()) };
    let server = Server::start(0)?;
    server.report(&bad_night());
    browser.look_by(1280, 900, false)?;
    browser.open(&server.url())?;
    browser.wait_for("document.querySelector('.flame .frame') !== null")?;
    let text = browser.text()?;
    for part in [
        "2 processes leak",
        "+1.21 MiB/min in Session::remember(Order)",
        "/srv/orders/src/session.cc:142",
        // The one that dies first stands first.
        "Out of memory in about 9 min",
        "Out of memory in about 5 h 20 min",
        "shop/orders-6c9f7d5b8-x2x4q/api",
        "212 watched, 2 traced",
        "99.8 % sure",
    ] {
        ensure!(text.contains(part), "{part:?} is not in\n{text}");
    }
    ensure!(text.find("billing").context("no billing")? < text.find("orders").context("no orders")?, "{text}");
    for (name, width, height, dark) in [
        ("light", 1280, 900, false),
        ("dark", 1280, 900, true),
        ("narrow", 390, 800, false),
        ("narrow-dark", 390, 800, true),
    ] {
        browser.look_by(width, height, dark)?;
        picture(&mut browser, name)?;
        let wide = browser.evaluate("document.documentElement.scrollWidth")?;
        ensure!(wide.as_u64() <= Some(u64::from(width)), "{name} is {wide} wide");
    }
    let outside: Vec<&str> = browser
        .requests()
        .into_iter()
        .filter(|url| !url.starts_with(&server.url()) && !url.starts_with("data:"))
        .collect();
    ensure!(outside.is_empty(), "asked elsewhere: {outside:?}");
    ensure!(browser.problems(true).is_empty(), "{:?}", browser.problems(true));
    Ok(())
}

/// On a full node the worst are at the top, the list is bounded, and a name, a pod or a pid finds the others; long names break nothing.
#[test]
fn many_processes() -> Result<()> {
    let Some(mut browser) = browser("many_processes")? else { return Ok(()) };
    let server = Server::start(0)?;
    let mut report = bad_night();
    let (model, mut system) = (report.processes[0].clone(), report.system.take().context("no system")?);
    report.processes.clear();
    for n in 0..30 {
        let mut one = model.clone();
        one.pid = 10_000 + n;
        one.comm = format!("worker-{n}");
        one.labels.pod = Some(format!("a-deployment-with-a-name-that-nobody-shortened-{n}-6c9f7d5b8-x2x4q"));
        one.seconds_to_limit = Some(3600.0 * f64::from(n + 1));
        report.processes.push(one);
    }
    let watched = system.processes[0].clone();
    system.processes = (0..400)
        .map(|n| {
            let mut one = watched.clone();
            (one.pid, one.comm) = (20_000 + n, format!("sidecar-{n}"));
            one
        })
        .collect();
    system.watched = 1000;
    report.system = Some(system);
    server.report(&report);
    browser.look_by(1280, 900, false)?;
    browser.open(&server.url())?;
    browser.wait_for("document.querySelectorAll('.row-link').length === 200")?;
    let text = browser.text()?;
    for part in [
        "30 processes leak",
        "and 25 more, in the list of processes.",
        "and 230 more: filter to see them.",
        "and 570 that neither",
    ] {
        ensure!(text.contains(part), "{part:?} is not in\n{text}");
    }
    ensure!(browser.evaluate("document.querySelector('#process-name').textContent.startsWith('worker-0')")? == true);
    for (name, width, height, dark) in [("many", 1280, 900, false), ("many-narrow-dark", 390, 800, true)] {
        browser.look_by(width, height, dark)?;
        picture(&mut browser, name)?;
        let wide = browser.evaluate("document.documentElement.scrollWidth")?;
        ensure!(wide.as_u64() <= Some(u64::from(width)), "{name} is {wide} wide");
    }
    browser.evaluate("document.querySelector('[data-key=filter]').focus()")?;
    for (typed, found) in [("sidecar-39", 11), ("9", 1)] {
        browser.type_text(typed)?;
        browser.wait_for(&format!("document.querySelectorAll('.row-link').length === {found}"))?;
    }
    // A new report takes neither what was typed nor the place in it.
    report.duration_s += 1.0;
    server.report(&report);
    browser.ask_again()?;
    browser.wait_for("document.querySelector('#age').textContent.includes('just now')")?;
    let field = "[document.activeElement.value, document.activeElement.selectionStart]";
    ensure!(browser.evaluate(field)? == json!(["sidecar-399", 11]), "{}", browser.evaluate(field)?);
    ensure!(browser.text()?.contains("sidecar-399"));
    browser.evaluate("document.activeElement.select()")?;
    browser.type_text("shortened-29-")?;
    browser.wait_for("document.querySelectorAll('.row-link').length === 1")?;
    browser.type_text("nobody")?;
    browser.wait_for("document.querySelector('#list').innerText.includes('None of that name.')")?;
    ensure!(browser.problems(true).is_empty(), "{:?}", browser.problems(true));
    Ok(())
}

/// What a page made of hostile names is text: nothing of it becomes an element, an attribute or code, and what would not print is
/// written out.
#[test]
fn hostile_names_stay_text() -> Result<()> {
    let Some(mut browser) = browser("hostile_names_stay_text")? else { return Ok(()) };
    let server = Server::start(0)?;
    server.report(&hostile());
    browser.look_by(1280, 900, false)?;
    // All that can be opened is open, and each process is looked at.
    for pid in ["777", "1234", "4321", "88", "1", "999999"] {
        browser.open(&format!("{}/#{pid}", server.url()))?;
        browser.wait_for("document.querySelector('#process h2') !== null")?;
        browser.evaluate("document.querySelectorAll('details').forEach((one) => { one.open = true; })")?;
        browser.evaluate("document.querySelectorAll('button.frame').forEach((one) => one.focus())")?;
        let text = browser.text()?;
        ensure!(text.contains("<script>document.body.dataset.owned=1</script>"), "{text}");
        for raw in ['\u{202e}', '\u{2066}', '\u{200b}', '\u{1b}', '\0'] {
            ensure!(!text.contains(raw), "{raw:?} is in {text:?}");
        }
        if pid == "1234" {
            for part in ["\\u{202e}gnp.exe\\u{2066}\\u{200b}", "\\u{1b}[2J\\n\\r\\t\\u{0}\"'&lt;"] {
                ensure!(text.contains(part), "{part:?} is not in\n{text}");
            }
            picture(&mut browser, "hostile")?;
        }
        let elements = browser.evaluate(
            "[document.scripts.length, document.images.length, document.body.dataset.owned ?? null, \
              document.querySelectorAll('main script, main iframe, main link, main style, [onerror]').length]",
        )?;
        ensure!(elements == json!([1, 0, null, 0]), "{elements}");
    }
    ensure!(browser.problems(true).is_empty(), "{:?}", browser.problems(true));
    Ok(())
}

/// Where an agent has a token, the page asks for it, says when it is wrong, and keeps it for the tab alone.
#[test]
fn asks_for_the_token() -> Result<()> {
    let Some(mut browser) = browser("asks_for_the_token")? else { return Ok(()) };
    let server = Server::start(0)?;
    let body = serde_json::to_string(&bad_night())?;
    server.answer(Answer { status: 200, body, token: Some("right".to_owned()) });
    browser.look_by(1280, 900, true)?;
    browser.open(&server.url())?;
    browser.wait_for("!document.querySelector('#token').hidden && document.activeElement.id === 'token-text'")?;
    ensure!(!browser.text()?.contains("orders"), "data without a token");
    picture(&mut browser, "token")?;
    browser.type_text("wrong")?;
    browser.press("Enter")?;
    browser.wait_for("document.querySelector('#token-why').textContent.includes('does not take this token')")?;
    ensure!(browser.evaluate("sessionStorage.length")? == 0, "a wrong token is kept");
    browser.type_text("right")?;
    browser.press("Enter")?;
    browser.wait_for("!document.querySelector('#main').hidden")?;
    ensure!(browser.text()?.contains("2 processes leak"));
    // A reload needs no second one, and nothing outlives the tab.
    browser.open(&format!("{}/?again", server.url()))?;
    browser.wait_for("!document.querySelector('#main').hidden")?;
    ensure!(browser.evaluate("[localStorage.length, document.cookie]")? == json!([0, ""]));
    ensure!(browser.evaluate("document.querySelector('#token-text').value")? == "");
    ensure!(browser.problems(false).is_empty(), "{:?}", browser.problems(false));
    Ok(())
}

/// A real agent and a real leak: the page asks for the token, then names the function that leaks and the pod that it is in, and has asked
/// nobody but the agent.
#[test]
fn of_a_real_agent() -> Result<()> {
    const TEST: &str = "of_a_real_agent";
    const TOKEN: &str = "a-token-for-this-test";
    if !host::can_trace(TEST) {
        return Ok(());
    }
    let Some(mut browser) = browser(TEST)? else { return Ok(()) };
    let traced = Traced::new()?;
    let mut fixture = traced.builder();
    // In a pod, where control groups can be made.
    let container = Container::new(&format!("leaktrace-test-page-{}", std::process::id()), 0);
    let cluster = Cluster::start();
    let mut expected = vec!["1 process leaks", "leak_slow", "LEAKING", "leak_slow.c:", "Growth over time", "Losses: "];
    if let Some(container) = &container {
        container.enter(fixture.command())?;
        cluster.set_pods([(container.uid.clone(), container.pod("7"))].into());
        expected.extend(["team-0/app-0-7/main-0", "registry.example/app-0:7", NODE]);
    } else {
        host::skip(TEST, "control groups cannot be made");
    }
    let fixture = fixture.start()?;
    let token = traced.folder().join("token");
    fs::write(&token, TOKEN)?;
    let kubernetes = format!("api_server = '{}'\nnode_name = '{NODE}'", cluster.url());
    traced.configure(&format!("[http]\ntoken_file = {token:?}\n[kubernetes]\n{kubernetes}\n"))?;
    let agent = traced.agent()?;
    let url = format!("http://{}", agent.address());
    browser.look_by(1280, 900, false)?;
    browser.open(&format!("{url}/#{}", fixture.pid()))?;
    browser.wait_for("document.activeElement.id === 'token-text'")?;
    browser.type_text(TOKEN)?;
    browser.press("Enter")?;
    let leaks = "document.querySelector('.card .where').innerText.includes('leak_block') && document.querySelector('.flame .leak')";
    // A verdict takes half a minute and the page asks every five seconds.
    if browser.wait_for(leaks).is_err() {
        browser.wait_for(leaks)?;
    }
    let text = browser.text()?;
    for part in expected {
        ensure!(text.contains(part), "{part:?} is not in\n{text}");
    }
    picture(&mut browser, "real")?;
    let outside: Vec<&str> = browser.requests().into_iter().filter(|asked| !asked.starts_with(&url)).collect();
    ensure!(outside.iter().all(|asked| asked.starts_with("data:")), "asked elsewhere: {outside:?}");
    ensure!(browser.problems(false).is_empty(), "{:?}", browser.problems(false));
    ensure!(agent.stop()?.code()? == 0);
    Ok(())
}

/// A page without anything to show says why, and one whose agent is gone says since when; both come back by themselves.
#[test]
fn says_why_there_is_nothing() -> Result<()> {
    let Some(mut browser) = browser("says_why_there_is_nothing")? else { return Ok(()) };
    let server = Server::start(0)?;
    server.answer(Answer { status: 503, ..Answer::default() });
    browser.look_by(1280, 900, true)?;
    browser.open(&server.url())?;
    browser.wait_for("document.body.innerText.includes('The agent has no report yet')")?;
    server.report(&quiet());
    browser.ask_again()?;
    browser.wait_for("document.body.innerText.includes('Watching 312 processes, none grows.')")?;
    let text = browser.text()?;
    for part in ["Nothing leaks", "None of the 312 watched processes grows", "Losses: none"] {
        ensure!(text.contains(part), "{part:?} is not in\n{text}");
    }
    ensure!(browser.evaluate("document.querySelector('#trouble').hidden")? == true);
    picture(&mut browser, "quiet")?;

    let mut report = sample::warming();
    report.duration_s = 5.0;
    server.report(&report);
    browser.ask_again()?;
    browser.wait_for("document.body.innerText.includes('too little for a verdict')")?;
    ensure!(browser.text()?.contains("Too early to tell"));
    picture(&mut browser, "warming")?;
    report.duration_s = 6.0;
    report.processes[0].verdict = Verdict::Stable;
    server.report(&report);
    browser.ask_again()?;
    browser.wait_for("document.body.innerText.includes('high but steady (68 MiB live): not a leak')")?;

    drop(server);
    browser.ask_again()?;
    browser.wait_for("document.querySelector('#trouble').textContent.includes('No answer from the agent since')")?;
    // What was known is still there.
    ensure!(browser.text()?.contains("high but steady"));
    picture(&mut browser, "gone")?;
    ensure!(browser.problems(false).is_empty(), "{:?}", browser.problems(false));
    Ok(())
}

/// Without a mouse: links by Tab and Enter, the flame graph by arrows, Enter and Escape; what has the focus keeps it when a new report
/// comes, and what was opened stays open.
#[test]
fn works_by_keyboard() -> Result<()> {
    let Some(mut browser) = browser("works_by_keyboard")? else { return Ok(()) };
    let server = Server::start(0)?;
    let mut report = bad_night();
    server.report(&report);
    browser.look_by(1280, 900, false)?;
    browser.open(&server.url())?;
    browser.wait_for("document.querySelector('.flame .frame') !== null")?;
    let mut reached = false;
    for _ in 0..40 {
        browser.press("Tab")?;
        if browser.evaluate("document.activeElement.dataset.key ?? ''")? == "row4321" {
            reached = true;
            break;
        }
    }
    ensure!(reached, "the list of processes cannot be reached");
    browser.press("Enter")?;
    browser.wait_for("location.hash === '#4321' && document.activeElement.id === 'process-name'")?;
    ensure!(browser.text()?.contains("high but steady"), "not the process that was chosen");

    browser.evaluate("location.hash = '#1234'")?;
    browser.wait_for("document.querySelector('#process-name').textContent.startsWith('orders')")?;
    browser.evaluate("document.querySelector('.flame .frame').focus()")?;
    browser.press("ArrowDown")?;
    browser.press("ArrowDown")?;
    ensure!(browser.evaluate("document.activeElement.textContent")? == "main");
    ensure!(browser.text()?.contains("main in orders: +1.20 MiB/min, 99.4 % of all"), "{}", browser.text()?);
    browser.press("Enter")?;
    browser
        .wait_for("document.activeElement.textContent === 'main' && document.activeElement.style.width === '100%'")?;
    browser.evaluate("document.querySelectorAll('details.stack')[3].open = true")?;
    report.duration_s = 31.0;
    report.processes[0].live_bytes += 1 << 20;
    server.report(&report);
    browser.ask_again()?;
    browser.wait_for("document.body.innerText.includes('69 MiB')")?;
    ensure!(browser.evaluate("document.activeElement.textContent")? == "main", "the focus was lost");
    ensure!(
        browser.evaluate("document.querySelectorAll('details.stack')[3].open")? == true,
        "what was open was closed"
    );
    ensure!(browser.evaluate("document.activeElement.style.width")? == "100%", "the flame graph forgot where it was");
    browser.press("Escape")?;
    browser.wait_for("document.querySelectorAll('.flame .frame')[0].style.width !== '100%'")?;
    ensure!(browser.problems(true).is_empty(), "{:?}", browser.problems(true));
    Ok(())
}

/// Numbers, names and sentences of the page are those of the text view.
#[test]
fn speaks_as_the_text_view() -> Result<()> {
    let Some(mut browser) = browser("speaks_as_the_text_view")? else { return Ok(()) };
    let server = Server::start(0)?;
    server.report(&bad_night());
    browser.open(&server.url())?;
    browser.wait_for("document.querySelector('main') !== null")?;
    let modules = "Promise.all(['units', 'names', 'words'].map((name) => import(`./${name}.js`)))";
    let mut same = |function: &str, cases: Vec<serde_json::Value>, expected: Vec<String>| -> Result<()> {
        let shown = browser.evaluate(&format!(
            "{modules}.then((all) => {}.map((args) => Object.assign({{}}, ...all).{function}(...args)))",
            json!(cases)
        ))?;
        ensure!(shown == json!(expected), "{function}: the page shows {shown}, the text view {expected:?}");
        Ok(())
    };
    let sizes = [0, 7, 512, 999, 1000, 1023, 1024, 1536, 10_239, 12 << 20, 12_900_000, 1023 << 20, 5 << 40];
    same("bytes", sizes.iter().map(|n| json!([n])).collect(), sizes.iter().map(|n| units::bytes(*n)).collect())?;
    same("count", sizes.iter().map(|n| json!([n])).collect(), sizes.iter().map(|n| units::count(*n)).collect())?;
    let speeds = [0.0, 0.004, 3.0, 128.0, 20_972.0, -20_972.0, 102_400.0, 5_242_880.0, 1e12];
    same("rate", speeds.iter().map(|n| json!([n])).collect(), speeds.iter().map(|n| units::rate(*n)).collect())?;
    let times = [0.0, 0.52, 9.0, 29.4, 59.7, 200.0, 3600.0, 12_000.0, 187_200.0, -1.0];
    same("duration", times.iter().map(|n| json!([n])).collect(), times.iter().map(|n| units::duration(*n)).collect())?;
    same(
        "about",
        times[..9].iter().map(|n| json!([n])).collect(),
        times[..9].iter().map(|n| units::about(*n)).collect(),
    )?;
    let odd = [
        "größe",
        "a\nb\r\tc\u{9b}",
        "z\u{301}",
        "no\u{a0}break",
        "\u{feff}\u{e0041}\u{1160}\u{d7b0}\u{3164}",
        "日本語 אבג 😀",
        "\"'\\",
    ];
    let strange: Vec<&str> = NAMES.into_iter().chain(odd).collect();
    same(
        "safe",
        strange.iter().map(|n| json!([n])).collect(),
        strange.iter().map(|n| leak_user::view::safe(n)).collect(),
    )?;
    let long = [
        "std::map<std::string, std::vector<Order, std::allocator<Order> > >::insert(Pair const&)",
        "<alloc::vec::Vec<app::order::Order> as core::clone::Clone>::clone",
        "Stream& operator<<<Order>(Stream&, Order const&)",
        "Smart::operator->(int, int, int, int)",
        "broken<(name>)of_somebody_else",
    ];
    for columns in [12, 16, 25, 40, 70] {
        let cases = long.iter().map(|name| json!([name, columns])).collect();
        same("elide", cases, long.iter().map(|name| names::elide(name, columns)).collect())?;
    }
    for report in [bad_night(), sample::sampled(), sample::steady(), sample::warming()] {
        let said = report.processes.iter().map(|process| words::verdict(process, &report).1).collect();
        same("sentence", report.processes.iter().map(|process| json!([process, report])).collect(), said)?;
    }
    Ok(())
}

/// Pods, what earlier runs were like, restarts, and whom the kernel killed for want of memory: what the agent knows beyond a trace.
#[test]
fn tells_what_the_agent_knows() -> Result<()> {
    let Some(mut browser) = browser("tells_what_the_agent_knows")? else { return Ok(()) };
    let server = Server::start(0)?;
    let mut report = serde_json::to_value(bad_night())?;
    let mut killed = report["processes"][0].clone();
    for (key, value) in [("pod", "orders-6c9f-x2x4q"), ("namespace", "shop"), ("container_name", "api"), ("node", "n1")]
    {
        report["processes"][0][key] = json!(value);
        killed[key] = json!(value);
    }
    report["processes"][0]["baseline"] = json!({"remark": "grew since build 7b2c", "steady_bytes": 64 << 20});
    report["processes"][0]["memory_limit_of"] = json!("/kubepods.slice/pod1");
    killed["pid"] = json!(999);
    let mut kill = killed.clone();
    kill["process"] = killed;
    kill["at"] = json!("2026-01-02T03:04:20Z");
    report["oom_kills"] = json!([kill]);
    report["system"]["restarts"] = json!([{"pid": 4321, "comm": "indexer", "at": "2026-01-02T03:04:20Z", "leaked": true,
        "before_bytes": 512 << 20, "now_bytes": 80 << 20, "baseline_bytes": null, "back_to_baseline": true}]);
    server.answer(Answer { status: 200, body: report.to_string(), token: None });
    browser.look_by(1280, 900, false)?;
    browser.open(&format!("{}/#1234", server.url()))?;
    browser.wait_for("document.querySelector('#process h2') !== null")?;
    browser.evaluate("document.querySelectorAll('details').forEach((one) => { one.open = true; })")?;
    let text = browser.text()?;
    // What time was left is of no use to one that is dead.
    let dead = browser.evaluate("[...document.querySelectorAll('.dead')].map((one) => one.innerText).join()")?;
    ensure!(dead.as_str().is_some_and(|dead| dead.contains("grow by") && !dead.contains("out of memory in")), "{dead}");
    for part in [
        "shop/orders-6c9f-x2x4q/api",
        "Grew since build 7b2c.",
        "Steady before at\n64 MiB",
        "/kubepods.slice/pod1",
        "03:04 the kernel killed orders 999 of shop/orders-6c9f-x2x4q/api because memory ran out",
        "memory is back to baseline: 80 MiB, 512 MiB before the restart",
    ] {
        ensure!(text.contains(part), "{part:?} is not in\n{text}");
    }
    picture(&mut browser, "agent-knows")?;
    browser.evaluate("document.querySelector('[data-key=dead999]').click()")?;
    browser.wait_for("document.querySelector('#process').innerText.includes('This is what was last known of it')")?;
    ensure!(browser.text()?.contains("Session::remember(Order)"));
    picture(&mut browser, "killed")?;
    ensure!(browser.problems(true).is_empty(), "{:?}", browser.problems(true));
    Ok(())
}

/// Letters stand out from their ground, in light and in dark, by the ratio that the guidelines for accessible pages ask for.
#[test]
fn can_be_read() -> Result<()> {
    const CONTRAST: &str = "(() => {
        const channel = (c) => (c /= 255, c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
        const light = ([r, g, b]) => 0.2126 * channel(r) + 0.7152 * channel(g) + 0.0722 * channel(b);
        const parse = (text) => text.match(/[\\d.]+/g).map(Number);
        const bad = [];
        const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
        let seen = 0;
        while (walker.nextNode()) {
            const one = walker.currentNode.parentElement;
            if (!walker.currentNode.data.trim() || !one.checkVisibility() || one.closest('svg')) continue;
            let ground = one;
            while (ground && (parse(getComputedStyle(ground).backgroundColor)[3] ?? 1) === 0) ground = ground.parentElement;
            const [a, b] = [light(parse(getComputedStyle(one).color)), light(parse(getComputedStyle(ground ?? document.body).backgroundColor))];
            const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
            seen += 1;
            if (ratio < 4.5) bad.push(`${walker.currentNode.data}: ${ratio.toFixed(2)}`);
        }
        return [seen > 50, bad];
    })()";
    let Some(mut browser) = browser("can_be_read")? else { return Ok(()) };
    let server = Server::start(0)?;
    server.report(&bad_night());
    for dark in [false, true] {
        browser.look_by(1280, 900, dark)?;
        for pid in [1234, 4321, 88] {
            browser.open(&format!("{}/?{dark}{pid}#{pid}", server.url()))?;
            browser.wait_for("document.querySelector('#process h2') !== null")?;
            browser.evaluate("document.querySelectorAll('details').forEach((one) => { one.open = true; })")?;
            let found = browser.evaluate(CONTRAST)?;
            ensure!(found == json!([true, []]), "dark: {dark}, pid {pid}: {found}");
        }
    }
    Ok(())
}
