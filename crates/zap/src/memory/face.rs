//! The face of a vDSO: the code of another kernel's at the address at which a program knows it, whose functions lead to those
//! of this kernel's, or to plain system calls.
//!
//! Beside the first instruction of each function, which becomes a jump, and the zeros at its end, nothing of the code is
//! changed. Whoever is in the middle of it finds zeros where that kernel's clocks were, which is what tells the code that
//! there is no clock to read, and makes the system call.

use super::{elf, vdso};

/// Behind the code, at its very end: by this a face is known.
const MARK: &[u8; 16] = b"face of a vDSO\0\x01";
/// The mark, the digest of the code as it was, and where that has zeros.
const TAIL: usize = 16 + 32 + 8;
/// Bytes of a jump with a displacement of 32 bits, which a function begins with.
pub(super) const JUMP: u64 = 5;
/// Where whatever is made for a function begins.
const ALIGNED: usize = 16;

/// The functions that a vDSO may have, and the system calls that do the same.
const CALLS: [(&str, libc::c_long); 6] = [
    ("clock_gettime", libc::SYS_clock_gettime),
    ("gettimeofday", libc::SYS_gettimeofday),
    ("time", libc::SYS_time),
    ("clock_getres", libc::SYS_clock_getres),
    ("getcpu", libc::SYS_getcpu),
    ("getrandom", libc::SYS_getrandom),
];

/// What a face says of itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Told {
    /// The digest of the code as it was.
    pub(super) digest: String,
    /// Where that has zeros up to its end.
    zeros: usize,
}

/// What a face says of itself; none if it is no face.
pub(super) fn told(bytes: &[u8]) -> Option<Told> {
    let tail = bytes.get(bytes.len().checked_sub(TAIL)?..)?;
    let (mark, rest) = tail.split_first_chunk::<16>()?;
    let (digest, rest) = rest.split_first_chunk::<32>()?;
    let zeros = usize::try_from(u64::from_le_bytes(*rest.first_chunk()?)).ok()?;
    let sound = mark == MARK && zeros <= bytes.len() - TAIL;
    sound.then(|| Told { digest: blake3::Hash::from_bytes(*digest).to_hex().to_string(), zeros })
}

/// Bytes at the end of a mapping that tell whether it is a face.
pub(super) const TELLING: usize = TAIL;

/// The offsets of the functions of a vDSO, each with one of its names.
pub(super) fn functions(code: &[u8]) -> Vec<(String, u64)> {
    let mut found = elf::symbols(code).unwrap_or_default();
    found.retain(|(_, at)| at.checked_add(JUMP).is_some_and(|end| end <= code.len() as u64));
    // The plain name and the one that begins with underscores are one function.
    found.iter_mut().for_each(|(name, _)| *name = plain(name).to_owned());
    found.sort_by_key(|(_, at)| *at);
    found.dedup_by_key(|(_, at)| *at);
    found
}

fn plain(name: &str) -> &str {
    name.strip_prefix("__vdso_").unwrap_or(name)
}

/// The face of `code` (a face already, or code as it was) at address `at`, whose functions lead to `ours`: names, and their
/// addresses in this kernel's vDSO, wherever that is.
pub(super) fn make(code: &[u8], at: u64, ours: &[(String, u64)]) -> Result<Vec<u8>, String> {
    let is_zero_from = || code.iter().rposition(|byte| *byte != 0).map_or(0, |last| last + 1);
    let told = told(code).unwrap_or_else(|| Told { digest: vdso::digest(code), zeros: is_zero_from() });
    let end = code.len().checked_sub(TAIL).filter(|end| told.zeros <= *end).ok_or("its vDSO is full")?;
    let mut face = code.to_vec();
    face[told.zeros..].fill(0);
    let mut free = told.zeros.next_multiple_of(ALIGNED);
    for (name, offset) in functions(code) {
        let here = at + offset;
        let there = ours.iter().find(|(other, _)| plain(other) == name).map(|(_, address)| *address);
        let jump = match there.and_then(|there| jump(here, there)) {
            Some(jump) => jump,
            None => {
                let made = there.map_or_else(|| call(&name), jump_anywhere);
                let room = face.get_mut(free..free + made.len()).filter(|_| free + made.len() <= end);
                room.ok_or("its vDSO is full")?.copy_from_slice(&made);
                let jump = jump(here, at + free as u64).ok_or("its vDSO is too long")?;
                free = (free + made.len()).next_multiple_of(ALIGNED);
                jump
            }
        };
        face[offset as usize..][..JUMP as usize].copy_from_slice(&jump);
    }
    let digest = blake3::Hash::from_hex(&told.digest).map_err(|_| "the digest of its vDSO is none")?;
    face[end..].copy_from_slice(&[&MARK[..], digest.as_bytes(), &(told.zeros as u64).to_le_bytes()].concat());
    Ok(face)
}

