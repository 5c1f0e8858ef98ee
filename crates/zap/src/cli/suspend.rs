//! `zap suspend` and `zap resume`.

use super::options;
use crate::monitor::client;
use crate::monitor::protocol::{Failure, Request};
use crate::pod::Store;

/// Hold every process of a pod still
#[derive(clap::Args)]
pub(super) struct Args {
    /// The pod
    #[arg(value_parser = options::pod_name)]
    pod: String,
}

/// Let a suspended pod go on
#[derive(clap::Args)]
pub(super) struct ResumeArgs {
    /// The pod
    #[arg(value_parser = options::pod_name)]
    pod: String,
}

pub(super) fn run(store: &Store, args: &Args) -> Result<u8, Failure> {
    client::ask::<()>(store, &args.pod, &Request::Suspend)?;
    Ok(0)
}

pub(super) fn resume(store: &Store, args: &ResumeArgs) -> Result<u8, Failure> {
    client::ask::<()>(store, &args.pod, &Request::Resume)?;
    Ok(0)
}
