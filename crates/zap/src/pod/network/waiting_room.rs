//! Where packets wait that come for a pod while it is held for a moment: a tap device on the bridge, to which the bridge
//! sends what is for the pod's MAC address, and from which it gets it again afterwards.
//!
//! Dropped, they would come again only when the peer's retransmission timer has run out: a client would see 200 ms where
//! the pod was away for ten. The device is there for as long as the monitor has it open, and nothing passes it otherwise.

use std::fs::File;
use std::io::{self, Read, Write};

use super::links;
use super::netlink::{Batch, Channel};
use crate::sys::tap;

/// Packets that wait at most: more are dropped.
const MOST: u32 = 4096;

/// The waiting room of one pod.
#[derive(Debug)]
pub(super) struct WaitingRoom {
    tap: File,
    index: u32,
    mac: [u8; 6],
}

/// The name of the room of the pod with this link.
pub(super) fn name(link: &str) -> String {
    format!("zw{}", link.trim_start_matches("zv"))
}

impl WaitingRoom {
    /// Makes that of the pod with this link and MAC address, on the bridge `master`.
    pub(super) fn make(channel: &Channel, link: &str, mac: [u8; 6], master: u32) -> io::Result<WaitingRoom> {
        let name = name(link);
        let tap = tap::make(&name)?;
        let mut batch = Batch::default();
        links::set_aside(&mut batch, &name, mac, MOST);
        links::set_master(&mut batch, &name, master);
        links::set_up(&mut batch, &name);
        channel.run(&batch)?;
        let index = links::list(channel)?.into_iter().find(|l| l.name == name).map(|l| l.index);
        let index = index.ok_or_else(|| io::Error::from_raw_os_error(libc::ENODEV))?;
        let mut batch = Batch::default();
        links::set_deaf(&mut batch, (&name, index));
        channel.run(&batch)?;
        Ok(WaitingRoom { tap, index, mac })
    }

    /// Has packets for the pod wait from now on, whatever the pod sends meanwhile.
    pub(super) fn open(&self, batch: &mut Batch) {
        links::lead_to(batch, self.mac, self.index, links::Lead::Fixed);
    }

    /// Has them go to the pod again, whose link is this and lets packets through. Those that waited follow with
    /// [`WaitingRoom::empty`].
    pub(super) fn close(&self, batch: &mut Batch, link: u32) {
        links::lead_to(batch, self.mac, link, links::Lead::Learnt);
    }

    /// Has them go wherever the bridge hears of the address next.
    pub(super) fn leave(&self, batch: &mut Batch) {
        links::forget(batch, self.mac, self.index);
    }

    /// Sends on what has waited.
    pub(super) fn empty(&self) -> io::Result<()> {
        let mut frame = vec![0; tap::LONGEST];
        for _ in 0..MOST {
            let length = match (&self.tap).read(&mut frame) {
                Ok(length) => length,
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(e) => return Err(e),
            };
            // What the device itself was sent is nobody else's.
            let is_pods = frame[..length].get(tap::HEADER..).is_some_and(|frame| frame.starts_with(&self.mac));
            if is_pods {
                (&self.tap).write_all(&frame[..length])?;
            }
        }
        Ok(())
    }
}
