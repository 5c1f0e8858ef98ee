//! What a kernel finds before it has a root: an archive in the format of cpio, `newc`
//! (Documentation/driver-api/early-userspace/buffer-format.rst).

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};

const DIRECTORY: u32 = 0o040_755;
const PROGRAM: u32 = 0o100_755;

/// An archive that has `init`, the libraries that it is linked with, and modules.
pub(super) fn archive(init: &Path, modules: &[PathBuf]) -> Result<Vec<u8>> {
    let mut archive = Archive::default();
    for directory in ["proc", "sys", "dev", "lower", "upper", "root", "modules"] {
        archive.directory(directory);
    }
    archive.file("init", &read(init)?);
    for library in libraries(init)? {
        let name = library.strip_prefix("/").unwrap_or(&library).to_string_lossy().into_owned();
        archive.parents(&name);
        archive.file(&name, &read(&library)?);
    }
    for module in modules {
        let name = module.file_name().unwrap_or_default().to_string_lossy().into_owned();
        archive.file(&format!("modules/{name}"), &read(module)?);
    }
    Ok(archive.finish())
}

fn read(path: &Path) -> Result<Vec<u8>> {
    std::fs::read(path).with_context(|| format!("reading {}", path.display()))
}

/// The files that a program is linked with, as its loader finds them here.
fn libraries(program: &Path) -> Result<Vec<PathBuf>> {
    let output = Command::new("ldd").arg(program).output().context("running ldd")?;
    ensure!(output.status.success(), "ldd: {}", String::from_utf8_lossy(&output.stderr).trim());
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    Ok(text.split_whitespace().filter(|word| word.starts_with('/')).map(PathBuf::from).collect())
}

#[derive(Default)]
struct Archive {
    bytes: Vec<u8>,
    made: Vec<String>,
}

impl Archive {
    fn entry(&mut self, name: &str, mode: u32, contents: &[u8]) {
        let inode = self.made.len() as u32 + 1;
        self.made.push(name.to_owned());
        // inode, mode, owner, group, links, time, size, device (2), device shown (2), length of the name, checksum
        let length = name.len() as u32 + 1;
        let numbers = [inode, mode, 0, 0, 1, 0, contents.len() as u32, 0, 0, 0, 0, length, 0];
        self.bytes.extend_from_slice(b"070701");
        numbers.iter().for_each(|number| self.bytes.extend_from_slice(format!("{number:08x}").as_bytes()));
        self.bytes.extend_from_slice(name.as_bytes());
        self.bytes.push(0);
        self.align();
        self.bytes.extend_from_slice(contents);
        self.align();
    }

    fn align(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }

    fn directory(&mut self, name: &str) {
        if !self.made.iter().any(|made| made == name) {
            self.entry(name, DIRECTORY, &[]);
        }
    }

    fn parents(&mut self, name: &str) {
        for (at, _) in name.match_indices('/') {
            self.directory(&name[..at]);
        }
    }

    fn file(&mut self, name: &str, contents: &[u8]) {
        self.entry(name, PROGRAM, contents);
    }

    fn finish(mut self) -> Vec<u8> {
        self.entry("TRAILER!!!", 0, &[]);
        self.bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_archive_is_read_by_others() {
        let mut archive = Archive::default();
        archive.parents("lib/deep/file");
        archive.file("lib/deep/file", b"five!");
        let bytes = archive.finish();
        let directory = tempfile::tempdir().unwrap();
        std::fs::write(directory.path().join("archive"), bytes).unwrap();
        let script = "busybox cpio -i -d <archive 2>/dev/null && cat lib/deep/file";
        let output = Command::new("sh").args(["-c", script]).current_dir(directory.path()).output().unwrap();
        assert_eq!(output.stdout, b"five!");
    }
}
