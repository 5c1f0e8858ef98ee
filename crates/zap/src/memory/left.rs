//! Pages that stay behind when a pod moves, and come when they are touched, or when nobody asks for others.
//!
//! Only private memory of no file may come later, and of that only what nobody else needs at the restart: what a child
//! shares with its parent, what is locked, and what the kernel itself writes to goes at once.

use std::fs::File;
use std::ops::Range;

use super::layout::flag;
use super::pages;
use super::state::{Backing, MemoryState, PageRun, PageSource, VmaState};
use super::{PAGE, ranges};
use crate::error::CaptureError;
use crate::look::Subject;

/// What is not worth coming later: of a process …
pub const LITTLE: u64 = 256 << 10;
/// … of one whose pages only have to be put in place, which takes less than what it takes to do that later …
pub const LITTLE_IN_PLACE: u64 = 4 << 20;
/// … of one that is restarted from an image, which touches much of what is less at once, and would wait for it page by page …
pub const LITTLE_AT_RESTART: u64 = 32 << 20;
/// … and of a mapping.
const FEW: u64 = 64 << 10;

/// The pages that a host keeps for one that a pod has moved to: numbered through by offsets, as if they were a file.
#[derive(Default)]
pub struct LeftBehind {
    processes: Vec<(Subject, File)>,
    /// Offset of the first byte, addresses, and whose; by offset.
    runs: Vec<(u64, Range<u64>, usize)>,
    end: u64,
}

impl LeftBehind {
    /// How many bytes there are.
    pub fn bytes(&self) -> u64 {
        self.end
    }

    /// Adds pages (sorted, disjoint) of a process that stays held.
    pub(super) fn add(&mut self, subject: &Subject, pagemap: File, left: &[Range<u64>]) -> Vec<PageRun> {
        let number = self.processes.len();
        self.processes.push((subject.clone(), pagemap));
        let number_through = |range: &Range<u64>| {
            let offset = self.end;
            self.end += range.end - range.start;
            self.runs.push((offset, range.clone(), number));
            PageRun { start: range.start, end: range.end, source: PageSource::Data(offset) }
        };
        left.iter().map(number_through).collect()
    }

    /// What is in some of the pages.
    pub fn read(&self, wanted: &Range<u64>) -> Result<Vec<u8>, CaptureError> {
        let mut bytes = Vec::new();
        let first = self.runs.partition_point(|(offset, range, _)| offset + (range.end - range.start) <= wanted.start);
        let concerned = self.runs[first..].iter().take_while(|(offset, ..)| *offset < wanted.end);
        for (offset, range, whose) in concerned {
            let from = range.start + wanted.start.saturating_sub(*offset);
            let to = range.end.min(range.start + (wanted.end - offset));
            let (subject, pagemap) = &self.processes[*whose];
            bytes.extend(pages::read(subject, pagemap, std::slice::from_ref(&(from..to)))?);
        }
        Ok(bytes)
    }
}

/// Whether what is in a mapping may come later.
fn may_come_later(vma: &VmaState, guards: &[Range<u64>]) -> bool {
    let odd = flag::GROWSDOWN
        | flag::LOCKED
        | flag::LOCK_ON_FAULT
        | flag::DROPPABLE
        | flag::DONTFORK
        | flag::WIPEONFORK
        | flag::MERGEABLE
        | flag::SEALED;
    vma.backing == Backing::Anonymous
        // What its process may not read the kernel may show tracers alone, and not when they have gone.
        && vma.protection & libc::PROT_READ != 0
        && !vma.has(odd)
        && ranges::common(guards, std::slice::from_ref(&vma.range())).is_empty()
}

/// Those of `pages` that may come later, but for what must be there at once (sorted, disjoint): nothing if it is less than
/// `little`.
pub(super) fn later(state: &MemoryState, pages: &[Range<u64>], at_once: &[Range<u64>], little: u64) -> Vec<Range<u64>> {
    let pages = ranges::minus(pages, at_once);
    let suitable = state.vmas.iter().filter(|vma| may_come_later(vma, &state.guards));
    let of_mapping = |vma: &VmaState| ranges::common(&pages, std::slice::from_ref(&vma.range()));
    let worth_it = suitable.map(of_mapping).filter(|found| pages::total(found) as u64 >= FEW);
    let found: Vec<Range<u64>> = worth_it.flatten().collect();
    if (pages::total(&found) as u64) < little { Vec::new() } else { found }
}

