//! What must be undone if a monitor dies: written down before it is done.

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::pod::PodError;
use crate::pod::network::follow::Moved;
use crate::sockets::Deferring;

/// Something that was done to a pod and must not stay so.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Undo {
    /// Its cgroup is frozen for a checkpoint: thaw it.
    Thaw,
    /// Its network is blocked: unblock it.
    Unblock,
    /// New connections to it are dropped: admit them.
    Newcomers,
    /// A listener of its does not wait for data, for now: have it be as it was.
    Deferring(Deferring),
    /// Its sockets are being read: [`crate::sockets::recover_all`] puts them right.
    Sockets,
    /// Its memory is still coming from the host that it left: without the rest it is lost, kill it.
    Fetching,
    /// Its memory is being put in place: go on with that, or it is lost too.
    Filling,
    /// Its memory is being written to that file in a store: remove it.
    Store(PathBuf),
    /// This host follows it to where it is about to go: it has not gone there.
    Following(Moved),
    /// An image of it is being written at that path: [`crate::image::remove_partials`] removes what there is of it.
    Image(PathBuf),
}

/// The undo journal of one pod: a line is added for each thing done, and one when it is undone. A crash of zap loses
/// nothing of it (a crash of the host ends the pod anyway, so nothing is synced).
#[derive(Debug)]
pub struct Journal {
    path: PathBuf,
    open: Vec<Undo>,
}

#[derive(Serialize, Deserialize)]
enum Line {
    Did(Undo),
    Undid(Undo),
}

impl Journal {
    /// The journal kept in that file, with what an earlier monitor left in it.
    pub fn at(path: PathBuf) -> Journal {
        let text = fs::read_to_string(&path).unwrap_or_default();
        let mut open = Vec::new();
        // A last line that was cut off by a full disk was never acted upon: recording comes first.
        for line in text.lines().filter_map(|l| serde_json::from_str(l).ok()) {
            match line {
                Line::Did(undo) => open.push(undo),
                Line::Undid(undo) => open.retain(|u| *u != undo),
            }
        }
        Journal { path, open }
    }

    /// What is done and not undone, last first.
    pub fn pending(&self) -> Vec<Undo> {
        self.open.iter().rev().cloned().collect()
    }

    /// Notes something that is about to be done.
    pub fn record(&mut self, undo: Undo) -> Result<(), PodError> {
        self.add(&Line::Did(undo.clone()))?;
        self.open.push(undo);
        Ok(())
    }

    /// Notes that it has been undone.
    pub fn done(&mut self, undo: &Undo) -> Result<(), PodError> {
        self.open.retain(|u| u != undo);
        if self.open.is_empty() {
            return match fs::remove_file(&self.path) {
                Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(self.failed(e)),
                _ => Ok(()),
            };
        }
        self.add(&Line::Undid(undo.clone()))
    }

    fn add(&self, line: &Line) -> Result<(), PodError> {
        let mut text = serde_json::to_vec(line).expect("a journal line is plain data");
        text.push(b'\n');
        let mut options = File::options();
        options
            .append(true)
            .create(true)
            .mode(0o600)
            .open(&self.path)
            .and_then(|mut f| f.write_all(&text))
            .map_err(|e| self.failed(e))
    }

    fn failed(&self, source: std::io::Error) -> PodError {
        PodError::Store { step: "writing", path: self.path.clone(), source }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_not_undone_is_found_again() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("journal");
        let mut journal = Journal::at(path.clone());
        journal.record(Undo::Unblock).unwrap();
        journal.record(Undo::Thaw).unwrap();
        assert_eq!(Journal::at(path.clone()).pending(), [Undo::Thaw, Undo::Unblock]);
        journal.done(&Undo::Thaw).unwrap();
        assert_eq!(Journal::at(path.clone()).pending(), [Undo::Unblock]);
        journal.done(&Undo::Unblock).unwrap();
        assert!(!path.exists());
    }
}
