//! Plans are carried out on a model of an address space: whatever parent and child look like, what comes out is what the
//! image says.

use std::collections::BTreeMap;
use std::ops::Range;

use proptest::prelude::*;

use super::layout::Mapping;
use super::state::{Backing, MemoryState, PageRun, PageSource, VmaState};
use super::{MemoryBatch, PAGE, Target, kinship, late_batch, ranges, rebuild_batches};
use crate::ids::FileId;
use crate::tracee::Arg;

/// What is at a page: what is mapped (private or shared, file and page of it), protection, and contents put there.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Page {
    shared: bool,
    shows: Option<(i32, u64)>,
    protection: i32,
    contents: Option<u64>,
}

type Space = BTreeMap<u64, Page>;

/// Where the test's mappings are, in pages, and where zap's scratch is.
const FIRST: u64 = 0x1000;
const PAGES: u64 = 48;
const KEEP: Range<u64> = 0x10_0000..0x20_0000;

fn value(arg: &Arg) -> u64 {
    match arg {
        Arg::Value(value) => *value,
        other => panic!("{other:?} where a number is expected"),
    }
}

fn pages(start: u64, length: u64) -> Range<u64> {
    assert!(start.is_multiple_of(PAGE) && length.is_multiple_of(PAGE) && length > 0, "{start:#x} + {length:#x}");
    start / PAGE..(start + length) / PAGE
}

fn carry_out(space: &mut Space, batches: &[MemoryBatch]) {
    for batch in batches {
        let data = batch.batch.data();
        for (number, args) in batch.batch.calls() {
            let numbers: Vec<Option<u64>> = args.iter().map(|a| matches!(a, Arg::Value(_)).then(|| value(a))).collect();
            let over = || pages(value(&args[0]), value(&args[1]));
            match number {
                libc::SYS_munmap => space.retain(|page, _| !over().contains(page)),
                libc::SYS_mmap => map(space, over(), &args.map(|a| if let Arg::Value(v) = a { v } else { 0 })),
                libc::SYS_mprotect => over().for_each(|page| {
                    space.get_mut(&page).expect("only what is mapped is protected").protection = value(&args[2]) as i32
                }),
                libc::SYS_madvise if numbers[2] == Some(libc::MADV_DONTNEED as u64) => {
                    over().for_each(|page| space.get_mut(&page).expect("mapped").contents = None);
                }
                libc::SYS_preadv => fill(space, data, &args),
                libc::SYS_madvise | libc::SYS_mlock2 | libc::SYS_prctl => {}
                other => panic!("call {other} is not in the model"),
            }
        }
    }
}

fn map(space: &mut Space, range: Range<u64>, args: &[u64; 6]) {
    let (protection, flags, file, offset) = (args[2] as i32, args[3] as i32, args[4] as i32, args[5]);
    assert!(flags & libc::MAP_FIXED != 0 && ranges::overlap(&(range.start * PAGE..range.end * PAGE), &KEEP).is_none());
    for (page, nth) in range.clone().zip(0..) {
        let shows = (file >= 0).then_some((file, offset / PAGE + nth));
        let shared = flags & libc::MAP_SHARED != 0;
        let before = space.insert(page, Page { shared, shows, protection, contents: None });
        assert!(before.is_none(), "page {page:#x} is mapped twice");
    }
}

fn fill(space: &mut Space, data: &[u8], args: &[Arg; 6]) {
    let (Arg::Data(vector), count) = (args[1], value(&args[2])) else { panic!("a vector") };
    let word = |at: usize| u64::from_ne_bytes(data[at..at + 8].try_into().unwrap());
    let mut offset = value(&args[3]);
    for piece in 0..count as usize {
        for page in pages(word(vector + piece * 16), word(vector + piece * 16 + 8)) {
            let page = space.get_mut(&page).expect("only what is mapped is filled");
            assert!(page.protection & libc::PROT_WRITE != 0 && !page.shared, "{page:?} is filled");
            page.contents = Some(offset / PAGE);
            offset += PAGE;
        }
    }
}

/// What the image says.
fn expected(state: &MemoryState, parent: Option<&Space>) -> Space {
    let mut space = Space::new();
    for vma in &state.vmas {
        for (page, nth) in pages(vma.start, vma.end - vma.start).zip(0..) {
            let (shared, shows) = match vma.backing {
                Backing::Private { file, offset } => (false, Some((file.0 as i32, offset / PAGE + nth))),
                Backing::Shared { file, offset } => (true, Some((file.0 as i32, offset / PAGE + nth))),
                _ => (false, None),
            };
            space.insert(page, Page { shared, shows, protection: vma.protection, contents: None });
        }
    }
    for run in &state.pages {
        for (page, nth) in pages(run.start, run.end - run.start).zip(0..) {
            space.get_mut(&page).unwrap().contents = match run.source {
                PageSource::Data(offset) => Some(offset / PAGE + nth),
                PageSource::Parent => parent.unwrap()[&page].contents,
            };
        }
    }
    space
}

