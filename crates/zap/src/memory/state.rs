//! What an image says of an address space. Plain data.

use std::ops::Range;

use serde::{Deserialize, Serialize};

use super::foreign::{FaceState, Patch};
use super::policy::PolicyState;
use crate::ids::FileId;

/// An address space: what is mapped, what is in it, and what the kernel knows of it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemoryState {
    /// The mappings, in order of their addresses; the kernel's own ([vdso] and its like) are not among them.
    pub vmas: Vec<VmaState>,
    /// The kernel's notes on the program.
    pub fields: MmFields,
    /// The contents of private memory, in order of their addresses. What is in no run is as it was mapped.
    pub pages: Vec<PageRun>,
    /// Pages that a restart leaves out, for they come later: where, in what was left behind or in the image's data.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub left: Vec<PageRun>,
    /// Guard pages (`MADV_GUARD_INSTALL`).
    pub guards: Vec<Range<u64>>,
    /// Where pages of files were mapped in. Contents are none of it: a restart may leave it out.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub touched: Vec<Range<u64>>,
    /// The vDSO; `None` for a process that unmapped it.
    pub vdso: Option<VdsoState>,
    /// What the program knows of other kernels' vDSOs. They are among its mappings, too.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub faces: Vec<FaceState>,
    /// What a restart on this kernel writes in the end. Not in the image.
    #[serde(skip)]
    pub patches: Vec<Patch>,
    /// The protection keys that it has, as bits.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub keys: u16,
}

fn is_zero<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}

/// A mapping.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmaState {
    /// Its first address.
    pub start: u64,
    /// The address behind it.
    pub end: u64,
    /// `PROT_*`.
    pub protection: i32,
    /// Bits of [`super::layout::flag`].
    pub flags: u32,
    /// What it shows.
    pub backing: Backing,
    /// Name given by the program.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<serde_bytes::ByteBuf>,
    /// Protection key; 0 is the one that everything has.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub key: u8,
    /// Where its pages are to be, if that is not as its threads have it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub policy: Option<PolicyState>,
}

/// What a mapping shows.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Backing {
    /// Private memory of no file.
    Anonymous,
    /// A private view of a file: its pages until they are written to.
    Private {
        /// The file.
        file: FileId,
        /// Offset of the first byte.
        offset: u64,
    },
    /// A shared view of a file or of shared memory.
    Shared {
        /// The file.
        file: FileId,
        /// Offset of the first byte.
        offset: u64,
    },
    /// A System V segment.
    SystemV {
        /// Its identifier in the pod.
        id: i32,
        /// Offset of the first byte.
        offset: u64,
        /// Whether it was attached for reading only (`SHM_RDONLY`), and can be no more than that.
        #[serde(default)]
        read_only: bool,
    },
    /// Memory that an `io_uring` shares with its programs.
    Ring {
        /// The ring.
        file: FileId,
        /// Which part of it.
        offset: u64,
    },
    /// The ring of a context of asynchronous I/O.
    Asynchronous(super::asynchronous::RingState),
}

/// `struct prctl_mm_map`, the auxiliary vector, and the executable.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs, reason = "the names of prctl(2), PR_SET_MM")]
pub struct MmFields {
    pub start_code: u64,
    pub end_code: u64,
    pub start_data: u64,
    pub end_data: u64,
    pub start_brk: u64,
    pub brk: u64,
    pub start_stack: u64,
    pub arg_start: u64,
    pub arg_end: u64,
    pub env_start: u64,
    pub env_end: u64,
    /// The auxiliary vector, whole.
    #[serde(with = "serde_bytes")]
    pub auxv: Vec<u8>,
    /// What `/proc/PID/exe` shows.
    pub exe: Option<FileId>,
}

/// Pages in a row whose contents are known.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "(u64, u64, Option<u64>)", into = "(u64, u64, Option<u64>)")]
pub struct PageRun {
    /// First address.
    pub start: u64,
    /// Address behind the last.
    pub end: u64,
    /// Where they are.
    pub source: PageSource,
}

