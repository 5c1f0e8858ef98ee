//! State → kernel.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;

use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, setns, unshare};

use super::capture::file_of;
use super::{IpcState, Permissions, QueueState, SegmentState, SemaphoresState, posix};
use crate::error::{Context, RebuildError};
use crate::files;
use crate::ids::HostPid;
use crate::image::ImageReader;
use crate::rebuild::Rebuild;
use crate::sys::clone::in_thread;
use crate::sys::ipc::{self, Attached};

/// Makes every object again under its id. Runs in the builder, in the pod's new IPC namespace.
///
/// Segments that are marked for removal stay unmarked until [`remove_marked`]: nobody has attached them yet.
pub fn restart(rebuild: &mut Rebuild<'_>, state: &IpcState) -> Result<(), RebuildError> {
    if *state == IpcState::default() {
        return Ok(());
    }
    let image = rebuild.image;
    // A fresh thread may be one too many.
    if *state != (IpcState { posix: state.posix.clone(), ..IpcState::default() }) {
        in_thread(|| restart_here(image, state)).rebuilding("making", "the System V objects")?;
    }
    state.posix.iter().try_for_each(|queue| posix::restart(image, queue).map(drop))
}

/// Marks for removal the segments that were: for when every process has attached its own. Runs in the monitor.
pub fn remove_marked(init: HostPid, state: &IpcState) -> Result<(), RebuildError> {
    let marked: Vec<i32> = state.segments.iter().filter(|s| s.is_marked()).map(|s| s.id).collect();
    if marked.is_empty() {
        return Ok(());
    }
    let remove = || {
        setns(File::open(init.proc("ns/ipc"))?.as_fd(), CloneFlags::CLONE_NEWIPC)?;
        marked.iter().try_for_each(|id| ipc::control_segment(*id, libc::IPC_RMID))
    };
    in_thread(remove).rebuilding("marking", "shared memory")
}

fn restart_here(image: &ImageReader, state: &IpcState) -> io::Result<()> {
    // The pod's own /proc/sys may be read-only: a fresh one, which only this thread sees.
    let none: Option<&str> = None;
    unshare(CloneFlags::CLONE_NEWNS)?;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none)?;
    mount(Some("proc"), "/proc", Some("proc"), MsFlags::empty(), none)?;
    state.segments.iter().try_for_each(|s| segment(image, s))?;
    state.semaphores.iter().try_for_each(semaphores)?;
    state.queues.iter().try_for_each(|q| queue(image, q))
}

/// Runs `make` so that what it makes gets this id and this creator.
fn make(kind: &str, id: i32, p: &Permissions, make: impl FnOnce() -> io::Result<i32>) -> io::Result<()> {
    std::fs::write(format!("/proc/sys/kernel/{kind}_next_id"), id.to_string())?;
    ipc::act_as(p.creator, p.creator_group)?;
    let made = make();
    ipc::act_as(0, 0)?;
    match made? {
        got if got == id => Ok(()),
        got => Err(io::Error::other(format!("the id {id} is taken (it got {got})"))),
    }
}

fn segment(image: &ImageReader, state: &SegmentState) -> io::Result<()> {
    let (id, p, size) = (state.id, &state.permissions, state.contents.size);
    make("shm", id, p, || ipc::make_segment(p.key, size as usize, (p.mode & 0o777) as i32))?;
    let attached = Attached::new(id, size, true)?;
    state.contents.put(&file_of(&attached, true)?, image)?;
    drop(attached);
    ipc::own_segment(id, p)?;
    if state.is_locked() {
        ipc::control_segment(id, libc::SHM_LOCK)?;
    }
    Ok(())
}

fn semaphores(state: &SemaphoresState) -> io::Result<()> {
    let p = &state.permissions;
    make("sem", state.id, p, || ipc::make_semaphores(p.key, state.values.len() as i32, (p.mode & 0o777) as i32))?;
    ipc::set_semaphores(state.id, &state.values, p)
}

fn queue(image: &ImageReader, state: &QueueState) -> io::Result<()> {
    let p = &state.permissions;
    make("msg", state.id, p, || ipc::make_queue(p.key, (p.mode & 0o777) as i32))?;
    ipc::own_queue(state.id, state.room, p)?;
    for (kind, place) in &state.messages {
        ipc::send_message(state.id, *kind, &files::data_of(image, *place)?)?;
    }
    Ok(())
}
