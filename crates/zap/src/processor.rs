//! What a processor has that a program may use, and what of a thread's registers another one could not have.

use std::fmt::Write;
use std::sync::OnceLock;

use serde::{Deserialize, Serialize};

use crate::sys::cpuid;

/// Bytes of the part of the XSAVE area that every processor has (FXSAVE), and of that with the header behind it.
const LEGACY: usize = 512;
const HEADER: usize = LEGACY + 64;
/// Where the kernel says in the legacy part which components it saves (`xstate_fx_sw_bytes`).
const SAVED: usize = 464;
/// x87 and SSE.
const ALWAYS: u64 = 3;
/// Protection keys: all the kernel's doing but for programs that have keys, which are refused.
const KEYS: u32 = 9;
const KEYS_AT_FIRST: u32 = 0x5555_5554;
/// No component has a higher number.
const MOST: u32 = 63;

/// Sets of registers that the extended state has, by their numbers (Intel SDM volume 1, 13.1).
const NAMES: [(u32, &str); 9] = [
    (2, "AVX (the upper halves of the ymm registers)"),
    (3, "MPX (bound registers)"),
    (4, "MPX (bound configuration)"),
    (5, "AVX-512 (mask registers)"),
    (6, "AVX-512 (the upper halves of the zmm registers)"),
    (7, "AVX-512 (registers zmm16 to zmm31)"),
    (KEYS, "protection keys"),
    (17, "AMX (tile configuration)"),
    (18, "AMX (tiles)"),
];

/// A component of the extended state: where it is in the XSAVE area.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "(u32, u32, u32)", into = "(u32, u32, u32)")]
pub struct Component {
    number: u32,
    offset: u32,
    size: u32,
}

impl From<(u32, u32, u32)> for Component {
    fn from((number, offset, size): (u32, u32, u32)) -> Component {
        Component { number, offset, size }
    }
}

impl From<Component> for (u32, u32, u32) {
    fn from(component: Component) -> (u32, u32, u32) {
        (component.number, component.offset, component.size)
    }
}

impl Component {
    fn of<'b>(&self, area: &'b [u8]) -> &'b [u8] {
        let (start, end) = (self.offset as usize, self.offset as usize + self.size as usize);
        // Zeros at the end are left out of images.
        area.get(start.min(area.len())..end.min(area.len())).unwrap_or_default()
    }
}

/// A processor, as an image or another host knows it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Processor {
    /// What its XSAVE area has beyond x87 and SSE.
    pub components: Vec<Component>,
    /// Instructions that programs look for when they begin, and use from then on.
    pub extensions: Vec<String>,
}

macro_rules! extensions {
    ($($name:tt)*) => {
        fn extensions() -> Vec<String> {
            let all = [$(($name, std::arch::is_x86_feature_detected!($name))),*];
            all.into_iter().filter(|(_, has)| *has).map(|(name, _)| name.to_owned()).collect()
        }
    };
}

// What the C library chooses its functions by (levels 2 and 3 of the psABI, and three more). What it chooses by AVX-512 shows
// in registers.
extensions! {
    "sse3" "ssse3" "sse4.1" "sse4.2" "popcnt" "cmpxchg16b" "avx" "avx2" "bmi1" "bmi2" "f16c" "fma" "lzcnt" "movbe"
    "xsave" "xsavec" "rtm"
}

