//! Who is connected to a pod while it is measured, and what they notice of it.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use crate::client::{Connection, Crowd};
use crate::lab::{Lab, Netns, PATIENCE, Pod, RestartStats};
use crate::viewer::Viewer;
use crate::workload::{Desktop, Offer, Workload};

/// Open connections while a web server is checkpointed: idle ones, and ones in the middle of a download.
const IDLE: usize = 46;
const DOWNLOADING: usize = 4;

/// See the [module](self).
pub(super) enum Peers {
    /// There is nobody to notice anything.
    Nobody,
    /// Browsers.
    Crowd(Crowd),
    /// Someone before a screen on which something moves.
    Viewer(Viewer),
}

impl Peers {
    /// Connects those who use what `workload` offers.
    pub(super) fn connect(lab: &Lab, pod: &Pod<'_>, workload: &dyn Workload) -> Result<Self> {
        if workload.offers() == Offer::Nothing {
            return Ok(Self::Nobody);
        }
        if workload.offers() == Offer::Screen {
            move_something(pod)?;
        }
        Self::connect_to(lab.client(), pod.served_at()?, workload)
    }

    /// The same, from another network and to another place.
    pub(super) fn connect_to(from: &Netns, to: SocketAddr, workload: &dyn Workload) -> Result<Self> {
        match workload.offers() {
            Offer::Nothing => Ok(Self::Nobody),
            Offer::Site => Ok(Self::Crowd(Crowd::open(from, to, IDLE, DOWNLOADING, PATIENCE)?)),
            Offer::Screen => Ok(Self::Viewer(Viewer::connect(from, Desktop::screen_at(to))?)),
        }
    }

    /// What there is to say of them beside the samples.
    pub(super) fn parameters(&self) -> String {
        match self {
            Self::Nobody => String::new(),
            Self::Crowd(_) => format!("idle={IDLE};downloading={DOWNLOADING}"),
            Self::Viewer(_) => "viewers=1;moving=ico".into(),
        }
    }

    /// From now on a viewer notes when the screen moves.
    pub(super) fn watch(&self) {
        if let Self::Viewer(viewer) = self {
            viewer.watch();
        }
    }

    /// The longest time that the screen has stood still since [`watch`](Self::watch), once it moves again.
    pub(super) fn longest_gap(&self) -> Result<Option<Duration>> {
        let Self::Viewer(viewer) = self else { return Ok(None) };
        viewer.await_update()?;
        Ok(Some(viewer.watched()?.longest))
    }

    /// How long after `began` they were answered first by a pod that was restarted since.
    pub(super) fn first_answer(&self, lab: &Lab, stats: &RestartStats, began: Instant) -> Result<Option<Duration>> {
        if let Self::Nobody = self {
            return Ok(None);
        }
        self.first_answer_from(lab.client(), stats.served_at()?, began)
    }

    /// The same, from another network and of another place.
    pub(super) fn first_answer_from(&self, from: &Netns, to: SocketAddr, began: Instant) -> Result<Option<Duration>> {
        match self {
            Self::Nobody => Ok(None),
            Self::Crowd(_) => {
                let ended = began.elapsed();
                let start = Instant::now();
                from.enter(|| Connection::open(to, PATIENCE)?.get_file("1k.bin"))??;
                Ok(Some(ended + start.elapsed()))
            }
            Self::Viewer(viewer) => Ok(Some(viewer.await_update_after(began)? - began)),
        }
    }

    /// Every open connection must still work, with every byte right, or the times mean nothing.
    pub(super) fn use_once(&mut self) -> Result<()> {
        match self {
            Self::Nobody => Ok(()),
            Self::Crowd(crowd) => crowd.use_once().context("after a checkpoint"),
            Self::Viewer(viewer) => viewer.refresh().map(drop).context("after a checkpoint"),
        }
    }

    /// Ends every connection in good order.
    pub(super) fn finish(self) -> Result<()> {
        match self {
            Self::Crowd(crowd) => crowd.finish().context("the connections, after all checkpoints").map(drop),
            Self::Nobody | Self::Viewer(_) => Ok(()),
        }
    }
}

/// Something moves on the screen of a pod from now on.
pub(super) fn move_something(pod: &Pod<'_>) -> Result<()> {
    let words = "DISPLAY=:1 ico -sleep 0.005 >/dev/null 2>&1 </dev/null &";
    pod.exec(&["sh", "-c", words]).context("starting something that moves").map(drop)
}
