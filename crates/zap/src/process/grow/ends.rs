//! The end of helpers, and of processes that had ended.

use std::collections::BTreeSet;

use crate::ids::PodPid;
use crate::process::grow::{Grove, GrowError, Grown, PATIENTLY};
use crate::process::tree::Role;
use crate::process::{finish, signals};
use crate::sys::pidfd::PidFd;
use crate::sys::ptrace::{self, Stop};
use crate::tracee::{Batch, TraceeError};

impl Grove<'_> {
    /// Ends the helpers, and the processes that are zombies in the image. Helpers that a process of the pod forked are
    /// reaped by it, and those that the first process of a PID namespace adopted by that; PID 1 reaps the others.
    pub fn end_the_ended(&mut self) -> Result<(), GrowError> {
        let ended = self.plan.nodes.values().filter(|node| node.role != Role::Live).map(|node| node.pid);
        let (last, first): (Vec<PodPid>, Vec<PodPid>) = ended.partition(|pid| self.plan.adopters.contains_key(pid));
        self.end_all(&first)?;
        for adopter in self.plan.adopters.values().collect::<BTreeSet<_>>() {
            // Whether it still is one will be set with its other attributes.
            let mut batch = Batch::new();
            let args = [libc::PR_SET_CHILD_SUBREAPER.into(), 1i32.into()];
            batch.call(libc::SYS_prctl, args, "becoming a subreaper");
            self.run(*adopter, &batch)?;
        }
        self.end_all(&last)?;
        for (parent, batch) in self.reapers()? {
            self.run(parent, &batch)?;
        }
        Ok(())
    }

    fn end_all(&mut self, processes: &[PodPid]) -> Result<(), GrowError> {
        for pid in processes.iter().rev() {
            let state = self.ended.get(pid).copied();
            if let Some(state) = state {
                let mut batch = Batch::new();
                finish::remains(state, &mut batch, |batch| {
                    self.pass_for(*pid, &state.credentials, batch);
                });
                self.run(*pid, &batch)?;
            }
            let Some(mut grown) = self.grown.remove(pid) else { continue };
            end(&mut grown, state.and_then(|state| state.place.ended).unwrap_or(0))?;
        }
        Ok(())
    }

    /// What live processes are to reap.
    fn reapers(&self) -> Result<Vec<(PodPid, Batch)>, GrowError> {
        let mut batches = Vec::new();
        for node in self.plan.nodes.values() {
            let reaper = match (node.role, node.namespace) {
                (Role::Live, _) => node.pid,
                (_, Some(namespace)) => self.first_of(namespace)?,
                _ => continue,
            };
            let is_live = self.plan.nodes.get(&reaper).is_some_and(|node| node.role == Role::Live);
            let phantoms = node.before.iter().chain(&node.after).map(|child| &self.plan.nodes[child]);
            let mut batch = Batch::new();
            for phantom in phantoms.filter(|child| is_live && child.role == Role::Phantom) {
                let number = phantom.seen_from(self.plan.nodes[&reaper].numbers.len());
                let args = [number.into(), 0u64.into(), PATIENTLY.into(), 0u64.into()];
                batch.call(libc::SYS_wait4, args, "reaping a helper");
            }
            if !batch.is_empty() {
                batches.push((reaper, batch));
            }
        }
        Ok(batches)
    }
}

/// Ends a helper, or a process as it ended the first time, with that status.
pub(super) fn end(grown: &mut Grown, status: i32) -> Result<(), GrowError> {
    let held = &mut grown.threads[0];
    let signal = status & 0x7f;
    if signal == libc::SIGKILL {
        // The first process of a PID namespace could not do that to itself.
        let killed = PidFd::open(held.name.host).and_then(|handle| handle.signal(signal));
        killed.map_err(TraceeError::kernel("killing", held.name.pod))?;
        return await_end(grown);
    }
    let mut batch = Batch::new();
    if signal == 0 {
        batch.attempt(libc::SYS_exit_group, [((status >> 8) & 0xff).into()]);
    } else {
        // A core dump would be a file that was not there.
        let none = batch.bytes(&[0; 16]);
        batch.attempt(libc::SYS_setrlimit, [(libc::RLIMIT_CORE as i32).into(), none]);
        signals::restart_actions(&[], &mut batch);
        let mask = batch.bytes(&0u64.to_ne_bytes());
        batch.attempt(libc::SYS_kill, [held.name.own.0.into(), signal.into()]);
        batch.attempt(libc::SYS_rt_sigprocmask, [libc::SIG_SETMASK.into(), mask, 0u64.into(), 8u64.into()]);
    }
    held.begin(&grown.ground, 0, &batch)?;
    await_end(grown)
}

fn await_end(grown: &Grown) -> Result<(), GrowError> {
    let name = grown.threads[0].name;
    loop {
        match ptrace::wait(name.host).map_err(TraceeError::kernel("ending", name.pod))? {
            Stop::Ended(_) => return Ok(()),
            Stop::Signal(signal) if signal == grown.ground.marker() => return Err(TraceeError::Died(name.pod).into()),
            Stop::Signal(signal) => ptrace::cont(name.host, signal),
            Stop::Event(_) | Stop::Other(_) => ptrace::cont(name.host, 0),
        }
        .map_err(TraceeError::kernel("ending", name.pod))?;
    }
}
