//! Stopping a pod at a moment at which everything of its connections is in somebody's hands: none waits to be accepted, no
//! handshake is under way, and none that was closed still has something to send. What only the kernel has, it shows to nobody.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::error::{network_failed, refused, unexpected};
use super::{Checkpoint, CheckpointError};
use crate::pod::cgroup::refuse_groups;
use crate::pod::journal::Undo;
use crate::pod::network::Network;
use crate::pod::{LivePod, NetworkMode, PodError};
use crate::process::vfork;
use crate::sockets::{Deferring, Listeners, PATIENCE, PAUSE, Stray, Strays};

/// How long a pod is kept standing at least for what it had just closed. On a network of ours it takes a tenth of that.
const HELD_PATIENCE: Duration = Duration::from_millis(5);

/// How long a handshake may take before the other end is asked about it.
const ORDINARY: Duration = Duration::from_millis(2);

/// How often it is tried to have a pod stand still at a moment at which nothing is under way.
const ATTEMPTS: usize = 20;

/// What the sockets of a pod have under way that no descriptor leads to.
#[derive(Default)]
pub(super) struct UnderWay {
    pub(super) listeners: Listeners,
    pub(super) strays: Strays,
    /// How long it took what the pod had closed to be done.
    took: Duration,
    /// Whether requests for new connections are being dropped.
    newcomers_dropped: bool,
    /// Handshakes whose other ends were asked about them.
    asked: Vec<Stray>,
    /// Those of them that nobody answers, and nobody would miss.
    given_up: Vec<Stray>,
    /// Listeners that do not wait for data, for now.
    deferring: Vec<Deferring>,
}

impl UnderWay {
    /// Whether requests for new connections are being dropped.
    pub(super) fn newcomers_dropped(&self) -> bool {
        self.newcomers_dropped
    }

    /// Prepares to look for strays in these network namespaces beside the pod's own. Those of a pod that shares the host's
    /// cannot be told from the host's.
    pub(super) fn look_into<'n>(
        pod: &LivePod,
        listeners: Listeners,
        others: impl Iterator<Item = &'n std::os::fd::OwnedFd>,
    ) -> std::io::Result<UnderWay> {
        let others = others.map(|namespace| namespace.try_clone());
        let own = std::fs::File::open(pod.init.proc("ns/net")).map(Into::into);
        let own = (pod.spec.network != NetworkMode::Host).then_some(own);
        let strays = Strays::of(own.into_iter().chain(others).collect::<Result<Vec<_>, _>>()?)?;
        Ok(UnderWay { listeners, strays, ..UnderWay::default() })
    }
}

