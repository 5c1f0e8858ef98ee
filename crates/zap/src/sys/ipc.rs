//! System V shared memory, semaphores and messages, in the IPC namespace of the calling thread.

use std::io;
use std::ops::Range;

use super::check;

/// Owner, creator and permissions of an object.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Permissions {
    /// `IPC_PRIVATE` is zero.
    pub key: i32,
    /// Owner.
    pub user: u32,
    /// Owner's group.
    pub group: u32,
    /// Who made it.
    pub creator: u32,
    /// Group of who made it.
    pub creator_group: u32,
    /// The low nine bits are the permissions; `SHM_DEST` and `SHM_LOCKED` are among the others.
    pub mode: u32,
}

fn permissions(p: &libc::ipc_perm) -> Permissions {
    Permissions {
        key: p.__key,
        user: p.uid,
        group: p.gid,
        creator: p.cuid,
        creator_group: p.cgid,
        mode: u32::from(p.mode),
    }
}

fn apply(p: &mut libc::ipc_perm, wanted: &Permissions) {
    p.uid = wanted.user;
    p.gid = wanted.group;
    p.mode = (wanted.mode & 0o777) as _;
}

/// `shmget(2)`: makes a segment; its id.
pub fn make_segment(key: i32, size: usize, mode: i32) -> io::Result<i32> {
    // SAFETY: numbers only.
    Ok(check(unsafe { libc::shmget(key, size, libc::IPC_CREAT | libc::IPC_EXCL | mode) }.into())? as i32)
}

fn segment(id: i32) -> io::Result<libc::shmid_ds> {
    let mut facts = std::mem::MaybeUninit::<libc::shmid_ds>::zeroed();
    // SAFETY: the kernel fills the structure.
    check(unsafe { libc::shmctl(id, libc::IPC_STAT, facts.as_mut_ptr()) }.into())?;
    // SAFETY: zeroed, then filled.
    Ok(unsafe { facts.assume_init() })
}

/// Size and permissions of a segment.
pub fn segment_facts(id: i32) -> io::Result<(u64, Permissions)> {
    let facts = segment(id)?;
    Ok((facts.shm_segsz as u64, permissions(&facts.shm_perm)))
}

/// Sets owner and permissions of a segment.
pub fn own_segment(id: i32, wanted: &Permissions) -> io::Result<()> {
    let mut facts = segment(id)?;
    apply(&mut facts.shm_perm, wanted);
    // SAFETY: the kernel reads the structure.
    check(unsafe { libc::shmctl(id, libc::IPC_SET, &mut facts) }.into()).map(drop)
}

/// A command of `shmctl(2)` that takes no structure: `SHM_LOCK`, `IPC_RMID`.
pub fn control_segment(id: i32, command: i32) -> io::Result<()> {
    // SAFETY: these commands ignore the pointer.
    check(unsafe { libc::shmctl(id, command, std::ptr::null_mut()) }.into()).map(drop)
}

/// A segment attached to this process, where nobody looks at it; detached when it is dropped.
pub struct Attached(Range<u64>);

impl Attached {
    /// Attaches a segment of `size` bytes.
    pub fn new(id: i32, size: u64, writable: bool) -> io::Result<Attached> {
        let flags = if writable { 0 } else { libc::SHM_RDONLY };
        // SAFETY: the kernel chooses an unused place, so no memory of ours changes.
        let start = unsafe { libc::shmat(id, std::ptr::null(), flags) };
        if start as isize == -1 {
            return Err(io::Error::last_os_error());
        }
        Ok(Attached(start as u64..start as u64 + size.next_multiple_of(4096)))
    }

    /// Where it is.
    pub fn range(&self) -> &Range<u64> {
        &self.0
    }
}

impl Drop for Attached {
    fn drop(&mut self) {
        // SAFETY: the range was attached by us, and no reference to it was ever made.
        unsafe { libc::shmdt(self.0.start as *const libc::c_void) };
    }
}

/// `semget(2)`: makes a set of `count` semaphores; its id.
pub fn make_semaphores(key: i32, count: i32, mode: i32) -> io::Result<i32> {
    // SAFETY: numbers only.
    Ok(check(unsafe { libc::semget(key, count, libc::IPC_CREAT | libc::IPC_EXCL | mode) }.into())? as i32)
}

fn semaphores(id: i32) -> io::Result<libc::semid_ds> {
    let mut facts = std::mem::MaybeUninit::<libc::semid_ds>::zeroed();
    // SAFETY: the kernel fills the structure.
    check(unsafe { libc::semctl(id, 0, libc::IPC_STAT, facts.as_mut_ptr()) }.into())?;
    // SAFETY: zeroed, then filled.
    Ok(unsafe { facts.assume_init() })
}

