//! `zap receive`.

use std::os::fd::AsFd;

use super::print_error;
use crate::migrate::destination::Options;
use crate::monitor::client;
use crate::monitor::protocol::{Born, Failure, Start};
use crate::pod::Store;

/// Take a pod that is moved here: the other side of migrate
#[derive(clap::Args)]
#[command(after_help = "Example, on the host where the pod is:\n  zap migrate web --via \"ssh b zap receive\"")]
pub(super) struct Args {}

pub(super) fn run(store: &Store, _: &Args) -> Result<u8, Failure> {
    let failed = |e: std::io::Error| Failure { message: format!("the stream: {e}"), code: 1 };
    let from = std::io::stdin().as_fd().try_clone_to_owned().map_err(failed)?;
    let to = std::io::stdout().as_fd().try_clone_to_owned().map_err(failed)?;
    let options = Options { fault: crate::fault::wanted(), cut_before: crate::fault::cut_wanted("destination") };
    let start = Start::Receive { store: store.clone(), options };
    let (born, _) = client::launch_with::<Born>(&start, [from, to])?;
    // stdout belongs to the stream
    print_error(&format!("pod {} runs here now", born.name));
    Ok(0)
}
