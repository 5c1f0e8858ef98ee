//! What a new monitor must know to go on filling memory where one that died has stopped: what there was to be filled, and
//! all that has become of it since. It is a file in memory of which PID 1 keeps a copy.
//!
//! The kernel writes its events into it itself ([`userfault::read_event`]), so there is no moment at which the dying monitor
//! knows of one and its ledger does not.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::os::fd::BorrowedFd;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicU64, Ordering};

use serde::{Deserialize, Serialize};

use super::remaining::{Remaining, Run};
use crate::image::{FileEntry, decode, encode};
use crate::memory::{PageRun, PageSource};
use crate::sys::userfault::{self, Event, Message};
use crate::sys::words::SharedWords;

/// Words of an entry: what it is and of which address space, then what became of it.
const ENTRY: usize = 5;
/// Entries at most: of what comes in between there are some ten thousand a GiB.
const MOST: usize = 1 << 19;
/// Words before the first entry: how many entries count.
const HEAD: usize = 8;
const WORDS: usize = HEAD + MOST * ENTRY;

const EVENT: u64 = 1;
const CAME: u64 = 2;
/// In place of a number of entries: there were more than fit.
const FULL: u64 = u64::MAX;

/// What there is to be filled.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Plan {
    /// The pages of each address space, and where they come from.
    pub(super) spaces: Vec<Vec<PageRun>>,
    /// Behind the last offset that any of them comes from.
    pub(super) end: u64,
    /// Checksums of the data, where it has to be checked as it is read.
    pub(super) check: Option<FileEntry>,
}

/// What has become of it.
pub(super) struct Ledger {
    file: File,
    words: SharedWords,
}

impl Ledger {
    /// Nothing has become of anything.
    pub(super) fn begin(plan: &Plan) -> io::Result<Ledger> {
        let file = crate::image::memory_file("zap-ledger")?;
        let words = SharedWords::map(&file, WORDS)?;
        file.write_all_at(&encode(plan), WORDS as u64 * 8)?;
        Ok(Ledger { file, words })
    }

    /// What another monitor has left, and what it says.
    pub(super) fn read(file: File) -> io::Result<(Ledger, Plan, Vec<Remaining>)> {
        let length = file.metadata()?.len().saturating_sub(WORDS as u64 * 8);
        let mut bytes = vec![0; length as usize];
        file.read_exact_at(&mut bytes, WORDS as u64 * 8)?;
        let plan: Plan = decode(&bytes).map_err(io::Error::other)?;
        let ledger = Ledger { words: SharedWords::map(&file, WORDS)?, file };
        let mut spaces = plan.spaces.iter().map(|pages| remaining(pages)).collect();
        ledger.replay(&mut spaces)?;
        Ok((ledger, plan, spaces))
    }

