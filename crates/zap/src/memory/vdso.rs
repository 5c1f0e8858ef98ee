//! The kernel's code in every process. It is the same in all of one kernel, so we look at our own.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::OnceLock;

use super::layout::{Mapping, Nature};
use super::state::VdsoState;
use super::survey;
use crate::ids::HostPid;

struct Code {
    digest: String,
    symbols: Vec<(String, u64)>,
    /// Lengths of the parts, with their names, in order.
    shape: Vec<(String, u64)>,
}

/// The names of the kernel's mappings that belong together. `[vsyscall]` is not in the address space proper.
const PARTS: [&[u8]; 3] = [b"[vvar]", b"[vvar_vclock]", b"[vdso]"];

fn parts(mappings: &[Mapping]) -> impl Iterator<Item = &Mapping> {
    mappings.iter().filter(|m| m.nature() == Nature::Kernel && PARTS.contains(&&m.path[..]))
}

fn name(mapping: &Mapping) -> String {
    String::from_utf8_lossy(&mapping.path).into_owned()
}

fn code() -> Option<&'static Code> {
    static CODE: OnceLock<Option<Code>> = OnceLock::new();
    let read = || {
        let mappings = survey::mappings(HostPid(std::process::id() as i32)).ok()?;
        let shape = parts(&mappings).map(|m| (name(m), m.end - m.start)).collect();
        let vdso = mappings.iter().find(|m| m.path == b"[vdso]")?;
        let mut bytes = vec![0; (vdso.end - vdso.start) as usize];
        File::open("/proc/self/mem").and_then(|mem| mem.read_exact_at(&mut bytes, vdso.start)).ok()?;
        Some(Code {
            digest: blake3::hash(&bytes).to_hex().to_string(),
            symbols: symbols(&bytes).unwrap_or_default(),
            shape,
        })
    };
    CODE.get_or_init(read).as_ref()
}

/// What is mapped of the kernel's in a process.
pub(super) fn capture(mappings: &[Mapping]) -> Option<VdsoState> {
    let parts: Vec<_> = parts(mappings).map(|m| (name(m), m.start, m.end)).collect();
    let code = code()?;
    (!parts.is_empty()).then(|| VdsoState { parts, digest: code.digest.clone(), symbols: code.symbols.clone() })
}

/// Whether a new vDSO of this kernel, placed at the first part, is what `state` says.
pub(super) fn fits(state: &VdsoState) -> bool {
    let whole = state.parts.windows(2).all(|w| w[0].2 == w[1].1);
    let shape = |code: &Code| {
        let lengths = state.parts.iter().map(|(name, start, end)| (name.clone(), end - start));
        lengths.eq(code.shape.iter().cloned())
    };
    whole && code().is_some_and(|code| code.digest == state.digest && shape(code))
}

/// The dynamic symbols of an ELF image: name and value.
fn symbols(elf: &[u8]) -> Option<Vec<(String, u64)>> {
    let word = |at: usize, bytes: usize| {
        Some(elf.get(at..at.checked_add(bytes)?)?.iter().rev().fold(0u64, |w, b| w << 8 | u64::from(*b)))
    };
    let (table, size, count) = (word(40, 8)? as usize, word(58, 2)? as usize, word(60, 2)? as usize);
    let header = |index: usize, place: usize, bytes: usize| word(table + index * size + place, bytes);
    const DYNSYM: u64 = 11;
    let dynsym = (0..count).find(|i| header(*i, 4, 4) == Some(DYNSYM))?;
    let (start, length) = (header(dynsym, 24, 8)? as usize, header(dynsym, 32, 8)? as usize);
    let strings = header(header(dynsym, 40, 4)? as usize, 24, 8)? as usize;
    let mut found = Vec::new();
    for symbol in (start..start.checked_add(length)?).step_by(24) {
        let name = elf.get(strings.checked_add(word(symbol, 4)? as usize)?..)?;
        let name = &name[..name.iter().position(|b| *b == 0)?];
        let value = word(symbol + 8, 8)?;
        if value != 0 && !name.is_empty() {
            found.push((String::from_utf8_lossy(name).into_owned(), value));
        }
    }
    Some(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ours_is_understood() {
        let mappings = survey::mappings(HostPid(std::process::id() as i32)).unwrap();
        let state = capture(&mappings).unwrap();
        assert!(state.symbols.iter().any(|(name, _)| name == "__vdso_clock_gettime"), "{:?}", state.symbols);
        assert!(fits(&state));
        let other = VdsoState { digest: "0".into(), ..state };
        assert!(!fits(&other));
    }
}
