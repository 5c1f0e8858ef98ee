//! Settings of a network namespace below `/proc/sys/net`: found, and opened where that is possible, while the pod runs.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::sys::mount;

const ROOT: &str = "/proc/sys/net";
const OWNER_WRITES: u32 = 0o200;
/// Longer than any but lists of ports.
const MOST: usize = 4096;

/// A setting.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Setting {
    /// Its path below `/proc/sys/net`.
    pub name: String,
    /// As it reads.
    pub value: String,
    /// Whether somebody has set it: a new namespace has another value.
    pub set: bool,
}

/// The values of settings, by name.
pub(super) type Values = HashMap<String, String>;

/// The settings of a namespace, those open for which there was room.
#[derive(Debug, Default)]
pub(super) struct Settings(Vec<(String, Option<File>)>);

impl Settings {
    /// Those of the caller's namespace that can be read and written. `room`: how many may still be kept open.
    pub(super) fn open(room: &mut usize) -> io::Result<Settings> {
        let found = match Settings::find(*room) {
            Err(e) if no_more_files(&e) => {
                *room = 0;
                Settings::find(0)?
            }
            other => other?,
        };
        *room -= found.0.iter().filter(|(_, file)| file.is_some()).count();
        Ok(found)
    }

    fn find(mut room: usize) -> io::Result<Settings> {
        let mut found = Vec::new();
        walk(Path::new(ROOT), &mut |name, path| {
            // Some can only be read, and some only be written: they are no settings. An open one is asked quicker.
            let is_setting = |metadata: fs::Metadata| metadata.mode() & OWNER_WRITES != 0;
            if room == 0 {
                found.extend(is_setting(fs::metadata(path)?).then_some((name, None)));
            } else if let Some(file) = open_one(path)?
                && is_setting(file.metadata()?)
            {
                room -= 1;
                found.push((name, Some(file)));
            }
            Ok(())
        })?;
        Ok(Settings(found))
    }

    /// Their values now, of interfaces that are still there. Those that are not open are the caller's namespace's.
    pub(super) fn read(&self) -> io::Result<Values> {
        let (mut values, mut bytes) = (Values::new(), vec![0; MOST]);
        for (name, file) in &self.0 {
            let value = match file {
                Some(file) => read(file, &mut bytes),
                None => open_one(&Path::new(ROOT).join(name))?.and_then(|file| read(&file, &mut bytes)),
            };
            values.extend(value.map(|value| (name.clone(), value)));
        }
        Ok(values)
    }

    /// Whether those of that interface are among them.
    pub(super) fn knows(&self, interface: &str) -> bool {
        let name = format!("ipv4/conf/{interface}/");
        self.0.iter().any(|(known, _)| known.starts_with(&name))
    }
}

/// A setting, unless it is gone or nobody may read it.
fn open_one(path: &Path) -> io::Result<Option<File>> {
    match File::open(path) {
        Err(e) if no_more_files(&e) => Err(e),
        other => Ok(other.ok()),
    }
}

fn no_more_files(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EMFILE | libc::ENFILE))
}

/// A secret that nobody has set cannot be read.
fn read(file: &File, bytes: &mut Vec<u8>) -> Option<String> {
    let mut length = 0;
    loop {
        match file.read_at(&mut bytes[length..], length as u64).ok()? {
            0 => return Some(String::from_utf8_lossy(&bytes[..length]).trim_end().to_owned()),
            more => length += more,
        }
        // A short one has been read as a whole.
        if length < MOST / 2 {
            return Some(String::from_utf8_lossy(&bytes[..length]).trim_end().to_owned());
        }
        bytes.resize(length + MOST, 0);
    }
}

fn walk(directory: &Path, visit: &mut dyn FnMut(String, &Path) -> io::Result<()>) -> io::Result<()> {
    for entry in fs::read_dir(directory)? {
        let entry = entry?;
        let path = entry.path();
        let seen = if entry.file_type()?.is_dir() {
            walk(&path, visit)
        } else {
            let name = path.strip_prefix(ROOT).unwrap_or(&path).to_string_lossy().into_owned();
            visit(name, &path)
        };
        match seen {
            // Of an interface that went meanwhile.
            Err(e) if e.kind() == io::ErrorKind::NotFound => {}
            other => other?,
        }
    }
    Ok(())
}

