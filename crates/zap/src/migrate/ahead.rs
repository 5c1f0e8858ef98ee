//! Before a pod is held: whether the destination has what the pod uses of its processor and of its kernel. What a pod begins to
//! use afterwards the destination finds when it rebuilds it, and the pod goes on here.

use crate::demands::{self, KernelFeature, Offer};
use crate::memory;
use crate::pod::LivePod;
use crate::process::discover::{self, Found};
use crate::process::hold;
use crate::processor::Processor;
use crate::sys::ptrace;

/// What the destination lacks, and who uses it.
pub(super) fn check(pod: &LivePod, there: &Offer) -> Result<(), String> {
    let (here, beginnings) = (Processor::here(), pod.beginnings.and_here().without_hidden(&pod.spec.environment));
    let missing: Vec<KernelFeature> = KernelFeature::missing(there).collect();
    let registers = here.has_registers_beyond(&there.processor);
    if missing.is_empty() && *here == there.processor && pod.beginnings.is_empty() {
        return Ok(());
    }
    // What cannot be looked at is left to the hold.
    let members = pod.cgroup.pids().unwrap_or_default();
    let Ok(population) = discover::discover(pod.init, &members) else { return Ok(()) };
    for found in &population.live {
        let who = || format!("which process {} ({}) uses", found.subject.pod, found.subject.command);
        if let Some(feature) = missing.iter().find(|feature| feature.is_used_by(found.subject.host)) {
            return Err(format!("{}, {}", feature.name(), who()));
        }
        if let Some(registers) =
            Some(found).filter(|_| registers && can_be_held(pod, found)).and_then(|found| beyond(pod, found, there))
        {
            return Err(format!("{registers}, {}", who()));
        }
        let auxv = std::fs::read(found.subject.host.proc("auxv")).unwrap_or_default();
        if let Some(what) = demands::lacking_instructions(&beginnings, &auxv, &there.processor) {
            let subject = &found.subject;
            return Err(format!(
                "{what}, which process {} ({}) found where it began, and may use",
                subject.pod, subject.command
            ));
        }
    }
    Ok(())
}

/// Whether its threads stop when they are asked to.
fn can_be_held(pod: &LivePod, found: &Found) -> bool {
    !pod.cgroup.is_frozen() && !matches!(found.stat.state, b'T' | b't' | b'D' | b'Z' | b'X')
}

/// Registers in use that the destination has not. Each thread is held for as long as it takes to read them.
fn beyond(pod: &LivePod, found: &Found, there: &Offer) -> Option<String> {
    let depth = discover::depth_of(pod.init).ok()?;
    let mut area = Vec::new();
    for name in discover::threads(found, depth).ok()? {
        let Ok(held) = hold::seize_one(name).and_then(|seized| seized.wait()) else { continue };
        let read = ptrace::extended_state(name.host, &mut area);
        let _ = held.let_go();
        let mut beyond = Processor::here().registers_beyond(&there.processor, &area);
        if let Some(registers) = read.ok().and_then(|()| beyond.next()) {
            return Some(registers);
        }
    }
    None
}

impl KernelFeature {
    /// Those that this host has and another lacks.
    fn missing(there: &Offer) -> impl Iterator<Item = KernelFeature> {
        Offer::here()
            .features
            .into_iter()
            .filter(|feature| !there.features.contains(feature))
            .collect::<Vec<_>>()
            .into_iter()
    }

    /// Whether a running process uses it.
    fn is_used_by(self, process: crate::ids::HostPid) -> bool {
        match self {
            KernelFeature::Guards => memory::has_guards(process),
            _ => memory::layout_of(process).is_ok_and(|layout| self.is_among(&layout)),
        }
    }
}
