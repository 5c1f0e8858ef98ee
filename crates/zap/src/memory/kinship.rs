//! What a forked child still has of the mappings it inherited. Capture and restart must agree on it: pages are shared
//! copy-on-write only there.

use std::ops::Range;

use super::layout::flag;
use super::state::{Backing, MemoryState, VmaState};

/// What a mapping is born with and keeps: where it differs, the child has mapped anew.
const INBORN: u32 = flag::GROWSDOWN | flag::NORESERVE | flag::DROPPABLE;

/// Advice that can be changed for its contrary, but not taken back: where the parent was given some after the fork, the child
/// that was not has to be mapped anew.
const HUGE: u32 = flag::HUGEPAGE | flag::NOHUGEPAGE;

/// The addresses at which `child` still shows what `parent` shows, in order, each in one mapping of both.
pub(super) fn kept(parent: &MemoryState, child: &MemoryState) -> Vec<Range<u64>> {
    // the executable can be changed only while the old one is not mapped
    let lost = if parent.fields.exe == child.fields.exe { None } else { parent.fields.exe };
    let (mut i, mut j, mut kept) = (0, 0, Vec::new());
    while let (Some(theirs), Some(ours)) = (parent.vmas.get(i), child.vmas.get(j)) {
        let both = theirs.start.max(ours.start)..theirs.end.min(ours.end);
        if both.start < both.end && same(theirs, ours) && !shows(theirs, lost) {
            kept.push(both);
        }
        if theirs.end <= ours.end { i += 1 } else { j += 1 }
    }
    kept
}

fn same(a: &VmaState, b: &VmaState) -> bool {
    // offsets compared as distances: a mapping may have been cut at its beginning
    let at = |vma: &VmaState, offset: u64| offset.wrapping_sub(vma.start);
    let backing = match (&a.backing, &b.backing) {
        (Backing::Anonymous, Backing::Anonymous) => true,
        (Backing::Private { file: f, offset: x }, Backing::Private { file: g, offset: y })
        | (Backing::Shared { file: f, offset: x }, Backing::Shared { file: g, offset: y })
        | (Backing::Ring { file: f, offset: x }, Backing::Ring { file: g, offset: y }) => {
            f == g && at(a, *x) == at(b, *y)
        }
        (Backing::SystemV { id: f, offset: x, read_only: r }, Backing::SystemV { id: g, offset: y, read_only: s }) => {
            f == g && at(a, *x) == at(b, *y) && r == s
        }
        _ => false,
    };
    backing && a.flags & INBORN == b.flags & INBORN && (a.flags & HUGE == 0 || b.flags & HUGE != 0)
}

fn shows(vma: &VmaState, file: Option<crate::ids::FileId>) -> bool {
    match vma.backing {
        Backing::Private { file: shown, .. } | Backing::Shared { file: shown, .. } => Some(shown) == file,
        _ => false,
    }
}

/// The part of `vmas` that holds `address`.
pub(super) fn vma_at(vmas: &[VmaState], address: u64) -> Option<&VmaState> {
    let index = vmas.partition_point(|v| v.end <= address);
    vmas.get(index).filter(|v| v.start <= address)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn space(flags: u32) -> MemoryState {
        let (backing, protection) = (Backing::Anonymous, 3);
        let vma = VmaState { start: 0x1000, end: 0x3000, protection, flags, backing, name: None, key: 0, policy: None };
        MemoryState { vmas: vec![vma], ..MemoryState::default() }
    }

    #[test]
    fn advice_that_cannot_be_taken_back_is_not_inherited() {
        let kept = |parent, child| !kept(&space(parent), &space(child)).is_empty();
        assert!(kept(0, 0) && kept(0, flag::NOHUGEPAGE) && kept(flag::NOHUGEPAGE, flag::HUGEPAGE));
        assert!(!kept(flag::NOHUGEPAGE, 0) && !kept(flag::HUGEPAGE, 0));
        assert!(kept(flag::DONTDUMP, 0) && !kept(flag::NORESERVE, 0));
    }
}
