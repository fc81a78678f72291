//! `berth faults`: the last incidents of a node, as evidence for whoever repairs its hardware. From the agent's own file
//! on the node, or from the agent through the API server. It changes nothing.

use std::path::{Path, PathBuf};

use anyhow::Context;
use berth_agent::{
    Faults,
    health::incidents::{Incident, Transition},
    state_file,
};
use clap::{Args, ValueEnum};
use jiff::Timestamp;

use crate::{
    cluster::{Cluster, ClusterArgs},
    output,
    table::Table,
    verdict::Verdict,
};

/// Where the chart has agents keep their file.
const FOLDER: &str = "/var/lib/berth/agent";

/// The last incidents of a node.
#[derive(Debug, Args)]
pub(crate) struct FaultsArgs {
    /// The node, whose agent is asked through the API server: needs get on pods/proxy and list on pods. By default the
    /// file of the agent on this machine is read.
    #[arg(long)]
    node: Option<String>,
    /// Folder of the agent's file
    #[arg(long, env = "BERTH_STATE_DIR", default_value = FOLDER)]
    state_dir: PathBuf,
    /// How to write them
    #[arg(short, long, value_enum, default_value_t)]
    output: Output,
    /// Kubeconfig file; by default as kubectl finds it
    #[arg(long)]
    kubeconfig: Option<PathBuf>,
    /// Context of the kubeconfig
    #[arg(long)]
    context: Option<String>,
}

/// How incidents are written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
enum Output {
    /// A table for people.
    #[default]
    Table,
    /// One JSON document with every transition.
    Json,
    /// One line for each incident, as a spreadsheet or a ticket takes it.
    Csv,
}

/// Reads and writes them.
pub(crate) fn run(args: FaultsArgs) -> anyhow::Result<Verdict> {
    let FaultsArgs { node, state_dir, output, kubeconfig, context } = args;
    let faults = match node {
        Some(node) => {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
            runtime.block_on(async {
                let cluster = Cluster::connect(&ClusterArgs::of(kubeconfig, context)).await?;
                let text = cluster.ask_agent(&node, "faults").await?;
                serde_json::from_str(&text).with_context(|| format!("the agent of {node} answers no list of incidents"))
            })?
        }
        None => from_file(&state_dir)?,
    };
    let text = match output {
        Output::Table => table(&faults),
        Output::Json => serde_json::to_string_pretty(&faults)?,
        Output::Csv => csv(&faults),
    };
    output::say(text.trim_end())?;
    Ok(Verdict::Pass)
}

fn from_file(folder: &Path) -> anyhow::Result<Faults> {
    let path = folder.join(state_file::NAME);
    let (node, incidents) = state_file::incidents(&path).with_context(|| {
        format!("{}: on another machine give --node, or --state-dir where the agent keeps its file", path.display())
    })?;
    Ok(Faults { node, incidents })
}

/// Every form of a list, for tests that only want it to be written.
#[cfg(test)]
pub(crate) fn all_forms(faults: &Faults) -> [String; 2] {
    [table(faults), csv(faults)]
}

fn time(unix_ms: i64) -> String {
    Timestamp::from_millisecond(unix_ms).map(|time| time.to_string()).unwrap_or_default()
}

fn closed(incident: &Incident) -> String {
    incident.closed_unix_ms.map(time).unwrap_or_default()
}

fn table(faults: &Faults) -> String {
    let mut table = Table::new(&["OPENED", "CLOSED", "DEVICE", "SERIAL", "REASON", "CODE", "ACTION", "EVIDENCE"]);
    for incident in faults.incidents.iter().rev() {
        let serial = if incident.serial.is_empty() { &incident.uuid } else { &incident.serial };
        table.row([
            time(incident.opened_unix_ms),
            closed(incident),
            incident.device.clone(),
            serial.clone(),
            incident.reason.map(|reason| reason.to_string()).unwrap_or_default(),
            incident.code.clone(),
            incident.action.to_string(),
            incident.evidence.chars().take(80).collect(),
        ]);
    }
    if faults.incidents.iter().next().is_none() {
        return format!("{}: no incidents are known", faults.node);
    }
    table.to_string()
}

/// Columns of the CSV. Added to at the end only.
const COLUMNS: [&str; 15] = [
    "node",
    "device",
    "product",
    "uuid",
    "serial",
    "opened",
    "closed",
    "reason",
    "code",
    "health",
    "admission",
    "action",
    "reports",
    "evidence",
    "transitions",
];

