//! Whom the pod has asked for while nothing of its could be heard.

use std::io;

use super::netlink::{Batch, Channel, attribute};

const NDA_DST: u16 = 1;
const NUD_INCOMPLETE: u16 = 0x01;
const NUD_FAILED: u16 = 0x20;
/// `struct ndmsg`: family, padding, index, state, flags, type.
const LENGTH: usize = 12;

/// Forgets the neighbours that link `index` has asked for and not heard of. The kernel asks again only after a second,
/// and keeps whatever is meant for them until then.
pub(super) fn forget_unanswered(channel: &Channel, index: u32) -> io::Result<()> {
    let mut batch = Batch::default();
    for entry in channel.ask(libc::RTM_GETNEIGH, libc::NLM_F_DUMP, &[0; LENGTH])? {
        let Some((header, address)) = unanswered(&entry, index) else { continue };
        batch.push(("forgetting", "a neighbour"), (libc::RTM_DELNEIGH, 0), header, |neighbour| {
            neighbour.put(NDA_DST, address);
        });
        // It may have been forgotten meanwhile.
        batch.optional();
    }
    if batch.is_empty() { Ok(()) } else { Ok(channel.run(&batch)?) }
}

/// Header and address of an entry, if it is such a neighbour.
fn unanswered(entry: &[u8], index: u32) -> Option<(&[u8], &[u8])> {
    let (header, rest) = entry.split_at_checked(LENGTH)?;
    let state = u16::from_ne_bytes([header[8], header[9]]);
    let address = attribute(rest, NDA_DST)?;
    let is_meant = header[4..8] == index.to_ne_bytes() && state & (NUD_INCOMPLETE | NUD_FAILED) != 0;
    is_meant.then_some((header, address))
}

/// Reads some bytes as a neighbour.
pub(super) fn try_answer(bytes: &[u8]) {
    let _ = unanswered(bytes, 1);
}
