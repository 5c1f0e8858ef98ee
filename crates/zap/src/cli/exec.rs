//! `zap exec`.

use std::path::PathBuf;

use super::{console, options, or_125};
use crate::monitor::client;
use crate::monitor::protocol::{Exec, Failure, Request, Watch};
use crate::pod::Store;

/// Run another command in a pod
#[derive(clap::Args)]
#[command(after_help = "Example:\n  zap exec -it web -- bash")]
pub(super) struct Args {
    /// Keep stdin open
    #[arg(short, long)]
    interactive: bool,
    /// Give it a terminal
    #[arg(short, long)]
    tty: bool,
    /// User, by name or number [default: the pod's]
    #[arg(short, long, value_name = "USER[:GROUP]")]
    user: Option<String>,
    /// Environment, over the pod's; a KEY alone takes the caller's value
    #[arg(short, long, value_name = "KEY[=VALUE]")]
    env: Vec<String>,
    /// Working directory [default: the pod's]
    #[arg(short, long, value_name = "DIR")]
    workdir: Option<PathBuf>,
    /// The pod
    #[arg(value_parser = options::pod_name)]
    pod: String,
    /// The command and its arguments
    #[arg(required = true, trailing_var_arg = true, value_name = "COMMAND")]
    command: Vec<String>,
}

pub(super) fn run(store: &Store, args: Args) -> Result<u8, Failure> {
    let (tty, interactive) = (args.tty, args.interactive);
    let exec = Exec {
        command: args.command,
        environment: options::environment(&args.env),
        user: args.user,
        workdir: args.workdir,
        tty,
        interactive,
        watch: Watch { attached: true, window: if tty { console::window() } else { None } },
    };
    let ((), socket) = client::ask(store, &args.pod, &Request::Exec(exec)).map_err(or_125)?;
    console::watch_own(socket, tty, interactive)
}
