//! What CRIU says of its own work: the files `stats-dump` and `stats-restore` beside its images.
//!
//! Two 32-bit magic numbers (of an auxiliary file, and of statistics), the length of a message, and the message, in protocol
//! buffers' encoding (<https://criu.org/Images>, <https://criu.org/Statistics>,
//! <https://protobuf.dev/programming-guides/encoding/>). All numbers of the head are little-endian.

use thiserror::Error;

/// What an auxiliary file of CRIU begins with.
const AUXILIARY: u32 = 0x5510_5940;
/// What follows in one with statistics.
const STATISTICS: u32 = 0x5709_3306;
/// Numbers of the two kinds of statistics in the message.
const DUMP: u64 = 1;
const RESTORE: u64 = 2;

/// Why a file is none with statistics.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum StatsError {
    /// It ends in the middle of something.
    #[error("the statistics are cut off")]
    Short,
    /// It begins with something else.
    #[error("this is no file of statistics: it begins with {0:#x}, {1:#x}")]
    Magic(u32, u32),
    /// It holds what the encoding does not have.
    #[error("field {0} of the statistics has the unknown type {1}")]
    Type(u64, u64),
    /// It has statistics of the other kind, or none.
    #[error("there are no such statistics in the file")]
    Missing,
}

/// Of a dump. Times are in microseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DumpStats {
    /// Until every process stood still.
    pub freezing_us: u64,
    /// For which the processes stood still.
    pub frozen_us: u64,
    /// For copying memory out of the processes.
    pub memory_us: u64,
    /// For writing memory.
    pub write_us: u64,
    /// Pages of memory written.
    pub pages: u64,
}

/// Of a restore. Times are in microseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RestoreStats {
    /// For making the processes.
    pub forking_us: u64,
    /// For all of it.
    pub restore_us: u64,
    /// Pages of memory put back.
    pub pages: u64,
}

impl DumpStats {
    /// Reads `stats-dump`.
    pub fn parse(file: &[u8]) -> Result<Self, StatsError> {
        let mut stats = Self::default();
        for (field, value) in fields(message(file, DUMP)?)? {
            let Value::Number(number) = value else { continue };
            match field {
                1 => stats.freezing_us = number,
                2 => stats.frozen_us = number,
                3 => stats.memory_us = number,
                4 => stats.write_us = number,
                7 => stats.pages = number,
                _ => {}
            }
        }
        Ok(stats)
    }
}

impl RestoreStats {
    /// Reads `stats-restore`.
    pub fn parse(file: &[u8]) -> Result<Self, StatsError> {
        let mut stats = Self::default();
        for (field, value) in fields(message(file, RESTORE)?)? {
            let Value::Number(number) = value else { continue };
            match field {
                3 => stats.forking_us = number,
                4 => stats.restore_us = number,
                5 => stats.pages = number,
                _ => {}
            }
        }
        Ok(stats)
    }
}

/// The message of one kind in a file.
fn message(file: &[u8], kind: u64) -> Result<&[u8], StatsError> {
    let (first, rest) = word(file)?;
    let (second, rest) = word(rest)?;
    if (first, second) != (AUXILIARY, STATISTICS) {
        return Err(StatsError::Magic(first, second));
    }
    let (length, rest) = word(rest)?;
    let all = fields(rest.get(..length as usize).ok_or(StatsError::Short)?)?;
    let found = all.into_iter().find_map(|(field, value)| match value {
        Value::Bytes(bytes) if field == kind => Some(bytes),
        _ => None,
    });
    found.ok_or(StatsError::Missing)
}

fn word(bytes: &[u8]) -> Result<(u32, &[u8]), StatsError> {
    let (word, rest) = bytes.split_first_chunk().ok_or(StatsError::Short)?;
    Ok((u32::from_le_bytes(*word), rest))
}

enum Value<'a> {
    Number(u64),
    Bytes(&'a [u8]),
    /// Of a fixed size: statistics have none, but could.
    Fixed,
}

/// Every field of a message, by its number.
fn fields(mut bytes: &[u8]) -> Result<Vec<(u64, Value<'_>)>, StatsError> {
    let mut found = Vec::new();
    while !bytes.is_empty() {
        let (key, rest) = variable(bytes)?;
        let (field, value, rest) = match (key >> 3, key & 7) {
            (field, 0) => {
                let (number, rest) = variable(rest)?;
                (field, Value::Number(number), rest)
            }
            (field, 2) => {
                let (length, rest) = variable(rest)?;
                let (value, rest) = rest.split_at_checked(length as usize).ok_or(StatsError::Short)?;
                (field, Value::Bytes(value), rest)
            }
            (field, 1) => (field, Value::Fixed, rest.get(8..).ok_or(StatsError::Short)?),
            (field, 5) => (field, Value::Fixed, rest.get(4..).ok_or(StatsError::Short)?),
            (field, kind) => return Err(StatsError::Type(field, kind)),
        };
        found.push((field, value));
        bytes = rest;
    }
    Ok(found)
}

/// A number in groups of seven bits, the lowest first.
fn variable(bytes: &[u8]) -> Result<(u64, &[u8]), StatsError> {
    let mut number = 0;
    for (place, byte) in bytes.iter().enumerate().take(10) {
        number |= u64::from(byte & 0x7f).wrapping_shl(7 * place as u32);
        if byte & 0x80 == 0 {
            return Ok((number, &bytes[place + 1..]));
        }
    }
    Err(StatsError::Short)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn file(kind: u8, message: &[u8]) -> Vec<u8> {
        let mut file = [AUXILIARY.to_le_bytes(), STATISTICS.to_le_bytes()].concat();
        file.extend((message.len() as u32 + 2).to_le_bytes());
        file.extend([kind << 3 | 2, message.len() as u8]);
        file.extend(message);
        file
    }

    #[test]
    fn numbers_of_a_dump_and_a_restore() {
        let dump =
            file(1, &[0x08, 5, 0x10, 0xac, 0x02, 0x18, 7, 0x20, 8, 0x28, 99, 0x38, 4, 0x61, 0, 0, 0, 0, 0, 0, 0, 0]);
        let expected = DumpStats { freezing_us: 5, frozen_us: 300, memory_us: 7, write_us: 8, pages: 4 };
        assert_eq!(DumpStats::parse(&dump), Ok(expected));
        assert_eq!(RestoreStats::parse(&dump), Err(StatsError::Missing));
        let restore = file(2, &[0x18, 1, 0x20, 2, 0x28, 3]);
        let expected = RestoreStats { forking_us: 1, restore_us: 2, pages: 3 };
        assert_eq!(RestoreStats::parse(&restore), Ok(expected));
    }

    #[test]
    fn what_is_none_says_why() {
        assert_eq!(DumpStats::parse(b"abc"), Err(StatsError::Short));
        assert_eq!(DumpStats::parse(&[0; 12]), Err(StatsError::Magic(0, 0)));
        let good = file(1, &[0x08, 5]);
        assert_eq!(DumpStats::parse(&good[..good.len() - 1]), Err(StatsError::Short));
        assert_eq!(DumpStats::parse(&file(1, &[0x0b])), Err(StatsError::Type(1, 3)));
    }

    proptest! {
        #[test]
        fn whatever_the_bytes_are_nothing_panics(bytes in prop::collection::vec(any::<u8>(), 0..64)) {
            let _ = (DumpStats::parse(&bytes), RestoreStats::parse(&bytes));
            let _ = DumpStats::parse(&file(1, &bytes));
        }
    }
}
