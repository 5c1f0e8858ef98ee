//! The little of ELF that a vDSO needs. Bytes in; hostile input.

/// The dynamic symbols of a 64-bit image: name and value.
pub(super) fn symbols(elf: &[u8]) -> Option<Vec<(String, u64)>> {
    let word = |at: usize, bytes: usize| {
        Some(elf.get(at..at.checked_add(bytes)?)?.iter().rev().fold(0u64, |w, b| w << 8 | u64::from(*b)))
    };
    let (table, size, count) = (word(40, 8)? as usize, word(58, 2)? as usize, word(60, 2)? as usize);
    let header = |index: usize, place: usize, bytes: usize| {
        word(table.checked_add(index.checked_mul(size)?)?.checked_add(place)?, bytes)
    };
    const DYNSYM: u64 = 11;
    let dynsym = (0..count).find(|i| header(*i, 4, 4) == Some(DYNSYM))?;
    let (start, length) = (header(dynsym, 24, 8)? as usize, header(dynsym, 32, 8)? as usize);
    let strings = header(header(dynsym, 40, 4)? as usize, 24, 8)? as usize;
    let mut found = Vec::new();
    for symbol in (start..start.checked_add(length)?.min(elf.len())).step_by(24) {
        let name = elf.get(strings.checked_add(word(symbol, 4)? as usize)?..)?;
        let name = &name[..name.iter().position(|b| *b == 0)?];
        let value = word(symbol + 8, 8)?;
        if value != 0 && !name.is_empty() {
            found.push((String::from_utf8_lossy(name).into_owned(), value));
        }
    }
    Some(found)
}
