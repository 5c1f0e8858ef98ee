//! Kernel → state, for an address space.

use std::fs::File;
use std::ops::Range;

use super::kinship;
use super::layout::{Mapping, Nature, flag};
use super::left::{self, LeftBehind};
use super::pages::{self, Frames};
use super::state::{Backing, MemoryState, MmFields, PageRun, PageSource, VmaState};
use super::survey::Survey;
use super::{PAGE, asynchronous, foreign, mapped, ranges, vdso};
use crate::error::{CaptureError, Context};
use crate::ids::{FileId, HostPid};
use crate::image::DataSink;
use crate::look::{Look, Subject};
use crate::parallel;
use crate::sys::pagemap::page;

/// What is to be captured, and what is known already.
pub struct Request<'a> {
    /// The process, held.
    pub subject: &'a Subject,
    /// What `brk(0)` says in it.
    pub brk: u64,
    /// Its parent, if it was forked and captured before: pages that they share are not stored again.
    pub parent: Option<&'a Captured>,
}

/// An address space written down, but for the contents of pages that [`read_all`] adds.
pub struct Captured {
    /// What goes into the image.
    pub state: MemoryState,
    subject: Subject,
    /// Its page map: what its children share with it is found there.
    pagemap: File,
    /// All the pages that the image will have of it.
    stored: Vec<Range<u64>>,
    /// Those that are still to be read.
    unread: Vec<Range<u64>>,
}

/// Flags that a restart makes again.
pub(super) const CARRIED: u32 = flag::GROWSDOWN
    | flag::LOCKED
    | flag::LOCK_ON_FAULT
    | flag::DONTFORK
    | flag::WIPEONFORK
    | flag::MERGEABLE
    | flag::HUGEPAGE
    | flag::NOHUGEPAGE
    | flag::DONTDUMP
    | flag::RANDOM
    | flag::SEQUENTIAL
    | flag::NORESERVE
    | flag::DROPPABLE
    | flag::SEALED
    | flag::HUGETLB;

/// Writes down the address space that `survey` saw.
pub fn capture(look: &mut Look<'_>, request: &Request<'_>, survey: Survey) -> Result<Captured, CaptureError> {
    let subject = request.subject;
    let mut vmas = Vec::with_capacity(survey.mappings.len());
    let mut last = None;
    for mapping in survey.mappings.iter().filter(|m| m.nature() != Nature::Kernel) {
        vmas.push(vma(look, subject, mapping, &mut last)?);
    }
    let exe = mapped::executable(look, subject)?;
    let mut state = MemoryState {
        fields: MmFields { brk: request.brk, exe, ..survey.fields.clone() },
        vdso: vdso::capture(&survey.mappings),
        guards: guards(&survey),
        touched: touched(&vmas, &survey),
        vmas,
        pages: Vec::new(),
        left: Vec::new(),
        keys: 0,
        faces: foreign::faces(subject.host, &survey.mappings)?,
        patches: Vec::new(),
    };
    let wanted = wanted(&state, &survey);
    let copied = PageRun::parts(&survey.unchanged, &wanted);
    // what was copied ahead was not shared then, and so is not now
    let rest = ranges::minus(&wanted, &pages::runs(&copied));
    let looking = || format!("the page frames of process {}", subject.pod);
    let shared = request.parent.map(|parent| {
        let candidates = ranges::common(&parent.stored, &joined_kept(&parent.state, &state));
        let candidates = ranges::common(&rest, &candidates);
        Frames::read(&survey.pagemap, &candidates)?.shared_with(&parent.pagemap, &candidates)
    });
    let shared = shared.transpose().capturing("comparing", looking())?.unwrap_or_default();
    let unread = ranges::minus(&rest, &shared);
    let inherited = shared.iter().map(|r| PageRun { start: r.start, end: r.end, source: PageSource::Parent });
    state.pages.extend(copied);
    state.pages.extend(inherited);
    Ok(Captured { state, subject: subject.clone(), pagemap: survey.pagemap, stored: wanted, unread })
}

impl Captured {
    /// Leaves pages behind that are still to be read and may come later, but for those that must be there `at_once` (sorted,
    /// disjoint).
    pub fn leave(&mut self, at_once: &[Range<u64>], behind: &mut LeftBehind) -> Result<(), CaptureError> {
        let later = left::later(&self.state, &self.unread, at_once, left::LITTLE);
        if !later.is_empty() {
            self.unread = ranges::minus(&self.unread, &later);
            let pagemap = self.pagemap.try_clone().capturing("sharing", "a page map")?;
            self.state.left = behind.add(&self.subject, pagemap, &later);
        }
        Ok(())
    }
}

