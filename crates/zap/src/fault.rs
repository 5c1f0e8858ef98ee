//! Named fault points: where a test can have zap die, or fail.
//!
//! `ZAP_FAULT=NAME` in the environment of `zap run`, `checkpoint`, `restart`, `migrate` or `receive` makes the pod's monitor kill itself (SIGKILL) when
//! it comes to that point; with `ZAP_FAULT=NAME:error` what is being done there fails, as if the kernel had said EIO, and with
//! `ZAP_FAULT=NAME:full` as if it had said ENOSPC. Nothing else reads it.

use std::io;
use std::sync::Mutex;

use serde::{Deserialize, Serialize};

/// Every point, in the order in which a pod's birth (by a restart, too), a checkpoint, a restart, and the two sides of a
/// migration come to them.
pub const POINTS: &[&str] = &[
    "birth-claimed",
    "birth-recorded",
    "birth-grouped",
    "birth-layered",
    "birth-cloned",
    "birth-connected",
    "birth-ready",
    "birth-saved",
    "run-spawned",
    "run-done",
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
    "migrate-welcomed",
    "migrate-compared",
    "migrate-sent",
    "migrate-ready",
    "migrate-followed",
    "migrate-given-up",
    "migrate-told",
    "migrate-serving",
    "migrate-away",
    "receive-welcomed",
    "receive-compared",
    "receive-complete",
    "receive-ready",
    "receive-told",
    "receive-running",
    "receive-fetching",
    "half-filled",
];

/// Those at which something can fail and the pod is whole yet: not those at which it has ended, or gone to the other side.
pub const FALLIBLE: &[&str] = &[
    "birth-claimed",
    "birth-recorded",
    "birth-grouped",
    "birth-layered",
    "birth-cloned",
    "birth-connected",
    "birth-ready",
    "birth-saved",
    "run-spawned",
    "checkpoint-begin",
    "checkpoint-looked-ahead",
    "checkpoint-frozen",
    "checkpoint-held",
    "checkpoint-captured",
    "checkpoint-before-rename",
    "restart-verified",
    "restart-namespaces",
    "restart-files",
    "restart-memory",
    "restart-tree",
    "restart-before-let-go",
    "migrate-welcomed",
    "migrate-compared",
    "migrate-sent",
    "migrate-ready",
    "migrate-followed",
    "receive-welcomed",
    "receive-compared",
    "receive-complete",
    "receive-ready",
    "receive-told",
];

/// What fails at such a point, in an error.
pub(crate) const OBJECT: &str = "a fault point";

/// What makes a point fail rather than kill, and with which error.
pub const ERRORS: [(&str, i32); 2] = [(":error", libc::EIO), (":full", libc::ENOSPC)];

/// A point that is to fail, and how.
fn failing(name: &str) -> Option<(&str, i32)> {
    ERRORS.iter().find_map(|(suffix, error)| Some((name.strip_suffix(suffix)?, *error)))
}

static ARMED: Mutex<Option<String>> = Mutex::new(None);

/// The point that the environment of this command asks for.
pub fn wanted() -> Option<String> {
    let is_known = |name: &str| match failing(name) {
        Some((name, _)) => FALLIBLE.contains(&name),
        None => POINTS.contains(&name),
    };
    std::env::var("ZAP_FAULT").ok().filter(|name| is_known(name))
}

/// What is to happen to the stream of a migration: for tests.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stream {
    /// Where it breaks.
    pub cut: Option<Cut>,
    /// How long the other side may be silent, in milliseconds.
    pub patience_ms: Option<u64>,
}

/// Where the stream of a migration breaks.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cut {
    /// Before this frame is sent, counted from 0 …
    pub frame: u64,
    /// … among those of this kind, or among all: a message by its name, `bytes` of the image, or `pages` that were left behind.
    pub kind: Option<String>,
    /// How.
    pub how: Break,
}

/// How a stream breaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Break {
    /// This side notices.
    Ends,
    /// The monitor dies.
    Dies,
    /// This side says nothing more, and reads nothing, until the other one is gone.
    Stalls,
}

/// What the environment asks for that side of a migration, `source` or `destination`: `ZAP_CUT=SIDE:FRAME`,
/// `SIDE:FRAME:dies` or `SIDE:FRAME:stalls`, and `ZAP_PATIENCE` in milliseconds. FRAME is a number, a kind of frame (the first
/// of them is meant), or `KIND+NUMBER`.
pub fn stream_wanted(side: &str) -> Stream {
    let number = |wish: String| wish.parse().ok();
    let cut = std::env::var("ZAP_CUT").ok();
    Stream {
        cut: cut.as_deref().and_then(|wish| Cut::parse(wish.strip_prefix(side)?.strip_prefix(':')?)),
        patience_ms: std::env::var("ZAP_PATIENCE").ok().and_then(number),
    }
}

impl Cut {
    fn parse(wish: &str) -> Option<Cut> {
        let (frame, how) = match wish.split_once(':') {
            None => (wish, Break::Ends),
            Some((frame, "dies")) => (frame, Break::Dies),
            Some((frame, "stalls")) => (frame, Break::Stalls),
            Some(_) => return None,
        };
        let (kind, frame) = match (frame.parse(), frame.split_once('+')) {
            (Ok(number), _) => (None, number),
            (_, Some((kind, number))) => (Some(kind.to_owned()), number.parse().ok()?),
            (_, None) => (Some(frame.to_owned()), 0),
        };
        Some(Cut { frame, kind, how })
    }
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
        die();
    }
}

/// Kills this process.
pub(crate) fn die() {
    let _ = nix::sys::signal::kill(nix::unistd::Pid::this(), nix::sys::signal::Signal::SIGKILL);
}

/// Dies here if this point is armed, or fails if it is to.
pub(crate) fn fallible(name: &str) -> io::Result<()> {
    debug_assert!(FALLIBLE.contains(&name), "{name} is not in the table");
    point(name);
    let armed = ARMED.lock().map(|armed| armed.clone()).unwrap_or_default();
    match armed.as_deref().and_then(failing) {
        Some((wanted, error)) if wanted == name => Err(io::Error::from_raw_os_error(error)),
        _ => Ok(()),
    }
}
