//! `zap ls`.

use serde::Serialize;

use super::{print, print_json};
use crate::monitor::client;
use crate::monitor::protocol::Failure;
use crate::pod::host_config::HostConfig;
use crate::pod::network::follow::{self, Followed};
use crate::pod::network::forwarder::{self, Forwarder};
use crate::pod::registry::Record;
use crate::pod::{PodError, PodState, Store};

/// List pods
#[derive(clap::Args)]
#[command(after_help = "Residual state is what this host keeps for pods that have moved away: memory that is still \
    fetched from here, which ends by itself, and forwarders, which `zap rm --residual` removes. So it does with what has \
    this host follow a pod, which ends by itself when nobody here is connected with it any more.")]
pub(super) struct Args {
    /// List what is kept here for pods that have moved away
    #[arg(long)]
    residual: bool,
    /// Print one JSON document
    #[arg(long)]
    json: bool,
}

/// A pod as lists show it.
#[derive(Serialize)]
pub(super) struct Row {
    name: String,
    state: PodState,
    address: Option<String>,
    address6: Option<String>,
    init_pid: Option<i32>,
    processes: usize,
    created: String,
    exit_code: Option<i32>,
}

impl Row {
    pub(super) fn of(record: &Record) -> Row {
        let living = record.state != PodState::Stopped;
        let addresses = record.outer_addresses().filter(|_| living);
        let processes = if living { record.cgroup.pids().map_or(0, |p| p.len().saturating_sub(1)) } else { 0 };
        Row {
            name: record.spec.name.clone(),
            state: record.state,
            address: addresses.as_ref().map(|a| a.ipv4.to_string()),
            address6: addresses.as_ref().map(|a| a.ipv6.to_string()),
            init_pid: record.init.filter(|_| living).map(|i| i.pid.0),
            processes,
            created: record.created.clone(),
            exit_code: record.exit_code.filter(|_| !living),
        }
    }
}

/// What is kept here for a pod that has moved away.
#[derive(Serialize)]
struct Kept {
    pod: String,
    kind: &'static str,
    /// The address that is kept for it, or by which programs know it.
    #[serde(skip_serializing_if = "Option::is_none")]
    address: Option<String>,
    to: String,
    /// Of memory that is kept, or that a forwarder has passed on.
    bytes: u64,
}

impl Kept {
    fn of(record: Record) -> Option<Kept> {
        let residual = record.residual?;
        Some(Kept { pod: record.spec.name, kind: "memory", address: None, to: residual.to, bytes: residual.memory })
    }

    fn by(forwarder: Forwarder) -> Kept {
        let (address, to) = (Some(forwarder.address.to_string()), forwarder.to.to_string());
        Kept { pod: forwarder.pod, kind: "forwarder", address, to, bytes: forwarder.bytes }
    }

    fn followed(followed: Followed) -> Kept {
        let Followed { pod, old, new, .. } = followed;
        Kept { pod, kind: "follows", address: Some(old.to_string()), to: new.to_string(), bytes: 0 }
    }
}

fn residual(store: &Store, json: bool) -> Result<u8, Failure> {
    // As it is written down: whoever serves it is busy.
    let records = store.names()?.into_iter().filter_map(|name| store.load(&name).ok());
    let config = HostConfig::load(store.state()).map_err(|e| Failure::of(&e, 1))?;
    let forwarders = forwarder::forwarders(&config).map_err(|e| Failure::of(&e, e.exit_code()))?;
    let followed = follow::tidy(store).map_err(|e| Failure::of(&e, e.exit_code()))?;
    let memory = records.filter_map(Kept::of);
    let forwarders = forwarders.into_iter().map(Kept::by);
    let kept: Vec<Kept> = memory.chain(forwarders).chain(followed.into_iter().map(Kept::followed)).collect();
    if json {
        print_json(&kept)?;
    } else {
        let head = ["POD", "KIND", "ADDRESS", "MIB", "FOR"].map(str::to_owned);
        let address = |k: &Kept| k.address.clone().unwrap_or_else(|| "-".to_owned());
        let row = |k: &Kept| [k.pod.clone(), k.kind.to_owned(), address(k), (k.bytes >> 20).to_string(), k.to.clone()];
        print(&columns(std::iter::once(head).chain(kept.iter().map(row)).collect()))?;
    }
    Ok(0)
}

pub(super) fn run(store: &Store, args: &Args) -> Result<u8, Failure> {
    if args.residual {
        return residual(store, args.json);
    }
    // Who can list pods need not be one who may change the network.
    let _ = follow::tidy(store);
    let mut rows = Vec::new();
    for name in store.names()? {
        match current(store, &name) {
            Ok(record) => rows.push(Row::of(&record)),
            // It is being made, or has just been removed.
            Err(failure) if failure.code == 6 => {}
            Err(failure) => return Err(failure),
        }
    }
    if args.json {
        print_json(&rows)?;
    } else {
        print(&table(&rows))?;
    }
    Ok(0)
}

/// What is known of a pod, by a monitor that lives.
pub(super) fn current(store: &Store, name: &str) -> Result<Record, Failure> {
    let record = store.load(name)?;
    let watched = record.monitor.is_some_and(|m| m.lives());
    if record.state == PodState::Stopped || watched {
        return Ok(record);
    }
    client::revive(store, name)?;
    store.load(name).map_err(|e: PodError| e.into())
}

fn table(rows: &[Row]) -> String {
    let head = ["NAME", "STATE", "ADDRESS", "PID 1", "PROCESSES", "CREATED"].map(str::to_owned);
    let cells = rows.iter().map(|r| {
        let state = match (r.state, r.exit_code) {
            (PodState::Running, _) => "running".to_owned(),
            (PodState::Suspended, _) => "suspended".to_owned(),
            (PodState::Stopped, Some(code)) => format!("stopped ({code})"),
            (PodState::Stopped, None) => "stopped".to_owned(),
        };
        let dash = || "-".to_owned();
        [
            r.name.clone(),
            state,
            r.address.clone().unwrap_or_else(dash),
            r.init_pid.map_or_else(dash, |p| p.to_string()),
            r.processes.to_string(),
            r.created.clone(),
        ]
    });
    columns(std::iter::once(head).chain(cells).collect())
}

/// Lines of cells under each other.
pub(super) fn columns<const N: usize>(lines: Vec<[String; N]>) -> String {
    let width = |column: usize| lines.iter().map(|l| l[column].chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..N).map(width).collect();
    let mut text = String::new();
    for line in &lines {
        let cells: Vec<String> = line.iter().zip(&widths).map(|(cell, width)| format!("{cell:width$}")).collect();
        text.push_str(cells.join("  ").trim_end());
        text.push('\n');
    }
    text
}
