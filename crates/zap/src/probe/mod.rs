//! What this kernel and host offer, feature by feature, found by trying: `zap check`.

mod host;
mod memory;
mod process;

use std::io;
use std::path::Path;

pub(crate) use memory::{can_fill, follows_asynchronously, soft_dirty};

use serde::Serialize;

/// Something that zap can use.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Feature {
    /// What it is called.
    pub name: &'static str,
    /// Whether it is there.
    pub available: bool,
    /// Whether nothing goes without it.
    pub required: bool,
    /// What it is for.
    pub enables: &'static str,
    /// What was found: a version, a list, or why it is not there. May be empty.
    pub detail: String,
}

/// What a host offers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Offer {
    /// Release of its kernel.
    pub kernel: String,
    /// Whether every required feature is there.
    pub ready: bool,
    /// The features.
    pub features: Vec<Feature>,
}

/// Tries everything, with the files of pods to be kept below `storage`. Leaves nothing behind.
pub fn offer(storage: &Path) -> Offer {
    let uname = nix::sys::utsname::uname();
    let features: Vec<_> =
        process::features().into_iter().chain(memory::features()).chain(host::features(storage)).collect();
    Offer {
        kernel: uname.map(|u| u.release().to_string_lossy().into_owned()).unwrap_or_default(),
        ready: features.iter().all(|f| f.available || !f.required),
        features,
    }
}

/// A feature that everything needs.
fn required(name: &'static str, enables: &'static str, found: io::Result<String>) -> Feature {
    Feature { required: true, ..useful(name, enables, found) }
}

/// A feature that something is better, or only possible, with.
fn useful(name: &'static str, enables: &'static str, found: io::Result<String>) -> Feature {
    let available = found.is_ok();
    let detail = found.unwrap_or_else(|e| reason(&e));
    Feature { name, available, required: false, enables, detail }
}

/// An error without the number that the standard library adds.
fn reason(error: &io::Error) -> String {
    match error.raw_os_error() {
        Some(number) => nix::Error::from_raw(number).desc().to_owned(),
        None => error.to_string(),
    }
}

/// For probes that have nothing to tell but that they worked.
fn works<T, E: Into<io::Error>>(result: Result<T, E>) -> io::Result<String> {
    result.map(|_| String::new()).map_err(Into::into)
}

/// For conditions.
fn holds(condition: bool, otherwise: &str) -> io::Result<String> {
    if condition { Ok(String::new()) } else { Err(io::Error::other(otherwise.to_owned())) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_feature_is_told_once_and_nothing_is_left() {
        let storage = tempfile::tempdir().unwrap();
        let offer = offer(storage.path());
        let mut names: Vec<_> = offer.features.iter().map(|f| f.name).collect();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), offer.features.len());
        assert!(offer.features.iter().all(|f| f.available || !f.detail.is_empty()), "{offer:?}");
        assert_eq!(std::fs::read_dir(storage.path()).unwrap().count(), 0);
    }
}
