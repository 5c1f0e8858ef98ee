//! `zap ps`.

use super::ls::{columns, current};
use super::{options, print, print_json};
use crate::monitor::protocol::Failure;
use crate::pod::processes::{self, Process};
use crate::pod::{PodState, Store};

/// List a pod's processes
#[derive(clap::Args)]
pub(super) struct Args {
    /// Print one JSON document
    #[arg(long)]
    json: bool,
    /// The pod
    #[arg(value_parser = options::pod_name)]
    pod: String,
}

pub(super) fn run(store: &Store, args: &Args) -> Result<u8, Failure> {
    let record = current(store, &args.pod)?;
    let list = match record.state {
        PodState::Stopped => Vec::new(),
        _ => processes::list(&record.cgroup)?,
    };
    if args.json {
        print_json(&list)?;
    } else {
        print(&table(&list))?;
    }
    Ok(0)
}

pub(super) fn table(list: &[Process]) -> String {
    let head = ["PID", "HOST PID", "PPID", "STATE", "COMMAND"].map(str::to_owned);
    let cells = list.iter().map(|p| {
        [p.pid.0.to_string(), p.host_pid.0.to_string(), p.ppid.to_string(), p.state.clone(), p.command.join(" ")]
    });
    columns(std::iter::once(head).chain(cells).collect())
}
