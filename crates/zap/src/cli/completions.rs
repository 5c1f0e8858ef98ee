//! `zap completions`, and the man page.

use clap::CommandFactory;

use super::{Cli, print};
use crate::monitor::protocol::Failure;

/// Print completions for a shell
#[derive(clap::Args)]
#[command(after_help = "Example:\n  zap completions bash > /etc/bash_completion.d/zap")]
pub(super) struct Args {
    /// The shell
    shell: clap_complete::Shell,
}

/// Write the man pages into a directory
#[derive(clap::Args)]
pub(super) struct ManArgs {
    /// The directory
    directory: std::path::PathBuf,
}

pub(super) fn run(args: &Args) -> Result<u8, Failure> {
    let mut text = Vec::new();
    clap_complete::generate(args.shell, &mut Cli::command(), "zap", &mut text);
    print(&String::from_utf8_lossy(&text))?;
    Ok(0)
}

pub(super) fn man(args: &ManArgs) -> Result<u8, Failure> {
    clap_mangen::generate_to(Cli::command(), &args.directory)
        .map_err(|e| Failure { message: format!("{}: {e}", args.directory.display()), code: 1 })?;
    Ok(0)
}
