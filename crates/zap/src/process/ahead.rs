//! What is learned of a pod's memory while it runs: the layout of every process, and copies of the big ones, so that the
//! hold does not grow with them.

use std::cell::OnceCell;
use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::ops::Range;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, TryRecvError, channel};
use std::time::{Duration, Instant};

use nix::time::{clock_getcpuclockid, clock_gettime};

use crate::error::CaptureError;
use crate::ids::HostPid;
use crate::image::DataSink;
use crate::kernel::mappings::{self, Record, Told};
use crate::memory::{self, Ahead, Mapping, Nature};
use crate::migrate::strategies::Strategy;
use crate::parallel;
use crate::process::discover::{Found, Population};
use crate::process::handles::{self, Handles, can_answer};
use crate::process::hold::HoldError;
use crate::process::sharing::{self, Groups};
use crate::procfs;

/// Modified memory that copying in the hold takes less for than holding a process to make a handle: of the whole pod, which is
/// written down once perhaps. Of one that is written down again, all holds after it gain by one handle more.
const LEFT: u64 = 10 << 20;
const LEFT_AGAIN: u64 = 2 << 20;
/// What of a process is not worth following.
const WORTH_IT: u64 = 256 << 10;

/// The layouts of processes with their flags, by PID on the host.
pub type Layouts = HashMap<HostPid, Layout>;

/// Modified memory of a process whose flags are read again in the hold if it has run since, where nobody tells of them at
/// once: that takes 17 ms/GiB.
const READ_AGAIN: u64 = 64 << 20;
/// Processes of which it is worth the time that it takes, once, to be told of mappings rather than to read of them.
const FEW: usize = 8;

/// How the memory of a process looked.
#[derive(Clone)]
pub struct Layout {
    /// Its mappings, with their flags.
    pub mappings: Arc<Vec<Mapping>>,
    /// The same as the kernel had them then, where it tells.
    records: Option<Arc<Vec<Record>>>,
    /// Pages that it had then.
    resident: Resident,
    /// Where pages of files were mapped in.
    touched: Arc<Vec<Range<u64>>>,
    /// Where it had nothing but such pages.
    untouched: Arc<Vec<Range<u64>>>,
    /// Bytes of modified memory.
    modified: u64,
    /// Processor time that it had taken before.
    ran: Option<Duration>,
}

impl Layout {
    /// Reads it, or takes the one of an earlier checkpoint if that is true still. A process that has gone has none.
    pub fn read(process: HostPid, earlier: Option<&Layout>) -> Layout {
        let ran = processor_time(process);
        let (told, resident) = (mappings::of(process), Resident::of(process));
        if let (Some(earlier), Some(told)) = (earlier, &told)
            && earlier.records.as_deref() == Some(&told.records)
            && earlier.resident.is_near(resident)
        {
            let untouched = match mappings::guards().is_some() || (ran.is_some() && earlier.ran == ran) {
                true => earlier.untouched.clone(),
                false => Arc::new(untouched(process, &earlier.mappings, &told.records)),
            };
            return Layout { ran, untouched, ..earlier.clone() };
        }
        let mappings = memory::layout_of(process).unwrap_or_default();
        // That they are the same before and after is not enough: programs map file after file at one address.
        let is_same = |told: &Told| mappings::of(process).is_some_and(|now| now.changes == told.changes);
        let records = told.filter(is_same).map(|told| Arc::new(told.records));
        let touched = Arc::new(memory::touched(process, &mappings));
        let untouched = records.as_ref().map_or(Vec::new(), |records| untouched(process, &mappings, records));
        let (untouched, modified) = (Arc::new(untouched), mappings.iter().map(|mapping| mapping.modified).sum());
        Layout { mappings: Arc::new(mappings), records, resident, touched, untouched, modified, ran }
    }

    /// Whether the mappings of a process that is held are what they were. Flags may be others for all that if the kernel
    /// tells of no records: then it is to be asked before whether the layout [is stale](Self::is_stale).
    pub fn is_still(&self, process: HostPid) -> bool {
        match &self.records {
            Some(records) => mappings::of(process).is_some_and(|told| told.records == **records),
            None => memory::are_still(process, &self.mappings),
        }
    }

    /// Whether the process has run since.
    fn has_run(&self, process: HostPid) -> bool {
        self.ran.is_none() || processor_time(process) != self.ran
    }

