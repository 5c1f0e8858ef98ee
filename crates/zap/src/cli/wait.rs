//! `zap wait`.

use std::io::Write;

use super::options;
use crate::monitor::client;
use crate::monitor::protocol::{Failure, Request};
use crate::monitor::session::End;
use crate::pod::{PodState, Store};

/// Wait for a pod's command to end, and end with its code
#[derive(clap::Args)]
pub(super) struct Args {
    /// The pod
    #[arg(value_parser = options::pod_name)]
    pod: String,
}

pub(super) fn run(store: &Store, args: &Args) -> Result<u8, Failure> {
    loop {
        let record = store.load(&args.pod)?;
        if record.state == PodState::Stopped {
            return Ok(record.exit_code.unwrap_or(128 + libc::SIGKILL) as u8);
        }
        match client::ask::<End>(store, &args.pod, &Request::Wait) {
            Ok((End::Exited(code), _)) => return Ok(code as u8),
            Ok((End::TakenAway(why), _)) => {
                let _ = writeln!(std::io::stderr(), "zap: {why}");
                return Ok(0);
            }
            // It ended just before it was asked, or its monitor died: the next look tells.
            Err(failure) if !store.pod_dir(&args.pod).exists() => return Err(failure),
            Err(failure) if store.load(&args.pod)?.monitor.is_some_and(|m| m.lives()) => return Err(failure),
            Err(_) => client::revive(store, &args.pod)?,
        }
    }
}