impl Processor {
    /// That of this host.
    pub fn here() -> &'static Processor {
        static HERE: OnceLock<Processor> = OnceLock::new();
        HERE.get_or_init(|| {
            let enabled = cpuid::enabled_components();
            let found =
                (2..MOST).filter(|number| enabled & 1 << number != 0).map(|number| (number, cpuid::component(number)));
            let there = found.filter(|(_, (size, offset))| *size > 0 && *offset as usize >= HEADER);
            let components = there.map(|(number, (size, offset))| Component { number, offset, size }).collect();
            Processor { components, extensions: extensions() }
        })
    }

    /// Whether an image says nothing of it.
    pub fn is_unknown(&self) -> bool {
        self.components.is_empty() && self.extensions.is_empty()
    }

    /// Bytes of its XSAVE area.
    pub fn area(&self) -> usize {
        let ends = self.components.iter().map(|component| component.offset as usize + component.size as usize);
        ends.max().unwrap_or(HEADER)
    }

    /// Bytes of the extended state as `ptrace(2)` has it: without XSAVE there is no header.
    pub fn area_or_legacy(&self) -> usize {
        if self.components.is_empty() && cpuid::enabled_components() == 0 { LEGACY } else { self.area() }
    }

    /// Whether it has registers that `other` has not.
    pub fn has_registers_beyond(&self, other: &Processor) -> bool {
        self.beyond(other).next().is_some()
    }

    fn beyond<'a>(&'a self, other: &'a Processor) -> impl Iterator<Item = &'a Component> {
        let has =
            |wanted: &Component| other.components.iter().any(|c| c.number == wanted.number && c.size == wanted.size);
        self.components.iter().filter(move |component| component.number != KEYS && !has(component))
    }

    /// The sets of registers that are in use in an XSAVE area of this processor, and that `other` has not.
    pub fn registers_beyond<'a>(&'a self, other: &'a Processor, area: &'a [u8]) -> impl Iterator<Item = String> + 'a {
        self.beyond(other).filter(|component| is_used(component, area)).map(|component| name(component.number))
    }

    /// An XSAVE area of this processor as `other` has it, `size` bytes long. What that lacks is left out.
    pub fn translated(&self, area: &[u8], other: &Processor, size: usize) -> Vec<u8> {
        let mut made = vec![0; size.max(LEGACY)];
        let legacy = area.len().min(SAVED);
        made[..legacy].copy_from_slice(&area[..legacy]);
        if size < HEADER {
            return made;
        }
        let mut held = header(area).unwrap_or(ALWAYS) & ALWAYS;
        for theirs in &other.components {
            let place = theirs.offset as usize..theirs.offset as usize + theirs.size as usize;
            let ours = self.components.iter().find(|ours| ours.number == theirs.number && ours.size == theirs.size);
            let Some(room) = made.get_mut(place) else { continue };
            match ours.filter(|ours| header(area).is_some_and(|bits| bits & 1 << ours.number != 0)) {
                Some(ours) => room[..ours.of(area).len()].copy_from_slice(ours.of(area)),
                None if theirs.number == KEYS => room[..4].copy_from_slice(&KEYS_AT_FIRST.to_le_bytes()),
                None => continue,
            }
            held |= 1 << theirs.number;
        }
        made[LEGACY..LEGACY + 8].copy_from_slice(&held.to_le_bytes());
        made
    }
}

/// On which processors programs began: they go on with what they found there. The kernel tells each program something of its
/// processor, in the auxiliary vector, and that stays with it wherever it moves: by that it is known.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Beginnings(Vec<(u64, Vec<String>)>);

impl Beginnings {
    /// Whether nothing is known beyond this host.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// These, and this host.
    pub fn and_here(&self) -> Beginnings {
        let own = std::fs::read("/proc/self/auxv").map_or(0, |auxv| mark_of(&auxv));
        self.and(own, &Processor::here().extensions)
    }

    fn and(&self, room: u64, extensions: &[String]) -> Beginnings {
        let mut all = self.clone();
        match all.0.iter_mut().find(|(known, _)| *known == room) {
            // Two processors that are not told apart: a program may have begun on either.
            Some((_, known)) => {
                let fresh: Vec<_> = extensions.iter().filter(|name| !known.contains(name)).cloned().collect();
                known.extend(fresh);
            }
            None => all.0.push((room, extensions.to_vec())),
        }
        all
    }

    /// Without what the C library was told not to find, in the environment of a pod's first program: `GLIBC_TUNABLES`, with
    /// `glibc.cpu.hwcaps=-AVX2,…` in it.
    pub fn without_hidden(mut self, environment: &[String]) -> Beginnings {
        let tunables = environment.iter().filter_map(|pair| pair.strip_prefix("GLIBC_TUNABLES="));
        let lists = tunables.flat_map(|all| all.split(':')).filter_map(|one| one.strip_prefix("glibc.cpu.hwcaps="));
        let names = lists.flat_map(|list| list.split(',')).filter_map(|name| name.strip_prefix('-'));
        let hidden: Vec<String> = names.map(|name| name.to_lowercase().replace('_', ".")).collect();
        self.0.iter_mut().for_each(|(_, names)| names.retain(|name| !hidden.contains(name)));
        self
    }

