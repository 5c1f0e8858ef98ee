//! Acting in another network namespace, and the lock that all of zap's processes in one share.

use std::fs::File;
use std::io;

use nix::fcntl::{Flock, FlockArg};
use nix::sched::{CloneFlags, setns};

use crate::ids::HostPid;

/// Runs `act` in the network namespace of `process`, on a thread that ends with it.
pub(super) fn inside<T: Send>(process: HostPid, act: impl FnOnce() -> io::Result<T> + Send) -> io::Result<T> {
    let namespace = File::open(process.proc("ns/net"))?;
    std::thread::scope(|scope| {
        let entered = scope.spawn(|| {
            setns(&namespace, CloneFlags::CLONE_NEWNET)?;
            act()
        });
        entered.join().unwrap_or_else(|_| Err(io::Error::other("the thread in the pod's namespace panicked")))
    })
}

/// Keeps other zap processes in this thread's network namespace from changing the bridge, until dropped.
///
/// The lock is on the namespace itself (`flock` works on its file), so it needs no file of ours, and every state
/// directory in the namespace meets at it.
pub(super) fn lock() -> io::Result<Flock<File>> {
    let namespace = File::open("/proc/thread-self/ns/net")?;
    Flock::lock(namespace, FlockArg::LockExclusive).map_err(|(_, e)| e.into())
}
