//! Hashes of files that were computed before, by the file's version: kept for this process, and by a file in the state
//! directory for the next ones. Whatever is wrong with that file, it is as good as none.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, SystemTime};

use nix::sys::statfs::fstatfs;

/// What tells that a file has not been written since it was hashed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Version([u64; WORDS]);

/// Device, file system, inode, size; seconds and nanoseconds of the last change of the contents, and of the inode.
const WORDS: usize = 8;
const HASH: usize = 32;
const ENTRY: usize = WORDS * 8 + HASH;

/// How long a file must have been left alone. A file that is mapped can be written without another time of change until
/// its dirty pages have been written back, which takes the kernel 35 seconds at most (`vm.dirty_expire_centisecs`).
const QUIET: Duration = Duration::from_secs(60);

/// File systems of disks, whose files have another time of change with each change: ext2 to ext4, XFS, btrfs, F2FS, and an
/// overlay of such. Images made to be reproducible, memory, and what other hosts write to have not.
const TRUSTED: [i64; 5] = [0xef53, 0x5846_5342, 0x9123_683e, 0xf2f5_2010, 0x794c_7630];

impl Version {
    /// The version of an open file, if its hash may be kept.
    pub(super) fn of(file: &File) -> Option<Version> {
        let system = fstatfs(file).ok().filter(|system| TRUSTED.contains(&system.filesystem_type().0))?;
        let facts = file.metadata().ok()?;
        is_quiet(facts.ctime(), SystemTime::now()).then_some(())?;
        // The identifier has no accessor; as text it is as good.
        let name = crc32fast::hash(format!("{:?}", system.filesystem_id()).as_bytes());
        let (modified, changed) = ((facts.mtime(), facts.mtime_nsec()), (facts.ctime(), facts.ctime_nsec()));
        let times = [modified.0, modified.1, changed.0, changed.1].map(|time| time as u64);
        let [a, b, c, d] = times;
        Some(Version([facts.dev(), name.into(), facts.ino(), facts.size(), a, b, c, d]))
    }
}

fn is_quiet(changed: i64, now: SystemTime) -> bool {
    let changed = u64::try_from(changed).ok().and_then(|s| SystemTime::UNIX_EPOCH.checked_add(Duration::from_secs(s)));
    changed.and_then(|changed| now.duration_since(changed).ok()).is_some_and(|ago| ago > QUIET)
}

/// Hashes that are known.
#[derive(Debug, Default)]
pub struct HashCache {
    known: HashMap<Version, Known>,
    /// Whether it has something that the file has not.
    grown: bool,
    loaded: bool,
}

#[derive(Clone, Copy, Debug)]
struct Known {
    blake3: [u8; HASH],
    /// Whether this process has asked for it.
    used: bool,
}

/// Kept at most: those that were used last.
const MOST: usize = 4096;
/// The name of the file, which is for root alone.
const FILE: &str = "hashes";
const MAGIC: &[u8; 16] = b"zap hashes v1\0\0\0";

/// The hashes that this process knows.
static KNOWN: OnceLock<Mutex<HashCache>> = OnceLock::new();

fn cache() -> MutexGuard<'static, HashCache> {
    // A thread that died while it held the lock left a whole map behind: entries are added one by one.
    KNOWN.get_or_init(Mutex::default).lock().unwrap_or_else(PoisonError::into_inner)
}

impl HashCache {
    /// Adds, once, what earlier processes kept in that directory.
    pub fn load(directory: &Path) {
        let mut cache = cache();
        if !std::mem::replace(&mut cache.loaded, true) {
            cache.add(read(directory).unwrap_or_default());
        }
    }

    /// Keeps what this process knows in that directory, if it learned something. Of two that do so at once, one wins.
    pub fn save(directory: &Path) -> io::Result<()> {
        let mut cache = cache();
        if !std::mem::take(&mut cache.grown) {
            return Ok(());
        }
        cache.add(read(directory).unwrap_or_default());
        let bytes = to_bytes(&boot()?, &cache.entries());
        drop(cache);
        let beside = directory.join(format!("{FILE}.new-{}", std::process::id()));
        let _ = fs::remove_file(&beside);
        let mut options = File::options();
        let file = options.write(true).create_new(true).mode(0o600).custom_flags(libc::O_NOFOLLOW).open(&beside);
        let written = file.and_then(|mut file| file.write_all(&bytes));
        written.and_then(|()| fs::rename(&beside, directory.join(FILE))).inspect_err(|_| {
            let _ = fs::remove_file(&beside);
        })
    }

    fn add(&mut self, entries: Vec<(Version, [u8; HASH])>) {
        for (version, blake3) in entries {
            self.known.entry(version).or_insert(Known { blake3, used: false });
        }
    }

    /// Those to keep: the used ones before the others.
    fn entries(&self) -> Vec<(Version, [u8; HASH])> {
        let mut all: Vec<_> = self.known.iter().collect();
        all.sort_by_key(|(_, known)| !known.used);
        all.into_iter().take(MOST).map(|(version, known)| (*version, known.blake3)).collect()
    }
}

/// The hash of that version, if it is known.
pub(super) fn known(version: Version) -> Option<[u8; HASH]> {
    let mut cache = cache();
    let known = cache.known.get_mut(&version)?;
    known.used = true;
    Some(known.blake3)
}

