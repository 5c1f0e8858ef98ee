//! Memory that is put in place once a restarted pod runs.

use std::os::fd::OwnedFd;

use super::{Image, RestartError};
use crate::error::Context;
use crate::fetch::{Fetching, Filling, FromImage, Whose};
use crate::memory;
use crate::namespaces::Kind;
use crate::pod::LivePod;
use crate::probe;
use crate::process::grow::Incomplete;
use crate::process::threads;

/// What of an image's memory comes later, and how far that is.
#[derive(Default)]
pub(super) struct Later {
    /// The file that it comes from.
    data: Option<OwnedFd>,
    fetching: Option<Fetching>,
}

impl Later {
    /// Has memory of an image come later that is much, can wait, and lies there as it is. What a child has of its parent's, and
    /// what a restart touches itself, is put in place at once. In a user namespace of its own nobody may have the kernel wait.
    pub(super) fn of(image: &mut Image) -> Result<Later, RestartError> {
        if !image.reader.is_plain() || !probe::can_fill() {
            return Ok(Later::default());
        }
        let inherited = image.processes.iter().flat_map(|process| process.memory.inherited());
        let needed = image.processes.iter().flat_map(|process| threads::needed_at_once(&process.threads));
        let at_once = memory::pages_of(inherited.chain(needed));
        let patient = image.processes.iter_mut().filter(|process| process.namespaces.of(Kind::User).is_none());
        patient.for_each(|process| process.memory.put_off(&at_once, memory::LITTLE_AT_RESTART));
        if image.processes.iter().all(|process| process.memory.left.is_empty()) {
            return Ok(Later::default());
        }
        let data = image.reader.data_file()?.try_clone_to_owned();
        let data = data.rebuilding("sharing", "the image").map_err(|error| image.failed(error))?;
        Ok(Later { data: Some(data), fetching: None })
    }

    /// The pod is about to be let go: from now on whoever waits for a page gets it. Why not, in words.
    pub(super) fn begin(&mut self, pod: &mut LivePod, incomplete: Vec<Incomplete>) -> Result<(), String> {
        if let Some(data) = self.data.take().filter(|_| !incomplete.is_empty()) {
            let filling = Filling::entrust(pod, incomplete, Box::new(FromImage::new(data)))?;
            self.fetching = Some(filling.begin(Whose::of(pod)).map_err(|error| error.to_string())?);
        }
        Ok(())
    }

    /// If the pod `lives`, all the other pages come as well; else it ends.
    pub(super) fn settle(self, lives: bool) -> Option<Fetching> {
        let end = if lives { Fetching::settle } else { Fetching::abandon };
        self.fetching.inspect(end)
    }
}
