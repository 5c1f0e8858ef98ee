//! Credentials on unix sockets, as the pod sees them. The kernel notes those of whoever connects, listens or sends; so a
//! restart does it in a process that for a moment has the PID, the user and the group of the one who did.

use std::collections::HashMap;
use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::{Mutex, PoisonError};

use crate::files::FileState;
use crate::ids::PodPid;
use crate::look::{Look, Subject};
use crate::process::proc_files::Status;
use crate::procfs;
use crate::rebuild::Rebuild;
use crate::sys::message::Credentials;
use crate::sys::{clone, ipc, socket};

use super::unix::{UnixForm, UnixState};

/// `SO_PEERCRED` of a connected socket; of a listener, who listens.
pub(super) fn of_peer(look: &mut Look<'_>, fd: BorrowedFd<'_>) -> Option<Credentials> {
    let mut bytes = [0; 12];
    let length = socket::get_bytes(fd, libc::SOL_SOCKET, libc::SO_PEERCRED, &mut bytes).ok()?;
    let word = |i: usize| i32::from_ne_bytes([bytes[i], bytes[i + 1], bytes[i + 2], bytes[i + 3]]);
    (length == 12 && word(0) > 0).then(|| in_pod(look, (word(0), word(4) as u32, word(8) as u32)))
}

/// Credentials that were read here, with the PID that the pod knows: zero for a process that is gone.
pub(super) fn in_pod(look: &mut Look<'_>, (pid, user, group): Credentials) -> Credentials {
    let init = look.init;
    (look.sockets.pod_pid(init, pid), user, group)
}

/// Those of a process that holds a socket: the kernel tells nobody but its peer who connected it.
pub(super) fn of_holder(subject: &Subject) -> Credentials {
    let status = procfs::read_record(subject.host.proc("status")).map(Status::new);
    let effective = |label| status.as_ref().ok().and_then(|status| status.numbers(label).get(1).copied()).unwrap_or(0);
    (subject.pod.0, effective("Uid"), effective("Gid"))
}

/// Who connected a socket that waits to be accepted.
pub(super) fn of_waiting(rebuild: &mut Rebuild<'_>, inode: u64) -> Option<Credentials> {
    all(rebuild).waiting.get(&inode).copied()
}

/// The credentials that the sockets of an image have of their peers, and of who connected those that wait, by inode.
#[derive(Default)]
struct All {
    peers: HashMap<u64, Credentials>,
    waiting: HashMap<u64, Credentials>,
}

/// What the socket of that inode knows of its peer.
pub(super) fn known_by(rebuild: &mut Rebuild<'_>, inode: u64) -> Option<Credentials> {
    all(rebuild).peers.get(&inode).copied()
}

fn all<'r>(rebuild: &'r mut Rebuild<'_>) -> &'r All {
    const ALL: &str = "unix-credentials";
    if rebuild.object::<All>(ALL, 0).is_none() {
        let files: Vec<FileState> = rebuild.image.every("file").unwrap_or_default();
        let unix = files.iter().filter(|f| f.kind == "unix");
        let mut all = All::default();
        for state in unix.filter_map(|f| crate::image::decode::<UnixState>(&f.state).ok()) {
            all.peers.extend(state.peer_credentials.map(|known| (state.inode, known)));
            if let UnixForm::Waiting { who } = state.form {
                all.waiting.insert(state.inode, who);
            }
        }
        rebuild.keep_object(ALL, 0, all);
    }
    rebuild.object_or_default(ALL, 0)
}

/// Runs `work` with these credentials.
pub(super) fn acting(credentials: Option<Credentials>, work: &(dyn Fn() -> io::Result<()> + Sync)) -> io::Result<()> {
    let Some((pid, user, group)) = credentials else { return work() };
    let act = || {
        if (user, group) != (0, 0) {
            ipc::become_user(user, group)?;
        }
        work()
    };
    if pid > 0 {
        match clone::in_process(PodPid(pid), &act) {
            // The PID of PID 1, or of the builder itself.
            Err(e) if e.raw_os_error() == Some(libc::EEXIST) => {}
            result => return result,
        }
    }
    clone::in_thread(act)
}

/// So many pairs whose ends have these credentials of each other.
pub(super) fn pairs(credentials: Option<Credentials>, kind: i32, count: usize) -> io::Result<Vec<(OwnedFd, OwnedFd)>> {
    let made = Mutex::new(Vec::with_capacity(count));
    acting(credentials, &|| {
        for _ in 0..count {
            let pair = socket::pair(libc::AF_UNIX, kind)?;
            made.lock().unwrap_or_else(PoisonError::into_inner).push(pair);
        }
        Ok(())
    })?;
    Ok(made.into_inner().unwrap_or_else(PoisonError::into_inner))
}
