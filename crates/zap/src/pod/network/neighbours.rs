//! Whom the pod has asked for while nothing of its could be heard.

use std::io;

use super::netlink::{Batch, Channel, attributes};

const NDA_DST: u16 = 1;
const NUD_INCOMPLETE: u16 = 0x01;
const NUD_FAILED: u16 = 0x20;

/// Forgets the neighbours that link `index` has asked for and not heard of. The kernel asks again only after a second,
/// and keeps whatever is meant for them until then.
pub(super) fn forget_unanswered(channel: &Channel, index: u32) -> io::Result<()> {
    // struct ndmsg: family, padding, index, state, flags, type.
    const LENGTH: usize = 12;
    let mut batch = Batch::default();
    for entry in channel.ask(libc::RTM_GETNEIGH, libc::NLM_F_DUMP, &[0; LENGTH])? {
        let Some((header, rest)) = entry.split_at_checked(LENGTH) else { continue };
        let state = u16::from_ne_bytes([header[8], header[9]]);
        let address = attributes(rest).find(|(kind, _)| *kind == NDA_DST);
        let (Some((_, address)), true) = (address, header[4..8] == index.to_ne_bytes()) else { continue };
        if state & (NUD_INCOMPLETE | NUD_FAILED) != 0 {
            batch.push(("forgetting", "a neighbour"), (libc::RTM_DELNEIGH, 0), header, |neighbour| {
                neighbour.put(NDA_DST, address);
            });
            // It may have been forgotten meanwhile.
            batch.optional();
        }
    }
    if batch.is_empty() { Ok(()) } else { Ok(channel.run(&batch)?) }
}