/// Where the contents of pages are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PageSource {
    /// In the image's data, from this offset on.
    Data(u64),
    /// In the parent, at the same address: shared copy-on-write.
    Parent,
}

impl PageRun {
    /// The offsets of its contents, if the image has them.
    pub fn data(&self) -> Option<Range<u64>> {
        match self.source {
            PageSource::Data(offset) => Some(offset..offset + (self.end - self.start)),
            PageSource::Parent => None,
        }
    }

    /// The part of it that lies in `range`.
    pub fn part(&self, range: &Range<u64>) -> Option<PageRun> {
        let (start, end) = (self.start.max(range.start), self.end.min(range.end));
        let source = match self.source {
            PageSource::Data(offset) => PageSource::Data(offset + start.saturating_sub(self.start)),
            PageSource::Parent => PageSource::Parent,
        };
        (start < end).then_some(PageRun { start, end, source })
    }

    /// The parts of `runs` that lie in `ranges` (both sorted, disjoint).
    pub fn parts(runs: &[PageRun], ranges: &[Range<u64>]) -> Vec<PageRun> {
        let (mut i, mut j, mut found) = (0, 0, Vec::new());
        while let (Some(run), Some(range)) = (runs.get(i), ranges.get(j)) {
            found.extend(run.part(range));
            if run.end <= range.end { i += 1 } else { j += 1 }
        }
        found
    }
}

impl From<(u64, u64, Option<u64>)> for PageRun {
    fn from((start, end, data): (u64, u64, Option<u64>)) -> PageRun {
        PageRun { start, end, source: data.map_or(PageSource::Parent, PageSource::Data) }
    }
}

impl From<PageRun> for (u64, u64, Option<u64>) {
    fn from(run: PageRun) -> (u64, u64, Option<u64>) {
        let data = match run.source {
            PageSource::Data(offset) => Some(offset),
            PageSource::Parent => None,
        };
        (run.start, run.end, data)
    }
}

/// The kernel's code in a process.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VdsoState {
    /// The kernel's mappings from the first to the last: name, first address, address behind.
    pub parts: Vec<(String, u64, u64)>,
    /// BLAKE3 of the code, in hexadecimal: another kernel has another.
    pub digest: String,
    /// Its functions: name and offset, for a host whose code differs.
    pub symbols: Vec<(String, u64)>,
}

impl VdsoState {
    /// From the first address to behind the last.
    pub fn range(&self) -> Range<u64> {
        let start = self.parts.first().map_or(0, |p| p.1);
        start..self.parts.last().map_or(start, |p| p.2)
    }

    /// The addresses of its code.
    pub fn code(&self) -> Option<Range<u64>> {
        self.parts.iter().find(|part| part.0 == "[vdso]").map(|part| part.1..part.2)
    }
}

impl VmaState {
    /// Its addresses.
    pub fn range(&self) -> Range<u64> {
        self.start..self.end
    }

    /// Whether it has that bit of [`super::layout::flag`].
    pub fn has(&self, flag: u32) -> bool {
        self.flags & flag != 0
    }

    /// Whether it is memory of an `io_uring`.
    pub fn is_ring(&self) -> bool {
        matches!(self.backing, Backing::Ring { .. })
    }

    /// Whether its contents belong to this address space.
    pub fn is_private(&self) -> bool {
        matches!(self.backing, Backing::Anonymous | Backing::Private { .. })
    }
}

impl MemoryState {
    /// Bytes whose contents the image has.
    pub fn stored_bytes(&self) -> u64 {
        let stored = self.pages.iter().filter(|r| r.source != PageSource::Parent);
        stored.map(|r| r.end - r.start).sum()
    }

    /// The files that are mapped, and the executable.
    pub fn files(&self) -> impl Iterator<Item = FileId> {
        let mapped = |vma: &VmaState| match vma.backing {
            Backing::Private { file, .. } | Backing::Shared { file, .. } | Backing::Ring { file, .. } => Some(file),
            Backing::Anonymous | Backing::SystemV { .. } | Backing::Asynchronous(_) => None,
        };
        self.vmas.iter().filter_map(mapped).chain(self.fields.exe)
    }
}
