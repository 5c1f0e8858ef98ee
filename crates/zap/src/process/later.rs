//! What of the memory of a restarted pod is put in place when it runs already: most of it nobody touches at once.

use super::state::ProcessState;
use super::threads;
use crate::memory::{LITTLE_IN_PLACE, pages_of};
use crate::namespaces::Kind;

/// Has pages come later, `most` bytes in all: of processes that can wait for them (in a user namespace of its own nobody may
/// have the kernel wait), and but for what must be there at once: what anybody shares with whoever forks it, and what a
/// restart touches.
pub fn put_off(processes: &mut [ProcessState], most: u64) {
    let inherited = pages_of(processes.iter().flat_map(|process| process.memory.inherited()));
    let mut left = most;
    for process in processes.iter_mut().filter(|process| process.namespaces.of(Kind::User).is_none()) {
        let needed = threads::needed_at_once(&process.threads);
        let at_once = pages_of(inherited.iter().cloned().chain(needed));
        left -= process.memory.put_off(&at_once, LITTLE_IN_PLACE, left);
    }
}
