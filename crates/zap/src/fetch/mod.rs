//! Filling the memory of a pod that runs already: pages come when they are touched, and meanwhile those that nobody touches.
//!
//! `userfaultfd(2)` tells who waits for which page and what becomes of address spaces meanwhile. While a change has not been
//! read the kernel answers EAGAIN to whoever fills, so no page is ever put where another belongs. PID 1 keeps a copy of every
//! userfaultfd: should this monitor die, whoever touches a missing page waits instead of reading zeros.

mod filling;
mod ledger;
mod remaining;
mod supply;

use std::collections::VecDeque;
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};

pub use self::filling::{Filling, Space};
use self::ledger::Ledger;
use self::remaining::{Remaining, Run};
pub use self::supply::{FromImage, FromStore, Supply};
use crate::fault;
use crate::memory::PAGE;
use crate::pod::control::Control;
use crate::pod::{Cgroup, LivePod};
use crate::sys::userfault::{self, Event};

/// What is asked for when somebody waits, and when nobody does.
const URGENT: u64 = 16 << 10;
const BLOCK: u64 = 128 << 10;
/// How much is on its way at once, unasked: at first, and at most; and how long whoever touches a page may have to wait for it.
const FIRST_WINDOW: u64 = 4 * BLOCK;
const MOST: u64 = 8 << 20;
const WAIT: Duration = Duration::from_millis(15);

/// The pod whose memory it is.
pub struct Whose {
    /// Its name.
    pub pod: String,
    /// Its processes, which are killed if their memory cannot come.
    pub cgroup: Cgroup,
    /// Keeps copies of every userfaultfd.
    pub(crate) control: Control,
    /// Says in its console why it was killed.
    pub console: Option<crate::monitor::session::Session>,
}

impl Whose {
    /// This one.
    pub(crate) fn of(pod: &LivePod) -> Whose {
        Whose {
            pod: pod.spec.name.clone(),
            cgroup: pod.cgroup.clone(),
            control: pod.control().clone(),
            console: pod.session().cloned(),
        }
    }
}

/// How it stands. Copies are the same.
#[derive(Clone)]
pub struct Fetching(Arc<Shared>);

struct Shared {
    progress: Mutex<Progress>,
    changed: Condvar,
    wake: EventFd,
}

#[derive(Default)]
struct Progress {
    /// The source knows that the pod runs here.
    settled: bool,
    /// It is not to be filled after all.
    abandoned: bool,
    /// How it ended.
    end: Option<Result<(), String>>,
}

impl Fetching {
    /// Begins to fill: until [`Fetching::settle`] nothing but what somebody waits for, for others have more to do then.
    fn begin(filling: Filling, whose: Whose) -> io::Result<Fetching> {
        let wake = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?;
        let shared = Shared { progress: Mutex::default(), changed: Condvar::new(), wake };
        let fetching = Fetching(Arc::new(shared));
        let fetcher = Fetcher::new(filling, whose, fetching.clone());
        std::thread::Builder::new().name("fetch".to_owned()).spawn(move || fetcher.run())?;
        Ok(fetching)
    }

    fn progress(&self) -> MutexGuard<'_, Progress> {
        self.0.progress.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The source knows that the pod runs here: all of it may come, and the source be told when it has.
    pub fn settle(&self) {
        self.progress().settled = true;
        let _ = self.0.wake.write(1);
    }

    /// Ends it; returns when it has ended. The pod does not run.
    pub fn abandon(&self) {
        self.progress().abandoned = true;
        let _ = self.0.wake.write(1);
        let _ = self.wait();
    }

