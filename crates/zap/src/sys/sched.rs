//! Scheduling attributes and other per-thread facts that can be read and set from outside.

use std::io;
use std::mem::size_of;

use super::check;
use crate::ids::HostPid;

/// `struct sched_attr` as its first 56 bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[repr(C)]
pub struct SchedulingAttributes {
    size: u32,
    /// `SCHED_OTHER`, `SCHED_FIFO` …
    pub policy: u32,
    /// `SCHED_FLAG_…`
    pub flags: u64,
    /// Nice value, also for policies under which it is without effect.
    pub nice: i32,
    /// Priority, for the real-time policies.
    pub priority: u32,
    /// Deadline policy: runtime in ns; slice for others.
    pub runtime: u64,
    /// Deadline in ns.
    pub deadline: u64,
    /// Period in ns.
    pub period: u64,
    /// Utilization clamp, lower.
    pub clamp_min: u32,
    /// Utilization clamp, upper.
    pub clamp_max: u32,
}

/// Reads a thread's scheduling attributes.
pub fn scheduling(tid: HostPid) -> io::Result<SchedulingAttributes> {
    let mut attributes = SchedulingAttributes::default();
    let size = size_of::<SchedulingAttributes>();
    // SAFETY: the kernel fills at most `size` bytes of the struct.
    check(unsafe { libc::syscall(libc::SYS_sched_getattr, tid.0, &raw mut attributes, size, 0) })?;
    if !attributes.is_fair() {
        // SAFETY: numbers only. The kernel's own call gives 20 minus the nice value.
        let seen = check(unsafe { libc::syscall(libc::SYS_getpriority, libc::PRIO_PROCESS, tid.0) })?;
        attributes.nice = 20 - seen as i32;
    }
    Ok(attributes)
}

impl SchedulingAttributes {
    /// Whether the nice value is one of the attributes: otherwise the kernel neither tells nor takes it along with them.
    fn is_fair(&self) -> bool {
        [libc::SCHED_OTHER, libc::SCHED_BATCH].contains(&(self.policy as i32))
    }
}

/// Sets a thread's scheduling attributes.
pub fn set_scheduling(tid: HostPid, attributes: &SchedulingAttributes) -> io::Result<()> {
    let mut attributes = *attributes;
    attributes.size = size_of::<SchedulingAttributes>() as u32;
    attributes.flags &= !0x60; // utilization clamps only where they were asked for
    if !attributes.is_fair() {
        // SAFETY: numbers only.
        check(unsafe { libc::syscall(libc::SYS_setpriority, libc::PRIO_PROCESS, tid.0, attributes.nice) })?;
    }
    // SAFETY: the kernel reads `size` bytes of the struct.
    check(unsafe { libc::syscall(libc::SYS_sched_setattr, tid.0, &raw const attributes, 0) }).map(drop)
}

/// While it lives, the calling thread runs before everything on the host that is not urgent itself, as do threads that it
/// starts meanwhile. Where that is not permitted it changes nothing. It stays with its thread.
#[derive(Debug)]
pub struct Urgent {
    before: SchedulingAttributes,
    _here: std::marker::PhantomData<*const ()>,
}

impl Urgent {
    /// Begins to be urgent.
    pub fn begin() -> Option<Urgent> {
        let own = HostPid(0);
        let urgent = SchedulingAttributes { policy: libc::SCHED_FIFO as u32, priority: 1, ..Default::default() };
        let before = scheduling(own).ok().filter(SchedulingAttributes::is_fair)?;
        set_own(&SchedulingAttributes { nice: before.nice, ..urgent }).ok()?;
        Some(Urgent { before, _here: std::marker::PhantomData })
    }
}

impl Drop for Urgent {
    fn drop(&mut self) {
        // Nobody needs leave to be less urgent.
        let _ = set_own(&self.before);
    }
}

fn set_own(attributes: &SchedulingAttributes) -> io::Result<()> {
    set_scheduling(HostPid(0), attributes)
}

/// Reads a thread's CPU affinity as a bit mask of 64-bit words.
pub fn affinity(tid: HostPid) -> io::Result<Vec<u64>> {
    let mut words = vec![0u64; 128];
    // SAFETY: the kernel fills at most the buffer's length in bytes; the result is how many.
    let bytes =
        check(unsafe { libc::syscall(libc::SYS_sched_getaffinity, tid.0, words.len() * 8, words.as_mut_ptr()) })?;
    words.truncate(bytes as usize / 8);
    Ok(words)
}

/// Sets a thread's CPU affinity.
pub fn set_affinity(tid: HostPid, words: &[u64]) -> io::Result<()> {
    // SAFETY: the kernel reads the buffer's length in bytes.
    check(unsafe { libc::syscall(libc::SYS_sched_setaffinity, tid.0, words.len() * 8, words.as_ptr()) }).map(drop)
}

/// Reads a thread's I/O priority.
pub fn io_priority(tid: HostPid) -> io::Result<i32> {
    // SAFETY: numbers only.
    check(unsafe { libc::syscall(libc::SYS_ioprio_get, 1, tid.0) }).map(|priority| priority as i32)
}

/// Sets a thread's I/O priority.
pub fn set_io_priority(tid: HostPid, priority: i32) -> io::Result<()> {
    // SAFETY: numbers only.
    check(unsafe { libc::syscall(libc::SYS_ioprio_set, 1, tid.0, priority) }).map(drop)
}

/// The head and length of a thread's robust futex list.
pub fn robust_list(tid: HostPid) -> io::Result<(u64, u64)> {
    let (mut head, mut length) = (0u64, 0u64);
    // SAFETY: the kernel writes one word to each address.
    check(unsafe { libc::syscall(libc::SYS_get_robust_list, tid.0, &raw mut head, &raw mut length) })?;
    Ok((head, length))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn urgency_ends() {
        let own = || scheduling(HostPid(0)).unwrap();
        let before = own();
        let Some(urgent) = Urgent::begin() else {
            eprintln!("skipped: this test may not run in real time");
            return;
        };
        assert_eq!((own().policy, own().nice), (libc::SCHED_FIFO as u32, before.nice));
        assert_eq!(std::thread::scope(|scope| scope.spawn(own).join().unwrap().policy), libc::SCHED_FIFO as u32);
        drop(urgent);
        assert_eq!(own(), before);
    }
}