impl Checkpoint<'_> {
    /// Blocks the network and freezes the pod, at a moment at which nobody waits in vfork(2) and nothing of its connections
    /// is under way.
    pub(super) fn stop(&mut self) -> Result<(), CheckpointError> {
        self.settle()?;
        let mut attempts = 0;
        loop {
            attempts += 1;
            self.clock.begin_hold();
            let passes = self.divert()?;
            self.pod.journal.record(Undo::Sockets)?;
            self.pod.journal.record(Undo::Thaw)?;
            self.freeze()?;
            if passes {
                self.shut()?;
            }
            if self.let_depart()? && !self.under_way.listeners.have_waiting() {
                return self.admit_newcomers();
            }
            // Something came at the last moment.
            if attempts >= ATTEMPTS {
                self.refuse(&self.strays()?)?;
            }
            if !self.was_suspended {
                self.pod.cgroup.thaw()?;
            }
            self.unblock()?;
            self.clock.end_hold();
            self.settle()?;
        }
    }

    /// Refuses what is under way, if anything is.
    fn refuse(&self, strays: &[Stray]) -> Result<(), CheckpointError> {
        self.under_way.listeners.refuse().map_err(|e| refused(self.pod, e))?;
        strays.first().map_or(Ok(()), |stray| Err(refused(self.pod, stray.refuse())))
    }

    /// The connections that only the kernel has now.
    fn strays(&self) -> Result<Vec<Stray>, CheckpointError> {
        let mut strays =
            self.under_way.strays.look().map_err(|e| refused(self.pod, unexpected("asking sock_diag", &e)))?;
        strays.retain(|stray| !self.under_way.given_up.iter().any(|other| other.is(stray)));
        Ok(strays)
    }

    /// While the pod runs: waits until it has accepted the connections that wait, of which no new ones come meanwhile, and
    /// until those that only the kernel has are done.
    fn settle(&mut self) -> Result<(), CheckpointError> {
        let begun = Instant::now();
        let mut strays = self.strays()?;
        let mut waiting = self.under_way.listeners.have_waiting();
        if strays.is_empty() && !waiting {
            return Ok(());
        }
        let deadline = begun + PATIENCE;
        if waiting && self.was_suspended {
            self.under_way.listeners.tolerate();
            return self.refuse(&[]);
        }
        if waiting || strays.iter().any(Stray::opening) {
            self.drop_newcomers()?;
        }
        while waiting || !strays.is_empty() {
            if Instant::now() > deadline {
                return self.give_up(&strays);
            }
            if begun.elapsed() > ORDINARY {
                self.ask_about(&strays)?;
            }
            std::thread::sleep(PAUSE);
            if !strays.is_empty() {
                strays = self.still_there(&strays)?;
                self.under_way.took = begun.elapsed();
            }
            waiting = self.under_way.listeners.have_waiting();
        }
        Ok(())
    }

    /// What there is to wait for still. A server closes one connection after the other: those that it has closed since are
    /// seen to when it stands still.
    fn still_there(&self, before: &[Stray]) -> Result<Vec<Stray>, CheckpointError> {
        let mut now = self.strays()?;
        now.retain(|stray| stray.opening() || before.iter().any(|other| other.is(stray)));
        Ok(now)
    }

    /// Time is up: refuses what is under way, but for handshakes with who has not answered for long, and does not now.
    fn give_up(&mut self, strays: &[Stray]) -> Result<(), CheckpointError> {
        self.under_way.listeners.tolerate();
        let asked = &self.under_way.asked;
        let unanswered = |stray: &Stray| asked.iter().any(|other| other.is(stray) && other.is_unanswered());
        let missed: Vec<Stray> = strays.iter().filter(|stray| !unanswered(stray)).copied().collect();
        self.refuse(&missed)?;
        self.under_way.given_up.extend(strays);
        Ok(())
    }

    /// Has the other ends of handshakes say whether they are connected, each once.
    fn ask_about(&mut self, strays: &[Stray]) -> Result<(), CheckpointError> {
        let known = |stray: &Stray| self.under_way.asked.iter().any(|other| other.is(stray));
        let fresh: Vec<Stray> = strays.iter().filter(|stray| stray.opening() && !known(stray)).copied().collect();
        if fresh.is_empty() {
            return Ok(());
        }
        let ports = fresh.iter().map(|stray| stray.local.port()).collect();
        for listener in self.under_way.listeners.deferring(&ports) {
            self.pod.journal.record(Undo::Deferring(listener.clone()))?;
            self.under_way.deferring.push(listener.clone());
            listener.suspend().map_err(|e| refused(self.pod, unexpected("setting up a listener", &e)))?;
        }
        let hastened = self.under_way.strays.hasten(&fresh);
        hastened.map_err(|e| refused(self.pod, unexpected("asking about handshakes", &e)))?;
        self.under_way.asked.extend(fresh);
        Ok(())
    }

    /// While the pod stands still: lets what it has just closed be done, for as long as that took while it ran, and again.
    /// Whether nothing is under way then.
    fn let_depart(&mut self) -> Result<bool, CheckpointError> {
        let mut strays = self.strays()?;
        if strays.is_empty() || strays.iter().any(Stray::opening) {
            return Ok(strays.is_empty());
        }
        // What is let through must not bring new ones.
        self.drop_newcomers()?;
        let deadline = Instant::now() + HELD_PATIENCE.max(2 * self.under_way.took).min(PATIENCE);
        self.unblock()?;
        while !strays.is_empty() && Instant::now() < deadline {
            std::thread::sleep(PAUSE / 5);
            strays = self.strays()?;
        }
        self.block()?;
        Ok(self.strays()?.is_empty())
    }

    /// Has packets for the pod wait. Whether what it sends passes until it stands still, or its peers would have to wait for it.
    fn divert(&mut self) -> Result<bool, CheckpointError> {
        let Some(network) = &self.pod.network else { return Ok(false) };
        self.pod.journal.record(Undo::Unblock)?;
        Ok(network.divert().map_err(|source| network_failed(self.pod, source))?)
    }

    fn block(&mut self) -> Result<(), CheckpointError> {
        if self.pod.network.is_some() {
            self.pod.journal.record(Undo::Unblock)?;
        }
        self.shut()
    }

    /// Blocks the network, which the journal has already.
    fn shut(&self) -> Result<(), CheckpointError> {
        let blocked = self.pod.network.as_ref().map_or(Ok(()), Network::block);
        Ok(blocked.map_err(|source| network_failed(self.pod, source))?)
    }

    fn drop_newcomers(&mut self) -> Result<(), CheckpointError> {
        if let (Some(network), false) = (&self.pod.network, self.under_way.newcomers_dropped) {
            self.pod.journal.record(Undo::Newcomers)?;
            self.under_way.newcomers_dropped = true;
            network.drop_newcomers().map_err(|source| network_failed(self.pod, source))?;
        }
        Ok(())
    }

    /// Undoes what was done to listeners and to requests for new connections.
    pub(super) fn admit_newcomers(&mut self) -> Result<(), CheckpointError> {
        for listener in std::mem::take(&mut self.under_way.deferring) {
            listener.resume().map_err(|e| refused(self.pod, unexpected("putting a listener right", &e)))?;
            self.pod.journal.done(&Undo::Deferring(listener))?;
        }
        if let (Some(network), true) = (&self.pod.network, self.under_way.newcomers_dropped) {
            network.admit_newcomers().map_err(|source| network_failed(self.pod, source))?;
            self.pod.journal.done(&Undo::Newcomers)?;
            self.under_way.newcomers_dropped = false;
        }
        Ok(())
    }

    /// Freezes the pod at a moment at which nobody waits in vfork(2).
    fn freeze(&mut self) -> Result<(), CheckpointError> {
        let begun = Instant::now();
        loop {
            if let Some(memory) = Arc::get_mut(&mut self.memory) {
                memory.forget_stale();
            }
            self.pod.cgroup.freeze().map_err(|error| match error {
                // Somebody in it has been at its groups since they were checked.
                PodError::Groups { group } => refused(self.pod, refuse_groups(group)),
                other => other.into(),
            })?;
            let Some(waiting) = vfork::waiting(&self.pod.cgroup.pids()?) else { return Ok(()) };
            self.pod.cgroup.thaw()?;
            waiting.finish(self.pod.init, begun).map_err(|e| refused(self.pod, e))?;
        }
    }
}
