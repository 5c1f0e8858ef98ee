//! The kernel's code in every process. It is the same in all of one kernel, so we look at our own.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::OnceLock;

use super::layout::{Mapping, Nature};
use super::state::VdsoState;
use super::{elf, survey};
use crate::ids::HostPid;

/// The vDSO of this kernel.
pub(super) struct Code {
    /// BLAKE3 of the code, in hexadecimal.
    pub(super) digest: String,
    /// What is mapped of it, whole.
    pub(super) bytes: Vec<u8>,
    /// Its functions: name and offset.
    pub(super) symbols: Vec<(String, u64)>,
    /// Lengths of the parts, with their names, in order.
    pub(super) shape: Vec<(String, u64)>,
}

impl Code {
    /// Bytes of all parts.
    pub(super) fn length(&self) -> u64 {
        self.shape.iter().map(|(_, length)| length).sum()
    }

    /// Bytes from the first part to the code.
    pub(super) fn lead(&self) -> u64 {
        self.length() - self.bytes.len() as u64
    }

    /// What an image says of it when its first part is at `start`.
    pub(super) fn placed_at(&self, start: u64) -> VdsoState {
        let mut at = start;
        let place = |(name, length): &(String, u64)| {
            at += length;
            (name.clone(), at - length, at)
        };
        let parts = self.shape.iter().map(place).collect();
        VdsoState { parts, digest: self.digest.clone(), symbols: self.symbols.clone() }
    }
}

/// The names of the kernel's mappings that belong together. `[vsyscall]` is not in the address space proper.
const PARTS: [&[u8]; 3] = [b"[vvar]", b"[vvar_vclock]", b"[vdso]"];

fn parts(mappings: &[Mapping]) -> impl Iterator<Item = &Mapping> {
    mappings.iter().filter(|m| m.nature() == Nature::Kernel && PARTS.contains(&&m.path[..]))
}

fn name(mapping: &Mapping) -> String {
    String::from_utf8_lossy(&mapping.path).into_owned()
}

/// That of this kernel, unless this process has none.
pub(super) fn code() -> Option<&'static Code> {
    static CODE: OnceLock<Option<Code>> = OnceLock::new();
    let read = || {
        let mappings = survey::mappings(HostPid(std::process::id() as i32)).ok()?;
        let shape = parts(&mappings).map(|m| (name(m), m.end - m.start)).collect();
        let vdso = mappings.iter().find(|m| m.path == b"[vdso]")?;
        let mut bytes = vec![0; (vdso.end - vdso.start) as usize];
        File::open("/proc/self/mem").and_then(|mem| mem.read_exact_at(&mut bytes, vdso.start)).ok()?;
        let (digest, symbols) = (digest(&bytes), elf::symbols(&bytes).unwrap_or_default());
        Some(Code { digest, bytes, symbols, shape })
    };
    CODE.get_or_init(read).as_ref()
}

/// By which a vDSO is known.
pub(super) fn digest(code: &[u8]) -> String {
    blake3::hash(code).to_hex().to_string()
}

/// The code of this kernel's vDSO, for those who have another.
pub fn own_vdso() -> Option<Vec<u8>> {
    code().map(|code| code.bytes.clone())
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
        let lengths = state.parts.iter().map(|(name, start, end)| (name.clone(), end.wrapping_sub(*start)));
        lengths.eq(code.shape.iter().cloned())
    };
    whole && code().is_some_and(|code| code.digest == state.digest && shape(code))
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
        assert_eq!(code().unwrap().placed_at(state.range().start), state);
        let other = VdsoState { digest: "0".into(), ..state };
        assert!(!fits(&other));
    }
}