/// What of `values` is to be in an image: everything, or what differs from a `fresh` namespace.
pub(super) fn kept(values: &Values, fresh: &Values, everything: bool) -> Vec<Setting> {
    let mut kept: Vec<Setting> = values
        .iter()
        .filter(|(name, _)| !is_elsewhere(name))
        .map(|(name, value)| Setting { set: is_set(name, value, fresh), name: name.clone(), value: value.clone() })
        .filter(|setting| everything || setting.set)
        .collect();
    kept.sort_by(|a, b| (rank(&a.name), &a.name).cmp(&(rank(&b.name), &b.name)));
    kept
}

/// Whether an interface itself has it.
fn is_elsewhere(name: &str) -> bool {
    name.ends_with("/addr_gen_mode") && !is_of_all(name)
}

fn is_of_all(name: &str) -> bool {
    ["/conf/all/", "/conf/default/", "/neigh/default/"].iter().any(|all| name.contains(all))
}

fn is_set(name: &str, value: &String, fresh: &Values) -> bool {
    match fresh.get(name) {
        Some(usual) => usual != value,
        // Another interface than `lo`: it had those of all at first, but for the size of its packets.
        None if name.ends_with("/mtu") => false,
        None => {
            let usual = of_interface(name).and_then(|(before, after)| fresh.get(&format!("{before}default/{after}")));
            usual.is_some_and(|usual| usual != value)
        }
    }
}

/// What comes before and after the name of an interface.
fn of_interface(name: &str) -> Option<(&str, &str)> {
    let at = ["/conf/", "/neigh/"].iter().find_map(|kind| Some(name.find(kind)? + kind.len()))?;
    let (before, rest) = name.split_at(at);
    Some((before, rest.split_once('/')?.1))
}

/// Some change others when they are set: those come first.
fn rank(name: &str) -> usize {
    match name {
        "ipv4/ip_forward" => 0,
        _ if name.contains("/conf/all/") => 1,
        _ if is_of_all(name) => 2,
        _ => 3,
    }
}

/// Whether a name leads to a setting.
fn is_straight(name: &str) -> bool {
    name.split('/').all(|part| !part.is_empty() && part != "." && part != "..")
}

/// Sets what is not so in the caller's namespace.
pub(super) fn restart(all: &[Setting]) -> io::Result<()> {
    if all.is_empty() {
        return Ok(());
    }
    // The pod's own /proc may be covered.
    let proc = mount::new_mount(c"proc", &[], 0)?;
    all.iter().try_for_each(|setting| restart_one(&proc, setting))
}

/// Sets what the kernel has changed since, when it switched interfaces on.
pub(super) fn restart_sizes(all: &[Setting]) -> io::Result<()> {
    let sizes: Vec<_> = all.iter().filter(|setting| setting.name.ends_with("/mtu")).cloned().collect();
    restart(&sizes)
}

fn restart_one(proc: &OwnedFd, setting: &Setting) -> io::Result<()> {
    let failed = |e: io::Error| io::Error::new(e.kind(), format!("net/{}: {e}", setting.name));
    if !is_straight(&setting.name) {
        return Err(failed(io::ErrorKind::InvalidInput.into()));
    }
    let path = format!("/proc/self/fd/{}/sys/net/{}", proc.as_raw_fd(), setting.name);
    if fs::read_to_string(&path).is_ok_and(|now| now.trim_end() == setting.value) {
        return Ok(());
    }
    match fs::write(&path, &setting.value) {
        // What nobody has set is the host's choice: another may have another.
        Err(_) if !setting.set => Ok(()),
        other => other.map_err(failed),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_lead_nowhere_else() {
        assert!(is_straight("ipv4/conf/eth0.7/arp_ignore"));
        for name in ["ipv4/../../kernel/core_pattern", "/kernel/core_pattern", "", "ipv4//x", "."] {
            assert!(!is_straight(name), "{name}");
        }
    }

    #[test]
    fn what_changes_others_comes_first_and_what_nobody_set_is_left() {
        let values = |all: &[(&str, &str)]| -> Values {
            all.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
        };
        let fresh = values(&[("ipv4/ip_forward", "0"), ("ipv4/conf/default/x", "1"), ("core/somaxconn", "4096")]);
        let now = values(&[
            ("core/somaxconn", "4096"),
            ("ipv4/conf/eth0/x", "2"),
            ("ipv4/conf/lo/x", "1"),
            ("ipv6/conf/eth0/mtu", "1500"),
            ("ipv4/conf/default/x", "3"),
            ("ipv4/ip_forward", "1"),
        ]);
        let names = |everything| -> Vec<String> {
            kept(&now, &fresh, everything).into_iter().map(|setting| setting.name).collect()
        };
        assert_eq!(names(false), ["ipv4/ip_forward", "ipv4/conf/default/x", "ipv4/conf/eth0/x"]);
        assert_eq!(names(true).len(), now.len());
    }
}
