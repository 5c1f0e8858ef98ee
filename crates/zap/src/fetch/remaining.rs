//! Which pages of an address space have not come yet: found by address, for somebody waits for one, and by where they come
//! from, for one has come.

use std::collections::BTreeMap;
use std::ops::Range;

use crate::sys::userfault::Event;

/// The pages of an address space that have not come. Each comes from an offset of its own, in what was left behind.
#[derive(Clone, Debug, Default)]
pub(super) struct Remaining {
    /// First address to length and offset.
    by_address: BTreeMap<u64, (u64, u64)>,
    /// First offset to length and address.
    by_offset: BTreeMap<u64, (u64, u64)>,
}

/// Pages in a row that come from offsets in a row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Run {
    pub(super) address: u64,
    pub(super) offset: u64,
    pub(super) length: u64,
}

impl Run {
    /// The part of it whose addresses lie in `range`.
    fn within(self, range: &Range<u64>) -> Option<Run> {
        let (start, end) = (self.address.max(range.start), (self.address + self.length).min(range.end));
        let offset = self.offset + (start - self.address);
        (start < end).then_some(Run { address: start, offset, length: end.saturating_sub(start) })
    }
}

impl Remaining {
    pub(super) fn insert(&mut self, run: Run) {
        self.by_address.insert(run.address, (run.length, run.offset));
        self.by_offset.insert(run.offset, (run.length, run.address));
    }

    fn remove(&mut self, run: Run) {
        self.by_address.remove(&run.address);
        self.by_offset.remove(&run.offset);
    }

    pub(super) fn is_empty(&self) -> bool {
        self.by_address.is_empty()
    }

    pub(super) fn clear(&mut self) {
        (self.by_address, self.by_offset) = Default::default();
    }

    /// Where the page at an address comes from, if it has not come.
    pub(super) fn offset_of(&self, address: u64) -> Option<u64> {
        let (start, (length, offset)) = self.by_address.range(..=address).next_back()?;
        (address < start + length).then(|| offset + (address - start))
    }

    /// The first of the pages that come from these offsets.
    pub(super) fn first_from(&self, offsets: &Range<u64>) -> Option<Run> {
        if offsets.is_empty() {
            return None;
        }
        let run = |(offset, (length, address)): (&u64, &(u64, u64))| Run {
            address: *address,
            offset: *offset,
            length: *length,
        };
        let before = self.by_offset.range(..offsets.start).next_back().map(run);
        let before = before.filter(|run| run.offset + run.length > offsets.start);
        let found = before.or_else(|| self.by_offset.range(offsets.clone()).next().map(run))?;
        let (start, end) = (found.offset.max(offsets.start), (found.offset + found.length).min(offsets.end));
        Some(Run { address: found.address + (start - found.offset), offset: start, length: end - start })
    }

    /// Those at these addresses come no more, or have come; what they were.
    pub(super) fn forget(&mut self, addresses: &Range<u64>) -> Vec<Run> {
        let run = |(address, (length, offset)): (&u64, &(u64, u64))| Run {
            address: *address,
            offset: *offset,
            length: *length,
        };
        let before = self.by_address.range(..addresses.start).next_back().map(run);
        let concerned: Vec<Run> = before.into_iter().chain(self.by_address.range(addresses.clone()).map(run)).collect();
        let mut forgotten = Vec::new();
        for run in concerned {
            let Some(gone) = run.within(addresses) else { continue };
            self.remove(run);
            forgotten.push(gone);
            let rest = [0..addresses.start, addresses.end..u64::MAX];
            rest.iter().filter_map(|range| run.within(range)).for_each(|rest| self.insert(rest));
        }
        forgotten
    }

    /// What a process has done to its address space.
    pub(super) fn hear(&mut self, event: Option<Event>) {
        match event {
            Some(Event::Remap { from, to, length }) => self.shift(from, to, length),
            Some(Event::Remove(range) | Event::Unmap(range)) => drop(self.forget(&range)),
            Some(Event::Fault(_) | Event::Fork(_)) | None => {}
        }
    }

    /// They moved, and are where they moved to.
    pub(super) fn shift(&mut self, from: u64, to: u64, length: u64) {
        let moved = self.forget(&(from..from + length));
        self.forget(&(to..to + length));
        moved.into_iter().for_each(|run| self.insert(Run { address: run.address - from + to, ..run }));
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use proptest::prelude::*;

    use super::*;

    #[derive(Clone, Debug)]
    enum Act {
        Forget(u64, u64),
        Shift(u64, u64, u64),
        Come(u64, u64),
    }

    fn act() -> impl Strategy<Value = Act> {
        prop_oneof![
            (0u64..60, 1u64..12).prop_map(|(start, length)| Act::Forget(start, length)),
            (0u64..30, 31u64..60, 1u64..12).prop_map(|(from, to, length)| Act::Shift(from, to, length)),
            (0u64..60, 1u64..12).prop_map(|(offset, length)| Act::Come(offset, length)),
        ]
    }

    proptest! {
        #[test]
        fn it_knows_what_has_not_come(runs in prop::collection::vec((1u64..4, 1u64..5), 0..8), acts in prop::collection::vec(act(), 0..12)) {
            let (mut remaining, mut model) = (Remaining::default(), HashMap::new());
            let (mut address, mut offset) = (0, 0);
            for (gap, length) in runs {
                address += gap;
                remaining.insert(Run { address, offset, length });
                model.extend((0..length).map(|page| (address + page, offset + page)));
                (address, offset) = (address + length, offset + length + gap % 2);
            }
            for act in acts {
                match act {
                    Act::Forget(start, length) => {
                        remaining.forget(&(start..start + length));
                        model.retain(|page, _| !(start..start + length).contains(page));
                    }
                    Act::Shift(from, to, length) => {
                        let length = length.min(to - from);
                        remaining.shift(from, to, length);
                        let moved: Vec<(u64, u64)> = (0..length).filter_map(|i| Some((to + i, model.remove(&(from + i))?))).collect();
                        model.retain(|page, _| !(to..to + length).contains(page));
                        model.extend(moved);
                    }
                    Act::Come(start, length) => {
                        while let Some(run) = remaining.first_from(&(start..start + length)) {
                            for page in 0..run.length {
                                prop_assert_eq!(model.remove(&(run.address + page)), Some(run.offset + page));
                            }
                            remaining.forget(&(run.address..run.address + run.length));
                        }
                        prop_assert!(!model.values().any(|offset| (start..start + length).contains(offset)));
                    }
                }
                for page in 0..80 {
                    prop_assert_eq!(remaining.offset_of(page), model.get(&page).copied());
                }
                prop_assert_eq!(remaining.is_empty(), model.is_empty());
            }
        }
    }
}
