//! `zap checkpoint`.

use std::path::PathBuf;

use super::{options, print, usage};
use crate::checkpoint::{Afterwards, Options, Stats};
use crate::image::Compression;
use crate::monitor::client;
use crate::monitor::protocol::{Failure, Request};
use crate::pod::Store;

/// Write a pod down; it is then gone, as after rm
#[derive(clap::Args)]
#[command(
    after_help = "Example:\n  zap checkpoint web -o web.zap --leave-running\n  zap checkpoint web -o later.zap --leave-running --parent web.zap"
)]
pub(super) struct Args {
    /// The pod
    #[arg(value_parser = options::pod_name)]
    pod: String,
    /// The image, a new directory
    #[arg(short, long, value_name = "IMAGE")]
    output: PathBuf,
    /// Let it go on running
    #[arg(long, conflicts_with = "leave_suspended")]
    leave_running: bool,
    /// Leave it suspended
    #[arg(long)]
    leave_suspended: bool,
    /// How its memory is compressed
    #[arg(long, value_enum, default_value = "none")]
    compress: Compress,
    /// An earlier image: write only what that does not have. It is needed at every restart
    #[arg(long, value_name = "IMAGE")]
    parent: Option<PathBuf>,
    /// Put the root's files that it has open or mapped into the image
    #[arg(long)]
    carry_files: bool,
    /// Print one line of figures in JSON
    #[arg(long)]
    stats: bool,
}

#[derive(Clone, Copy, clap::ValueEnum)]
enum Compress {
    None,
    Lz4,
    Zstd,
}

pub(super) fn run(store: &Store, args: Args) -> Result<u8, Failure> {
    let absolute = |given: PathBuf| match std::path::absolute(&given) {
        Ok(path) if path.to_str().is_none() => {
            Err(usage(format!("{}: the path of an image must be UTF-8; choose another", path.display())))
        }
        path => path.map_err(|e| usage(format!("{}: {e}", given.display()))),
    };
    let afterwards = match (args.leave_running, args.leave_suspended) {
        (true, _) => Afterwards::Running,
        (_, true) => Afterwards::Suspended,
        _ => Afterwards::Gone,
    };
    let options = Options {
        output: absolute(args.output)?,
        afterwards,
        compress: match args.compress {
            Compress::None => Compression::None,
            Compress::Lz4 => Compression::Lz4,
            Compress::Zstd => Compression::Zstd,
        },
        parent: args.parent.map(absolute).transpose()?,
        carry_files: args.carry_files,
        fault: crate::fault::wanted(),
    };
    let monitor = store.load(&args.pod)?.monitor;
    let (stats, _) = client::ask::<Stats>(store, &args.pod, &Request::Checkpoint(options))?;
    if afterwards == Afterwards::Gone {
        client::await_end(monitor);
    }
    if args.stats {
        let line = serde_json::to_string(&stats).map_err(|e| Failure { message: e.to_string(), code: 1 })?;
        print(&(line + "\n"))?;
    }
    Ok(0)
}
