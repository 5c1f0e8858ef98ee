//! What processes share that are not threads of one: an address space, a descriptor table, root and working directory.

use std::cmp::Ordering;

use crate::error::CaptureError;
use crate::process::discover::{Found, Population};
use crate::process::vfork;
use crate::sys::kcmp::{self, Shared};

const KINDS: [(Shared, &str); 3] = [
    (Shared::Memory, "its address space"),
    (Shared::Files, "its descriptor table"),
    (Shared::Fs, "its root and working directory"),
];

/// Refuses processes that share something.
pub fn check(population: &Population) -> Result<(), CaptureError> {
    for (what, name) in KINDS {
        // In the kernel's own order, so that each is compared with a few.
        let mut ordered: Vec<&Found> = Vec::with_capacity(population.live.len());
        for found in population.live.iter().filter(|found| found.stat.state != b'Z') {
            // Whoever has ended meanwhile shares nothing.
            match ordered.binary_search_by(|other| compare(other, found, what).unwrap_or(Ordering::Less)) {
                Ok(place) => refuse(ordered[place], found, what, name)?,
                Err(place) => ordered.insert(place, found),
            }
        }
    }
    Ok(())
}

/// A child of vfork shares until it executes a program, and the hold waits for that. It may just have.
fn refuse(one: &Found, other: &Found, what: Shared, name: &str) -> Result<(), CaptureError> {
    let waits = [one, other].iter().any(|found| vfork::waits(found.subject.host));
    if waits || compare(one, other, what) != Some(Ordering::Equal) {
        return Ok(());
    }
    let why = format!("is shared with process {}, which cannot be checkpointed yet", one.subject.pod);
    Err(other.subject.refuse(name, why))
}

fn compare(a: &Found, b: &Found, what: Shared) -> Option<Ordering> {
    kcmp::compare(a.subject.host.0, b.subject.host.0, what).ok()
}
