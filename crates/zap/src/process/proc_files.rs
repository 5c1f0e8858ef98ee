//! Parsers of `/proc/PID/stat` and `status`. They take bytes and open nothing; names in them are hostile.

use std::ops::Range;

use crate::ids::PodPid;

/// What we use of `/proc/PID/stat`, as the PID namespace of that `/proc` numbers things.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stat {
    /// `comm`, raw.
    pub command: Vec<u8>,
    /// State letter: `R`, `S`, `Z` …
    pub state: u8,
    /// Parent.
    pub parent: PodPid,
    /// Process group.
    pub group: PodPid,
    /// Session.
    pub session: PodPid,
    /// Device number of the controlling terminal; 0 for none.
    pub terminal: u32,
    /// Foreground group of that terminal; -1 for none.
    pub foreground: i32,
    /// What the kernel notes of it (`PF_…`).
    pub flags: u64,
    /// Nice value.
    pub nice: i32,
    /// The signal that tells the parent of its end; 0 for none.
    pub exit_signal: i32,
    /// Wait status of a zombie (field 52).
    pub exit_code: i32,
}

/// Parses `/proc/PID/stat`.
pub fn parse_stat(bytes: &[u8]) -> Option<Stat> {
    let open = bytes.iter().position(|b| *b == b'(')?;
    let close = bytes.iter().rposition(|b| *b == b')')?;
    let command = bytes.get(open + 1..close)?.to_vec();
    let rest = std::str::from_utf8(bytes.get(close + 1..)?).ok()?;
    let fields: Vec<&str> = rest.split_ascii_whitespace().collect();
    // fields[0] is field 3 of proc(5).
    let number = |field: usize| fields.get(field - 3)?.parse::<i64>().ok();
    Some(Stat {
        command,
        state: *fields.first()?.as_bytes().first()?,
        parent: PodPid(number(4)? as i32),
        group: PodPid(number(5)? as i32),
        session: PodPid(number(6)? as i32),
        terminal: number(7)? as u32,
        foreground: number(8)? as i32,
        flags: number(9)? as u64,
        nice: number(19)? as i32,
        exit_signal: number(38)? as i32,
        exit_code: number(52)? as i32,
    })
}

/// `/proc/PID/status`, by its labels.
#[derive(Clone, Debug)]
pub struct Status {
    bytes: Vec<u8>,
    /// Where labels and what is behind them are.
    lines: Vec<(Range<usize>, Range<usize>)>,
}

impl Status {
    /// Wraps the bytes of the file.
    pub fn new(bytes: Vec<u8>) -> Status {
        let (mut lines, mut start) = (Vec::with_capacity(64), 0);
        for line in bytes.split(|b| *b == b'\n') {
            if let Some(colon) = line.iter().position(|b| *b == b':') {
                lines.push((start..start + colon, start + colon + 1..start + line.len()));
            }
            start += line.len() + 1;
        }
        Status { bytes, lines }
    }

    /// The text behind `label:`, trimmed.
    pub fn field(&self, label: &str) -> Option<&str> {
        let (_, value) = self.lines.iter().find(|(name, _)| self.bytes[name.clone()] == *label.as_bytes())?;
        std::str::from_utf8(&self.bytes[value.clone()]).ok().map(str::trim)
    }

    /// The numbers behind `label:`.
    pub fn numbers(&self, label: &str) -> Vec<u32> {
        self.field(label)
            .map_or(Vec::new(), |text| text.split_ascii_whitespace().filter_map(|n| n.parse().ok()).collect())
    }

    /// The hexadecimal mask behind `label:`.
    pub fn mask(&self, label: &str) -> u64 {
        self.field(label).and_then(|text| u64::from_str_radix(text, 16).ok()).unwrap_or(0)
    }

    /// The size behind `label:`, in kB; 0 if there is none.
    pub fn kilobytes(&self, label: &str) -> u64 {
        self.field(label).and_then(|text| text.split_ascii_whitespace().next()?.parse().ok()).unwrap_or(0)
    }

    /// The file mode creation mask.
    pub fn umask(&self) -> u32 {
        self.field("Umask").and_then(|mask| u32::from_str_radix(mask, 8).ok()).unwrap_or(0o22)
    }

    /// The last `count` numbers behind `label:`.
    pub fn innermost(&self, label: &str, count: usize) -> Vec<i32> {
        let all = self.numbers(label);
        all[all.len().saturating_sub(count)..].iter().map(|number| *number as i32).collect()
    }

    /// The process's numbers in each PID namespace from ours inwards.
    pub fn namespace_pids(&self) -> Vec<i32> {
        self.numbers("NSpid").into_iter().map(|n| n as i32).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_may_hold_anything() {
        let line = b"7 (a) Z (\n) S 1 7 7 34816 9 4194304 1 2 3 4 5 6 7 8 20 -5 1 0 100 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 17 1 0 0 0 0 0 0 0 0 0 0 0 0 256";
        let stat = parse_stat(line).unwrap();
        assert_eq!(stat.command, b"a) Z (\n");
        assert_eq!((stat.state, stat.parent, stat.group, stat.session), (b'S', PodPid(1), PodPid(7), PodPid(7)));
        assert_eq!((stat.terminal, stat.foreground, stat.nice, stat.exit_code), (34816, 9, -5, 256));
    }

    #[test]
    fn too_short_is_nothing() {
        assert_eq!(parse_stat(b"7 (a) S 1 7"), None);
        assert_eq!(parse_stat(b""), None);
    }

    #[test]
    fn status_fields() {
        let status = Status::new(b"Name:\ta\nNSpid:\t512\t7\nSigCgt:\t0000000000010002\nGroups:\t \n".to_vec());
        assert_eq!(status.namespace_pids(), [512, 7]);
        assert_eq!(status.mask("SigCgt"), 0x10002);
        assert!(status.numbers("Groups").is_empty());
        assert_eq!(status.field("Sig"), None);
    }
}
