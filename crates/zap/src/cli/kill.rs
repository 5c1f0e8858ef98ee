//! `zap kill`.

use super::options;
use crate::monitor::client;
use crate::monitor::protocol::{Failure, Request};
use crate::pod::Store;

/// Send a signal to a pod's first command
#[derive(clap::Args)]
#[command(
    after_help = "KILL ends every process of the pod at once, also when it is suspended.\n\nExample:\n  zap kill -s HUP web"
)]
pub(super) struct Args {
    /// Signal, by name or number
    #[arg(short, long, default_value = "KILL", value_parser = options::signal)]
    signal: i32,
    /// The pod
    #[arg(value_parser = options::pod_name)]
    pod: String,
}

pub(super) fn run(store: &Store, args: &Args) -> Result<u8, Failure> {
    client::ask::<()>(store, &args.pod, &Request::Signal(args.signal))?;
    Ok(0)
}
