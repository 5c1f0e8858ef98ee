//! A tree that goes into an image: packed while the pod runs, caught up in the hold, written afterwards.

use std::io::Write;
use std::path::PathBuf;

use super::pack::{Index, Inodes, pack, pack_changes};
use crate::error::{CaptureError, Context};
use crate::image::{ImageError, ImageWriter, LayerWriter};

/// A tree on its way into an image.
pub struct Followed {
    top: PathBuf,
    archive: LayerWriter,
    index: Index,
    late: Vec<u8>,
}

/// Why a tree could not be followed.
#[derive(Debug, thiserror::Error)]
pub enum FollowError {
    /// It could not be read.
    #[error(transparent)]
    Capture(#[from] CaptureError),
    /// The image could not be written.
    #[error(transparent)]
    Image(#[from] ImageError),
}

impl Followed {
    /// Packs the tree below `top` into the archive `name`, while the pod runs.
    pub fn begin(image: &mut ImageWriter, name: &str, top: PathBuf) -> Result<Followed, FollowError> {
        let mut archive = image.layer(name)?;
        let index = pack(&top, &mut archive)?;
        Ok(Followed { top, archive, index, late: Vec::new() })
    }

    /// Gathers in memory what changed since, in the hold. `always`: the files that some process maps shared and writable.
    pub fn catch_up(&mut self, always: &Inodes) -> Result<(), CaptureError> {
        self.late.clear();
        pack_changes(&self.top, &self.index, always, &mut self.late).map(drop)
    }

    /// Writes what was gathered, when the pod runs again.
    pub fn end(mut self, image: &mut ImageWriter) -> Result<(), FollowError> {
        self.archive.write_all(&self.late).capturing("writing the archive of", self.top.display())?;
        Ok(image.close_layer(self.archive)?)
    }
}
