//! Connections both of whose ends are in the pod.
//!
//! The kernel goes on while a pod is held: what was written before the hold still goes from one end to the other over the
//! pod's loopback, and timers of TCP's own send more of it. So the two ends, which are not read at one moment, need not
//! fit together: one may have received what the other, read earlier, had not sent yet (its answers would be taken for
//! acknowledgements of nothing, for ever), or lack what the other, read later, had dropped as acknowledged already.
//!
//! Nobody writes or reads meanwhile. So what an end has yet to send can only become less, at its beginning, and what it
//! has received can only become more, at its end. An end that lacks something is heard once more, *after* its peer was
//! read; and of what an end has not sent, that is counted as sent which the other has received.

use std::collections::{HashMap, HashSet};
use std::fmt;
use std::net::SocketAddr;

use super::tcp::{self, Form, TcpState};
use super::tcp_queues::Connection;
use crate::error::CaptureError;
use crate::files::Descriptor;
use crate::ids::FileId;
use crate::image;
use crate::look::Look;
use crate::pod::NetworkMode;

/// The connections that were met.
#[derive(Debug, Default)]
pub(crate) struct Pairs {
    ends: Vec<End>,
    /// Where somebody listens.
    listening: Vec<SocketAddr>,
}

struct End {
    id: FileId,
    descriptor: Descriptor,
    state: TcpState,
    changed: bool,
}

impl Pairs {
    /// A socket was captured.
    pub(super) fn meet(&mut self, id: FileId, descriptor: &Descriptor, state: &TcpState) {
        if let Form::Listening { local, .. } = &state.form {
            self.listening.push(plain(*local));
        }
        if matches!(state.form, Form::Connected(_)) {
            let (descriptor, state) = (descriptor.clone(), state.clone());
            self.ends.push(End { id, descriptor, state, changed: false });
        }
    }

    /// Which of the ends is whose peer, by their places. The namespaces of networks inside the pod may have the same
    /// addresses each: who has several candidates takes the one that it fits best.
    fn mates(&self) -> Vec<(usize, usize)> {
        let mut places: HashMap<(SocketAddr, SocketAddr), Vec<usize>> = HashMap::new();
        for (place, end) in self.ends.iter().enumerate() {
            if let Some(c) = end.connection() {
                places.entry((plain(c.local), plain(c.peer))).or_default().push(place);
            }
        }
        let mate = |(place, end): (usize, &End)| {
            let connection = end.connection()?;
            let candidates = places.get(&(plain(connection.peer), plain(connection.local)))?;
            let distance = |other: &&usize| {
                let received = self.ends[**other].connection().map_or(0, Connection::received);
                (received.wrapping_sub(connection.acknowledged()) as i32).unsigned_abs()
            };
            Some((place, *candidates.iter().min_by_key(distance)?))
        };
        self.ends.iter().enumerate().filter_map(mate).collect()
    }
}

impl Pairs {
    /// Refuses a connection with a listener of the pod whose other end nobody has: it came to be while sockets were read, and
    /// has not been accepted.
    fn refuse_unaccepted(&self, mates: &[(usize, usize)]) -> Result<(), CaptureError> {
        let paired: HashSet<usize> = mates.iter().map(|(place, _)| *place).collect();
        let alone = self.ends.iter().enumerate().filter(|(place, _)| !paired.contains(place)).map(|(_, end)| end);
        for end in alone {
            let Some(connection) = end.connection().filter(|c| !c.phase.fin_theirs()) else { continue };
            let (local, peer) = (plain(connection.local), plain(connection.peer));
            let is_here = peer.ip() == local.ip() || peer.ip().is_loopback();
            let is_there = |listener: &SocketAddr| {
                listener.port() == peer.port() && (listener.ip() == peer.ip() || listener.ip().is_unspecified())
            };
            if is_here && self.listening.iter().any(is_there) {
                let why = "has just been connected with a listener of the pod that has not accepted it yet; try again";
                return Err(end.descriptor.refuse(why));
            }
        }
        Ok(())
    }
}

impl fmt::Debug for End {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("End").field("id", &self.id).field("state", &self.state).finish_non_exhaustive()
    }
}

impl End {
    fn connection(&self) -> Option<&Connection> {
        match &self.state.form {
            Form::Connected(connection) => Some(connection),
            _ => None,
        }
    }

    /// Reads what this end has received once more.
    fn hear_again(&mut self, look: &mut Look<'_>) -> Result<(), CaptureError> {
        let reuse = self.state.options.reuse;
        self.changed = true;
        if let Form::Connected(connection) = &mut self.state.form
            && connection.hear_again(look, &self.descriptor, reuse)?
        {
            return Ok(());
        }
        // It is over meanwhile.
        self.state.form = tcp::form(look, &self.descriptor, &self.state.options)?;
        Ok(())
    }
}

/// An address of IPv4 that is written as one of IPv6 is the same.
fn plain(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}

/// Whether `a` comes after `b`, as sequence numbers go.
fn is_after(a: u32, b: u32) -> bool {
    (a.wrapping_sub(b) as i32) > 0
}

/// Has the ends of connections within the pod fit together. To be called once every socket has been captured.
pub(crate) fn reconcile(look: &mut Look<'_>) -> Result<(), CaptureError> {
    let mut pairs = std::mem::take(&mut look.sockets.pairs);
    let mates = pairs.mates();
    if look.spec.network != NetworkMode::Host {
        pairs.refuse_unaccepted(&mates)?;
    }
    for (from, to) in mates {
        let acknowledged = pairs.ends[from].connection().map(Connection::acknowledged);
        let received = pairs.ends[to].connection().map(Connection::received);
        if acknowledged.zip(received).is_some_and(|(acknowledged, received)| is_after(acknowledged, received)) {
            pairs.ends[to].hear_again(look)?;
        }
        let received = pairs.ends[to].connection().map(Connection::received);
        let sender = &mut pairs.ends[from];
        if let (Form::Connected(connection), Some(received)) = (&mut sender.state.form, received)
            && is_after(received, connection.sent())
        {
            connection.was_heard_until(received);
            sender.changed = true;
        }
    }
    for end in pairs.ends.into_iter().filter(|end| end.changed) {
        look.files.amend(end.id, image::encode(&end.state));
    }
    Ok(())
}
