//! Objects captured in one IPC namespace and made again in another.

use super::*;
use crate::files::testing::spec;
use crate::ids::HostPid;
use crate::image::{DataSink, ImageReader};
use crate::look::{Console, Look};
use crate::rebuild::Rebuild;
use crate::sys::ipc;

fn fresh_namespace() {
    nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWIPC).unwrap();
}

fn capture_here(sink: &mut DataSink) -> IpcState {
    let here = HostPid(nix::unistd::gettid().as_raw());
    let spec = spec();
    let mut look = Look::new(&spec, here, sink, Console::None, false);
    capture(&mut look, here).unwrap()
}

/// The state of what `make` makes, and what it is after it was made again in another namespace.
fn round_trip(make: impl FnOnce() + Send + 'static) -> (IpcState, IpcState) {
    let test = || {
        fresh_namespace();
        make();
        let mut sink = DataSink::default();
        let before = capture_here(&mut sink);
        let image = ImageReader::of_sink(sink).unwrap();
        fresh_namespace();
        let spec = spec();
        restart(&mut Rebuild::new(&image, &spec, Vec::new()), &before).unwrap();
        let mut sink = DataSink::default();
        let after = capture_here(&mut sink);
        assert_eq!(image.data_file().map(|f| crate::sys::file::fstat(f).unwrap().st_size as u64).unwrap(), sink.end());
        (before, after)
    };
    std::thread::spawn(test).join().unwrap()
}

#[test]
fn a_namespace_without_objects() {
    let (before, after) = round_trip(|| ());
    assert_eq!((before, after), Default::default());
}

#[test]
fn shared_memory_keeps_id_owner_and_contents() {
    let (before, after) = round_trip(|| {
        let first = ipc::make_segment(0x1234, 10_000, 0o640).unwrap();
        ipc::make_segment(0, 4096, 0o600).unwrap();
        ipc::control_segment(first, libc::IPC_RMID).unwrap();
        ipc::act_as(65534, 65534).unwrap();
        let id = ipc::make_segment(0x1234, 1 << 20, 0o640).unwrap();
        ipc::act_as(0, 0).unwrap();
        let attached = ipc::Attached::new(id, 1 << 20, true).unwrap();
        let file = super::capture::file_of(&attached, true).unwrap();
        std::os::unix::fs::FileExt::write_all_at(&file, b"in the middle", 500_000).unwrap();
        ipc::control_segment(id, libc::SHM_LOCK).unwrap();
    });
    assert_eq!(before, after);
    let ours = before.segments.iter().find(|s| s.permissions.key == 0x1234).unwrap();
    assert_eq!((ours.permissions.creator, ours.is_locked(), ours.contents.pieces.len()), (65534, true, 1));
}

#[test]
fn semaphores_keep_their_values() {
    let (before, after) = round_trip(|| {
        let id = ipc::make_semaphores(7, 3, 0o666).unwrap();
        let p = Permissions { user: 1, group: 2, mode: 0o606, ..Permissions::default() };
        ipc::set_semaphores(id, &[1, 0, 32767], &p).unwrap();
    });
    assert_eq!(before, after);
    assert_eq!(before.semaphores[0].values, [1, 0, 32767]);
}

#[test]
fn messages_keep_their_order_and_types() {
    let (before, after) = round_trip(|| {
        let id = ipc::make_queue(0, 0o600).unwrap();
        ipc::send_message(id, 3, b"first").unwrap();
        ipc::send_message(id, 1, b"").unwrap();
        ipc::send_message(id, i64::MAX, &[9; 5000]).unwrap();
    });
    assert_eq!(before, after);
    assert_eq!(before.queues[0].messages.iter().map(|m| m.0).collect::<Vec<_>>(), [3, 1, i64::MAX]);
}