fn mappings(space: &Space) -> Vec<Mapping> {
    let line = |page: &u64| Mapping { start: page * PAGE, end: (page + 1) * PAGE, ..Mapping::default() };
    space.keys().map(line).collect()
}

/// Mappings: (gap before, length, backing, protection, flags), in pages.
type Recipe = Vec<(u64, u64, u8, i32, u32)>;

fn recipe() -> impl Strategy<Value = Recipe> {
    let flags = prop_oneof![4 => Just(0u32), 1 => any::<u32>().prop_map(|f| f & super::capture::CARRIED & !super::layout::flag::SEALED)];
    prop::collection::vec((0u64..4, 1u64..9, 0u8..5, 0i32..8, flags), 0..8)
}

fn vmas(recipe: &Recipe) -> Vec<VmaState> {
    let mut at = FIRST;
    let mut vmas = Vec::new();
    for (gap, length, backing, protection, flags) in recipe {
        let start = at + gap;
        at = (start + length).min(FIRST + PAGES);
        if start >= at {
            break;
        }
        // offsets follow the addresses, so that mappings of parent and child agree now and then
        let offset = start * PAGE;
        let (backing, flags) = match backing {
            0 | 1 => (Backing::Anonymous, *flags),
            2 => (Backing::Private { file: FileId(3), offset }, 0),
            3 => (Backing::Private { file: FileId(4), offset }, 0),
            _ => (Backing::Shared { file: FileId(3), offset }, 0),
        };
        let vma = VmaState {
            start: start * PAGE,
            end: at * PAGE,
            protection: *protection,
            flags,
            backing,
            name: None,
            key: 0,
            policy: None,
        };
        vmas.push(vma);
    }
    vmas
}

/// What is in the pages: nothing, bytes of the image, or the parent's where it can be.
fn with_pages(mut state: MemoryState, choices: &[u8], parent: Option<&MemoryState>, data: u64) -> MemoryState {
    let kept = parent.map_or(Vec::new(), |p| kinship::kept(p, &state));
    let theirs = ranges::common(&kept, &parent.map_or(Vec::new(), |p| super::pages::runs(&p.pages)));
    let private = state.vmas.iter().filter(|v| v.is_private());
    for page in private.flat_map(|v| pages(v.start, v.end - v.start)) {
        let (start, end) = (page * PAGE, (page + 1) * PAGE);
        let source = match choices[(page - FIRST) as usize] {
            0 => continue,
            1 if theirs.iter().any(|r| r.contains(&start)) => PageSource::Parent,
            choice => PageSource::Data((data + page + u64::from(choice) * 1000) * PAGE),
        };
        state.pages.push(PageRun { start, end, source });
    }
    state
}

fn rebuilt(state: &MemoryState, from: &Space, inherited: Option<&MemoryState>) -> Space {
    let current: Vec<_> = mappings(from).iter().map(|m| m.start..m.end).collect();
    let pool = |id: FileId| id.0 as i32;
    let target = Target { state, current: &current, inherited, keep: KEEP, pool: &pool, data: 9 };
    let mut space = from.clone();
    carry_out(&mut space, &rebuild_batches(&target).unwrap());
    space
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn what_comes_out_is_what_the_image_says(
        seed in recipe(), first in recipe(), second in recipe(), alike: bool, exe in any::<bool>(),
        choices in prop::collection::vec(0u8..4, PAGES as usize), others in prop::collection::vec(0u8..4, PAGES as usize),
    ) {
        let before = expected(&MemoryState { vmas: vmas(&seed), ..MemoryState::default() }, None);
        let mut parent = with_pages(MemoryState { vmas: vmas(&first), ..MemoryState::default() }, &choices, None, 0);
        let mut child = MemoryState { vmas: vmas(if alike { &first } else { &second }), ..MemoryState::default() };
        // a child that runs another program keeps nothing of the parent's executable
        parent.fields.exe = Some(FileId(4));
        child.fields.exe = Some(FileId(if exe { 4 } else { 3 }));
        let child = with_pages(child, &others, Some(&parent), 100_000);
        let parent_space = rebuilt(&parent, &before, None);
        prop_assert_eq!(&parent_space, &expected(&parent, None));
        let child_space = rebuilt(&child, &parent_space, Some(&parent));
        prop_assert_eq!(&child_space, &expected(&child, Some(&parent_space)));
        late_batch(&child);
    }
}
