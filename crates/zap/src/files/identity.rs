//! What a file of the root was like, so that a restart can tell whether it still is.

use std::collections::HashMap;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, OnceLock, PoisonError};

use serde::{Deserialize, Serialize};

use crate::error::RebuildError;

/// Size and hash of a file that is not in the image.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileIdentity {
    /// Size in bytes.
    pub size: u64,
    /// BLAKE3 of its contents.
    #[serde(with = "serde_bytes")]
    pub blake3: [u8; 32],
}

/// What tells that a file has not been written since it was hashed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
struct Version {
    device: u64,
    inode: u64,
    size: u64,
    modified: (i64, i64),
    changed: (i64, i64),
}

/// Hashes of files that were computed before, by the file's version.
#[derive(Debug, Default)]
pub struct HashCache {
    known: HashMap<Version, [u8; 32]>,
    grown: bool,
}

/// The hashes that this process knows.
static KNOWN: OnceLock<Mutex<HashCache>> = OnceLock::new();

impl HashCache {
    /// Adds what an earlier process kept in `path`; a file that is missing or damaged is as good as none.
    pub fn load(path: &Path) {
        let Ok(bytes) = std::fs::read(path) else { return };
        if let Ok(entries) = crate::image::decode::<Vec<(Version, FileIdentity)>>(&bytes) {
            let mut cache = cache();
            cache.known.extend(entries.into_iter().map(|(v, i)| (v, i.blake3)));
        }
    }

    /// Keeps what this process knows in `path`, if it learned something. Written beside and renamed.
    pub fn save(path: &Path) -> io::Result<()> {
        let bytes = {
            let mut cache = cache();
            if !std::mem::take(&mut cache.grown) {
                return Ok(());
            }
            let entry = |(v, h): (&Version, &[u8; 32])| (*v, FileIdentity { size: v.size, blake3: *h });
            crate::image::encode(&cache.known.iter().map(entry).collect::<Vec<_>>())
        };
        let beside = path.with_extension(format!("new-{}", std::process::id()));
        std::fs::write(&beside, bytes)?;
        std::fs::rename(&beside, path)
    }
}

fn cache() -> std::sync::MutexGuard<'static, HashCache> {
    // A thread that died while it held the lock left a whole map behind: entries are added one by one.
    KNOWN.get_or_init(Mutex::default).lock().unwrap_or_else(PoisonError::into_inner)
}

/// The identity of the file at `path`; read only if this version of it has not been hashed before.
pub fn identity_of(path: &Path) -> io::Result<FileIdentity> {
    let mut file = std::fs::File::open(path)?;
    let facts = file.metadata()?;
    let version = Version {
        device: facts.dev(),
        inode: facts.ino(),
        size: facts.size(),
        modified: (facts.mtime(), facts.mtime_nsec()),
        changed: (facts.ctime(), facts.ctime_nsec()),
    };
    if let Some(known) = cache().known.get(&version) {
        return Ok(FileIdentity { size: version.size, blake3: *known });
    }
    let mut hasher = blake3::Hasher::new();
    hasher.update_reader(&mut file)?;
    let blake3 = *hasher.finalize().as_bytes();
    let mut cache = cache();
    cache.known.insert(version, blake3);
    cache.grown = true;
    Ok(FileIdentity { size: version.size, blake3 })
}

/// Where a file of the pod's lower root is on the host.
pub(crate) fn in_root(root: &Path, path: &[u8]) -> PathBuf {
    root.join(super::reopen::as_path(path.strip_prefix(b"/").unwrap_or(path)))
}

/// Refuses a file of the root that is not what it was.
pub(crate) fn verify(root: &Path, path: &[u8], expected: &FileIdentity) -> Result<(), RebuildError> {
    let changed =
        |what: &str| RebuildError::Changed { path: String::from_utf8_lossy(path).into_owned(), what: what.to_owned() };
    let here = in_root(root, path);
    match std::fs::metadata(&here) {
        Err(e) => return Err(changed(&format!("it cannot be read: {e}"))),
        Ok(facts) if facts.size() != expected.size => return Err(changed("its size differs")),
        Ok(_) => {}
    }
    match identity_of(&here) {
        Err(e) => Err(changed(&format!("it cannot be read: {e}"))),
        Ok(found) if found != *expected => Err(changed("its contents differ")),
        Ok(_) => Ok(()),
    }
}
