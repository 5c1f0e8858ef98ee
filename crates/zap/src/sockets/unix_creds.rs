//! Credentials on unix sockets, as the pod sees them. The kernel notes those of whoever connects, listens or sends; so a
//! restart does it in a process that for a moment has the PID, the user and the group of the one who did.

use std::collections::HashMap;
use std::fs::File;
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
    let seen = read_peer(fd).filter(|(pid, ..)| *pid > 0)?;
    learn(look, &[seen.0], &|| Ok(read_peer(fd).map(|known| vec![known.0]).unwrap_or_default()));
    Some(in_pod(look, seen))
}

fn read_peer(fd: BorrowedFd<'_>) -> Option<Credentials> {
    let mut bytes = [0; 12];
    let length = socket::get_bytes(fd, libc::SOL_SOCKET, libc::SO_PEERCRED, &mut bytes).ok()?;
    let word = |i: usize| i32::from_ne_bytes([bytes[i], bytes[i + 1], bytes[i + 2], bytes[i + 3]]);
    (length == 12).then(|| (word(0), word(4) as u32, word(8) as u32))
}

/// Learns which PIDs the pod knows processes by that are gone, of which there is nothing in `/proc`: `seen` are the numbers
/// that were read here, and `read` reads them again, in the pod's PID namespace. Whoever connected a socket of a restarted
/// pod, or sent what is in it, was a helper, which is gone.
pub(super) fn learn(look: &mut Look<'_>, seen: &[i32], read: &(dyn Fn() -> io::Result<Vec<i32>> + Sync)) {
    let init = look.init;
    let mut is_unknown = |pid: i32| look.sockets.pod_pid(init, pid) == 0 && !look.sockets.gone.contains_key(&pid);
    if !seen.iter().any(|pid| *pid > 0 && is_unknown(*pid)) {
        return;
    }
    let known = Mutex::new(Vec::new());
    let note = || {
        *known.lock().unwrap_or_else(PoisonError::into_inner) = read()?;
        Ok(())
    };
    let asked = clone::in_thread(|| clone::in_pid_namespace(File::open(init.proc("ns/pid"))?, &note));
    if let Err(error) = asked {
        tracing::info!(%error, "PIDs of processes that are gone stay unknown");
    }
    let known = known.into_inner().unwrap_or_else(PoisonError::into_inner);
    if known.len() != seen.len() {
        return;
    }
    for (seen, known) in seen.iter().zip(known) {
        look.sockets.learn_pid(*seen, known);
    }
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

/// Sends with these credentials, which root may say of any process that there is: if there is none, one that has its number
/// for a moment says it. (Those who say nothing are told by their real user and group, not by those that act.)
pub(super) fn sending(
    credentials: Option<Credentials>,
    send: &(dyn Fn(Option<Credentials>) -> io::Result<()> + Sync),
) -> io::Result<()> {
    match credentials {
        Some((pid @ 1.., ..)) if clone::is_taken(PodPid(pid)) => send(credentials),
        Some((pid @ 1.., ..)) => clone::in_process(PodPid(pid), &|| send(credentials)),
        _ => acting(credentials, &|| send(None)),
    }
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