    /// Returns when all has come, or cannot come: then the pod has been killed, and this is why.
    pub fn wait(&self) -> Result<(), String> {
        let mut progress = self.progress();
        loop {
            if let Some(end) = &progress.end {
                return end.clone();
            }
            progress = self.0.changed.wait(progress).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

/// An address space that is being filled.
struct Filled {
    userfault: OwnedFd,
    remaining: Remaining,
    /// Pages that somebody waits for.
    waiting: Vec<u64>,
    /// It is gone.
    gone: bool,
}

struct Fetcher {
    spaces: Vec<Filled>,
    supply: Box<dyn Supply>,
    ledger: Ledger,
    /// A bit a page: whether it was asked for.
    asked: Vec<u64>,
    /// What is on its way, and since when.
    coming: VecDeque<(Range<u64>, Instant)>,
    on_its_way: u64,
    /// When something came last.
    heard: Instant,
    window: u64,
    /// The least that an answer took, and what is behind the offset that was asked for when the window was last made smaller.
    fastest: Duration,
    shrunk: u64,
    received: u64,
    /// Where to go on asking when nobody waits.
    cursor: u64,
    end: u64,
    whose: Whose,
    fetching: Fetching,
}

/// Why there is no filling any more.
enum Failed {
    Supply(io::Error),
    Memory(io::Error),
    Abandoned,
}

impl Fetcher {
    fn new(filling: Filling, whose: Whose, fetching: Fetching) -> Fetcher {
        let Filling { spaces, supply, ledger, end } = filling;
        let filled = |(userfault, remaining)| Filled { userfault, remaining, waiting: Vec::new(), gone: false };
        Fetcher {
            spaces: spaces.into_iter().map(filled).collect(),
            supply,
            ledger,
            asked: vec![0; (end / PAGE / 64 + 1) as usize],
            coming: VecDeque::new(),
            on_its_way: 0,
            heard: Instant::now(),
            window: FIRST_WINDOW,
            fastest: Duration::MAX,
            shrunk: 0,
            received: 0,
            cursor: 0,
            end,
            whose,
            fetching,
        }
    }

    fn run(mut self) {
        // Whatever goes wrong, nobody may wait for ever, or read zeros where its memory was.
        let filled = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| self.fill()));
        let end = match filled.unwrap_or_else(|_| Err(Failed::Memory(io::Error::other("a defect of zap")))) {
            Ok(()) => Ok(()),
            Err(Failed::Abandoned) => Err("it was given up".to_owned()),
            Err(Failed::Supply(error)) => Err(self.lose(&format!("the rest of its memory cannot be had: {error}"))),
            Err(Failed::Memory(error)) => Err(self.lose(&format!("its memory cannot be filled: {error}"))),
        };
        // Whoever still waits reads zeros from here on: nobody does, all has come or the pod is dead.
        self.spaces.clear();
        let _ = self.whose.control.drop_hoard();
        let mut progress = self.fetching.progress();
        progress.end = Some(end);
        drop(progress);
        self.fetching.0.changed.notify_all();
    }

    /// Kills the pod: half of its memory is lost. Returns when it is dead, with what its console was told.
    fn lose(&self, why: &str) -> String {
        let words = format!("pod {} is lost: {why}", self.whose.pod);
        tracing::error!("{words}");
        if let Some(console) = &self.whose.console {
            console.say(&format!("zap: {words}\n"));
        }
        let begun = Instant::now();
        let _ = self.whose.cgroup.kill();
        // Nobody may read zeros where its memory was.
        while !self.whose.cgroup.pids().unwrap_or_default().is_empty() && begun.elapsed() < Duration::from_secs(30) {
            std::thread::sleep(Duration::from_millis(1));
        }
        words
    }

    fn fill(&mut self) -> Result<(), Failed> {
        loop {
            (0..self.spaces.len()).try_for_each(|space| self.attend(space))?;
            let missing = self.spaces.iter().any(|space| !space.remaining.is_empty());
            let Progress { settled, abandoned, .. } = *self.fetching.progress();
            match (missing, settled) {
                _ if abandoned => return Err(Failed::Abandoned),
                (true, true) => self.ask_ahead().map_err(Failed::Supply)?,
                (false, true) if self.coming.is_empty() => {
                    self.say_that_all_has_come();
                    return Ok(());
                }
                _ => {}
            }
            if self.wait()? {
                let (offset, bytes) = self.supply.take().map_err(Failed::Supply)?;
                self.arrived(offset, &bytes)?;
            }
        }
    }

    /// Nothing of it is needed any more: who cannot be told decides for himself what to do with what he has.
    fn say_that_all_has_come(&mut self) {
        if let Err(error) = self.supply.finish() {
            tracing::warn!(
                "all memory of pod {} has come, and whence it came has not heard of that: {error}",
                self.whose.pod
            );
        }
    }

    /// How long may still be waited for what is on its way, if that has an end.
    fn patience_left(&self) -> Option<Duration> {
        let (_, asked) = self.coming.front()?;
        Some(self.supply.patience()?.saturating_sub(self.heard.max(*asked).elapsed()))
    }

    /// Waits until there is something to do; whether pages have come.
    fn wait(&mut self) -> Result<bool, Failed> {
        let at_once = !self.coming.is_empty() && self.supply.arrivals().is_none();
        let patience = self.patience_left();
        let stalled = self.spaces.iter().any(|space| !space.waiting.is_empty() && space.is_stalled());
        let limit = match (at_once, stalled) {
            (true, _) => PollTimeout::ZERO,
            // The kernel is about to tell what became of a page.
            (_, true) => PollTimeout::from(1u8),
            _ => patience.map_or(PollTimeout::NONE, |left| PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX)),
        };
        let wake = &self.fetching.0.wake;
        let mut fds = vec![PollFd::new(wake.as_fd(), PollFlags::POLLIN)];
        let supply = self.supply.arrivals().filter(|_| !self.coming.is_empty());
        let has_supply = supply.is_some();
        fds.extend(supply.map(|fd| PollFd::new(fd, PollFlags::POLLIN)));
        let spaces = self.spaces.iter().filter(|space| !space.gone);
        fds.extend(spaces.map(|space| PollFd::new(space.userfault.as_fd(), PollFlags::POLLIN)));
        match poll(&mut fds, limit) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(error) => return Err(Failed::Memory(error.into())),
        }
        let arrived = has_supply && fds[1].any().unwrap_or(false);
        if !arrived && patience.is_some_and(|left| left.is_zero()) {
            return Err(Failed::Supply(io::Error::new(io::ErrorKind::TimedOut, "the other side is silent")));
        }
        if fds[0].any().unwrap_or(false) {
            let _ = wake.read();
            if self.fetching.progress().abandoned {
                return Err(Failed::Abandoned);
            }
        }
        Ok(at_once || arrived)
    }

    /// Hears what became of an address space, and sees to it that whoever waits gets a page.
    fn attend(&mut self, space: usize) -> Result<(), Failed> {
        self.hear(space).map_err(Failed::Memory)?;
        let waiting = std::mem::take(&mut self.spaces[space].waiting);
        for page in waiting {
            match self.spaces[space].remaining.offset_of(page) {
                Some(offset) => {
                    self.spaces[space].waiting.push(page);
                    self.ask_urgently(offset).map_err(Failed::Supply)?;
                }
                // It has come, or never was: then it is zeros.
                None => match answer_to(userfault::zero(&self.spaces[space].userfault, page)) {
                    Answer::Done => {}
                    Answer::There | Answer::Elsewhere => drop(userfault::wake(&self.spaces[space].userfault, page)),
                    Answer::Changing => self.spaces[space].waiting.push(page),
                    Answer::Gone => self.spaces[space].end(),
                    Answer::Failed(error) => return Err(Failed::Memory(error)),
                },
            }
        }
        Ok(())
    }

    /// Reads the events of an address space.
    fn hear(&mut self, space: usize) -> io::Result<()> {
        while !self.spaces[space].gone {
            let Filled { userfault, remaining, waiting, .. } = &mut self.spaces[space];
            match self.ledger.hear(space, userfault.as_fd())? {
                None => break,
                Some(Event::Fault(page)) => waiting.push(page),
                Some(Event::Fork(userfault)) => {
                    let remaining = remaining.clone();
                    // It hears of it before the child runs.
                    let _ = self.whose.control.hoard(&[userfault.as_fd()]);
                    self.spaces.push(Filled { userfault, remaining, waiting: Vec::new(), gone: false });
                }
                change => remaining.hear(change),
            }
        }
        Ok(())
    }

    fn was_asked(&self, page: u64) -> bool {
        self.asked[(page / 64) as usize] >> (page % 64) & 1 != 0
    }

    fn ask(&mut self, wanted: Range<u64>) -> io::Result<()> {
        let coming = self.supply.ask(wanted)?;
        for page in coming.start / PAGE..coming.end.min(self.end).div_ceil(PAGE) {
            self.asked[(page / 64) as usize] |= 1 << (page % 64);
        }
        self.on_its_way += coming.end - coming.start;
        self.coming.push_back((coming, Instant::now()));
        Ok(())
    }

    /// Somebody waits for the page at this offset: it, and what is near, goes before all that has not been asked for.
    fn ask_urgently(&mut self, offset: u64) -> io::Result<()> {
        if self.was_asked(offset / PAGE) {
            return Ok(());
        }
        let mut end = offset + PAGE;
        while end < (offset / URGENT + 1) * URGENT && end < self.end && !self.was_asked(end / PAGE) {
            end += PAGE;
        }
        self.ask(offset..end.min(self.end))?;
        // What comes behind is likely to be touched next.
        self.cursor = end;
        Ok(())
    }

    /// Asks for what nobody waits for, as much as may be on its way.
    fn ask_ahead(&mut self) -> io::Result<()> {
        while self.on_its_way < self.window {
            let Some(next) = self.next_wanted(self.cursor).or_else(|| self.next_wanted(0)) else { return Ok(()) };
            let mut end = next + PAGE;
            while end < (next / BLOCK + 1) * BLOCK && end < self.end && !self.was_asked(end / PAGE) {
                end += PAGE;
            }
            self.cursor = end;
            self.ask(next..end.min(self.end))?;
        }
        Ok(())
    }

    /// The first page from this offset on that has not come, and was not asked for.
    fn next_wanted(&self, mut offset: u64) -> Option<u64> {
        loop {
            let first = |space: &Filled| Some(space.remaining.first_from(&(offset..self.end))?.offset);
            let found = self.spaces.iter().filter_map(first).min()?;
            if !self.was_asked(found / PAGE) {
                return Some(found);
            }
            // Those that are on their way are in few pieces.
            let coming = self.coming.iter().find(|(range, _)| range.contains(&found));
            offset = coming.map_or(found / PAGE * PAGE + PAGE, |(range, _)| range.end);
        }
    }

    /// Puts pages where they are missing.
    fn arrived(&mut self, offset: u64, bytes: &[u8]) -> Result<(), Failed> {
        let strange = || Failed::Supply(io::Error::other("pages came that nobody asked for"));
        let (expected, since) = self.coming.pop_front().ok_or_else(strange)?;
        if expected != (offset..offset + bytes.len() as u64) {
            return Err(strange());
        }
        self.heard = Instant::now();
        self.on_its_way -= bytes.len() as u64;
        if self.received > self.end / 2 {
            fault::point("half-filled");
        }
        self.pace(since.elapsed(), bytes.len() as u64);
        let mut space = 0;
        // Spaces are added when their parents fork meanwhile.
        while space < self.spaces.len() {
            self.put(space, &expected, bytes).map_err(Failed::Memory)?;
            space += 1;
        }
        Ok(())
    }

    /// More may be on its way while answers are fast, less when whoever waits would wait long.
    fn pace(&mut self, took: Duration, bytes: u64) {
        self.received += bytes;
        self.fastest = self.fastest.min(took);
        if took < self.fastest + WAIT {
            self.window = (self.window + bytes / 2).min(MOST);
        } else if self.received >= self.shrunk {
            self.window = (self.window / 2).max(URGENT);
            self.shrunk = self.received + self.on_its_way;
        }
    }

    fn put(&mut self, space: usize, offsets: &Range<u64>, bytes: &[u8]) -> io::Result<()> {
        let mut most = u64::MAX;
        while let Some(Run { address, offset, length }) = self.spaces[space].remaining.first_from(offsets) {
            let (from, length) = ((offset - offsets.start) as usize, length.min(most));
            let Filled { userfault, remaining, .. } = &mut self.spaces[space];
            let (done, result) = userfault::copy(&*userfault, address, &bytes[from..from + length as usize]);
            remaining.forget(&(address..address + done));
            self.ledger.came(space, address, done);
            let failed_at = address + done;
            match answer_to(result) {
                Answer::Done => {}
                // Pages of two mappings cannot be put in one go: one by one, then.
                Answer::Elsewhere if length - done > PAGE => most = PAGE,
                Answer::There | Answer::Elsewhere => drop(remaining.forget(&(failed_at..failed_at + PAGE))),
                Answer::Changing => {
                    self.hear(space)?;
                    // Until whoever changed it has gone on: that is the kernel's rule.
                    std::thread::yield_now();
                }
                Answer::Gone => self.spaces[space].end(),
                Answer::Failed(error) => return Err(error),
            }
        }
        Ok(())
    }
}

impl Filled {
    fn end(&mut self) {
        self.remaining.clear();
        self.waiting.clear();
        self.gone = true;
    }

    /// Whether somebody waits for what is not known to come.
    fn is_stalled(&self) -> bool {
        self.waiting.iter().any(|page| self.remaining.offset_of(*page).is_none())
    }
}

/// What the kernel says to a page.
enum Answer {
    Done,
    /// One is there.
    There,
    /// Nothing of ours is mapped there.
    Elsewhere,
    /// The address space is changing: hear first how.
    Changing,
    /// The address space is gone.
    Gone,
    Failed(io::Error),
}

fn answer_to(result: io::Result<()>) -> Answer {
    match result {
        Ok(()) => Answer::Done,
        Err(error) => match error.raw_os_error() {
            Some(libc::EEXIST) => Answer::There,
            Some(libc::ENOENT | libc::EINVAL) => Answer::Elsewhere,
            Some(libc::EAGAIN) => Answer::Changing,
            Some(libc::ESRCH) => Answer::Gone,
            _ => Answer::Failed(error),
        },
    }
}
