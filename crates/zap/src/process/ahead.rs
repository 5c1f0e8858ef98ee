//! What is learned of a pod's memory while it runs: the layout of every process, and copies of the big ones, so that the
//! hold does not grow with them.

use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::ops::Range;
use std::time::{Duration, Instant};

use nix::time::{clock_getcpuclockid, clock_gettime};

use crate::error::CaptureError;
use crate::ids::HostPid;
use crate::image::DataSink;
use crate::memory::{self, Ahead, Mapping};
use crate::migrate::strategies::Strategy;
use crate::parallel;
use crate::process::discover::{Found, Population};
use crate::process::handles::{self, Handles, can_answer};
use crate::process::hold::HoldError;
use crate::process::sharing::{self, Groups};

/// Modified memory that copying in the hold takes less for than holding a process to make a handle: of the whole pod. And what
/// of a process is not worth following.
const LEFT: u64 = 10 << 20;
const WORTH_IT: u64 = 256 << 10;

/// The layouts of processes with their flags, by PID on the host.
pub type Layouts = HashMap<HostPid, Layout>;

/// Modified memory of a process whose flags are read again in the hold if it has run since: that takes 17 ms/GiB.
const READ_AGAIN: u64 = 64 << 20;

/// How the memory of a process looked.
pub struct Layout {
    /// Its mappings, with their flags.
    pub mappings: Vec<Mapping>,
    /// Where pages of files were mapped in.
    touched: Vec<Range<u64>>,
    /// Bytes of modified memory.
    modified: u64,
    /// Processor time that it had taken before.
    ran: Option<Duration>,
}

impl Layout {
    /// Reads it. A process that has gone has none.
    pub fn read(process: HostPid) -> Layout {
        let ran = processor_time(process);
        let mappings = memory::layout_of(process).unwrap_or_default();
        let touched = memory::touched(process, &mappings);
        Layout { modified: mappings.iter().map(|mapping| mapping.modified).sum(), mappings, touched, ran }
    }

    /// Whether the process has run since.
    fn has_run(&self, process: HostPid) -> bool {
        self.ran.is_none() || processor_time(process) != self.ran
    }

    /// Whether it can have changed without a change of its lines.
    fn is_stale(&self, process: HostPid) -> bool {
        self.modified <= READ_AGAIN && self.has_run(process)
    }
}

/// Processor time that the threads of a process have taken. What a thread takes that runs on another processor just now
/// may be missing.
fn processor_time(process: HostPid) -> Option<Duration> {
    let clock = clock_getcpuclockid(nix::unistd::Pid::from_raw(process.0)).ok()?;
    Some(clock_gettime(clock).ok()?.into())
}

