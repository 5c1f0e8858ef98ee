//! The manifest: the readable part of an image, which covers every byte of the others, and of itself.
//!
//! Three parts: a line with the format's version, a JSON document, and a line with the CRC-32 of all before.

use std::path::Path;

use serde::{Deserialize, Serialize};

use super::ImageError;
use super::chunk::FileEntry;
use super::inherit::Ancestor;

/// The version of the format that this zap writes and reads.
pub const FORMAT: u32 = 1;

const TITLE: &str = "zap image, format ";
const SUM: &str = "crc32 ";

#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Manifest {
    /// BLAKE3 of the state, of every checksum, and of the ancestors' ids: what a child image names its parent by.
    pub(super) id: String,
    /// The architecture that it was written on.
    pub(super) machine: String,
    /// What the caller wants to be readable: the pod, the host, sizes.
    pub(super) facts: serde_json::Value,
    pub(super) files: Vec<FileEntry>,
    /// Images in which parts of this one are stored, the parent first.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(super) ancestors: Vec<Ancestor>,
}

impl Manifest {
    pub(super) fn to_bytes(&self) -> Vec<u8> {
        let json = serde_json::to_string_pretty(self).expect("a manifest is plain data");
        let mut text = format!("{TITLE}{FORMAT}\n{json}\n");
        text += &format!("{SUM}{:08x}\n", crc32fast::hash(text.as_bytes()));
        text.into_bytes()
    }

    /// Checks and decodes the manifest at `path` (for messages; `bytes` are its contents).
    pub(super) fn from_bytes(path: &Path, bytes: &[u8]) -> Result<Manifest, ImageError> {
        let foreign = |why: &str| ImageError::Foreign { path: path.to_owned(), why: why.to_owned() };
        let after_title = bytes.strip_prefix(TITLE.as_bytes());
        // "crc32 " + eight digits + a newline
        let (body, last) = bytes.split_at(bytes.len().saturating_sub(SUM.len() + 9));
        let sum = format!("{SUM}{:08x}\n", crc32fast::hash(body));
        if last != sum.as_bytes() {
            return Err(match after_title {
                Some(_) => ImageError::damaged(path, "the checksum of the manifest is wrong"),
                None => foreign("its manifest is not one of zap's"),
            });
        }
        let rest = after_title.ok_or_else(|| foreign("its manifest is not one of zap's"))?;
        let line = rest.iter().position(|b| *b == b'\n').ok_or_else(|| foreign("its manifest has no body"))?;
        let found = std::str::from_utf8(&rest[..line]).ok().and_then(|v| v.parse().ok());
        match found {
            Some(FORMAT) => {}
            Some(found) => return Err(ImageError::Version { path: path.to_owned(), found, known: FORMAT }),
            None => return Err(foreign("its manifest names no format version")),
        }
        let json = &body[TITLE.len() + line + 1..];
        let manifest: Manifest = serde_json::from_slice(json)
            .map_err(|e| ImageError::damaged(path, format!("the manifest is not sound: {e}")))?;
        manifest.check(path)?;
        Ok(manifest)
    }

    fn check(&self, path: &Path) -> Result<(), ImageError> {
        if self.machine != std::env::consts::ARCH {
            let why = format!("it was written on {}, this host is {}", self.machine, std::env::consts::ARCH);
            return Err(ImageError::Foreign { path: path.to_owned(), why });
        }
        for file in &self.files {
            let plain = !file.name.contains('/') && file.name != "manifest";
            if !plain || !(["state", "data"].contains(&&*file.name) || file.name.starts_with("layer-")) {
                return Err(ImageError::damaged(path, format!("it names a file {:?}", file.name)));
            }
            file.chunks().map_err(|what| ImageError::damaged(path, format!("{}: {what}", file.name)))?;
        }
        Ok(())
    }

    pub(super) fn file(&self, name: &str) -> Option<&FileEntry> {
        self.files.iter().find(|f| f.name == name)
    }
}
