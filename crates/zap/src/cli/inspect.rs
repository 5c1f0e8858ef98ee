//! `zap inspect`.

use std::collections::BTreeMap;
use std::path::Path;

use serde::Serialize;

use super::ls::{Row, current};
use super::{options, print, print_json, ps, usage};
use crate::image::ImageReader;
use crate::inspect::inspect_image;
use crate::monitor::protocol::Failure;
use crate::pod::processes::{self, Process};
use crate::pod::registry::Record;
use crate::pod::{PodState, Store, capabilities};
use crate::restart::RestartError;

/// Print everything known of a pod or an image
#[derive(clap::Args)]
pub(super) struct Args {
    /// Print one JSON document
    #[arg(long)]
    json: bool,
    /// The pod, or the path of an image
    #[arg(value_name = "POD|IMAGE")]
    target: String,
}

#[derive(Serialize)]
struct Details<'a> {
    #[serde(flatten)]
    row: Row,
    #[serde(flatten)]
    record: &'a Record,
    capability_names: Vec<String>,
    process_list: Vec<Process>,
}

pub(super) fn run(store: &Store, args: &Args) -> Result<u8, Failure> {
    let is_pod = options::pod_name(&args.target).is_ok_and(|name| store.pod_dir(&name).exists());
    match Path::new(&args.target).is_dir() && !is_pod || args.target.contains('/') {
        true => image(Path::new(&args.target), args.json)?,
        false => pod(store, &options::pod_name(&args.target).map_err(usage)?, args.json)?,
    }
    Ok(0)
}

fn pod(store: &Store, name: &str, json: bool) -> Result<(), Failure> {
    let record = current(store, name)?;
    let process_list = match record.state {
        PodState::Stopped => Vec::new(),
        _ => processes::list(&record.cgroup)?,
    };
    if json {
        let capability_names = record.spec.capabilities.iter().map(|n| capabilities::name(*n)).collect();
        print_json(&Details { row: Row::of(&record), record: &record, capability_names, process_list })?;
    } else {
        print(&describe(&record, &process_list))?;
    }
    Ok(())
}

/// What an image says of itself, the pod that it holds, and how big its parts are; as JSON, everything.
fn image(path: &Path, json: bool) -> Result<(), Failure> {
    let reader = ImageReader::open(path).map_err(RestartError::from)?;
    if json {
        return print_json(&inspect_image(&reader).map_err(RestartError::from)?);
    }
    let mut text = format!("{:18} {}\n{:18} {:?}\n", "Content", reader.id(), "Compression", reader.compression());
    if let Some((id, path)) = reader.parent() {
        text.push_str(&format!("{:18} {id}, written at {}\n", "Parent", path.display()));
    }
    for (name, value) in reader.facts().as_object().into_iter().flatten() {
        text.push_str(&format!("{name:18} {value}\n"));
    }
    for (name, stored, bytes) in reader.parts() {
        text.push_str(&format!("{name:18} {bytes} bytes, {stored} on disk\n"));
    }
    let mut records = BTreeMap::<String, usize>::new();
    reader.contents().for_each(|(kind, version, _)| *records.entry(format!("{kind}/{version}")).or_default() += 1);
    for (kind, count) in &records {
        text.push_str(&format!("{kind:18} {count} records\n"));
    }
    print(&text)
}

fn describe(record: &Record, list: &[Process]) -> String {
    let spec = &record.spec;
    let mut lines: Vec<(&str, String)> = vec![
        ("Name", spec.name.clone()),
        ("State", format!("{:?}", record.state).to_lowercase()),
        ("Created", record.created.clone()),
        ("Command", spec.command.join(" ")),
        ("User", spec.user.clone().unwrap_or_else(|| "root".to_owned())),
        ("Directory", spec.workdir.display().to_string()),
        ("Root", spec.root.display().to_string()),
        ("Host name", spec.hostname.clone()),
        ("Network", format!("{:?}", spec.network).to_lowercase()),
    ];
    if let Some(code) = record.exit_code {
        lines.push(("Exit code", code.to_string()));
    }
    if let Some(address) = &spec.address {
        lines.push(("Address inside", format!("{}/{}, {}", address.ipv4, address.prefix4, address.ipv6)));
    }
    if let Some(address) = record.outer_addresses() {
        lines.push(("Address outside", format!("{}, {}", address.ipv4, address.ipv6)));
    }
    for bind in &spec.binds {
        let mode = if bind.read_only { " (read-only)" } else { "" };
        lines.push(("Bind", format!("{} at {}{mode}", bind.source.display(), bind.target.display())));
    }
    let limits = [
        ("Memory", spec.limits.memory.map(|n| format!("{} MiB", n >> 20))),
        ("CPUs", spec.limits.cpus.map(|n| format!("{}", n as f64 / 1000.0))),
        ("Processes at most", spec.limits.pids.map(|n| n.to_string())),
    ];
    lines.extend(limits.into_iter().filter_map(|(name, value)| Some((name, value?))));
    let names: Vec<String> = spec.capabilities.iter().map(|n| capabilities::name(*n)).collect();
    lines.push(("Capabilities", names.join(" ")));
    lines.push(("Cgroup", record.cgroup.path().display().to_string()));
    let mut text: String = lines.iter().map(|(name, value)| format!("{name:18} {value}\n")).collect();
    if !list.is_empty() {
        text.push('\n');
        text.push_str(&ps::table(list));
    }
    text
}