/// Pages of a process that are read in one go.
#[derive(Clone, Debug)]
pub struct Piece {
    /// In whose place the process is.
    place: usize,
    /// The process.
    pub process: HostPid,
    /// Where they are: sorted, disjoint.
    pub pages: Vec<Range<u64>>,
}

/// One, and what is in it.
pub type ReadPiece = (Piece, Vec<u8>);

/// Reads the pages that are still to be read, of all processes at once, and completes their states but for what the kernel
/// shows tracers alone (`proc_mem.force_override`, since Linux 6.12): pages that the processes themselves may not read.
pub fn read_all<'c>(
    data: &mut DataSink,
    all: impl IntoIterator<Item = &'c mut Captured>,
) -> Result<Vec<Piece>, CaptureError> {
    let mut all: Vec<&mut Captured> = all.into_iter().collect();
    let pieces_of = |(place, captured): (usize, &&mut Captured)| {
        let pieces = pages::pieces(&captured.unread).into_iter();
        pieces.map(move |piece| (place, piece)).collect::<Vec<_>>()
    };
    let pieces: Vec<_> = all.iter().enumerate().flat_map(pieces_of).collect();
    let read = parallel::map(pieces, |(place, piece)| {
        let captured = &all[place];
        let bytes = unless_hidden(pages::read(&captured.subject, &captured.pagemap, &piece))?;
        Ok((place, piece, bytes))
    });
    let mut unreadable = Vec::new();
    for read in read {
        let (place, pages, bytes) = read?;
        match bytes {
            Some(bytes) => pages::append(data, &pages, bytes, &mut all[place].state.pages),
            None => unreadable.push(Piece { place, process: all[place].subject.host, pages }),
        }
    }
    all.iter_mut().for_each(|captured| captured.state.pages.sort_by_key(|r| r.start));
    Ok(unreadable)
}

/// The same, in order, while others write what was read before: for much of it, where nobody waits for the hold alone. What
/// cannot be written is told by the next who writes.
pub fn stream_all<'c>(
    data: &mut DataSink,
    all: impl IntoIterator<Item = &'c mut Captured>,
) -> Result<Vec<Piece>, CaptureError> {
    let streamed = data.stream(|feed| {
        let mut unreadable = Vec::new();
        for (place, captured) in all.into_iter().enumerate() {
            for pages in pages::pieces(&captured.unread) {
                let mut buffer = feed.buffer(pages::total(&pages));
                let read = pages::read_into(&mut buffer, &captured.subject, &captured.pagemap, &pages);
                let offset = feed.append(buffer).offset;
                match unless_hidden(read)? {
                    Some(()) => pages::note(&pages, offset, &mut captured.state.pages),
                    None => unreadable.push(Piece { place, process: captured.subject.host, pages }),
                }
            }
            captured.state.pages.sort_by_key(|run| run.start);
        }
        Ok(unreadable)
    });
    streamed.unwrap_or_else(|error| {
        data.fail(error);
        Ok(Vec::new())
    })
}

/// Nothing of what the kernel shows tracers alone.
fn unless_hidden<T>(read: Result<T, CaptureError>) -> Result<Option<T>, CaptureError> {
    match read {
        Err(CaptureError::Kernel { source, .. }) if source.raw_os_error() == Some(libc::EIO) => Ok(None),
        other => other.map(Some),
    }
}

/// How many bytes are still to be read.
pub fn unread<'c>(all: impl IntoIterator<Item = &'c Captured>) -> usize {
    all.into_iter().map(|captured| pages::total(&captured.unread)).sum()
}

/// Completes states with what tracers have read ([`read_traced`](pages::read_traced)).
pub fn append_all<'c>(
    data: &mut DataSink,
    all: impl IntoIterator<Item = &'c mut Captured>,
    read: impl IntoIterator<Item = ReadPiece>,
) {
    let mut all: Vec<&mut Captured> = all.into_iter().collect();
    for (piece, bytes) in read {
        let pages = &mut all[piece.place].state.pages;
        pages::append(data, &piece.pages, bytes, pages);
        pages.sort_by_key(|run| run.start);
    }
}

fn joined_kept(parent: &MemoryState, child: &MemoryState) -> Vec<Range<u64>> {
    ranges::joined(kinship::kept(parent, child))
}

/// The pages to keep: what is there in private memory that the kernel may not drop.
fn wanted(state: &MemoryState, survey: &Survey) -> Vec<Range<u64>> {
    let private =
        state.vmas.iter().filter(|v| v.is_private() && !v.has(flag::DROPPABLE)).map(VmaState::range).collect();
    let found = survey.regions.iter().filter(|r| r.is & page::GUARD == 0).map(|r| r.start..r.end);
    let there = found.chain(survey.unchanged.iter().map(|r| r.start..r.end)).collect();
    ranges::common(&ranges::joined(private), &ranges::joined(there))
}

