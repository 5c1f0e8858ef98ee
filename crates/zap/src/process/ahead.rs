//! What is learned of a pod's memory while it runs: the layout of every process, and copies of the big ones, so that the
//! hold does not grow with them.

use std::collections::HashMap;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::time::Instant;

use crate::ids::HostPid;
use crate::image::DataSink;
use crate::memory::{self, Ahead, Mapping, ask_for_tracking};
use crate::migrate::strategies::Strategy;
use crate::parallel;
use crate::process::capture::pidfd;
use crate::process::discover::{self, Found, Population};
use crate::process::hold::{self, HoldError};
use crate::tracee::{Batch, Held};

/// Modified memory that copying in the hold takes less for than following: of the whole pod, and of a process.
const LEFT: u64 = 10 << 20;
const WORTH_IT: u64 = 256 << 10;

/// The layouts of processes with their flags, by PID on the host.
pub type Layouts = HashMap<HostPid, Vec<Mapping>>;

/// About how many bytes of modified memory are left to the hold, if what is big is followed or nothing is.
pub fn left_to_hold(layouts: &Layouts, follows: bool) -> u64 {
    let modified = layouts.values().flatten().map(|mapping| mapping.modified).sum();
    if follows { LEFT.min(modified) } else { modified }
}

/// What is known of the memory of the processes.
#[derive(Default)]
pub struct MemoryAhead {
    layouts: Layouts,
    followed: HashMap<HostPid, Ahead>,
    /// How long, in microseconds, threads were held each time to begin following their processes.
    pub holds_us: Vec<u64>,
    /// Times that the memory of those followed was looked through.
    pub rounds: u64,
}

impl MemoryAhead {
    /// What is followed of a process.
    pub fn of(&self, process: HostPid) -> Option<&Ahead> {
        self.followed.get(&process)
    }

    /// How its memory looked, if it was there.
    pub fn layout_of(&self, process: HostPid) -> Option<&[Mapping]> {
        self.layouts.get(&process).map(Vec::as_slice)
    }

    /// Nothing but layouts.
    pub fn layouts(layouts: Layouts) -> MemoryAhead {
        MemoryAhead { layouts, ..MemoryAhead::default() }
    }

    /// Follows the big processes of a running pod, and copies their memory for as many rounds as `strategy` says. What
    /// cannot be followed, for whatever reason, is left to the hold.
    pub fn look_ahead(
        layouts: Layouts,
        population: &Population,
        data: &mut DataSink,
        strategy: &dyn Strategy,
    ) -> MemoryAhead {
        let mut ahead = MemoryAhead::layouts(layouts);
        let big = ahead.worth_following(population);
        let begun = Instant::now();
        // All at once: the pod is counted as held until the last of them goes on.
        let made = parallel::map(big.clone(), |found| (found, hold_for_userfault(found)));
        if !made.is_empty() {
            ahead.holds_us.push(begun.elapsed().as_micros() as u64);
        }
        let followed = parallel::map(made, |(found, made)| {
            (found, made.and_then(|made| Ok(Ahead::begin(found.subject.host, made, &[])?)))
        });
        for (found, followed) in followed {
            match followed {
                Ok(followed) => drop(ahead.followed.insert(found.subject.host, followed)),
                Err(error) => tracing::info!(process = %found.subject.pod, %error, "memory is not followed"),
            }
        }
        let mut written = Vec::new();
        while !ahead.followed.is_empty() && strategy.another_round(&written) {
            written.push(ahead.round(&big, population, data));
        }
        ahead.rounds = written.len() as u64;
        let followed: Vec<HostPid> = ahead.followed.keys().copied().collect();
        let layout = |process| (process, memory::layout_of(process).unwrap_or_default());
        ahead.layouts.extend(parallel::map(followed, layout));
        ahead
    }

    /// The biggest processes, all but what is little together.
    fn worth_following<'p>(&self, population: &'p Population) -> Vec<&'p Found> {
        let modified = |found: &Found| -> u64 {
            let layout = self.layout_of(found.subject.host).unwrap_or_default();
            layout.iter().filter(|mapping| !mapping.shared).map(|mapping| mapping.modified).sum()
        };
        let mut all: Vec<(u64, &Found)> = population.live.iter().map(|found| (modified(found), found)).collect();
        let mut left: u64 = all.iter().map(|(size, _)| size).sum();
        all.sort_by_key(|(size, _)| std::cmp::Reverse(*size));
        let mut big = Vec::new();
        for (size, found) in all {
            if left <= LEFT || size < WORTH_IT {
                break;
            }
            if can_answer(found) {
                left -= size;
                big.push(found);
            }
        }
        big
    }

    /// One round of copying over all of them; how much had been written.
    fn round(&mut self, big: &[&Found], population: &Population, data: &mut DataSink) -> u64 {
        let mut written = 0;
        for found in big {
            let host = found.subject.host;
            let Some(followed) = self.followed.get_mut(&host) else { continue };
            let parent = population.live.iter().find(|p| p.subject.pod == found.stat.parent);
            let parent = parent.and_then(|p| File::open(p.subject.host.proc("pagemap")).ok());
            match followed.round(data, &found.subject, parent.as_ref()) {
                Ok(round) => written += round.written,
                Err(_) => drop(self.followed.remove(&host)),
            }
        }
        written
    }
}

/// Not if it is stopped, or in a wait that nothing interrupts.
fn can_answer(found: &Found) -> bool {
    !matches!(found.stat.state, b'T' | b't' | b'D' | b'Z' | b'X')
}

/// Holds the leader of a process for as long as it takes to have it make a userfaultfd.
fn hold_for_userfault(found: &Found) -> Result<OwnedFd, HoldError> {
    let mut threads = vec![hold::seize_one(discover::leader(found))?.wait()?];
    let userfault = make_userfault(found, &mut threads);
    for held in threads {
        held.let_go()?;
    }
    userfault
}

fn make_userfault(found: &Found, threads: &mut Vec<Held>) -> Result<OwnedFd, HoldError> {
    let (ground, _) = hold::prepare(found, threads)?;
    let vanished = || crate::error::CaptureError::Vanished(found.subject.pod);
    let leader = threads.first_mut().ok_or_else(vanished)?;
    let mut ask = Batch::new();
    let made = ask_for_tracking(&mut ask);
    let number = leader.run(&ground, 0, &ask)?.get(made) as i32;
    let copy =
        if number < 0 { Err(std::io::Error::from_raw_os_error(-number)) } else { pidfd(&found.subject)?.get(number) };
    if number >= 0 {
        let mut close = Batch::new();
        close.attempt(libc::SYS_close, [number.into()]);
        leader.run(&ground, 0, &close)?;
    }
    ground.clear(leader)?;
    let object = || format!("the memory of process {}", found.subject.pod);
    Ok(crate::error::Context::capturing(copy, "following", object())?)
}
