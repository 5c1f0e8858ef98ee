//! Requests of any number, in batches that fit into the kernel's buffers; and how its answers are read.

use std::io;

use crate::pod::network::netlink::{Attributes, Batch, Channel, attributes};

/// How many go together.
const MOST: usize = 100;

/// Requests on their way to the kernel, in order.
pub(super) struct Requests<'c> {
    channel: &'c Channel,
    batch: Batch,
    waiting: usize,
}

impl<'c> Requests<'c> {
    pub(super) fn new(channel: &'c Channel) -> Requests<'c> {
        Requests { channel, batch: Batch::default(), waiting: 0 }
    }

    /// Another one; see [`Batch::push`].
    pub(super) fn push(
        &mut self,
        what: (&'static str, &str),
        kind: (u16, i32),
        header: &[u8],
        fill: impl FnOnce(&mut Attributes),
    ) -> io::Result<()> {
        if self.waiting == MOST {
            self.run()?;
        }
        self.batch.push(what, kind, header, fill);
        self.waiting += 1;
        Ok(())
    }

    /// Lets the last one fail.
    pub(super) fn optional(&mut self) {
        self.batch.optional();
    }

    /// Has all be carried out.
    pub(super) fn run(&mut self) -> io::Result<()> {
        self.waiting = 0;
        let batch = std::mem::take(&mut self.batch);
        if batch.is_empty() { Ok(()) } else { self.channel.run(&batch).map_err(|failed| failed.in_words()) }
    }
}

/// The attributes in `bytes`, as (kind without flags, value, all of it). What is malformed ends the list.
pub(super) fn pieces(mut bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8], &[u8])> {
    std::iter::from_fn(move || {
        let (kind, value) = attributes(bytes).next()?;
        let (whole, rest) = bytes.split_at_checked((value.len() + 4).next_multiple_of(4))?;
        bytes = rest;
        Some((kind, value, whole))
    })
}

/// The number at the beginning of `bytes`.
pub(in crate::namespaces) fn word(bytes: &[u8]) -> Option<u32> {
    bytes.first_chunk().map(|word| u32::from_ne_bytes(*word))
}

/// The number of the interface that a `struct ifinfomsg`, `ifaddrmsg`, `ndmsg` or `tcmsg` is about.
pub(in crate::namespaces) fn index_of(body: &[u8]) -> Option<u32> {
    word(body.get(4..)?)
}

/// A string of the kernel's, as text.
pub(super) fn text(value: &[u8]) -> String {
    String::from_utf8_lossy(value).trim_end_matches('\0').to_owned()
}