/// What is known of the memory of the processes.
#[derive(Default)]
pub struct MemoryAhead {
    layouts: Layouts,
    touched: HashMap<HostPid, Vec<Range<u64>>>,
    followed: HashMap<HostPid, Ahead>,
    /// The processes of each address space that several have.
    sharers: Vec<Vec<HostPid>>,
    /// How long, in microseconds, a thread was held each time to begin following its process.
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
        self.layouts.get(&process).map(|layout| layout.mappings.as_slice())
    }

    /// Where it had pages of files mapped in.
    pub fn touched_by(&self, process: HostPid) -> &[Range<u64>] {
        self.touched.get(&process).map_or(&[], Vec::as_slice)
    }

    /// Forgets the layouts of small processes that have run since: `madvise(2)` and `mlock(2)` change flags that show
    /// nowhere else. To be called when the pod is about to be frozen.
    pub fn forget_stale(&mut self) {
        let is_stale = |process: &HostPid| self.layouts.get(process).is_none_or(|layout| layout.is_stale(*process));
        let changed = self.sharers.iter().filter(|group| group.iter().any(is_stale));
        let changed: HashSet<HostPid> = changed.flatten().copied().collect();
        self.layouts.retain(|process, layout| !changed.contains(process) && !layout.is_stale(*process));
    }

    /// Nothing but layouts, and who shares one.
    pub fn layouts(mut layouts: Layouts, groups: &Groups) -> MemoryAhead {
        let touched = layouts.iter_mut().map(|(process, layout)| (*process, std::mem::take(&mut layout.touched)));
        let sharers = groups.memory().cloned().collect();
        MemoryAhead { touched: touched.collect(), layouts, sharers, ..MemoryAhead::default() }
    }

    /// Everybody who has the address space of a process.
    fn sharers_of(&self, process: HostPid) -> Vec<HostPid> {
        let group = self.sharers.iter().find(|group| group.contains(&process));
        group.cloned().unwrap_or_else(|| vec![process])
    }

    /// Follows the big processes of a running pod, and copies their memory for as many rounds as `strategy` says. What
    /// cannot be followed, for whatever reason, is left to the hold. `handles` are those of earlier checkpoints.
    pub fn look_ahead(
        (layouts, groups): (Layouts, &Groups),
        population: &Population,
        handles: &mut Handles,
        data: &mut DataSink,
        strategy: &dyn Strategy,
    ) -> MemoryAhead {
        let mut ahead = MemoryAhead::layouts(layouts, groups);
        handles.retain(|process| ahead.layouts.contains_key(&process));
        let big = ahead.worth_following(population, handles);
        for found in &big {
            match ahead.follow(found, handles) {
                Ok(followed) => drop(ahead.followed.insert(found.subject.host, followed)),
                Err(error) => tracing::info!(process = %found.subject.pod, %error, "memory is not followed"),
            }
        }
        let mut written = Vec::new();
        while !ahead.followed.is_empty() && strategy.another_round(&written) {
            written.push(ahead.round(&big, population, data));
        }
        ahead.rounds = written.len() as u64;
        let one_has = |process: &HostPid| ahead.layouts.get(process).is_none_or(|layout| layout.has_run(*process));
        let has_run = |process: &HostPid| ahead.sharers_of(*process).iter().any(one_has);
        let changed: Vec<HostPid> = ahead.followed.keys().copied().filter(has_run).collect();
        let layout = |process| (process, Layout::read(process));
        ahead.layouts.extend(parallel::map(changed, layout));
        ahead
    }

    /// Bytes of modified memory that are left to the hold, at least.
    pub fn unfollowed(&self) -> u64 {
        let is_followed = |process| self.sharers_of(process).iter().any(|one| self.followed.contains_key(one));
        let left = self.layouts.iter().filter(|(process, _)| !is_followed(**process));
        left.map(|(_, layout)| layout.modified).sum()
    }

    /// Begins to follow a process: through the handle that there is of it, or one that it is held to make.
    fn follow(&mut self, found: &Found, handles: &mut Handles) -> Result<Ahead, HoldError> {
        let host = found.subject.host;
        let before = self.layouts.get(&host).map_or(&[][..], |layout| &layout.mappings);
        if let Some(handle) = handles.of(host)
            && let Ok(followed) = Ahead::begin(host, handle.clone(), before)
        {
            return Ok(followed);
        }
        if let Some(marks) = memory::Handle::of_marks() {
            return Ok(Ahead::begin(host, marks, before)?);
        }
        if !can_answer(found) {
            let object = format!("the memory of process {}", found.subject.pod);
            return Err(CaptureError::Unexpected { object, what: "lack of a thread that answers".into() }.into());
        }
        let begun = Instant::now();
        let handle = handles::make(found);
        self.holds_us.push(begun.elapsed().as_micros() as u64);
        let handle = handle?;
        handles.insert(host, handle.clone());
        Ok(Ahead::begin(host, handle, before)?)
    }

    /// Those that there are handles of, and the biggest of the others, all but what is little together.
    fn worth_following<'p>(&self, population: &'p Population, handles: &Handles) -> Vec<&'p Found> {
        let modified = |found: &Found| -> u64 {
            let layout = self.layout_of(found.subject.host).unwrap_or_default();
            layout.iter().filter(|mapping| !mapping.shared).map(|mapping| mapping.modified).sum()
        };
        let sized = |found: &'p Found| (handles.of(found.subject.host).is_some(), modified(found), found);
        let others = self.all_but_eldest(population);
        let own = population.live.iter().filter(|found| !others.contains(&found.subject.host));
        let mut all: Vec<(bool, u64, &Found)> = own.map(sized).collect();
        let mut left: u64 = all.iter().map(|(_, size, _)| size).sum();
        all.retain(|(_, size, _)| *size >= WORTH_IT);
        all.sort_by_key(|(has_handle, size, _)| std::cmp::Reverse((*has_handle, *size)));
        let mut big = Vec::new();
        for (has_handle, size, found) in all {
            if has_handle || (left > LEFT && can_answer(found)) {
                left -= size;
                big.push(found);
            }
        }
        big
    }

    /// Those whose address space is another's as well, which stands for it.
    fn all_but_eldest(&self, population: &Population) -> HashSet<HostPid> {
        let mut others = HashSet::new();
        for group in &self.sharers {
            let found = population.live.iter().filter(|found| group.contains(&found.subject.host));
            let found: Vec<&Found> = found.collect();
            let eldest = sharing::eldest(&found);
            others.extend(found.iter().filter(|f| Some(f.subject.pod) != eldest).map(|found| found.subject.host));
        }
        others
    }

    /// One round of copying over all of them; how much had been written.
    fn round(&mut self, big: &[&Found], population: &Population, data: &mut DataSink) -> u64 {
        let followed = &mut self.followed;
        let copied = data.stream(|feed| {
            let mut written = 0;
            for found in big {
                let host = found.subject.host;
                let Some(ahead) = followed.get_mut(&host) else { continue };
                let parent = population.live.iter().find(|p| p.subject.pod == found.stat.parent);
                let parent = parent.and_then(|p| File::open(p.subject.host.proc("pagemap")).ok());
                match ahead.round(feed, &found.subject, parent.as_ref()) {
                    Ok(round) => written += round.written,
                    Err(_) => drop(followed.remove(&host)),
                }
            }
            written
        });
        copied.unwrap_or_else(|error| {
            tracing::info!(%error, "memory is not copied ahead");
            self.followed.clear();
            0
        })
    }
}
