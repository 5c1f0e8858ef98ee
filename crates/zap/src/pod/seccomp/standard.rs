//! The built-in profile: everything but what reaches outside the pod, and what cannot be saved.

use std::collections::BTreeMap;

use super::names;
use super::program::{Action, Comparison, Condition, Decisions};

/// Calls that reach outside, and the capabilities any of which allows them. The kernel asks for these as well; the filter
/// also covers what has been forgotten there, and user namespaces, in which a pod's processes have every capability.
const REACHING_OUT: &[(&str, &[&str])] = &[
    ("acct", &["SYS_PACCT"]),
    ("bpf", &["SYS_ADMIN", "BPF"]),
    ("clock_settime", &["SYS_TIME"]),
    ("settimeofday", &["SYS_TIME"]),
    ("init_module", &["SYS_MODULE"]),
    ("finit_module", &["SYS_MODULE"]),
    ("delete_module", &["SYS_MODULE"]),
    ("fanotify_init", &["SYS_ADMIN"]),
    ("ioperm", &["SYS_RAWIO"]),
    ("iopl", &["SYS_RAWIO"]),
    ("kexec_load", &["SYS_BOOT"]),
    ("kexec_file_load", &["SYS_BOOT"]),
    ("lookup_dcookie", &["SYS_ADMIN"]),
    ("open_by_handle_at", &["DAC_READ_SEARCH"]),
    ("perf_event_open", &["SYS_ADMIN", "PERFMON"]),
    ("quotactl", &["SYS_ADMIN"]),
    ("quotactl_fd", &["SYS_ADMIN"]),
    ("reboot", &["SYS_BOOT"]),
    ("swapon", &["SYS_ADMIN"]),
    ("swapoff", &["SYS_ADMIN"]),
    ("syslog", &["SYS_ADMIN", "SYSLOG"]),
    ("vhangup", &["SYS_TTY_CONFIG"]),
    // Zap follows the pod's memory with one of its own, and two cannot have the same page.
    ("userfaultfd", &["SYS_PTRACE"]),
];

/// Calls whose effects no checkpoint could save, answered as by a kernel without them, so that programs do without:
/// Landlock's rules and keyrings cannot be read back, an io_uring shares memory with the kernel, and pages of
/// `memfd_secret` can be read by nobody else.
const NOT_SAVED: &[&str] = &[
    "landlock_create_ruleset",
    "landlock_add_rule",
    "landlock_restrict_self",
    "io_uring_setup",
    "io_uring_enter",
    "io_uring_register",
    "add_key",
    "request_key",
    "keyctl",
    "memfd_secret",
];

/// The profile for a pod with these capabilities.
pub(super) fn decisions(allowed: impl Fn(&str) -> bool) -> Decisions {
    // A call that this zap does not know may be anything: as on an older kernel.
    let mut decisions = Decisions { by_number: BTreeMap::new(), otherwise: Action::Fail(libc::ENOSYS as u16) };
    let mut deny = |name: &str, errno: i32| {
        if let Some(number) = names::number(name) {
            decisions.add(number, vec![], Action::Fail(errno as u16));
        }
    };
    for (name, capabilities) in REACHING_OUT {
        if !capabilities.iter().any(|c| allowed(c)) {
            deny(name, libc::EPERM);
        }
    }
    NOT_SAVED.iter().for_each(|name| deny(name, libc::ENOSYS));
    if let Some(number) = names::number("socket") {
        decisions.add(number, vec![no_network_namespace()], Action::Fail(libc::EAFNOSUPPORT as u16));
    }
    for (first, end) in names::known() {
        (first..end).for_each(|number| decisions.add(number, vec![], Action::Allow));
    }
    decisions
}

/// Sockets between a virtual machine and its host know nothing of network namespaces.
fn no_network_namespace() -> Condition {
    Condition { argument: 0, comparison: Comparison::Masked(u64::from(u32::MAX)), value: libc::AF_VSOCK as u64 }
}
