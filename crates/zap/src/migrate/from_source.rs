//! Pages that stayed behind, fetched over the stream that the pod came by.

use std::io;
use std::ops::Range;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::time::Duration;

use super::protocol::Message;
use super::wire::Wire;
use crate::fetch::Supply;

/// The host that the pod has left.
pub(super) struct FromSource(pub(super) Arc<Wire>);

impl Supply for FromSource {
    fn ask(&mut self, wanted: Range<u64>) -> io::Result<Range<u64>> {
        self.0.send(&Message::Fetch { offset: wanted.start, length: wanted.end - wanted.start })?;
        Ok(wanted)
    }

    fn arrivals(&self) -> Option<BorrowedFd<'_>> {
        Some(self.0.arrivals())
    }

    fn patience(&self) -> Option<Duration> {
        Some(self.0.patience())
    }

    fn take(&mut self) -> io::Result<(u64, Vec<u8>)> {
        self.0.hear_pages()
    }

    fn finish(&mut self) -> io::Result<()> {
        self.0.send(&Message::Complete)
    }
}
