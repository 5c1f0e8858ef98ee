//! Capabilities of the calling thread.

use std::io;

use super::check;

#[repr(C)]
struct Header {
    version: u32,
    pid: i32,
}

#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Sets {
    effective: u32,
    permitted: u32,
    inheritable: u32,
}

const VERSION_3: u32 = 0x2008_0522;

/// Confines the calling thread to the capabilities in `set` (one bit each): bounding, permitted and effective; nothing is
/// inheritable or ambient. What the thread does not have it does not get. Only system calls, so it is safe after a fork.
pub fn confine(set: u64) -> io::Result<()> {
    for number in 0..64u64 {
        if set & (1 << number) != 0 {
            continue;
        }
        // SAFETY: prctl with numbers only. EINVAL: the kernel knows no more capabilities.
        match check(unsafe { libc::prctl(libc::PR_CAPBSET_DROP, number, 0u64, 0u64, 0u64) }.into()) {
            Err(e) if e.raw_os_error() == Some(libc::EINVAL) => break,
            other => other?,
        };
    }
    let clear = libc::PR_CAP_AMBIENT_CLEAR_ALL as u64;
    // SAFETY: as above.
    check(unsafe { libc::prctl(libc::PR_CAP_AMBIENT, clear, 0u64, 0u64, 0u64) }.into())?;
    let (low, high) = (set as u32, (set >> 32) as u32);
    let had = current()?;
    let keep =
        |had: Sets, set: u32| Sets { effective: had.permitted & set, permitted: had.permitted & set, inheritable: 0 };
    let sets = [keep(had[0], low), keep(had[1], high)];
    self::set(sets)
}

fn current() -> io::Result<[Sets; 2]> {
    let mut header = Header { version: VERSION_3, pid: 0 };
    let mut sets = [Sets::default(); 2];
    // SAFETY: the kernel writes at most one header and two sets (version 3), which are ours.
    check(unsafe { libc::syscall(libc::SYS_capget, &raw mut header, sets.as_mut_ptr()) })?;
    Ok(sets)
}

/// Runs `work` as a user and a group to whom what it makes belongs, with every capability, as root runs it otherwise: in a
/// file system of a user namespace those can make nothing who have no name there.
pub fn making_as<T>((user, group): (u32, u32), work: impl FnOnce() -> T) -> io::Result<T> {
    let become_one = |user: u32, group: u32| {
        nix::unistd::setfsgid(group.into());
        nix::unistd::setfsuid(user.into());
        raise()
    };
    become_one(user, group)?;
    let done = work();
    become_one(0, 0)?;
    Ok(done)
}

/// Runs `work` as if the calling thread did not have a capability.
pub fn without<T>(number: u32, work: impl FnOnce() -> T) -> io::Result<T> {
    let had = current()?;
    let mut fewer = had;
    fewer[number as usize / 32].effective &= !(1 << (number % 32));
    set(fewer)?;
    let done = work();
    set(had)?;
    Ok(done)
}

fn set(sets: [Sets; 2]) -> io::Result<()> {
    let header = Header { version: VERSION_3, pid: 0 };
    // SAFETY: the kernel reads one header and two sets (version 3), all of which outlive the call.
    check(unsafe { libc::syscall(libc::SYS_capset, &raw const header, sets.as_ptr()) }).map(drop)
}

/// Makes every permitted capability effective (they are not, after a change of user that kept them).
pub fn raise() -> io::Result<()> {
    let sets = current()?.map(|s| Sets { effective: s.permitted, ..s });
    set(sets)
}

/// The permitted capabilities of the calling thread, one bit each.
pub fn permitted() -> io::Result<u64> {
    let [low, high] = current()?;
    Ok(u64::from(low.permitted) | u64::from(high.permitted) << 32)
}

/// Makes the calling thread this user and group; it keeps its capabilities. Raw calls, for the child of a clone that the C
/// library does not know of.
pub fn become_user(uid: u32, gid: u32) -> io::Result<()> {
    const KEEP_CAPS_AND_NO_FIXUP: u64 = 1 << 4 | 1 << 2;
    // SAFETY: numbers only.
    check(unsafe { libc::syscall(libc::SYS_prctl, libc::PR_SET_SECUREBITS, KEEP_CAPS_AND_NO_FIXUP, 0, 0, 0) })?;
    // SAFETY: as above.
    check(unsafe { libc::syscall(libc::SYS_setresgid, gid, gid, gid) })?;
    // SAFETY: as above.
    check(unsafe { libc::syscall(libc::SYS_setresuid, uid, uid, uid) })?;
    visible()
}

/// Shows the process again to those of its own user: a change of user or user namespace hides it.
pub fn visible() -> io::Result<()> {
    // SAFETY: numbers only.
    check(unsafe { libc::syscall(libc::SYS_prctl, libc::PR_SET_DUMPABLE, 1, 0, 0, 0) }).map(drop)
}
