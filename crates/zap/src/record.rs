//! The record of an image that says what the pod as a whole is.

use std::fs;

use serde::{Deserialize, Serialize};

use crate::error::{CaptureError, Context};
use crate::ids::PodPid;
use crate::memory;
use crate::namespaces::UtsState;
use crate::pod::{self, LivePod, PodSpec};
use crate::process::discover::PodProc;
use crate::processor::{Beginnings, Processor};

/// Kinds of record that this version reads, and their versions.
pub const KNOWN: &[(&str, u16)] = &[
    ("pod", 1),
    ("process", 1),
    ("zombies", 1),
    ("file", 1),
    ("ipc", 1),
    ("layers", 1),
    ("namespace", 1),
    ("mount", 1),
    ("network", 1),
];

/// The pod as a whole.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct PodRecord {
    /// As it was born.
    pub spec: PodSpec,
    /// Its first command's PID; the pod ends with it.
    pub main: Option<PodPid>,
    /// The session of PID 1.
    pub init_session: PodPid,
    /// Its CLOCK_MONOTONIC and CLOCK_BOOTTIME, in nanoseconds.
    pub clocks: (i64, i64),
    /// Kernel release and CPU model of the host.
    pub host: HostFacts,
    /// What it calls itself, if its processes may change that and have.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub names: Option<UtsState>,
    /// On which processors its programs began.
    #[serde(default, skip_serializing_if = "Beginnings::is_empty")]
    pub beginnings: Beginnings,
}

/// What is worth knowing of the host that wrote an image.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct HostFacts {
    /// `uname -r`.
    pub kernel: String,
    /// Bytes of the XSAVE area.
    pub xsave: usize,
    /// Its vDSO: what programs know of it must stay where another kernel has another.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vdso: Option<serde_bytes::ByteBuf>,
    /// Its processor.
    #[serde(default, skip_serializing_if = "Processor::is_unknown")]
    pub processor: Processor,
}

impl HostFacts {
    /// Those of this host.
    pub fn here() -> std::io::Result<HostFacts> {
        let uname = nix::sys::utsname::uname().map_err(std::io::Error::from)?;
        let processor = Processor::here().clone();
        Ok(HostFacts {
            kernel: uname.release().to_string_lossy().into_owned(),
            xsave: processor.area(),
            vdso: memory::own_vdso().map(serde_bytes::ByteBuf::from),
            processor,
        })
    }
}

/// Nanoseconds of a clock on this host.
pub fn host_clock(clock: nix::time::ClockId) -> i64 {
    nix::time::clock_gettime(clock).map_or(0, |time| time.tv_sec() * 1_000_000_000 + time.tv_nsec())
}

/// The offsets of a pod's clocks from the host's, in nanoseconds: (monotonic, boottime).
pub(crate) fn offsets(text: &str) -> (i64, i64) {
    let of = |name: &str| {
        let line = text.lines().find(|line| line.starts_with(name))?;
        let mut words = line.split_ascii_whitespace().skip(1);
        let (seconds, nanoseconds): (i64, i64) = (words.next()?.parse().ok()?, words.next()?.parse().ok()?);
        seconds.checked_mul(1_000_000_000)?.checked_add(nanoseconds)
    };
    (of("monotonic").unwrap_or(0), of("boottime").unwrap_or(0))
}

/// The names of a pod, if they are not those that it was born with. It takes CAP_SYS_ADMIN to change them.
fn names(pod: &LivePod) -> Result<Option<UtsState>, CaptureError> {
    const UNSET: &[u8] = b"(none)";
    if !pod::may_name_itself(&pod.spec) {
        return Ok(None);
    }
    let names = UtsState::of(pod.init).capturing("reading", "the names of the pod")?;
    let is_as_born = names.hostname == pod.spec.hostname.as_bytes() && names.domain == UNSET;
    Ok((!is_as_born).then_some(names))
}

impl PodRecord {
    /// The record of a pod at this moment.
    pub fn of(pod: &LivePod) -> Result<PodRecord, CaptureError> {
        let text = fs::read_to_string(pod.init.proc("timens_offsets")).unwrap_or_default();
        let (monotonic, boottime) = offsets(&text);
        let init = PodProc::new(pod.init).stat(PodPid(1))?;
        Ok(PodRecord {
            spec: pod.spec.clone(),
            main: pod.main,
            init_session: init.session,
            clocks: (
                host_clock(nix::time::ClockId::CLOCK_MONOTONIC) + monotonic,
                host_clock(nix::time::ClockId::CLOCK_BOOTTIME) + boottime,
            ),
            names: names(pod)?,
            beginnings: pod.beginnings.and_here(),
            host: HostFacts::here().capturing("reading", "uname")?,
        })
    }

    /// What the manifest shows to people.
    pub fn facts(&self) -> serde_json::Value {
        serde_json::json!({
            "pod": self.spec.name,
            "command": self.spec.command,
            "kernel": self.host.kernel,
            "written": humantime::format_rfc3339_seconds(std::time::SystemTime::now()).to_string(),
        })
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn offsets_of_a_time_namespace() {
        let text = "monotonic         -12         500000000\nboottime           3         0\n";
        assert_eq!(super::offsets(text), (-11_500_000_000, 3_000_000_000));
    }
}
