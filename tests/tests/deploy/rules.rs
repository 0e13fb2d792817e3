//! Alert rules, runbook and dashboard.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, ensure};
use leaktrace_tests::deploy::{self, MONITORING, Tools};
use leaktrace_tests::host;
use serde_json::{Value, json};

const RULES: &str = "chart/leaktrace/files/rules.yaml";

/// What promtool says, if it is content.
fn promtool(tool: &Path, args: &[&str], file: &Path) -> Result<String> {
    let output =
        Command::new(tool).args(args).arg(file).stdin(Stdio::null()).output().context("failed to start promtool")?;
    deploy::text(output, "pass promtool")
}

/// The rules are sound, and their own tests pass: who fires when, with which text, and who does not.
#[test]
fn promtool_takes_the_rules() -> Result<()> {
    let Some(tool) = host::program("promtool_takes_the_rules", "promtool") else { return Ok(()) };
    let said = promtool(&tool, &["check", "rules"], &deploy::folder().join(RULES))?;
    ensure!(said.contains("rules found"), "{said}");
    let tests = deploy::folder().join("prometheus/rules.test.yaml");
    promtool(&tool, &["test", "rules"], &tests)?;

    // Every alert has a test in which it fires.
    let text = fs::read_to_string(deploy::folder().join(RULES))?;
    let alerts: BTreeSet<&str> = text.lines().filter_map(|line| line.trim().strip_prefix("- alert: ")).collect();
    ensure!(alerts.len() >= 10, "{alerts:?}");
    let text = fs::read_to_string(tests)?;
    let fires = text.split("alertname: ").filter_map(|part| {
        let (name, rest) = part.split_once('\n')?;
        rest.lines().next()?.trim().eq("exp_alerts:").then_some(name)
    });
    assert_eq!(fires.collect::<BTreeSet<_>>(), alerts);
    Ok(())
}

/// Each alert says how bad it is, in words what it means and what to do next, and where in the runbook there is more; and the runbook has
/// a chapter of that name.
#[test]
fn every_alert_has_its_chapter() -> Result<()> {
    let Some(tools) = Tools::for_test("every_alert_has_its_chapter") else { return Ok(()) };
    let runbook = fs::read_to_string(deploy::folder().join("RUNBOOK.md"))?;
    let anchors: BTreeSet<String> = runbook
        .lines()
        .filter_map(|line| line.strip_prefix("## "))
        .map(|title| {
            let title = title.to_lowercase();
            title
                .chars()
                .filter(|c| c.is_alphanumeric() || " -".contains(*c))
                .map(|c| if c == ' ' { '-' } else { c })
                .collect()
        })
        .collect();
    // The runbook's own links too.
    for link in runbook.split("](#").skip(1).filter_map(|rest| rest.split_once(')')) {
        ensure!(anchors.contains(link.0), "there is no chapter {}", link.0);
    }
    let rules = tools.documents(&fs::read_to_string(deploy::folder().join(RULES))?)?;
    let mut seen = 0;
    for rule in
        rules[0]["groups"].as_array().into_iter().flatten().filter_map(|group| group["rules"].as_array()).flatten()
    {
        let name = rule["alert"].as_str().context("no name")?;
        let text = |key: &str| rule["annotations"][key].as_str().unwrap_or_default();
        ensure!(
            ["critical", "warning", "info"].contains(&rule["labels"]["severity"].as_str().unwrap_or_default()),
            "{name}"
        );
        ensure!(!text("summary").is_empty() && text("description").contains("Next: "), "{name}");
        let anchor =
            text("runbook_url").strip_prefix("deploy/RUNBOOK.md#").with_context(|| format!("{name}: no runbook"))?;
        ensure!(anchors.contains(anchor), "{name}: there is no chapter {anchor}");
        ensure!(runbook.contains(&format!("`{name}`")), "the runbook does not speak of {name}");
        seen += 1;
    }
    ensure!(seen >= 10, "{seen} rules");

    // The operator gets the very same, with links to where the runbook is.
    let objects = tools.documents(&tools.chart(&MONITORING)?)?;
    let wrapped = objects.iter().find(|object| object["kind"] == "PrometheusRule").context("no PrometheusRule")?;
    assert_eq!(wrapped["spec"], rules[0]);
    let elsewhere = [&MONITORING[..], &["rules.runbook=https://wiki.example/leaktrace"]].concat();
    let elsewhere = tools.chart(&elsewhere)?;
    ensure!(!elsewhere.contains("deploy/RUNBOOK.md#"), "a link stays");
    ensure!(elsewhere.contains("https://wiki.example/leaktrace#the-agent-is-down"), "no link to the wiki");
    Ok(())
}

/// All expressions in the dashboard are sound, no two panels have an id in common or overlap, and the chart brings it unchanged.
#[test]
fn the_dashboard_is_sound() -> Result<()> {
    let Some(tool) = host::program("the_dashboard_is_sound", "promtool") else { return Ok(()) };
    let text = fs::read_to_string(deploy::folder().join("chart/leaktrace/files/dashboard.json"))?;
    let dashboard: Value = serde_json::from_str(&text)?;
    let panels = dashboard["panels"].as_array().context("no panels")?;
    let mut rules = Vec::new();
    let mut ids = BTreeSet::new();
    let mut taken = BTreeSet::new();
    for panel in panels {
        ensure!(ids.insert(panel["id"].as_u64()), "two panels with the id {}", panel["id"]);
        let place = |key: &str| panel["gridPos"][key].as_u64().with_context(|| format!("a panel without {key}"));
        let (x, y, w, h) = (place("x")?, place("y")?, place("w")?, place("h")?);
        ensure!(x + w <= 24, "{} is too wide", panel["title"]);
        for cell in (x..x + w).flat_map(|x| (y..y + h).map(move |y| (x, y))) {
            ensure!(taken.insert(cell), "{} overlaps", panel["title"]);
        }
        for target in panel["targets"].as_array().into_iter().flatten() {
            let expression = target["expr"].as_str().context("no expression")?;
            // What Grafana puts in.
            let expression = expression.replace("$__rate_interval", "5m").replace("$node", ".*");
            let expression = expression.replace("$namespace", ".*").replace("$process", ".*");
            ensure!(!expression.contains('$'), "an unknown variable in {expression}");
            rules.push(json!({"record": format!("panel:{}", rules.len()), "expr": expression}));
        }
    }
    ensure!(rules.len() >= 20, "{} expressions", rules.len());
    let folder = tempfile::tempdir()?;
    let file = folder.path().join("dashboard.rules");
    let check = |rules: &[Value]| -> Result<String> {
        // JSON is YAML.
        fs::write(&file, json!({"groups": [{"name": "dashboard", "rules": rules}]}).to_string())?;
        promtool(&tool, &["check", "rules"], &file)
    };
    check(&rules)?;
    rules[3]["expr"] = json!("sum by (pid (x)");
    ensure!(check(&rules).is_err(), "promtool takes everything");

    let Some(tools) = Tools::for_test("the_dashboard_is_sound") else { return Ok(()) };
    let objects = tools.documents(&tools.chart(&MONITORING)?)?;
    let brought =
        objects.iter().find_map(|object| object["data"]["leaktrace.json"].as_str()).context("no dashboard")?;
    assert_eq!(serde_json::from_str::<Value>(brought)?, dashboard);
    Ok(())
}
