//! Somebody who uses a pod without a pause while something is done to it, and what he notices.

use std::time::{Duration, Instant};

use anyhow::Result;

use super::peers;
use crate::client::{Gaps, Prober};
use crate::lab::{Lab, PATIENCE, Pod};
use crate::viewer::Viewer;
use crate::workload::Desktop;

/// How a pod is used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Use {
    /// One request after the other, for a small file.
    Requests,
    /// The same with pauses, so that it takes little of the machine.
    Few,
    /// A stream of bytes over one connection.
    Bytes,
    /// A screen on which something moves.
    Frames,
}

impl Use {
    /// What there is to say of it beside the samples.
    pub(super) fn parameters(self) -> &'static str {
        match self {
            Use::Requests => "client=requests;connections=1;file=1k.bin",
            Use::Few => "client=requests;connections=1;file=1k.bin;pause_us=1000",
            Use::Bytes => "client=bytes;connections=1;file=100m.bin",
            Use::Frames => "client=frames;viewers=1;moving=ico",
        }
    }
}

/// The connection that stays from one look to the next: only a viewer's does.
pub(super) struct Seat(Use, Option<Viewer>);

impl Seat {
    /// Before a pod that is used like that.
    pub(super) fn take(lab: &Lab, pod: &Pod<'_>, how: Use) -> Result<Self> {
        if how != Use::Frames {
            return Ok(Self(how, None));
        }
        peers::move_something(pod)?;
        Ok(Self(how, Some(Viewer::connect(lab.client(), Desktop::screen_at(pod.served_at()?))?)))
    }

    /// Looks on from now.
    pub(super) fn look(&self, lab: &Lab, pod: &Pod<'_>) -> Result<Onlooker<'_>> {
        match (self.0, &self.1) {
            (_, Some(viewer)) => {
                let begun = Instant::now();
                viewer.watch();
                Ok(Onlooker::Viewer(viewer, begun))
            }
            (Use::Few, _) => {
                Ok(Onlooker::Prober(Prober::paced(lab.client(), pod.served_at()?, PATIENCE, Duration::from_millis(1))?))
            }
            (Use::Bytes, _) => Ok(Onlooker::Prober(Prober::stream(lab.client(), pod.served_at()?, PATIENCE)?)),
            _ => Ok(Onlooker::Prober(Prober::start(lab.client(), pod.served_at()?, PATIENCE)?)),
        }
    }
}

/// See the [module](self).
pub(super) enum Onlooker<'v> {
    /// Who asks, or reads.
    Prober(Prober),
    /// Who looks at a screen, since when.
    Viewer(&'v Viewer, Instant),
}

impl Onlooker<'_> {
    /// Looks on for so long, or until there was something to see: what he had before something is done to the pod.
    pub(super) fn look_for(&self, time: Duration) -> Result<()> {
        std::thread::sleep(time);
        match self {
            Self::Prober(prober) => prober.await_first(),
            // From one frame to the next.
            Self::Viewer(viewer, begun) => {
                let first = viewer.await_update_after(*begun)?;
                viewer.await_update_after(first)?;
            }
        }
        Ok(())
    }

    /// How long he has looked on.
    pub(super) fn elapsed(&self) -> Duration {
        match self {
            Self::Prober(prober) => prober.elapsed(),
            Self::Viewer(_, begun) => begun.elapsed(),
        }
    }

    /// What he has noticed, once he is answered again.
    pub(super) fn finish(self) -> Result<Gaps> {
        match self {
            Self::Prober(prober) => prober.finish(),
            Self::Viewer(viewer, _) => {
                viewer.await_update()?;
                viewer.watched()
            }
        }
    }
}
