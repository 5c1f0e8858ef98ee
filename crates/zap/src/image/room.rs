//! How much of a held pod may be gathered in memory: as much as the host has to spare.

use std::fs;

/// Bytes after which it is looked again how much memory there is.
const STEP: u64 = 64 << 20;
/// The part of the host's memory that is left to others.
const SPARED: u64 = 8;

/// Counts what is gathered in memory.
#[derive(Debug, Default)]
pub(crate) struct Room {
    since: u64,
}

impl Room {
    /// Whether memory is scarce, now that so many more bytes were gathered.
    pub(crate) fn is_scarce_after(&mut self, bytes: u64) -> bool {
        self.since += bytes;
        if self.since < STEP {
            return false;
        }
        self.since = 0;
        fs::read_to_string("/proc/meminfo").is_ok_and(|text| is_scarce(&text))
    }
}

pub(super) fn is_scarce(meminfo: &str) -> bool {
    let field = |label| {
        let line = meminfo.lines().find_map(|line| line.strip_prefix(label))?;
        line.split_whitespace().next()?.parse::<u64>().ok()
    };
    match (field("MemAvailable:"), field("MemTotal:")) {
        (Some(available), Some(total)) => available < total / SPARED,
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_eighth_is_left_to_others() {
        assert!(is_scarce("MemTotal:       8000 kB\nMemFree: 10 kB\nMemAvailable:    999 kB\n"));
        assert!(!is_scarce("MemTotal:       8000 kB\nMemFree: 10 kB\nMemAvailable:    1000 kB\n"));
        assert!(!is_scarce(""));
    }

    #[test]
    fn it_is_looked_after_a_step() {
        let mut room = Room::default();
        assert!(!room.is_scarce_after(STEP - 1));
        assert_eq!(room.since, STEP - 1);
        room.is_scarce_after(1);
        assert_eq!(room.since, 0);
    }
}