    /// What a program with this auxiliary vector may use, and `other` lacks. Of one that is not known it is what any may use.
    pub fn lacking(&self, auxv: &[u8], other: &Processor) -> Vec<&str> {
        let room = mark_of(auxv);
        let is_known = self.0.iter().any(|(known, _)| *known == room);
        let begun = self.0.iter().filter(|(known, _)| !is_known || *known == room);
        let mut lacking: Vec<&str> = begun.flat_map(|(_, names)| names).map(String::as_str).collect();
        lacking.retain(|name| !other.extensions.iter().any(|has| has == name));
        lacking
    }
}

/// Reads some bytes as an auxiliary vector, and as an area of registers of a processor that has the components of ours.
pub(crate) fn try_area(bytes: &[u8]) {
    let _ = mark_of(bytes);
    let here = Processor::here();
    drop(here.translated(bytes, here, bytes.len()));
    here.registers_beyond(&Processor::default(), bytes).for_each(drop);
}

/// Reads some bytes as a processor that an image or another host knows.
pub(crate) fn try_other(bytes: &[u8]) {
    if let Ok(other) = crate::image::decode::<Processor>(bytes) {
        let (here, area) = (Processor::here(), [0xff; HEADER + 64]);
        other.registers_beyond(here, &area).for_each(drop);
        drop(other.translated(&area, here, area.len()));
    }
}

/// What an auxiliary vector says of the processor, as one number: `AT_MINSIGSTKSZ`, zero where a kernel did not say, and the
/// words of capabilities beside it, `AT_HWCAP` and `AT_HWCAP2`. Areas of two processors may be equally large.
fn mark_of(auxv: &[u8]) -> u64 {
    let word = |bytes: &[u8]| bytes.iter().rev().fold(0, |word, byte| word << 8 | u64::from(*byte));
    let entries: Vec<(u64, u64)> = auxv.chunks_exact(16).map(|e| (word(&e[..8]), word(&e[8..]))).collect();
    let value = |kind: u64| entries.iter().find(|(found, _)| *found == kind).map_or(0, |(_, value)| *value);
    let [hwcap, hwcap2, minsigstksz] = [16, 26, 51].map(value);
    minsigstksz ^ hwcap.rotate_left(24) ^ hwcap2.rotate_left(58)
}

/// Which components an area holds (`XSTATE_BV`); none of an area without a header.
fn header(area: &[u8]) -> Option<u64> {
    (area.len() > LEGACY).then(|| {
        let mut word = [0; 8];
        let bytes = &area[LEGACY..area.len().min(LEGACY + 8)];
        word[..bytes.len()].copy_from_slice(bytes);
        u64::from_le_bytes(word)
    })
}

/// Whether a component holds anything but what it has at first. Not every processor says so by its bit.
fn is_used(component: &Component, area: &[u8]) -> bool {
    // An image may say any number.
    let held = header(area).is_some_and(|bits| bits.checked_shr(component.number).is_some_and(|bits| bits & 1 != 0));
    held && component.of(area).iter().any(|byte| *byte != 0)
}

