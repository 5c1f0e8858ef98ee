//! `zap check`.

use super::{print, print_json};
use crate::monitor::protocol::Failure;
use crate::pod::Store;
use crate::probe::{self, Feature};

/// Show what this kernel and host offer, and what that enables
#[derive(clap::Args)]
#[command(after_help = "Ends with 4 if something is missing that everything needs.\n\nExample:\n  zap check --json")]
pub(super) struct Args {
    /// Print one JSON document
    #[arg(long)]
    json: bool,
}

pub(super) fn run(store: &Store, args: &Args) -> Result<u8, Failure> {
    let offer = probe::offer(store.storage());
    if args.json {
        print_json(&offer)?;
    } else {
        let lines: String = offer.features.iter().map(line).collect();
        print(&format!("Linux {}\n{lines}", offer.kernel))?;
    }
    Ok(if offer.ready { 0 } else { 4 })
}

fn line(feature: &Feature) -> String {
    let mark = match (feature.available, feature.required) {
        (true, _) => "yes",
        (false, false) => "no",
        (false, true) => "MISSING",
    };
    let detail = if feature.detail.is_empty() { String::new() } else { format!(" ({})", feature.detail) };
    format!("{mark:<8}{:<25} {}{detail}\n", feature.name, feature.enables)
}
