//! Looking for inodes by their numbers in a whole file system.

use std::collections::HashSet;
use std::os::unix::fs::{DirEntryExt, MetadataExt};
use std::path::{Path, PathBuf};

use crate::procfs;

/// More entries than this are not looked at.
const MOST: usize = 4_000_000;

/// Every path below `top`, on its file system, with one of the numbers. Directories of processes in `/proc` are left out:
/// they are made anew each time that somebody looks.
pub(super) fn find(top: &Path, numbers: &HashSet<u64>) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let Ok(device) = std::fs::symlink_metadata(top).map(|m| m.dev()) else { return found };
    let proc = procfs::has(top);
    let (mut rest, mut seen) = (vec![top.to_owned()], 0);
    while let Some(directory) = rest.pop() {
        // Its number as others list it may be that of a mount point below.
        let Ok(facts) = std::fs::symlink_metadata(&directory) else { continue };
        if facts.dev() != device {
            continue;
        }
        if numbers.contains(&facts.ino()) {
            found.push(directory.clone());
        }
        for entry in std::fs::read_dir(&directory).into_iter().flatten().flatten() {
            seen += 1;
            let passing = proc && entry.file_name().as_encoded_bytes().iter().all(u8::is_ascii_digit);
            if seen > MOST || passing {
                continue;
            }
            if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                rest.push(entry.path());
            } else if numbers.contains(&entry.ino()) {
                found.push(entry.path());
            }
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_files_and_directories_by_number() {
        let directory = tempfile::tempdir().unwrap();
        let inner = directory.path().join("a/b");
        std::fs::create_dir_all(&inner).unwrap();
        std::fs::write(inner.join("file"), "").unwrap();
        let number = |path: &Path| std::fs::metadata(path).unwrap().ino();
        let wanted = HashSet::from([number(&inner), number(&inner.join("file"))]);
        assert_eq!(find(directory.path(), &wanted), [inner.clone(), inner.join("file")]);
    }
}