fn name(number: u32) -> String {
    let known = NAMES.iter().find(|(known, _)| *known == number);
    known.map_or_else(
        || {
            let mut text = String::from("registers of component ");
            let _ = write!(text, "{number} of the extended state");
            text
        },
        |(_, name)| (*name).to_owned(),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn processor(components: &[(u32, u32, u32)]) -> Processor {
        Processor { components: components.iter().copied().map(Component::from).collect(), extensions: Vec::new() }
    }

    fn area(bits: u64, length: usize, set: &[(usize, u8)]) -> Vec<u8> {
        let mut area = vec![0; length];
        area[LEGACY..LEGACY + 8].copy_from_slice(&bits.to_le_bytes());
        set.iter().for_each(|(at, value)| area[*at] = *value);
        area
    }

    #[test]
    fn registers_that_are_used_are_told_from_those_that_are_not() {
        let large = processor(&[(2, 576, 256), (5, 1088, 64), (7, 1664, 1024)]);
        let small = processor(&[(2, 576, 256)]);
        let idle = area(0b1110_0111, 2688, &[(600, 1)]);
        assert_eq!(large.registers_beyond(&small, &idle).count(), 0);
        let busy = area(0b1110_0111, 2688, &[(1700, 1)]);
        let beyond: Vec<_> = large.registers_beyond(&small, &busy).collect();
        assert_eq!(beyond, ["AVX-512 (registers zmm16 to zmm31)"]);
        let none = processor(&[]);
        assert!(large.registers_beyond(&none, &idle).next().unwrap().starts_with("AVX ("));
        assert_eq!(large.registers_beyond(&large, &busy).count(), 0);
    }

    #[test]
    fn areas_are_laid_out_anew() {
        // the same registers, at other places
        let (from, to) = (processor(&[(2, 576, 256)]), processor(&[(2, 1024, 256), (KEYS, 2688, 8)]));
        let made = from.translated(&area(0b111, 832, &[(0, 9), (SAVED, 8), (577, 5)]), &to, 2696);
        assert_eq!((made.len(), made[0], made[SAVED], made[1025]), (2696, 9, 0, 5));
        assert_eq!(header(&made), Some(0b111 | 1 << KEYS));
        assert_eq!(made[2688..2692], KEYS_AT_FIRST.to_le_bytes());
        // without XSAVE, and back
        let bare = processor(&[]);
        let legacy = from.translated(&area(0b111, 832, &[(100, 7)]), &bare, LEGACY);
        assert_eq!((legacy.len(), legacy[100]), (LEGACY, 7));
        let back = bare.translated(&legacy, &from, 832);
        assert_eq!((header(&back), back[100]), (Some(ALWAYS), 7));
    }

    #[test]
    fn programs_use_what_they_found_where_they_began() {
        let auxv = |room: u64| [51u64, room, 0, 0].iter().flat_map(|word| word.to_le_bytes()).collect::<Vec<u8>>();
        let named = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>();
        let all = Beginnings::default().and(1776, &named(&["avx"])).and(3632, &named(&["avx", "avx2"]));
        let bare = Processor { extensions: named(&["sse3"]), ..Processor::default() };
        assert_eq!(all.lacking(&auxv(1776), &bare), ["avx"]);
        assert_eq!(all.lacking(&auxv(3632), &bare), ["avx", "avx2"]);
        assert_eq!(all.lacking(&auxv(1104), &bare).len(), 3);
        let both = all.and(1776, &named(&["avx", "movbe"]));
        assert_eq!(both.lacking(&auxv(1776), &bare), ["avx", "movbe"]);
        let hidden =
            ["HOME=/", "GLIBC_TUNABLES=glibc.malloc.check=1:glibc.cpu.hwcaps=-AVX2,-SSE4_1"].map(str::to_owned);
        assert_eq!(all.clone().without_hidden(&hidden).lacking(&auxv(3632), &bare), ["avx"]);
        let own = Beginnings::default().and_here();
        assert!(own.lacking(&std::fs::read("/proc/self/auxv").unwrap(), Processor::here()).is_empty());
        assert!(!own.lacking(&std::fs::read("/proc/self/auxv").unwrap(), &bare).is_empty());
    }

    #[test]
    fn short_areas_and_hostile_ones_make_no_panic() {
        let odd = processor(&[(2, u32::MAX / 2, 8), (40, 600, 8)]);
        for length in [0, 1, 511, 512, 513, 519, 600] {
            let area = vec![0xff; length];
            let _ = odd.registers_beyond(&processor(&[]), &area).count();
            let _ = odd.translated(&area, &odd, 1000);
        }
    }

    #[test]
    fn this_host_has_what_every_one_has() {
        let here = Processor::here();
        assert!(here.extensions.iter().any(|name| name == "sse3"), "{here:?}");
        assert!(here.area() >= HEADER);
    }
}
