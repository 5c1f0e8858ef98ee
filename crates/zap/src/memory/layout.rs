//! The layout of an address space, as `/proc/PID/maps` and `smaps` tell it. Bytes in, hostile input.

use serde::{Deserialize, Serialize};

/// Flags of a mapping that its line in `maps` does not show. Codes that we do not know are kept.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct VmFlags {
    /// Those that we know: [`flag`].
    pub known: u32,
    /// The two-letter codes of the others.
    pub unknown: Vec<[u8; 2]>,
}

macro_rules! flags {
    ($($(#[$doc:meta])* $name:ident $code:literal $bit:literal;)*) => {
        /// Flags of mappings that matter here (`VmFlags` of `smaps`, proc(5)).
        pub mod flag {
            $($(#[$doc])* pub const $name: u32 = 1 << $bit;)*
        }
        const CODES: &[(&[u8; 2], u32)] = &[$(($code, flag::$name)),*];
        const NAMES: &[(&str, u32)] = &[$((stringify!($name), flag::$name)),*];
    };
}

flags! {
    /// Grows down as a stack does.
    GROWSDOWN b"gd" 0;
    /// Locked in memory.
    LOCKED b"lo" 1;
    /// Locked as it is touched.
    LOCK_ON_FAULT b"lf" 2;
    /// Not inherited by a child.
    DONTFORK b"dc" 3;
    /// Zeros in a child.
    WIPEONFORK b"wf" 4;
    /// May be merged by KSM.
    MERGEABLE b"mg" 5;
    /// Huge pages wanted.
    HUGEPAGE b"hg" 6;
    /// Huge pages not wanted.
    NOHUGEPAGE b"nh" 7;
    /// Not in core dumps.
    DONTDUMP b"dd" 8;
    /// Read at random.
    RANDOM b"rr" 9;
    /// Read in order.
    SEQUENTIAL b"sr" 10;
    /// No swap space is reserved.
    NORESERVE b"nr" 11;
    /// The kernel may drop its pages.
    DROPPABLE b"dp" 12;
    /// Sealed by mseal.
    SEALED b"sl" 13;
    /// hugetlbfs.
    HUGETLB b"ht" 14;
    /// Of a device.
    DEVICE b"io" 15;
    /// Page frames without pages.
    FRAMES b"pf" 16;
    /// A shadow stack.
    SHADOW_STACK b"ss" 17;
    /// Missing pages are served by a userfaultfd.
    FAULTS_MISSING b"um" 18;
    /// Writes are followed by a userfaultfd.
    FAULTS_WRITES b"uw" 19;
    /// Minor faults are served by a userfaultfd.
    FAULTS_MINOR b"ui" 20;
    /// A shared mapping that may be made writable.
    MAY_WRITE b"mw" 21;
    /// Counted as committed.
    ACCOUNTED b"ac" 22;
    /// Readable.
    READ b"rd" 23;
    /// Writable.
    WRITE b"wr" 24;
    /// Executable.
    EXECUTE b"ex" 25;
    /// Shared.
    SHARED b"sh" 26;
    /// May be made readable.
    MAY_READ b"mr" 27;
    /// May be made executable.
    MAY_EXECUTE b"me" 28;
    /// May be shared.
    MAY_SHARE b"ms" 29;
    /// Soft-dirty.
    SOFT_DIRTY b"sd" 30;
    /// Does not expand on mremap.
    DONTEXPAND b"de" 31;
}

impl VmFlags {
    /// Those of the codes in `text`, separated by spaces.
    pub fn parse(text: &[u8]) -> VmFlags {
        let mut flags = VmFlags::default();
        for code in text.split(|b| b.is_ascii_whitespace()).filter_map(|w| <[u8; 2]>::try_from(w).ok()) {
            match CODES.iter().find(|(known, _)| **known == code) {
                Some((_, bit)) => flags.known |= bit,
                None => flags.unknown.push(code),
            }
        }
        // Kernels that have no name for it yet (6.1) show that memory is locked on fault like this.
        if flags.known & flag::LOCKED != 0 && flags.unknown == [*b"??"] {
            flags.known |= flag::LOCK_ON_FAULT;
            flags.unknown.clear();
        }
        flags
    }
}

/// The names of the flags in `bits`, for people.
pub fn flag_names(bits: u32) -> Vec<String> {
    NAMES.iter().filter(|(_, bit)| bits & bit != 0).map(|(name, _)| name.to_lowercase()).collect()
}

/// A mapping of an address space.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Mapping {
    /// Its first address.
    pub start: u64,
    /// The address behind it.
    pub end: u64,
    /// `PROT_READ`, `PROT_WRITE`, `PROT_EXEC`.
    pub protection: i32,
    /// Shared rather than private.
    pub shared: bool,
    /// Offset in the file.
    pub offset: u64,
    /// Device of the file, as `st_dev`.
    pub device: u64,
    /// Inode of the file; zero for memory of no file.
    pub inode: u64,
    /// Path or name as the kernel shows it.
    pub path: Vec<u8>,
    /// Flags; none when read from `maps`.
    pub flags: VmFlags,
    /// Protection key; zero is the one that everything has.
    pub key: u32,
    /// Bytes of modified pages, what others map too in part only; none when read from `maps`.
    pub modified: u64,
}

/// What a mapping is made of, by its line.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Nature {
    /// Memory of no file.
    Anonymous,
    /// `[vdso]`, `[vvar]` and their like: the kernel's.
    Kernel,
    /// A System V shared memory segment.
    SystemV,
    /// A file, or shared memory that looks like one.
    File,
}

impl Mapping {
    /// What it is made of.
    pub fn nature(&self) -> Nature {
        // the kernel's own shared memory has no block device, and nobody can make files there
        let unnamed = libc::major(self.device) == 0 && self.path.ends_with(b" (deleted)");
        if self.shared && unnamed && self.path.starts_with(b"/SYSV") {
            return Nature::SystemV;
        }
        match &self.path[..] {
            _ if self.inode != 0 => Nature::File,
            b"[vdso]" | b"[vvar]" | b"[vvar_vclock]" | b"[vsyscall]" | b"[uprobes]" => Nature::Kernel,
            path if path.starts_with(b"/") || path.starts_with(b"anon_inode:") => Nature::File,
            _ => Nature::Anonymous,
        }
    }

    /// The name that a program gave to anonymous memory (`PR_SET_VMA_ANON_NAME`).
    pub fn given_name(&self) -> Option<&[u8]> {
        let name = self.path.strip_prefix(b"[anon:").or_else(|| self.path.strip_prefix(b"[anon_shmem:"))?;
        name.strip_suffix(b"]")
    }

    /// Whether the two lines in `maps` are the same.
    pub fn same_line(&self, other: &Mapping) -> bool {
        let line = |m: &Mapping| (m.start, m.end, m.protection, m.shared, m.offset, m.device, m.inode);
        line(self) == line(other) && self.path == other.path
    }
}

/// What is wrong with a line.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("not a line of /proc/PID/maps: {0:?}")]
pub struct BadLine(pub String);

/// The mappings in the text of `maps` or of `smaps`.
pub fn parse(text: &[u8]) -> Result<Vec<Mapping>, BadLine> {
    let mut mappings: Vec<Mapping> = Vec::new();
    for line in text.split(|b| *b == b'\n').filter(|l| !l.is_empty()) {
        let bad = || BadLine(String::from_utf8_lossy(line).into_owned());
        // details of smaps begin with a capital letter; addresses are written in small ones
        if !line[0].is_ascii_uppercase() {
            mappings.push(parse_line(line).ok_or_else(bad)?);
            continue;
        }
        let mapping = mappings.last_mut().ok_or_else(bad)?;
        if let Some(flags) = line.strip_prefix(b"VmFlags:") {
            mapping.flags = VmFlags::parse(flags);
        } else if let Some(size) = line.strip_prefix(b"Pss_Dirty:") {
            mapping.modified =
                size.strip_suffix(b" kB").and_then(|n| number(n.trim_ascii(), 10)).ok_or_else(bad)? << 10;
        } else if let Some(key) = line.strip_prefix(b"ProtectionKey:") {
            mapping.key = number(key.trim_ascii(), 10).ok_or_else(bad)? as u32;
        }
    }
    Ok(mappings)
}

fn number(text: &[u8], radix: u32) -> Option<u64> {
    u64::from_str_radix(std::str::from_utf8(text).ok()?, radix).ok()
}

/// `start-end perms offset major:minor inode        path`
fn parse_line(line: &[u8]) -> Option<Mapping> {
    let mut words = line.splitn(6, |b| *b == b' ');
    let (start, end) = split_at_byte(words.next()?, b'-')?;
    let letters = words.next()?;
    let offset = number(words.next()?, 16)?;
    let (major, minor) = split_at_byte(words.next()?, b':')?;
    let inode = number(words.next()?, 10)?;
    let path = words.next().unwrap_or_default().trim_ascii_start();
    let bit = |place: usize, letter: u8, bit: i32| if letters.get(place) == Some(&letter) { bit } else { 0 };
    let mapping = Mapping {
        start: number(start, 16)?,
        end: number(end, 16)?,
        protection: bit(0, b'r', libc::PROT_READ) | bit(1, b'w', libc::PROT_WRITE) | bit(2, b'x', libc::PROT_EXEC),
        shared: *letters.get(3)? == b's',
        offset,
        device: libc::makedev(number(major, 16)? as u32, number(minor, 16)? as u32),
        inode,
        path: path.to_vec(),
        ..Mapping::default()
    };
    (mapping.start < mapping.end).then_some(mapping)
}

fn split_at_byte(text: &[u8], byte: u8) -> Option<(&[u8], &[u8])> {
    let place = text.iter().position(|b| *b == byte)?;
    Some((&text[..place], &text[place + 1..]))
}

/// Reads some bytes as the image of a vDSO, of another kernel's too, and as the line that says where a process has what.
pub(crate) fn try_bytes(bytes: &[u8]) {
    drop(super::elf::symbols(bytes));
    drop(super::face::make(bytes, 4096, &[("time".to_owned(), 1 << 40)]));
    super::survey::try_stat(bytes);
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const SMAPS: &[u8] = b"7f0b5742a000-7f0b57450000 r-xp 00001000 fe:00 325843                     /usr/lib/x y.so.2
Size:                152 kB
Rss:                 152 kB
ProtectionKey:         0
VmFlags: rd ex mr mw me zz 
7f0b5742b000-7f0b57450000 rw-s 00000000 00:00 0 
VmFlags: rd wr sh mr mw me ms gd
7fff37994000-7fff379b5000 rw-p 00000000 00:00 0                          [stack]
";

    #[test]
    fn locking_on_fault_without_a_name_is_understood() {
        let locked = VmFlags::parse(b" rd wr mr mw me lo ac ?? sd \n");
        assert!(locked.known & flag::LOCK_ON_FAULT != 0 && locked.unknown.is_empty(), "{locked:?}");
        assert_eq!(VmFlags::parse(b" rd wr ac ??").unknown, [*b"??"]);
    }

    #[test]
    fn smaps_is_understood() {
        let found = parse(SMAPS).unwrap();
        assert_eq!(found.len(), 3);
        assert_eq!((found[0].start, found[0].end), (0x7f0b5742a000, 0x7f0b57450000));
        assert_eq!(found[0].protection, libc::PROT_READ | libc::PROT_EXEC);
        assert_eq!((found[0].offset, found[0].inode, found[0].device), (0x1000, 325843, libc::makedev(0xfe, 0)));
        assert_eq!(found[0].path, b"/usr/lib/x y.so.2");
        assert_eq!(found[0].flags.unknown, [*b"zz"]);
        assert!(found[1].shared && found[1].path.is_empty());
        assert_ne!(found[1].flags.known & flag::GROWSDOWN, 0);
        assert_eq!(found[2].nature(), Nature::Anonymous);
    }

    #[test]
    fn our_own_layout_is_understood() {
        let found = parse(&std::fs::read("/proc/self/smaps").unwrap()).unwrap();
        assert!(found.iter().any(|m| m.path == b"[vdso]" && m.nature() == Nature::Kernel));
        assert!(found.iter().all(|m| m.flags.known & flag::MAY_READ != 0 || m.nature() == Nature::Kernel));
    }

    proptest! {
        #[test]
        fn nothing_makes_it_panic(text in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = parse(&text);
        }

        #[test]
        fn a_damaged_line_makes_no_panic(place in 0..SMAPS.len(), byte: u8) {
            let mut text = SMAPS.to_vec();
            text[place] = byte;
            let _ = parse(&text);
        }
    }
}