/// Remembers the hash of a version.
pub(super) fn learn(version: Version, blake3: [u8; HASH]) {
    let mut cache = cache();
    cache.known.insert(version, Known { blake3, used: true });
    cache.grown = true;
}

/// Devices have other numbers after the host has booted again.
fn boot() -> io::Result<[u8; HASH]> {
    Ok(*blake3::hash(&fs::read("/proc/sys/kernel/random/boot_id")?).as_bytes())
}

fn read(directory: &Path) -> Option<Vec<(Version, [u8; HASH])>> {
    let mut options = File::options();
    let file = options.read(true).custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK).open(directory.join(FILE)).ok()?;
    let facts = file.metadata().ok()?;
    let ours = facts.is_file() && facts.uid() == nix::unistd::geteuid().as_raw() && facts.mode() & 0o077 == 0;
    let mut bytes = Vec::new();
    ours.then_some(file)?.take((MAGIC.len() + 2 * HASH + MOST * ENTRY) as u64).read_to_end(&mut bytes).ok()?;
    from_bytes(&boot().ok()?, &bytes)
}

/// The beginning, the boot of the host, the entries, and the hash of all of that.
fn to_bytes(boot: &[u8; HASH], entries: &[(Version, [u8; HASH])]) -> Vec<u8> {
    let mut bytes = [&MAGIC[..], boot].concat();
    for (version, blake3) in entries {
        bytes.extend(version.0.iter().flat_map(|word| word.to_le_bytes()));
        bytes.extend(blake3);
    }
    let sum = blake3::hash(&bytes);
    bytes.extend(sum.as_bytes());
    bytes
}

fn from_bytes(boot: &[u8; HASH], bytes: &[u8]) -> Option<Vec<(Version, [u8; HASH])>> {
    let (body, sum) = bytes.split_last_chunk::<HASH>()?;
    let entries = body.strip_prefix(MAGIC)?.strip_prefix(boot)?;
    if blake3::hash(body) != *sum || entries.len() % ENTRY != 0 {
        return None;
    }
    let entry = |entry: &[u8]| {
        let (words, blake3) = entry.split_last_chunk::<HASH>()?;
        let mut version = [0; WORDS];
        for (word, bytes) in version.iter_mut().zip(words.chunks_exact(8)) {
            *word = u64::from_le_bytes(bytes.try_into().ok()?);
        }
        Some((Version(version), *blake3))
    };
    entries.chunks_exact(ENTRY).map(entry).collect()
}

/// Reads some bytes as the file of hashes, of this boot.
pub(super) fn try_hashes(bytes: &[u8]) {
    let boot = bytes.get(MAGIC.len()..).and_then(<[u8]>::first_chunk).copied().unwrap_or_default();
    drop(from_bytes(&boot, bytes));
}

#[cfg(test)]
mod tests {
    use super::*;

    const BOOT: [u8; HASH] = [7; HASH];

    fn entries(count: u64) -> Vec<(Version, [u8; HASH])> {
        (0..count).map(|n| (Version([n; WORDS]), [n as u8; HASH])).collect()
    }

    #[test]
    fn what_is_damaged_or_of_another_boot_is_as_good_as_none() {
        let bytes = to_bytes(&BOOT, &entries(3));
        assert_eq!(from_bytes(&BOOT, &bytes), Some(entries(3)));
        assert_eq!(from_bytes(&[8; HASH], &bytes), None);
        for cut in 0..bytes.len() {
            assert_eq!(from_bytes(&BOOT, &bytes[..cut]), None);
        }
        for place in 0..bytes.len() {
            let mut flipped = bytes.clone();
            flipped[place] ^= 1;
            assert_eq!(from_bytes(&BOOT, &flipped), None);
        }
    }

    #[test]
    fn no_more_is_kept_than_there_is_room_for_and_what_is_used_stays() {
        let mut cache = HashCache::default();
        cache.add(entries(MOST as u64 + 10));
        let used = Version([MOST as u64 + 9; WORDS]);
        cache.known.get_mut(&used).unwrap().used = true;
        let kept = cache.entries();
        assert_eq!((kept.len(), kept[0].0), (MOST, used));
    }

    #[test]
    fn a_file_that_changed_a_moment_ago_is_not_trusted() {
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000);
        assert!(is_quiet(1_000_000 - 61, now));
        assert!(!is_quiet(1_000_000 - 60, now) && !is_quiet(1_000_001, now) && !is_quiet(-1, now));
        let directory = tempfile::tempdir().unwrap();
        fs::write(directory.path().join("fresh"), "fresh").unwrap();
        assert_eq!(Version::of(&File::open(directory.path().join("fresh")).unwrap()), None);
    }

    #[test]
    fn the_next_process_finds_them_and_others_do_not_read_them() {
        let directory = tempfile::tempdir().unwrap();
        let entry = entries(200).pop().unwrap();
        learn(entry.0, entry.1);
        HashCache::save(directory.path()).unwrap();
        assert!(read(directory.path()).unwrap().contains(&entry));
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 1);
        let path = directory.path().join(FILE);
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o600);
        fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o644)).unwrap();
        assert_eq!(read(directory.path()), None);
    }
}
