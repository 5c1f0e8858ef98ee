//! Named fault points: where a test can have zap die.
//!
//! `ZAP_FAULT=NAME` in the environment of `zap checkpoint` or `zap restart` makes the pod's monitor kill itself (SIGKILL) when
//! it comes to that point. Nothing else reads it.

use std::sync::Mutex;

/// Every point, in the order in which a checkpoint and a restart come to them.
pub const POINTS: &[&str] = &[
    "checkpoint-begin",
    "checkpoint-looked-ahead",
    "checkpoint-frozen",
    "checkpoint-held",
    "checkpoint-captured",
    "checkpoint-let-go",
    "checkpoint-before-rename",
    "checkpoint-written",
    "restart-verified",
    "restart-namespaces",
    "restart-files",
    "restart-memory",
    "restart-tree",
    "restart-before-let-go",
    "restart-done",
];

static ARMED: Mutex<Option<String>> = Mutex::new(None);

/// The point that the environment of this command asks for.
pub fn wanted() -> Option<String> {
    std::env::var("ZAP_FAULT").ok().filter(|name| POINTS.contains(&name.as_str()))
}

/// Arms a point in this process, or disarms all.
pub fn arm(point: Option<&str>) {
    if let Ok(mut armed) = ARMED.lock() {
        *armed = point.map(str::to_owned);
    }
}

/// Dies here if this point is armed.
pub(crate) fn point(name: &str) {
    debug_assert!(POINTS.contains(&name), "{name} is not in the table");
    let hit = ARMED.lock().is_ok_and(|armed| armed.as_deref() == Some(name));
    if hit {
        let _ = nix::sys::signal::kill(nix::unistd::Pid::this(), nix::sys::signal::Signal::SIGKILL);
    }
}
