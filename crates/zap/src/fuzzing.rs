//! What takes bytes that others wrote, by name: images, archives, frames of protocols, texts of `/proc`, answers of netlink.
//! Each may refuse what it is given, and must neither panic, nor hang, nor take much memory. `fuzz/` tries them for hours,
//! `tests/corpus.rs` for seconds.

use crate::files::FileState;
use crate::image;
use crate::ipc::IpcState;
use crate::monitor::frame::Collector;
use crate::namespaces::NamespaceState;
use crate::namespaces::network::NetworkState;
use crate::pod::network::netlink;
use crate::process::proc_files::Status;
use crate::process::state::{EndedState, ProcessState};
use crate::record::PodRecord;

/// Name, and what is tried.
pub type Target = (&'static str, fn(&[u8]));

/// Every one.
pub const TARGETS: &[Target] = &[
    ("manifest", image::try_manifest),
    ("state", |bytes| image::try_records(bytes, &mut try_record)),
    ("process", |bytes| try_record("process", bytes)),
    ("file", |bytes| try_record("file", bytes)),
    ("archive", archive),
    ("migration", migration),
    ("command", command),
    ("mappings", |bytes| drop(crate::memory::layout::parse(bytes))),
    ("stat", |bytes| drop(crate::process::proc_files::parse_stat(bytes))),
    ("status", status),
    ("timers", |bytes| drop(crate::process::timers::parse_timers(&String::from_utf8_lossy(bytes)))),
    ("mounts", mounts),
    ("configuration", |bytes| {
        drop(crate::pod::host_config::HostConfig::parse(&String::from_utf8_lossy(bytes)));
    }),
    ("netlink", |bytes| netlink::attributes(bytes).for_each(drop)),
    ("sockets", crate::sockets::try_answer),
    ("packets", |bytes| {
        crate::sockets::try_packet(bytes);
        crate::pod::network::try_bytes(bytes);
    }),
    ("interfaces", crate::namespaces::try_bytes),
    ("tables", |bytes| {
        let text = String::from_utf8_lossy(bytes);
        crate::sockets::try_table(&text);
        crate::ipc::try_table(&text);
    }),
    ("descriptors", crate::files::try_info),
    ("hashes", crate::files::try_hashes),
    ("kernel-types", crate::kernel::try_types),
    ("memory", crate::memory::layout::try_bytes),
];

/// The target of that name.
pub fn target(name: &str) -> Option<fn(&[u8])> {
    TARGETS.iter().find(|(known, _)| *known == name).map(|(_, target)| *target)
}

fn try_record(kind: &str, body: &[u8]) {
    match kind {
        "pod" => drop(image::decode::<PodRecord>(body)),
        "process" => drop(image::decode::<ProcessState>(body)),
        "zombies" => drop(image::decode::<Vec<EndedState>>(body)),
        "file" => drop(image::decode::<FileState>(body)),
        "ipc" => drop(image::decode::<IpcState>(body)),
        "network" => drop(image::decode::<NetworkState>(body)),
        "namespace" => drop(image::decode::<NamespaceState>(body)),
        _ => {}
    }
}

fn archive(bytes: &[u8]) {
    let mut into = std::env::temp_dir();
    into.push(format!("zap-fuzz-{}-{:?}", std::process::id(), std::thread::current().id()));
    if std::fs::create_dir(&into).is_ok() {
        let _ = crate::layer::unpack(&mut &bytes[..], &into);
        let _ = std::fs::remove_dir_all(&into);
    }
}

fn migration(mut bytes: &[u8]) {
    let mut buffer = Vec::new();
    while crate::migrate::protocol::read_frame(&mut bytes, &mut buffer).is_ok() {}
}

fn command(bytes: &[u8]) {
    let mut collector = Collector::default();
    for piece in bytes.chunks(7) {
        collector.add(piece);
        while let Ok(Some(_)) = collector.take() {}
    }
    let mut rest = bytes;
    while let Ok(Some(_)) = crate::monitor::frame::read(&mut rest) {}
}

fn status(bytes: &[u8]) {
    let status = Status::new(bytes.to_vec());
    crate::pod::processes::try_status(&String::from_utf8_lossy(bytes));
    let _ = (status.numbers("Uid:"), status.mask("SigBlk:"), status.kilobytes("VmRSS:"), status.namespace_pids());
}

fn mounts(bytes: &[u8]) {
    for entry in crate::mounts::parse(bytes) {
        let _ = (entry.file_system_options(), entry.attributes());
    }
    drop(crate::pod::mounts::parse(bytes));
    crate::files::mounts::parse(bytes).for_each(drop);
}