    /// Whether it can have changed without a change that shows.
    fn is_stale(&self, process: HostPid) -> bool {
        self.records.is_none() && self.modified <= READ_AGAIN && self.has_run(process)
    }
}

/// Where a process has nothing but pages of files.
fn untouched(process: HostPid, mappings: &[Mapping], records: &[Record]) -> Vec<Range<u64>> {
    let guards = mappings::guards();
    let is_untouched = |mapping: &&Mapping| {
        let record = records.binary_search_by_key(&mapping.start, |record| record.start).map(|place| &records[place]);
        let is_changed = |record: &Record| record.modified || record.flags & guards.unwrap_or(0) != 0;
        mapping.nature() == Nature::File && record.is_ok_and(|record| !is_changed(record))
    };
    let untouched = memory::worth_leaving_out(mappings.iter().filter(is_untouched).map(|m| m.start..m.end));
    if guards.is_some() { untouched } else { memory::without_guards(process, untouched).unwrap_or_default() }
}

/// Has the kernel tell of mappings if there is a process whose flags would not be read again in the hold.
pub fn prepare(population: &Population) {
    let modified = |found: &Found| found.status.numbers("RssAnon").first().copied().map_or(0, u64::from);
    if population.live.iter().any(|found| modified(found) << 10 > READ_AGAIN) {
        mappings::open();
    }
}

/// Has it tell of them the next time, beside whatever else is done, if there is much to read.
pub fn prepare_for_next(layouts: &Layouts) {
    if layouts.len() > FEW && !mappings::are_told() {
        // Without a thread they go on being read.
        drop(std::thread::Builder::new().name("types".into()).spawn(mappings::open));
    }
}

/// How many pages a process has.
#[derive(Clone, Copy, Default)]
struct Resident {
    anonymous: u64,
    of_files: u64,
}

impl Resident {
    fn of(process: HostPid) -> Resident {
        let text = procfs::read_record(process.proc("statm")).unwrap_or_default();
        let text = String::from_utf8_lossy(&text);
        let mut words = text.split_ascii_whitespace().map(|word| word.parse().unwrap_or(0)).skip(1);
        let (all, of_files): (u64, u64) = (words.next().unwrap_or(0), words.next().unwrap_or(0));
        Resident { anonymous: all.saturating_sub(of_files), of_files }
    }

    /// Whether so many more or less do not matter. The kernel counts loosely.
    fn is_near(self, other: Resident) -> bool {
        const LITTLE: u64 = 64;
        self.anonymous.abs_diff(other.anonymous) <= LITTLE && self.of_files.abs_diff(other.of_files) <= LITTLE
    }
}

/// Processor time that the threads of a process have taken. What a thread takes that runs on another processor just now
/// may be missing.
fn processor_time(process: HostPid) -> Option<Duration> {
    let clock = clock_getcpuclockid(nix::unistd::Pid::from_raw(process.0)).ok()?;
    Some(clock_gettime(clock).ok()?.into())
}

/// Whether processes may be disturbed: not before it is known that nothing of them is refused.
pub struct Permission(Receiver<bool>, OnceCell<bool>);

/// Who gives the permission, or by going without a word refuses it.
pub struct Giver(Sender<bool>);

impl Giver {
    /// Says whether they may.
    pub fn tell(self, may: bool) {
        // Nobody may need to know.
        let _ = self.0.send(may);
    }
}

impl Permission {
    /// One that is not given yet.
    pub fn new() -> (Giver, Permission) {
        let (giver, heard) = channel();
        (Giver(giver), Permission(heard, OnceCell::new()))
    }

    /// Whether it is given; waits until that is known.
    pub fn is_given(&self) -> bool {
        *self.1.get_or_init(|| self.0.recv().unwrap_or(false))
    }

    /// Whether that is known.
    fn is_known(&self) -> bool {
        self.1.get().is_some()
    }

    /// Whether it is known to be refused by now.
    fn is_refused(&self) -> bool {
        match self.0.try_recv() {
            Ok(told) => drop(self.1.set(told)),
            Err(TryRecvError::Disconnected) => drop(self.1.set(false)),
            Err(TryRecvError::Empty) => {}
        }
        self.1.get() == Some(&false)
    }
}