impl MemoryState {
    /// Moves pages that are in the image's data, and may come later, from those that a restart reads at once to those that
    /// it leaves until then, unless they are less than `little`; `at_once` (sorted, disjoint) are not among them.
    pub fn put_off(&mut self, at_once: &[Range<u64>], little: u64) {
        let stored: Vec<PageRun> = self.pages.iter().filter(|run| run.source != PageSource::Parent).copied().collect();
        let later = later(self, &pages::runs(&stored), at_once, little);
        self.left = PageRun::parts(&stored, &later);
        self.pages = PageRun::parts(&self.pages, &ranges::without(0..u64::MAX, &later));
    }

    /// The pages that children of this process have of its.
    pub fn inherited(&self) -> impl Iterator<Item = Range<u64>> {
        self.pages.iter().filter(|run| run.source == PageSource::Parent).map(|run| run.start..run.end)
    }

    /// Where pages come later, each range in one mapping: from the first of them to the last.
    pub fn incomplete(&self) -> Vec<Range<u64>> {
        let left = pages::runs(&self.left);
        let hull = |vma: &VmaState| {
            let found = ranges::common(&left, std::slice::from_ref(&vma.range()));
            Some(found.first()?.start..found.last()?.end)
        };
        self.vmas.iter().filter_map(hull).collect()
    }
}

/// The pages of some addresses: sorted and disjoint.
pub fn pages_of(places: impl IntoIterator<Item = Range<u64>>) -> Vec<Range<u64>> {
    let page =
        |place: Range<u64>| place.start & !(PAGE - 1)..place.end.checked_next_multiple_of(PAGE).unwrap_or(place.end);
    ranges::joined(places.into_iter().map(page).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn state() -> MemoryState {
        let vma = |start: u64, end: u64, flags: u32| VmaState {
            start: start << 20,
            end: end << 20,
            protection: 3,
            flags,
            backing: Backing::Anonymous,
            key: 0,
            policy: None,
            name: None,
        };
        MemoryState { vmas: vec![vma(1, 3, 0), vma(4, 6, flag::LOCKED), vma(7, 8, 0)], ..MemoryState::default() }
    }

    #[test]
    fn what_is_needed_at_once_does_not_come_later() {
        let mut state = state();
        let run = |start: u64, end: u64, data: Option<u64>| PageRun::from((start << 20, end << 20, data));
        state.pages = vec![run(1, 2, Some(0)), run(2, 3, None), run(4, 6, Some(1 << 20)), run(7, 8, Some(3 << 20))];
        let needed = pages_of(std::iter::once((1 << 20) + 100..(1 << 20) + 101));
        assert_eq!((needed.len(), needed[0].clone()), (1, 1 << 20..(1 << 20) + PAGE));
        state.put_off(&needed, LITTLE);
        assert_eq!(state.left.iter().map(|r| r.end - r.start).sum::<u64>(), (2 << 20) - PAGE);
        let first = (1 << 20) + PAGE;
        assert_eq!(state.left, [(first, 2 << 20, Some(PAGE)).into(), run(7, 8, Some(3 << 20))]);
        assert_eq!(state.pages.iter().map(|r| r.end - r.start).sum::<u64>(), PAGE + (3 << 20));
        assert_eq!(state.incomplete(), [first..2 << 20, 7 << 20..8 << 20]);
        assert!(state.inherited().eq(std::iter::once(2 << 20..3 << 20)));
    }

    #[test]
    fn little_goes_at_once() {
        let mut state = state();
        state.pages = vec![(1 << 20, (1 << 20) + (128 << 10), Some(0)).into()];
        state.put_off(&[], LITTLE);
        assert_eq!((state.left.len(), state.pages.len()), (0, 1));
    }
}
