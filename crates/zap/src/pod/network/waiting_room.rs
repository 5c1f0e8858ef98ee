//! Where packets wait that come for a pod while it is held for a moment: a tap device on the bridge, to which the bridge
//! sends what is for the pod's MAC address, and from which it gets it again afterwards.
//!
//! Dropped, they would come again only when the peer's retransmission timer has run out: a client would see 200 ms where
//! the pod was away for ten. The device is there for as long as the monitor has it open, and nothing passes it otherwise.

use std::fs::File;
use std::io::{self, Read, Write};
use std::sync::{Mutex, PoisonError};

use super::netlink::{Batch, Channel};
use super::{links, newcomers};
use crate::sys::tap;

/// Packets that wait at most: more are dropped.
const MOST: u32 = 4096;

/// The waiting room of one pod.
#[derive(Debug)]
pub(super) struct WaitingRoom {
    tap: File,
    index: u32,
    mac: [u8; 6],
    /// Requests for new connections that go on waiting.
    newcomers: Mutex<Vec<Vec<u8>>>,
}

/// Who of those that wait goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Waiting {
    /// Everybody.
    All,
    /// All but requests for new TCP connections.
    Known,
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
        let index = nix::net::if_::if_nametoindex(name.as_str())?;
        let mut batch = Batch::default();
        links::set_deaf(&mut batch, (&name, index));
        channel.run(&batch)?;
        Ok(WaitingRoom { tap, index, mac, newcomers: Mutex::default() })
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
    pub(super) fn empty(&self, who: Waiting) -> io::Result<()> {
        let mut newcomers = self.newcomers.lock().unwrap_or_else(PoisonError::into_inner);
        if who == Waiting::All {
            newcomers.drain(..).try_for_each(|frame| (&self.tap).write_all(&frame))?;
        }
        let mut frame = vec![0; tap::LONGEST];
        for _ in 0..MOST {
            let length = match (&self.tap).read(&mut frame) {
                Ok(length) => length,
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(e) => return Err(e),
            };
            let packet = frame.get(tap::HEADER..length).unwrap_or_default();
            if who == Waiting::Known && newcomers::is_one(packet) {
                newcomers.push(frame[..length].to_vec());
            } else if packet.starts_with(&self.mac) {
                // What the device itself was sent is nobody else's.
                (&self.tap).write_all(&frame[..length])?;
            }
        }
        Ok(())
    }
}
