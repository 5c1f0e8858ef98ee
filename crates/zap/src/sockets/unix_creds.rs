//! Credentials on unix sockets, as the pod sees them. The kernel notes those of whoever connects, listens or sends; so a
//! restart does it in a process that for a moment has the PID, the user and the group of the one who did.

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};

use crate::files::FileState;
use crate::ids::PodPid;
use crate::look::Look;
use crate::rebuild::Rebuild;
use crate::sys::message::Credentials;
use crate::sys::{clone, ipc, socket};

use super::unix::UnixState;

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

/// The credentials that the sockets of an image have of their peers, by inode.
struct All(HashMap<u64, Credentials>);

/// What the socket of that inode knows of its peer.
pub(super) fn known_by(rebuild: &mut Rebuild<'_>, inode: u64) -> Option<Credentials> {
    const ALL: &str = "unix-credentials";
    if rebuild.object::<All>(ALL, 0).is_none() {
        let files: Vec<FileState> = rebuild.image.every("file").unwrap_or_default();
        let unix = files.iter().filter(|f| f.kind == "unix");
        let states = unix.filter_map(|f| crate::image::decode::<UnixState>(&f.state).ok());
        let all = states.filter_map(|s| Some((s.inode, s.peer_credentials?))).collect();
        rebuild.keep_object(ALL, 0, All(all));
    }
    rebuild.object::<All>(ALL, 0)?.0.get(&inode).copied()
}

/// Runs `work`, which must not allocate, with these credentials.
pub(super) fn acting(credentials: Option<Credentials>, work: &(dyn Fn() -> io::Result<()> + Sync)) -> io::Result<()> {
    let Some((pid, user, group)) = credentials else { return work() };
    let act = || {
        if (user, group) != (0, 0) {
            ipc::act_as(user, group)?;
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
    let (read, write) = nix::unistd::pipe()?;
    acting(credentials, &|| {
        for _ in 0..count {
            let (a, b) = socket::pair(libc::AF_UNIX, kind)?;
            let numbers = [a.as_raw_fd().to_ne_bytes(), b.as_raw_fd().to_ne_bytes()];
            nix::unistd::write(&write, numbers.as_flattened())?;
            std::mem::forget((a, b));
        }
        Ok(())
    })?;
    let take = |_| {
        let mut numbers = [[0; 4]; 2];
        nix::unistd::read(&read, numbers.as_flattened_mut())?;
        Ok((adopt(numbers[0])?, adopt(numbers[1])?))
    };
    (0..count).map(take).collect()
}

/// A descriptor that the helper made in the table that we share.
fn adopt(number: [u8; 4]) -> io::Result<OwnedFd> {
    socket::adopt(i32::from_ne_bytes(number))
}