/// RFC 4180, one line for each incident, oldest first.
fn csv(faults: &Faults) -> String {
    let mut text = COLUMNS.join(",") + "\r\n";
    for incident in faults.incidents.iter() {
        let worst = incident.transitions.iter().max_by_key(|change| (change.health, change.admission, change.action));
        let word = |of: fn(&Transition) -> &'static str| worst.map(of).unwrap_or_default().to_owned();
        let changes: Vec<String> = incident.transitions.iter().map(change).collect();
        let cells: [String; 15] = [
            faults.node.clone(),
            incident.device.clone(),
            incident.product.clone(),
            incident.uuid.clone(),
            incident.serial.clone(),
            time(incident.opened_unix_ms),
            closed(incident),
            incident.reason.map(|reason| reason.to_string()).unwrap_or_default(),
            incident.code.clone(),
            word(|change| change.health.as_str()),
            word(|change| change.admission.as_str()),
            incident.action.to_string(),
            incident.reports.to_string(),
            incident.evidence.clone(),
            changes.join("; "),
        ];
        text.push_str(&cells.map(|text| cell(&text)).join(","));
        text.push_str("\r\n");
    }
    text
}

/// `2026-01-01T00:00:00Z Unhealthy/Barred/RebootNode DeviceLost Xid 79`.
fn change(change: &Transition) -> String {
    let reason = change.reason.map(|reason| reason.to_string()).unwrap_or_default();
    let words = format!("{}/{}/{}", change.health, change.admission, change.action);
    [time(change.at_unix_ms), words, reason, change.evidence.clone()].join(" ").trim_end().to_owned()
}

/// One cell. What a spreadsheet would take for a formula is marked as text: a program's name is in the evidence.
fn cell(text: &str) -> String {
    let formula = text.starts_with(['=', '+', '-', '@', '\t', '\r']);
    let text = if formula { format!("'{text}") } else { text.to_owned() };
    if text.contains(['"', ',', '\n', '\r', ';']) { format!("\"{}\"", text.replace('"', "\"\"")) } else { text }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use berth_agent::health::{device::Settings, incidents::Incidents, ledger::Ledger};

    use super::*;

    fn faults() -> Faults {
        let incidents: Incidents = serde_json::from_value(serde_json::json!([{
            "device": "0000:3b:00.0", "product": "NVIDIA H100 80GB HBM3", "uuid": "GPU-1", "serial": "1653723052734",
            "openedUnixMs": 1_767_225_600_000_i64, "closedUnixMs": 1_767_225_700_000_i64, "note": false, "reports": 2,
            "reason": "DeviceLost", "code": "Xid 79", "evidence": "Xid 79: GPU has fallen off the bus.",
            "action": "RebootNode", "transitions": [
                {"atUnixMs": 1_767_225_600_000_i64, "health": "Unhealthy", "admission": "Barred", "action": "RebootNode",
                 "scope": "Device", "reason": "DeviceLost", "evidence": "Xid 79, pid 7: \"quoted\", text"},
                {"atUnixMs": 1_767_225_700_000_i64, "health": "Healthy", "admission": "Schedulable", "action": "None",
                 "evidence": ""}]
        }]))
        .unwrap();
        Faults { node: "gpu-07".to_owned(), incidents }
    }

    #[test]
    fn a_ticket_gets_one_line_for_each_incident() {
        let text = csv(&faults());
        let lines: Vec<&str> = text.split("\r\n").collect();
        assert_eq!((lines.len(), lines[0]), (3, COLUMNS.join(",").as_str()));
        let expected = "gpu-07,0000:3b:00.0,NVIDIA H100 80GB HBM3,GPU-1,1653723052734,2026-01-01T00:00:00Z,2026-01-01T00:01:40Z,\
                        DeviceLost,Xid 79,Unhealthy,Barred,RebootNode,2,Xid 79: GPU has fallen off the bus.,\
                        \"2026-01-01T00:00:00Z Unhealthy/Barred/RebootNode DeviceLost Xid 79, pid 7: \"\"quoted\"\", text; \
                        2026-01-01T00:01:40Z Healthy/Schedulable/None\"";
        assert_eq!(lines[1], expected);
    }

    #[test]
    fn people_see_the_serial_number_and_the_code() {
        let text = table(&faults());
        assert!(text.contains("1653723052734") && text.contains("Xid 79") && text.contains("RebootNode"), "{text}");
        assert_eq!(table(&Faults { node: "a".to_owned(), ..Faults::default() }), "a: no incidents are known");
    }

    #[test]
    fn a_cell_is_never_a_formula() {
        assert_eq!(cell("=cmd|'/c calc'!A0"), "'=cmd|'/c calc'!A0");
        assert_eq!(cell("@x, \"y\""), "\"'@x, \"\"y\"\"\"");
    }

    #[test]
    fn the_agents_file_is_read_and_its_absence_says_what_to_do() {
        let folder = tempfile::tempdir().unwrap();
        let error = format!("{:#}", from_file(folder.path()).unwrap_err());
        assert!(error.contains("--node") && error.contains("agent-state.json"), "{error}");
        let faults = faults();
        let here = state_file::Here { node: faults.node.clone(), ..Default::default() };
        let ledger = Ledger::new(Settings::default());
        let kept = state_file::Kept { ledger: &ledger, incidents: &faults.incidents, log_sequence: None };
        let text = state_file::write_text(&kept, Duration::ZERO, &here).unwrap();
        std::fs::write(folder.path().join(state_file::NAME), text).unwrap();
        assert_eq!(from_file(folder.path()).unwrap(), faults);
    }
}
