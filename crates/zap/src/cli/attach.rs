//! `zap attach`.

use super::{console, options};
use crate::monitor::client;
use crate::monitor::protocol::{Failure, Request, Watch};
use crate::pod::{PodState, Store};

/// Show a pod's console from now on, and type into it
#[derive(clap::Args)]
#[command(after_help = "Ctrl-P Ctrl-Q leaves a pod with a terminal running by itself.\n\nExample:\n  zap attach web")]
pub(super) struct Args {
    /// The pod
    #[arg(value_parser = options::pod_name)]
    pod: String,
}

pub(super) fn run(store: &Store, args: &Args) -> Result<u8, Failure> {
    let record = store.load(&args.pod)?;
    if let (PodState::Stopped, Some(code)) = (record.state, record.exit_code) {
        return Ok(code as u8);
    }
    let window = if record.spec.tty { console::window() } else { None };
    let watch = Watch { attached: true, window };
    let ((), socket) = client::ask(store, &args.pod, &Request::Attach(watch))?;
    console::watch(socket, record.spec.tty, true)
}