/// `jmp there`, if that is near enough.
fn jump(here: u64, there: u64) -> Option<[u8; JUMP as usize]> {
    let distance = i32::try_from(there.wrapping_sub(here + JUMP) as i64).ok()?;
    let [a, b, c, d] = distance.to_le_bytes();
    Some([0xe9, a, b, c, d])
}

/// `jmp *[rip]`, and the address behind it.
fn jump_anywhere(there: u64) -> Vec<u8> {
    [&[0xff, 0x25, 0, 0, 0, 0], &there.to_le_bytes()[..]].concat()
}

/// A function that makes the system call of that name; ENOSYS where there is none.
fn call(name: &str) -> Vec<u8> {
    const NO_SUCH_CALL: [u8; 6] = [0xb8, 0xda, 0xff, 0xff, 0xff, 0xc3]; // mov $-38,%eax; ret
    let Some((_, number)) = CALLS.iter().find(|(known, _)| *known == name) else { return NO_SUCH_CALL.to_vec() };
    let [a, b, ..] = number.to_le_bytes();
    // arguments are where the system call has them; the result is, too
    let call = [0xb8, a, b, 0, 0, 0x0f, 0x05, 0xc3]; // mov $number,%eax; syscall; ret
    match name {
        // Whoever asks how large its state would be (the fifth argument is -1) must hear that there is none:
        // cmp $-1,%r8; je over the call
        "getrandom" => [&[0x49, 0x83, 0xf8, 0xff, 0x74, 0x08], &call[..], &NO_SUCH_CALL].concat(),
        _ => call.to_vec(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ours() -> &'static vdso::Code {
        vdso::code().unwrap()
    }

    #[test]
    fn a_face_tells_what_it_was_and_can_be_made_anew() {
        let at = 0x7ffe_1234_5000;
        let near: Vec<_> =
            ours().symbols.iter().map(|(name, offset)| (name.clone(), at + 0x10_0000 + offset)).collect();
        let face = make(&ours().bytes, at, &near).unwrap();
        assert_eq!(told(&face).unwrap().digest, ours().digest);
        assert_eq!(told(&ours().bytes), None);
        let (name, offset) = functions(&ours().bytes).into_iter().find(|(name, _)| name == "clock_gettime").unwrap();
        assert_eq!((name.as_str(), face[offset as usize]), ("clock_gettime", 0xe9));
        assert_eq!(make(&face, at, &near).unwrap(), face);
        let far: Vec<_> = near.iter().map(|(name, address)| (name.clone(), address - (1 << 40))).collect();
        let other = make(&face, at, &far).unwrap();
        assert!(other != face && make(&other, at, &near).unwrap() == face);
        let calls = make(&face, at, &[]).unwrap();
        assert_eq!(make(&calls, at, &near).unwrap(), face);
    }

    #[test]
    fn what_is_not_changed_is_as_it_was() {
        let face = make(&ours().bytes, 0x1000_0000, &[]).unwrap();
        let changed = face.iter().zip(&ours().bytes).filter(|(a, b)| a != b).count();
        assert!(changed < TAIL + 7 * (JUMP as usize + 32), "{changed} bytes");
        assert_eq!(elf::symbols(&face), elf::symbols(&ours().bytes));
    }

    #[test]
    fn what_is_no_code_makes_no_face_and_no_panic() {
        assert!(make(&[], 0, &[]).is_err());
        assert!(make(&[0xff; 4096], 0, &[]).is_err());
        assert!(make(&[0; 4096], 0, &[]).is_ok());
        assert!(told(&[0xff; TAIL]).is_none() && told(b"x").is_none());
        let mut lying = MARK.to_vec();
        lying.extend([0xff; 40]);
        assert!(told(&lying).is_none());
    }
}