/// The values of a set, and its permissions.
pub fn semaphore_values(id: i32) -> io::Result<(Vec<u16>, Permissions)> {
    let facts = semaphores(id)?;
    let mut values = vec![0u16; facts.sem_nsems as usize];
    // SAFETY: the kernel writes one value a semaphore, and a set's size never changes.
    check(unsafe { libc::semctl(id, 0, libc::GETALL, values.as_mut_ptr()) }.into())?;
    Ok((values, permissions(&facts.sem_perm)))
}

/// Sets the values of a set, which has as many, and its owner and permissions.
pub fn set_semaphores(id: i32, values: &[u16], wanted: &Permissions) -> io::Result<()> {
    let mut facts = semaphores(id)?;
    if facts.sem_nsems as usize != values.len() {
        return Err(io::Error::from_raw_os_error(libc::EINVAL));
    }
    // SAFETY: the kernel reads one value a semaphore, which are as many as the slice has.
    check(unsafe { libc::semctl(id, 0, libc::SETALL, values.as_ptr()) }.into())?;
    apply(&mut facts.sem_perm, wanted);
    // SAFETY: the kernel reads the structure.
    check(unsafe { libc::semctl(id, 0, libc::IPC_SET, &mut facts) }.into()).map(drop)
}

/// `msgget(2)`: makes a queue; its id.
pub fn make_queue(key: i32, mode: i32) -> io::Result<i32> {
    // SAFETY: numbers only.
    Ok(check(unsafe { libc::msgget(key, libc::IPC_CREAT | libc::IPC_EXCL | mode) }.into())? as i32)
}

fn queue(id: i32) -> io::Result<libc::msqid_ds> {
    let mut facts = std::mem::MaybeUninit::<libc::msqid_ds>::zeroed();
    // SAFETY: the kernel fills the structure.
    check(unsafe { libc::msgctl(id, libc::IPC_STAT, facts.as_mut_ptr()) }.into())?;
    // SAFETY: zeroed, then filled.
    Ok(unsafe { facts.assume_init() })
}

/// How many bytes a queue may hold, how many messages it holds, its longest possible message, its permissions.
pub fn queue_facts(id: i32) -> io::Result<(u64, u64, usize, Permissions)> {
    let facts = queue(id)?;
    Ok((facts.msg_qbytes, facts.msg_qnum, facts.__msg_cbytes as usize, permissions(&facts.msg_perm)))
}

/// Sets how many bytes a queue may hold, its owner and permissions.
pub fn own_queue(id: i32, bytes: u64, wanted: &Permissions) -> io::Result<()> {
    let mut facts = queue(id)?;
    facts.msg_qbytes = bytes;
    apply(&mut facts.msg_perm, wanted);
    // SAFETY: the kernel reads the structure.
    check(unsafe { libc::msgctl(id, libc::IPC_SET, &mut facts) }.into()).map(drop)
}

const TYPE: usize = size_of::<libc::c_long>();

/// The `index`-th message of a queue, of at most `room` bytes, left where it is: its type and bytes.
pub fn peek_message(id: i32, index: u64, room: usize) -> io::Result<(i64, Vec<u8>)> {
    let mut buffer = vec![0u8; TYPE + room];
    let flags = libc::MSG_COPY | libc::IPC_NOWAIT;
    // SAFETY: the kernel writes the type and at most `room` bytes, for which there is room.
    let length =
        check(unsafe { libc::msgrcv(id, buffer.as_mut_ptr().cast(), room, index as i64, flags) } as libc::c_long)?;
    let bytes = buffer.split_off(TYPE)[..(length as usize).min(room)].to_vec();
    let kind = buffer.first_chunk().map_or(0, |b| i64::from_ne_bytes(*b));
    Ok((kind, bytes))
}

/// `msgsnd(2)`, without waiting.
pub fn send_message(id: i32, kind: i64, bytes: &[u8]) -> io::Result<()> {
    let mut buffer = kind.to_ne_bytes().to_vec();
    buffer.extend(bytes);
    // SAFETY: the kernel reads the type and as many bytes as are said.
    check(unsafe { libc::msgsnd(id, buffer.as_ptr().cast(), bytes.len(), libc::IPC_NOWAIT) }.into()).map(drop)
}

/// Leaves a user or group as it is.
const STAY: u32 = u32::MAX;

/// Makes the calling *thread* act as another user and group (the real ones stay, so that there is a way back).
pub fn act_as(user: u32, group: u32) -> io::Result<()> {
    set_users((STAY, user), (STAY, group))
}

/// Makes the calling *thread* that of another user and group, the real ones too: these are what a message tells of its
/// sender.
pub fn become_user(user: u32, group: u32) -> io::Result<()> {
    set_users((user, user), (group, group))
}

/// Sets real and effective user and group of the calling thread.
fn set_users(user: (u32, u32), group: (u32, u32)) -> io::Result<()> {
    // The raw calls: the library's would change every thread.
    // SAFETY: numbers only.
    check(unsafe { libc::syscall(libc::SYS_setresgid, group.0, group.1, STAY) })?;
    // SAFETY: as above.
    check(unsafe { libc::syscall(libc::SYS_setresuid, user.0, user.1, STAY) }).map(drop)
}
