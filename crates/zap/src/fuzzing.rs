//! What takes bytes that others wrote, by name: images, archives, frames of protocols, texts of `/proc`, answers of netlink.
//! Each may refuse what it is given, and must neither panic, nor hang, nor take much memory. `fuzz/` tries them for hours,
//! `tests/corpus.rs` for seconds.

use crate::files::FileState;
use crate::image;
use crate::ipc::IpcState;
use crate::migrate::protocol::Message;
use crate::monitor::frame::Collector;
use crate::monitor::protocol::{Answer, Request, Start};
use crate::mounts::MountState;
use crate::namespaces::NamespaceState;
use crate::namespaces::network::NetworkState;
use crate::plausible;
use crate::pod::PodSpec;
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
    ("process", process),
    ("file", |bytes| try_record("file", bytes)),
    ("others", |bytes| {
        for kind in ["pod", "zombies", "ipc", "network", "namespace", "mount"] {
            try_record(kind, bytes);
        }
        crate::processor::try_other(bytes);
    }),
    ("chunk", image::try_chunk),
    ("archive", archive),
    ("migration", migration),
    ("message", |bytes| drop(image::decode::<Message>(bytes))),
    ("command", command),
    ("request", request),
    ("mappings", |bytes| drop(crate::memory::layout::parse(bytes))),
    ("stat", |bytes| drop(crate::process::proc_files::parse_stat(bytes))),
    ("status", status),
    ("timers", |bytes| drop(crate::process::timers::parse_timers(&String::from_utf8_lossy(bytes)))),
    ("mounts", mounts),
    ("configuration", |bytes| {
        drop(crate::pod::host_config::HostConfig::parse(&String::from_utf8_lossy(bytes)));
    }),
    ("netlink", netlink::try_answers),
    ("entries", crate::namespaces::try_entry),
    ("sockets", crate::sockets::try_answer),
    ("packets", |bytes| {
        crate::sockets::try_packet(bytes);
        crate::pod::network::try_frame(bytes);
    }),
    ("interfaces", |bytes| {
        crate::namespaces::try_bytes(bytes);
        crate::pod::network::try_answer(bytes);
    }),
    ("tables", |bytes| tables(&String::from_utf8_lossy(bytes))),
    ("descriptors", |bytes| {
        crate::files::try_info(bytes);
        crate::files::try_name(bytes);
    }),
    ("hashes", crate::files::try_hashes),
    ("kernel-types", crate::kernel::try_types),
    ("memory", |bytes| {
        crate::memory::layout::try_bytes(bytes);
        crate::processor::try_area(bytes);
    }),
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
        "mount" => drop(image::decode::<MountState>(body)),
        _ => {}
    }
}

/// What is decoded may be impossible still.
fn process(bytes: &[u8]) {
    if let Ok(process) = image::decode::<ProcessState>(bytes) {
        drop(plausible::check(&PodSpec::new("pod", &["true"]), &[process], &[], &[], 1 << 30));
    }
}

fn tables(text: &str) {
    crate::sockets::try_table(text);
    crate::ipc::try_table(text);
    crate::pod::network::try_text(text);
    crate::pod::old_groups::try_groups(text);
    image::try_room(text);
    let _ = crate::record::offsets(text);
}

fn request(bytes: &[u8]) {
    drop((serde_json::from_slice::<Request>(bytes), serde_json::from_slice::<Start>(bytes)));
    drop(serde_json::from_slice::<Answer>(bytes));
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
