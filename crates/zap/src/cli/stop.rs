//! `zap stop`.

use super::options;
use crate::monitor::client;
use crate::monitor::protocol::{Failure, Request};
use crate::pod::{PodState, Store};

/// End a pod: politely first, then for good
#[derive(clap::Args)]
pub(super) struct Args {
    /// Seconds between the polite signal and the other
    #[arg(short, long, default_value_t = 10)]
    timeout: u64,
    /// The pod
    #[arg(value_parser = options::pod_name)]
    pod: String,
}

pub(super) fn run(store: &Store, args: &Args) -> Result<u8, Failure> {
    if store.load(&args.pod)?.state == PodState::Stopped {
        return Ok(0);
    }
    client::ask::<()>(store, &args.pod, &Request::Stop { seconds: args.timeout })?;
    Ok(0)
}
