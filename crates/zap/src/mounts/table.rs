//! `/proc/PID/mountinfo`, whole. Bytes in, nothing opened.

/// A line of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Its number.
    pub id: u64,
    /// That of the mount on which it is.
    pub parent: u64,
    /// The device of its file system: `0:31`.
    pub device: Vec<u8>,
    /// The directory of its file system that it shows.
    pub root: Vec<u8>,
    /// Where it is.
    pub point: Vec<u8>,
    /// Its own options.
    pub options: Vec<String>,
    /// Propagation: `shared:1`, `master:2`, `unbindable`.
    pub propagation: Vec<String>,
    /// `tmpfs`.
    pub kind: String,
    /// What was mounted.
    pub source: Vec<u8>,
    /// The file system's options.
    pub super_options: Vec<String>,
}

impl Entry {
    /// Whether it is the same mount, made as it was.
    pub fn is_same(&self, other: &Entry) -> bool {
        (self.id, self.parent, &self.device, &self.root, &self.point)
            == (other.id, other.parent, &other.device, &other.root, &other.point)
    }

    /// Whether it, or its file system, is read-only.
    pub fn is_read_only(&self) -> bool {
        self.options.iter().chain(&self.super_options).any(|option| option == "ro")
    }

    /// Its flags, as `mount_setattr(2)` has them.
    pub fn attributes(&self) -> u64 {
        let flag = |option: &String| match option.as_str() {
            "ro" => 0x1,
            "nosuid" => 0x2,
            "nodev" => 0x4,
            "noexec" => 0x8,
            "noatime" => 0x10,
            "nodiratime" => 0x80,
            "nosymfollow" => 0x20_0000,
            _ => 0,
        };
        // Access times relative to changes are what there is unless something is said.
        let strict = !self.options.iter().any(|option| option == "relatime" || option == "noatime");
        self.options.iter().map(flag).fold(if strict { 0x20 } else { 0 }, |all, one| all | one)
    }

    /// Whether something of that kind is said of its propagation: `shared`, `master`, `unbindable`.
    pub fn propagates(&self, kind: &str) -> bool {
        self.propagation.iter().any(|field| field.starts_with(kind))
    }

    /// Whether one of `others` hears of what is mounted on it, or it hears of what is mounted elsewhere.
    pub fn has_peers<'e>(&self, mut others: impl Iterator<Item = &'e Entry>) -> bool {
        let is_peer =
            |other: &Entry| other.id != self.id && self.propagation.iter().any(|p| other.propagation.contains(p));
        self.propagates("master") || self.propagates("shared") && others.any(is_peer)
    }

    /// The options of a file system that make it what it is.
    pub fn file_system_options(&self) -> Vec<(String, Option<String>)> {
        let is_own = |option: &&String| !["rw", "ro", "seclabel", "inode64", "relatime"].contains(&option.as_str());
        let split = |option: &String| match option.split_once('=') {
            Some((key, value)) => (key.to_owned(), Some(value.to_owned())),
            None => (option.clone(), None),
        };
        self.super_options.iter().filter(is_own).map(split).collect()
    }
}

/// The lines that make sense.
pub fn parse(text: &[u8]) -> Vec<Entry> {
    text.split(|b| *b == b'\n').filter_map(line).collect()
}

fn line(line: &[u8]) -> Option<Entry> {
    let fields: Vec<&[u8]> = line.split(|b| *b == b' ').collect();
    let dash = fields.iter().skip(6).position(|field| *field == b"-")? + 6;
    let number = |at: usize| std::str::from_utf8(fields[at]).ok()?.parse().ok();
    let list = |field: &[u8]| String::from_utf8_lossy(field).split(',').map(str::to_owned).collect();
    Some(Entry {
        id: number(0)?,
        parent: number(1)?,
        device: fields[2].to_vec(),
        root: unescape(fields[3]),
        point: unescape(fields[4]),
        options: list(fields[5]),
        propagation: fields[6..dash].iter().map(|field| String::from_utf8_lossy(field).into_owned()).collect(),
        kind: String::from_utf8_lossy(fields.get(dash + 1)?).into_owned(),
        source: unescape(fields.get(dash + 2)?),
        super_options: list(fields.get(dash + 3)?),
    })
}

/// Undoes the kernel's `\ooo` for blanks and backslashes.
fn unescape(text: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(text.len());
    let mut rest = text;
    while let [first, tail @ ..] = rest {
        let octal = |t: &[u8]| u8::from_str_radix(std::str::from_utf8(t.get(..3)?).ok()?, 8).ok();
        match (first, octal(tail)) {
            (b'\\', Some(byte)) => {
                out.push(byte);
                rest = &tail[3..];
            }
            _ => {
                out.push(*first);
                rest = tail;
            }
        }
    }
    out
}

/// A path below another: what comes behind it, with its slash; the whole of it below `/`.
pub(crate) fn below<'p>(path: &'p [u8], above: &[u8]) -> Option<&'p [u8]> {
    let above = above.strip_suffix(b"/").unwrap_or(above);
    path.strip_prefix(above).filter(|rest| rest.is_empty() || rest[0] == b'/')
}

/// One path behind another.
pub(crate) fn join(above: &[u8], rest: &[u8]) -> Vec<u8> {
    let above = above.strip_suffix(b"/").unwrap_or(above);
    let joined = [above, rest].concat();
    if joined.is_empty() { b"/".to_vec() } else { joined }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_read_whole() {
        let text = b"90 27 0:40 /in\\040side /mnt rw,nosuid,relatime shared:3 - tmpfs none rw,size=4k,mode=755\nbad\n";
        let entries = parse(text);
        let [entry] = &entries[..] else { panic!("{entries:?}") };
        assert_eq!((entry.id, entry.parent, &entry.root[..]), (90, 27, &b"/in side"[..]));
        assert_eq!((entry.attributes(), &entry.propagation[..]), (2, &["shared:3".to_owned()][..]));
        let options = entry.file_system_options();
        assert_eq!(options[0], ("size".into(), Some("4k".into())));
    }

    #[test]
    fn paths_are_split_at_slashes() {
        assert_eq!(below(b"/a/b", b"/a"), Some(&b"/b"[..]));
        assert_eq!(below(b"/ab", b"/a"), None);
        assert_eq!(below(b"/a", b"/"), Some(&b"/a"[..]));
        assert_eq!(join(b"/", b"/x"), b"/x");
        assert_eq!(join(b"/", b""), b"/");
    }
}
