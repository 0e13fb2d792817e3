//! A headless Chromium that is told what to do by the `DevTools` protocol, over two pipes: JSON, each message ended by a zero byte.
//!
//! The crates for that protocol bring code for all its thousands of messages, which takes minutes to build; a dozen are needed here.

use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use leaktrace_tests::patience;
use serde_json::{Value, json};

/// To start takes it longer than anything else.
const STARTS: u32 = 3;

/// One browser with one page; killed when dropped.
pub struct Chromium {
    child: Child,
    input: ChildStdin,
    messages: Receiver<Value>,
    session: Option<String>,
    last_id: u64,
    /// What the page told by itself, in order.
    events: Vec<Value>,
    /// Its profile, which it writes into as long as it lives.
    _home: tempfile::TempDir,
}

impl Chromium {
    pub fn start(program: &Path) -> Result<Self> {
        let home = tempfile::tempdir()?;
        // It wants its pipes at 3 and 4, where a shell can put them.
        let mut child = Command::new("sh")
            .args(["-c", "exec \"$0\" \"$@\" 3<&0 4>&1 </dev/null >/dev/null"])
            .arg(program)
            .args(["--headless=new", "--remote-debugging-pipe", "--no-first-run", "--no-default-browser-check"])
            // Root has no sandbox, a container no large /dev/shm, and nobody here a screen.
            .args(["--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu", "--hide-scrollbars"])
            .args(["--disable-background-networking", "--disable-component-update", "--disable-sync"])
            // Whatever it would like to ask elsewhere stays here.
            .args(["--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1", "--no-proxy-server"])
            .arg(format!("--user-data-dir={}", home.path().join("profile").display()))
            .arg("about:blank")
            .env("HOME", home.path())
            .env("XDG_RUNTIME_DIR", home.path())
            // It is killed, and what it has for the moment would stay.
            .env("TMPDIR", home.path())
            .env("TZ", "UTC")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            // It starts processes of its own, which are ended with it.
            .process_group(0)
            .spawn()
            .context("failed to start chromium")?;
        let input = child.stdin.take().context("failed to take chromium's input")?;
        let mut output = BufReader::new(child.stdout.take().context("failed to take chromium's output")?);
        let (send, messages) = channel();
        thread::spawn(move || {
            let mut message = Vec::new();
            while output.read_until(0, &mut message).is_ok_and(|read| read > 0) {
                message.pop();
                let Ok(value) = serde_json::from_slice(&message) else { break };
                if send.send(value).is_err() {
                    break;
                }
                message.clear();
            }
        });
        let mut browser = Self { child, input, messages, session: None, last_id: 0, events: Vec::new(), _home: home };
        let created =
            browser.call_within("Target.createTarget", &json!({"url": "about:blank"}), patience() * STARTS)?;
        let attached =
            browser.call("Target.attachToTarget", json!({"targetId": created["targetId"], "flatten": true}))?;
        browser.session = Some(attached["sessionId"].as_str().context("failed to attach to a page")?.to_owned());
        for domain in ["Page", "Runtime", "Network", "Log"] {
            browser.call(&format!("{domain}.enable"), json!({}))?;
        }
        Ok(browser)
    }

    /// Sends a message and waits for its answer.
    #[allow(clippy::needless_pass_by_value, reason = "it is made for the call")]
    pub fn call(&mut self, method: &str, params: Value) -> Result<Value> {
        self.call_within(method, &params, patience())
    }