    /// The file.
    pub(super) fn file(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    fn count(&self) -> &AtomicU64 {
        &self.words.all()[0]
    }

    fn entry(&self, number: usize) -> &[AtomicU64; ENTRY] {
        let start = HEAD + number.min(MOST - 1) * ENTRY;
        let words = self.words.all()[start..].first_chunk::<ENTRY>();
        words.expect("as many as there are entries were mapped")
    }

    /// The next event of an address space, noted unless it is but a fault: that is heard of again.
    pub(super) fn hear(&self, space: usize, userfault: BorrowedFd<'_>) -> io::Result<Option<Event>> {
        let [head, message @ ..] = self.next(space as u64, EVENT);
        let message: &Message = message;
        let event = userfault::read_event(userfault, message);
        if !matches!(event, Ok(None | Some(Event::Fault(_)))) {
            self.keep();
        } else {
            head.store(0, Ordering::Release);
        }
        event
    }

    /// Pages have come.
    pub(super) fn came(&self, space: usize, address: u64, length: u64) {
        if length > 0 {
            let [_, from, bytes, ..] = self.next(space as u64, CAME);
            from.store(address, Ordering::Relaxed);
            bytes.store(length, Ordering::Relaxed);
            self.keep();
        }
    }

    /// The entry behind the last, empty but for its head.
    fn next(&self, space: u64, kind: u64) -> &[AtomicU64; ENTRY] {
        let count = self.count().load(Ordering::Relaxed);
        let entry = self.entry(usize::try_from(count).unwrap_or(MOST));
        entry[1..].iter().for_each(|word| word.store(0, Ordering::Release));
        entry[0].store(space << 8 | kind, Ordering::Release);
        entry
    }

    /// The entry behind the last counts.
    fn keep(&self) {
        let count = self.count().load(Ordering::Relaxed);
        let next = if count == FULL || count as usize + 1 >= MOST { FULL } else { count + 1 };
        self.count().store(next, Ordering::Release);
    }

    fn replay(&self, spaces: &mut Vec<Remaining>) -> io::Result<()> {
        let count = self.count().load(Ordering::Acquire);
        if count as usize >= MOST {
            return Err(io::Error::other("more became of it than could be written down"));
        }
        for number in 0..count as usize {
            apply(self.entry(number), spaces);
        }
        // It died between hearing an event and counting it.
        let [head, message @ ..] = self.entry(count as usize);
        let heard = head.load(Ordering::Acquire) as u8 == EVENT as u8
            && !matches!(message[0].load(Ordering::Acquire) as u8, 0 | 0x12);
        if heard {
            apply(self.entry(count as usize), spaces);
            self.keep();
        }
        Ok(())
    }
}

fn apply(entry: &[AtomicU64; ENTRY], spaces: &mut Vec<Remaining>) {
    let [head, words @ ..] = entry.each_ref().map(|word| word.load(Ordering::Acquire));
    let (kind, space) = (head & 0xff, (head >> 8) as usize);
    let Some(remaining) = spaces.get_mut(space) else { return };
    match kind {
        CAME => drop(remaining.forget(&(words[0]..words[0] + words[1]))),
        EVENT if words[0] as u8 == userfault::FORK => {
            let child = remaining.clone();
            spaces.push(child);
        }
        EVENT => remaining.hear(userfault::change(words)),
        _ => {}
    }
}

/// All of these pages.
pub(super) fn remaining(pages: &[PageRun]) -> Remaining {
    let mut remaining = Remaining::default();
    for run in pages {
        if let PageSource::Data(offset) = run.source {
            remaining.insert(Run { address: run.start, offset, length: run.end - run.start });
        }
    }
    remaining
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan() -> Plan {
        let run = |start: u64, end: u64, data: u64| PageRun::from((start << 12, end << 12, Some(data << 12)));
        Plan { spaces: vec![vec![run(10, 20, 0)], vec![run(40, 50, 100)]], end: 110 << 12, check: None }
    }

    fn event(ledger: &Ledger, space: u64, words: [u64; 4]) {
        let entry = ledger.next(space, EVENT);
        entry[1..].iter().zip(words).for_each(|(word, value)| word.store(value, Ordering::Relaxed));
    }

    fn left(spaces: &[Remaining], space: usize, pages: std::ops::Range<u64>) -> Vec<u64> {
        pages.filter(|page| spaces[space].offset_of(page << 12).is_some()).collect()
    }

    #[test]
    fn what_became_of_it_is_read_again() {
        let ledger = Ledger::begin(&plan()).unwrap();
        ledger.came(0, 10 << 12, 2 << 12);
        event(&ledger, 1, [0x15, 41 << 12, 43 << 12, 0]);
        ledger.keep();
        event(&ledger, 0, [u64::from(userfault::FORK), 99, 0, 0]);
        ledger.keep();
        ledger.came(2, 12 << 12, 1 << 12);
        // Heard and not counted; the fault that follows counts for nothing.
        event(&ledger, 0, [0x14, 18 << 12, 30 << 12, 1 << 12]);
        let copy = ledger.file.try_clone().unwrap();
        let (again, found, spaces) = Ledger::read(copy).unwrap();
        assert_eq!((found.spaces.len(), found.end, spaces.len()), (2, 110 << 12, 3));
        assert_eq!(left(&spaces, 0, 0..60), [12, 13, 14, 15, 16, 17, 19, 30]);
        assert_eq!(left(&spaces, 1, 0..60), [40, 43, 44, 45, 46, 47, 48, 49]);
        assert_eq!(left(&spaces, 2, 0..60), [13, 14, 15, 16, 17, 18, 19]);
        event(&again, 0, [0x12, 0, 12 << 12, 0]);
        assert_eq!(left(&Ledger::read(ledger.file.try_clone().unwrap()).unwrap().2, 0, 0..60).len(), 8);
    }

    #[test]
    fn what_does_not_fit_is_not_taken_for_all() {
        let ledger = Ledger::begin(&plan()).unwrap();
        (0..MOST).for_each(|_| ledger.came(0, 10 << 12, 1 << 12));
        ledger.came(0, 10 << 12, 1 << 12);
        assert!(Ledger::read(ledger.file).is_err());
    }
}
