//! What a file of the root was like, so that a restart can tell whether it still is.

use std::fs::File;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::hashes::{self, Version};
use crate::error::RebuildError;
use crate::parallel;

/// Size and hash of a file that is not in the image.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileIdentity {
    /// Size in bytes.
    pub size: u64,
    /// BLAKE3 of its contents.
    #[serde(with = "serde_bytes")]
    pub blake3: [u8; 32],
}

/// A file of the root that a pod uses, and does not take along.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct UsedFile {
    /// Its path in the root.
    #[serde(with = "serde_bytes")]
    pub path: Vec<u8>,
    /// What it is like.
    pub identity: FileIdentity,
}

/// Refuses a root in which one of those files is another.
pub fn compare(root: &Path, files: Vec<UsedFile>) -> Result<(), RebuildError> {
    parallel::map(files, |file| verify(root, &file.path, &file.identity)).into_iter().collect()
}

/// The identity of the file at `path`; read only if this version of it has not been hashed before.
pub fn identity_of(path: &Path) -> io::Result<FileIdentity> {
    let mut file = File::open(path)?;
    let size = file.metadata()?.size();
    let version = Version::of(&file);
    if let Some(blake3) = version.and_then(hashes::known) {
        return Ok(FileIdentity { size, blake3 });
    }
    let mut hasher = blake3::Hasher::new();
    hasher.update_reader(&mut file)?;
    let blake3 = *hasher.finalize().as_bytes();
    // Nobody wrote to it meanwhile.
    if let Some(version) = version.filter(|version| Version::of(&file) == Some(*version)) {
        hashes::learn(version, blake3);
    }
    Ok(FileIdentity { size, blake3 })
}

/// Where a file of the pod's lower root is on the host.
pub(crate) fn in_root(root: &Path, path: &[u8]) -> PathBuf {
    root.join(super::reopen::relative(path))
}

/// Refuses a file of the root that is not what it was.
pub(crate) fn verify(root: &Path, path: &[u8], expected: &FileIdentity) -> Result<(), RebuildError> {
    let changed =
        |what: &str| RebuildError::Changed { path: String::from_utf8_lossy(path).into_owned(), what: what.to_owned() };
    let here = in_root(root, path);
    match std::fs::metadata(&here) {
        Err(e) => return Err(changed(&format!("it cannot be read: {e}"))),
        // Opening another kind of file could take for ever.
        Ok(facts) if !facts.is_file() => return Err(changed("it is not a file")),
        Ok(facts) if facts.size() != expected.size => return Err(changed("its size differs")),
        Ok(_) => {}
    }
    match identity_of(&here) {
        Err(e) => Err(changed(&format!("it cannot be read: {e}"))),
        Ok(found) if found != *expected => Err(changed("its contents differ")),
        Ok(_) => Ok(()),
    }
}