/// What is known of the memory of the processes.
#[derive(Default)]
pub struct MemoryAhead {
    layouts: Layouts,
    touched: HashMap<HostPid, Arc<Vec<Range<u64>>>>,
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
    pub fn layout_of(&self, process: HostPid) -> Option<&Layout> {
        self.layouts.get(&process)
    }

    /// Where it had pages of files mapped in.
    pub fn touched_by(&self, process: HostPid) -> &[Range<u64>] {
        self.touched.get(&process).map_or(&[], |touched| touched)
    }

    /// Where a process that is held has nothing but pages of files, as far as that is known. `now` are the mappings that it has.
    pub fn untouched_by(&self, process: HostPid, now: &Arc<Vec<Mapping>>) -> &[Range<u64>] {
        let Some(layout) = self.layouts.get(&process).filter(|layout| Arc::ptr_eq(&layout.mappings, now)) else {
            return &[];
        };
        // What anybody writes there is a change. Guards may be none: those are made by whoever has them.
        let is_alone = || !self.sharers.iter().any(|group| group.contains(&process));
        let is_true = mappings::guards().is_some() || (!layout.has_run(process) && is_alone());
        if is_true { &layout.untouched } else { &[] }
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
    pub fn layouts(layouts: Layouts, groups: &Groups) -> MemoryAhead {
        let touched = layouts.iter().map(|(process, layout)| (*process, layout.touched.clone()));
        let sharers = groups.memory().cloned().collect();
        MemoryAhead { touched: touched.collect(), layouts, sharers, ..MemoryAhead::default() }
    }

    /// Everybody who has the address space of a process.
    fn sharers_of(&self, process: HostPid) -> Vec<HostPid> {
        let group = self.sharers.iter().find(|group| group.contains(&process));
        group.cloned().unwrap_or_else(|| vec![process])
    }

    /// Follows the big processes of a running pod, and copies their memory for as many rounds as `strategy` says. What
    /// cannot be followed, for whatever reason, is left to the hold. `handles` are those of earlier checkpoints; `again`: there
    /// were some.
    pub fn look_ahead(
        (layouts, groups): (Layouts, &Groups),
        population: &Population,
        handles: &mut Handles,
        data: &mut DataSink,
        (strategy, permission): (&dyn Strategy, Permission),
        again: bool,
    ) -> MemoryAhead {
        let mut ahead = MemoryAhead::layouts(layouts, groups);
        handles.retain(|process| ahead.layouts.contains_key(&process));
        let left = if again { LEFT_AGAIN } else { LEFT };
        let big = ahead.worth_following(population, handles, left);
        for found in &big {
            // Whoever has made a handle already is not disturbed. They come first.
            if handles.of(found.subject.host).is_none() && !permission.is_given() {
                return ahead;
            }
            match ahead.follow(found, handles) {
                Ok(followed) => drop(ahead.followed.insert(found.subject.host, followed)),
                Err(error) => tracing::info!(process = %found.subject.pod, %error, "memory is not followed"),
            }
        }
        let mut written = Vec::new();
        // What is written while all else is looked at is copied as well.
        let news = |permission: &Permission| !permission.is_known() && permission.is_given();
        while !ahead.followed.is_empty()
            && !permission.is_refused()
            && (strategy.another_round(&written) || news(&permission))
        {
            written.push(ahead.round(&big, population, data));
        }
        ahead.rounds = written.len() as u64;
        let one_has = |process: &HostPid| ahead.layouts.get(process).is_none_or(|layout| layout.has_run(*process));
        let has_run = |process: &HostPid| ahead.sharers_of(*process).iter().any(one_has);
        let changed: Vec<HostPid> = ahead.followed.keys().copied().filter(has_run).collect();
        let layout = |process| (process, Layout::read(process, ahead.layouts.get(&process)));
        let changed = parallel::map(changed, layout);
        ahead.layouts.extend(changed);
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

    /// Those that there are handles of, and the biggest of the others, all but `little` together.
    fn worth_following<'p>(&self, population: &'p Population, handles: &Handles, little: u64) -> Vec<&'p Found> {
        let modified = |found: &Found| -> u64 {
            let layout = self.layout_of(found.subject.host).map_or(&[][..], |layout| &layout.mappings);
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
            if has_handle || (left > little && can_answer(found)) {
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

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};

    use super::*;
    use crate::sys::testing;

    fn guards_in_files() -> bool {
        let own = crate::sys::mappings::Own::map().unwrap();
        own.advise(crate::sys::memory::MADV_GUARD_INSTALL).is_ok()
    }

    /// A child that does something when it is asked to.
    struct Child {
        host: HostPid,
        ask: std::io::PipeWriter,
        heard: std::io::PipeReader,
    }

    impl Child {
        fn that(act: impl FnOnce()) -> Child {
            let ((mut asked, ask), (heard, mut answer)) = (std::io::pipe().unwrap(), std::io::pipe().unwrap());
            let child = testing::fork();
            if child == 0 {
                let mut byte = [0];
                let _ = answer.write_all(&byte);
                let _ = asked.read_exact(&mut byte);
                act();
                let _ = answer.write_all(&byte);
                let _ = asked.read_exact(&mut byte);
                testing::exit();
            }
            let mut child = Child { host: HostPid(child), ask, heard };
            child.heard.read_exact(&mut [0]).unwrap();
            while !std::fs::read_to_string(child.host.proc("wchan")).unwrap().contains("pipe_read") {
                std::thread::yield_now();
            }
            child
        }

        fn act(&mut self) {
            self.ask.write_all(&[1]).unwrap();
            self.heard.read_exact(&mut [0]).unwrap();
        }
    }

    impl Drop for Child {
        fn drop(&mut self) {
            let child = nix::unistd::Pid::from_raw(self.host.0);
            nix::sys::signal::kill(child, nix::sys::signal::Signal::SIGKILL).unwrap();
            nix::sys::wait::waitpid(child, None).unwrap();
        }
    }

    #[test]
    fn advice_that_no_line_shows_is_a_change_of_the_layout() {
        mappings::open();
        let page = testing::map(4096, libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE, None);
        testing::poke(page, 1);
        let mut child = Child::that(|| testing::over(libc::SYS_madvise, page, 4096, libc::MADV_DONTFORK));
        let before = Layout::read(child.host, None);
        assert!(before.records.is_some() && before.is_still(child.host));
        let again = Layout::read(child.host, Some(&before));
        assert!(Arc::ptr_eq(&again.mappings, &before.mappings));
        child.act();
        assert!(memory::are_still(child.host, &before.mappings));
        assert!(!before.is_still(child.host) && before.has_run(child.host));
        assert!(!Arc::ptr_eq(&Layout::read(child.host, Some(&before)).mappings, &before.mappings));
    }

    #[test]
    fn what_others_write_and_guards_are_not_left_out() {
        const LENGTH: usize = 1 << 20;
        mappings::open();
        let file = nix::sys::memfd::memfd_create("mapped", nix::sys::memfd::MFdFlags::MFD_CLOEXEC).unwrap();
        nix::unistd::ftruncate(&file, LENGTH as i64).unwrap();
        let start =
            testing::map(LENGTH, libc::PROT_READ, libc::MAP_PRIVATE, Some(std::os::fd::AsRawFd::as_raw_fd(&file)));
        let guard = || testing::over(libc::SYS_madvise, start + 8192, 4096, crate::sys::memory::MADV_GUARD_INSTALL);
        let mut child = Child::that(guard);
        let host = child.host;
        let before = Layout::read(host, None);
        let is_left_out = |layout: &Layout| layout.untouched.iter().any(|r| r.contains(&start));
        assert!(is_left_out(&before));
        let mappings = before.mappings.clone();
        let ahead = MemoryAhead::layouts(HashMap::from([(host, before.clone())]), &Groups::default());
        assert_eq!(ahead.untouched_by(host, &mappings), &before.untouched[..]);
        assert!(ahead.untouched_by(host, &Arc::new(Vec::new())).is_empty());
        if guards_in_files() {
            child.act();
            assert!(!before.is_still(host) || ahead.untouched_by(host, &mappings).is_empty());
            assert!(!is_left_out(&Layout::read(host, Some(&before))));
        } else {
            println!("skipped in part: this kernel has no guards in mappings of files");
        }
        let memory = std::fs::OpenOptions::new().write(true).open(host.proc("mem")).unwrap();
        std::os::unix::fs::FileExt::write_all_at(&memory, &[1], start).unwrap();
        assert!(!before.is_still(host));
    }
}