    fn call_within(&mut self, method: &str, params: &Value, limit: Duration) -> Result<Value> {
        self.last_id += 1;
        let id = self.last_id;
        let mut message = json!({"id": id, "method": method, "params": params});
        if let Some(session) = &self.session {
            message["sessionId"] = json!(session);
        }
        let mut bytes = serde_json::to_vec(&message)?;
        bytes.push(0);
        self.input.write_all(&bytes).with_context(|| format!("failed to send {method} to chromium"))?;
        let deadline = Instant::now() + limit;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let mut message = match self.messages.recv_timeout(left) {
                Ok(message) => message,
                Err(RecvTimeoutError::Timeout) => bail!("chromium did not answer {method}"),
                Err(RecvTimeoutError::Disconnected) => bail!("chromium ended at {method}"),
            };
            if message["id"].as_u64() != Some(id) {
                self.events.push(message);
                continue;
            }
            ensure!(message["error"].is_null(), "chromium answered {method} with {}", message["error"]);
            return Ok(message["result"].take());
        }
    }

    /// Goes to an address; the page need not be ready when this returns.
    pub fn open(&mut self, url: &str) -> Result<()> {
        let answer = self.call("Page.navigate", json!({"url": url}))?;
        ensure!(answer["errorText"].is_null(), "failed to open {url}: {}", answer["errorText"]);
        Ok(())
    }

    /// The value of an expression in the page; a promise is awaited.
    pub fn evaluate(&mut self, expression: &str) -> Result<Value> {
        let params = json!({"expression": expression, "returnByValue": true, "awaitPromise": true});
        let mut answer = self.call_within("Runtime.evaluate", &params, patience() * 2)?;
        ensure!(
            answer["exceptionDetails"].is_null(),
            "failed to evaluate {expression}: {}",
            answer["exceptionDetails"]
        );
        Ok(answer["result"]["value"].take())
    }

    /// Waits until an expression holds, which is looked at whenever the page changes.
    pub fn wait_for(&mut self, condition: &str) -> Result<()> {
        let limit = patience();
        let wait = format!(
            "new Promise((done) => {{
                const check = () => {{ try {{ if ({condition}) done(true); }} catch {{}} }};
                new MutationObserver(check).observe(document, {{subtree: true, childList: true, attributes: true, characterData: true}});
                addEventListener('hashchange', check);
                setTimeout(() => done(false), {});
                check();
            }})",
            limit.as_millis()
        );
        let deadline = Instant::now() + limit;
        loop {
            match self.evaluate(&wait) {
                Ok(Value::Bool(true)) => return Ok(()),
                // A page that was left takes its promises with it.
                Err(error) if Instant::now() < deadline && format!("{error:#}").contains("context") => {}
                Err(error) => return Err(error),
                Ok(_) => {
                    let text = self.evaluate("document.body.innerText")?;
                    bail!("the page did not come to {condition}; it shows {text}");
                }
            }
        }
    }

    /// Makes the page ask for the report now, as when its tab comes to the front.
    pub fn ask_again(&mut self) -> Result<()> {
        self.evaluate("document.dispatchEvent(new Event('visibilitychange'))").map(drop)
    }

    /// What the page shows, as a person reads it.
    pub fn text(&mut self) -> Result<String> {
        let text = self.evaluate("document.body.innerText")?;
        Ok(text.as_str().context("failed to read the page's text")?.to_owned())
    }

    /// Presses a key, such as `Tab` or `ArrowDown`.
    pub fn press(&mut self, key: &str) -> Result<()> {
        let code = match key {
            "Tab" => 9,
            "Enter" => 13,
            "Escape" => 27,
            "ArrowUp" => 38,
            "ArrowDown" => 40,
            _ => bail!("no such key is known: {key}"),
        };
        for kind in ["rawKeyDown", "keyUp"] {
            let mut params = json!({"type": kind, "key": key, "code": key, "windowsVirtualKeyCode": code});
            if kind == "rawKeyDown" && key == "Enter" {
                params["type"] = json!("keyDown");
                params["text"] = json!("\r");
            }
            self.call("Input.dispatchKeyEvent", params)?;
        }
        Ok(())
    }

    /// Types into what has the focus.
    pub fn type_text(&mut self, text: &str) -> Result<()> {
        self.call("Input.insertText", json!({"text": text})).map(drop)
    }

    /// The window's size in pixels, and whether the reader's system is dark.
    pub fn look_by(&mut self, width: u32, height: u32, dark: bool) -> Result<()> {
        let size = json!({"width": width, "height": height, "deviceScaleFactor": 1, "mobile": false});
        self.call("Emulation.setDeviceMetricsOverride", size)?;
        let scheme = if dark { "dark" } else { "light" };
        self.call(
            "Emulation.setEmulatedMedia",
            json!({"features": [{"name": "prefers-color-scheme", "value": scheme}]}),
        )
        .map(drop)
    }

    /// The whole page as PNG, in base64.
    pub fn screenshot(&mut self) -> Result<String> {
        let answer = self.call("Page.captureScreenshot", json!({"format": "png", "captureBeyondViewport": true}))?;
        Ok(answer["data"].as_str().context("failed to take a screenshot")?.to_owned())
    }

    /// Every address that the page asked for.
    pub fn requests(&self) -> Vec<&str> {
        let sent = self.events.iter().filter(|event| event["method"] == "Network.requestWillBeSent");
        sent.filter_map(|event| event["params"]["request"]["url"].as_str()).collect()
    }

    /// What the console shows as wrong. That an answer has an error's status is shown too; `with_answers` says whether to tell it.
    pub fn problems(&self, with_answers: bool) -> Vec<String> {
        let is_problem = |event: &&Value| {
            let params = &event["params"];
            match event["method"].as_str() {
                Some("Runtime.exceptionThrown") => true,
                Some("Runtime.consoleAPICalled") => {
                    ["error", "warning", "assert"].iter().any(|kind| params["type"] == *kind)
                }
                Some("Log.entryAdded") => {
                    let entry = &params["entry"];
                    let of_answer = entry["source"] == "network" && !with_answers;
                    (entry["level"] == "error" || entry["level"] == "warning") && !of_answer
                }
                _ => false,
            }
        };
        self.events.iter().filter(is_problem).map(Value::to_string).collect()
    }
}

impl Drop for Chromium {
    fn drop(&mut self) {
        if let Ok(group) = i32::try_from(self.child.id()) {
            // SAFETY: kill has no memory effects; the group is the child's own, and lives until it is waited for.
            unsafe { libc::kill(-group, libc::SIGKILL) };
        }
        let _ = self.child.wait();
    }
}
