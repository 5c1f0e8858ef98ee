//! `zap verify`.

use std::path::PathBuf;

use super::{print, usage};
use crate::monitor::protocol::Failure;
use crate::restart::{self, Options};

/// Check an image, and whether this host can restart it; changes nothing
#[derive(clap::Args)]
pub(super) struct Args {
    /// The image
    image: PathBuf,
}

pub(super) fn run(args: &Args) -> Result<u8, Failure> {
    let image = std::path::absolute(&args.image).map_err(|e| usage(format!("{}: {e}", args.image.display())))?;
    restart::verify(&Options {
        image,
        name: None,
        address: None,
        publish: None,
        binds: Vec::new(),
        root: None,
        former: None,
        trail: None,
        fault: None,
    })?;
    print(&format!("{} is whole, and can be restarted here\n", args.image.display()))?;
    Ok(0)
}
