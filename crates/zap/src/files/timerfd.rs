//! Timers that are read as files.

use std::os::fd::OwnedFd;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::{Descriptor, FileKind, decoded, describe, reopen};
use crate::error::{CaptureError, Context, RebuildError};
use crate::ids::FileId;
use crate::image::encode;
use crate::look::Look;
use crate::rebuild::Rebuild;
use crate::sys::anonymous;

/// A timerfd.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TimerfdState {
    /// The clock, by number.
    pub clock: i32,
    /// Status flags.
    pub flags: i32,
    /// The flags it was last set with: `TFD_TIMER_ABSTIME`, `TFD_TIMER_CANCEL_ON_SET`.
    pub set_with: i32,
    /// What remains until it expires next; zero when it is not armed.
    pub remaining: Duration,
    /// When it expires next on CLOCK_REALTIME, for a timer that was set to a time of day.
    pub due: Option<Duration>,
    /// The interval; zero when it expires once.
    pub interval: Duration,
    /// Expirations that have not been read.
    pub ticks: u64,
}

pub(super) struct Timerfd;

/// Clocks that show the time of day.
const OF_DAY: [i32; 2] = [libc::CLOCK_REALTIME, libc::CLOCK_REALTIME_ALARM];

impl FileKind for Timerfd {
    fn name(&self) -> &'static str {
        "timerfd"
    }

    fn recognizes(&self, descriptor: &Descriptor) -> bool {
        descriptor.link == b"anon_inode:[timerfd]"
    }

    fn capture(&self, _look: &mut Look<'_>, descriptor: &Descriptor) -> Result<Vec<u8>, CaptureError> {
        // A timer with an interval that has expired stands still until somebody looks; only then are the ticks right.
        let times = anonymous::timer(descriptor).capturing("reading", descriptor.object())?;
        let copy = descriptor.file.try_clone().capturing("copying", descriptor.object())?;
        let now = describe(&descriptor.subject, descriptor.number, copy)?;
        let set_with = now.field("settime flags:").and_then(|f| i32::from_str_radix(f, 8).ok()).unwrap_or(0);
        let clock = now.decimal("clockid:")? as i32;
        let absolute = OF_DAY.contains(&clock) && set_with & libc::TFD_TIMER_ABSTIME != 0;
        let due = |_| anonymous::now(libc::CLOCK_REALTIME).map(|now| now + times.0);
        let due = (absolute && !times.0.is_zero()).then_some(()).map(due);
        Ok(encode(&TimerfdState {
            clock,
            flags: descriptor.flags(),
            set_with,
            remaining: times.0,
            due: due.transpose().capturing("reading the clock of", descriptor.object())?,
            interval: times.1,
            ticks: now.decimal("ticks:")?,
        }))
    }

    fn open(&self, _rebuild: &mut Rebuild<'_>, id: FileId, state: &[u8]) -> Result<OwnedFd, RebuildError> {
        let state: TimerfdState = decoded(state)?;
        let file = anonymous::timerfd(state.clock).rebuilding("making the timerfd", id)?;
        arm(&file, &state).rebuilding("arming the timerfd", id)?;
        reopen::set_flags(&file, state.flags).rebuilding("setting the flags of", id)?;
        Ok(file)
    }
}

fn arm(file: &OwnedFd, state: &TimerfdState) -> std::io::Result<()> {
    let value = match state.due {
        Some(due) => due,
        // The pod's clock goes on from where it was, so what remained then remains now.
        None if state.set_with & libc::TFD_TIMER_ABSTIME != 0 && !state.remaining.is_zero() => {
            anonymous::now(state.clock)? + state.remaining
        }
        None => state.remaining,
    };
    if !value.is_zero() || state.set_with != 0 {
        anonymous::set_timer(file, state.set_with, value, state.interval)?;
    }
    if state.ticks > 0 {
        anonymous::set_ticks(file, state.ticks)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use nix::unistd::read;

    use super::*;
    use crate::files::testing::round_trip;
    use crate::look::Console;

    const HOUR: Duration = Duration::from_secs(3600);

    fn timer(clock: i32, flags: i32, value: Duration, interval: Duration) -> OwnedFd {
        let timer = anonymous::timerfd(clock).unwrap();
        anonymous::set_timer(&timer, flags, value, interval).unwrap();
        timer
    }

    #[test]
    fn what_remains_comes_back() {
        let second = Duration::from_secs(1);
        let day = anonymous::now(libc::CLOCK_REALTIME).unwrap() + HOUR;
        let timers = [
            timer(libc::CLOCK_MONOTONIC, 0, HOUR, second),
            timer(libc::CLOCK_BOOTTIME, 0, Duration::ZERO, Duration::ZERO),
            timer(libc::CLOCK_REALTIME, libc::TFD_TIMER_ABSTIME | libc::TFD_TIMER_CANCEL_ON_SET, day, Duration::ZERO),
        ];
        let (_, states, again) = round_trip(&timers.each_ref(), Console::None);
        let remaining = |i: usize| anonymous::timer(&again[i]).unwrap();
        assert!(remaining(0).0 > HOUR - 10 * second && remaining(0).1 == second);
        assert_eq!(remaining(1), (Duration::ZERO, Duration::ZERO));
        assert!(remaining(2).0 > HOUR - 10 * second && remaining(2).0 <= HOUR);
        let state: TimerfdState = crate::image::decode(&states[2].state).unwrap();
        assert_eq!(state.set_with, 3);
    }

    #[test]
    fn expirations_that_were_not_read_come_back() {
        let tick = Duration::from_millis(1);
        let timer = timer(libc::CLOCK_MONOTONIC, 0, tick, HOUR);
        let mut poll = [nix::poll::PollFd::new(std::os::fd::AsFd::as_fd(&timer), nix::poll::PollFlags::POLLIN)];
        assert_eq!(nix::poll::poll(&mut poll, 5000u16).unwrap(), 1);
        let (_, _, again) = round_trip(&[&timer], Console::None);
        for timer in [&timer, &again[0]] {
            let mut ticks = [0; 8];
            read(timer, &mut ticks).unwrap();
            assert_eq!(u64::from_ne_bytes(ticks), 1);
            assert!(anonymous::timer(timer).unwrap().0 > HOUR / 2);
        }
    }
}