/// Where pages of files are mapped in, as far as the files are still mapped.
fn touched(vmas: &[VmaState], survey: &Survey) -> Vec<Range<u64>> {
    let of_file = |vma: &&VmaState| matches!(vma.backing, Backing::Private { .. } | Backing::Shared { .. });
    let files = ranges::joined(vmas.iter().filter(of_file).map(VmaState::range).collect());
    ranges::common(&survey.touched, &files)
}

fn guards(survey: &Survey) -> Vec<Range<u64>> {
    ranges::joined(survey.regions.iter().filter(|r| r.is & page::GUARD != 0).map(|r| r.start..r.end).collect())
}

/// One mapping; `last` is the one before it that shows a file, and that file: most files are mapped in several parts.
fn vma<'m>(
    look: &mut Look<'_>,
    subject: &Subject,
    mapping: &'m Mapping,
    last: &mut Option<(&'m Mapping, FileId)>,
) -> Result<VmaState, CaptureError> {
    if let Some(why) = why_not(mapping) {
        return Err(subject.refuse(mapped::object(mapping), format!("{why}, which cannot be checkpointed yet")));
    }
    let offset = mapping.offset;
    let backing = match mapping.nature() {
        _ if asynchronous::is_ring(mapping) => asynchronous::capture(look, subject, mapping)?,
        Nature::Anonymous | Nature::Kernel => Backing::Anonymous,
        // the inode of a segment is its identifier
        Nature::SystemV => {
            whole_segment(subject, mapping)?;
            let read_only = mapping.flags.known & flag::MAY_WRITE == 0;
            Backing::SystemV { id: mapping.inode as i32, offset, read_only }
        }
        Nature::File => {
            let file = match *last {
                Some((before, file)) if mapped::is_of_one_file(before, mapping) => file,
                _ => mapped::file_of(look, subject, mapping)?,
            };
            *last = Some((mapping, file));
            match mapping.shared {
                _ if mapped::is_io_uring(mapping) => Backing::Ring { file, offset },
                true => Backing::Shared { file, offset },
                false => Backing::Private { file, offset },
            }
        }
    };
    Ok(VmaState {
        start: mapping.start,
        end: mapping.end,
        protection: mapping.protection,
        flags: mapping.flags.known & CARRIED,
        backing,
        name: mapping.given_name().map(|name| serde_bytes::ByteBuf::from(name.to_vec())),
        key: mapping.key as u8,
        policy: None,
    })
}

/// A segment is attached as a whole: a part of one cannot be made again.
fn whole_segment(subject: &Subject, mapping: &Mapping) -> Result<(), CaptureError> {
    let object = || mapped::object(mapping);
    let shown = subject.host.proc(&format!("map_files/{:x}-{:x}", mapping.start, mapping.end));
    let size = std::fs::metadata(shown).capturing("looking at", object())?.len();
    if mapping.offset == 0 && size.next_multiple_of(PAGE) == mapping.end - mapping.start {
        return Ok(());
    }
    Err(subject.refuse(object(), "is part of a System V segment, which cannot be checkpointed yet"))
}

/// Why a mapping cannot be captured.
fn why_not(mapping: &Mapping) -> Option<&'static str> {
    let has = |flags: u32| mapping.flags.known & flags != 0;
    match &mapping.path[..] {
        _ if has(flag::DEVICE | flag::FRAMES) => Some("shows the memory of a device"),
        path if has(flag::HUGETLB) && path != b"/anon_hugepage (deleted)" && !path.starts_with(b"/memfd:") => {
            Some("is of a file or a segment of huge pages")
        }
        _ if has(flag::SHADOW_STACK) => Some("is a shadow stack"),
        _ if has(flag::FAULTS_MISSING | flag::FAULTS_MINOR) => Some("is served by a userfaultfd"),
        path if path.starts_with(b"anon_inode:") && !mapped::is_io_uring(mapping) => Some("shows a kernel object"),
        _ if mapping.nature() == Nature::SystemV && mapping.offset != 0 => {
            Some("is the rest of a segment that was cut")
        }
        _ => None,
    }
}

/// Refuses what cannot be captured, and looks ahead at the files that are mapped, while the process still runs.
pub fn check(look: &mut Look<'_>, subject: &Subject, layout: &[Mapping]) -> Result<(), CaptureError> {
    for mapping in layout.iter().filter(|m| m.nature() != Nature::Kernel) {
        if let Some(why) = why_not(mapping) {
            return Err(subject.refuse(mapped::object(mapping), format!("{why}, which cannot be checkpointed yet")));
        }
        match mapping.nature() {
            Nature::File if asynchronous::is_ring(mapping) => asynchronous::check(subject, mapping)?,
            Nature::File => mapped::check(look, subject, mapping)?,
            _ => {}
        }
    }
    Ok(())
}
