//! `zap keys`.

use super::print;
use crate::migrate::keys::Keys;
use crate::monitor::protocol::Failure;
use crate::pod::Store;

/// Show this host's key and the hosts that it knows, for migrate --to
#[derive(clap::Args)]
#[command(
    after_help = "Two hosts move pods over a network only if each knows the other's key.\n\nExample:\n  zap keys\n  zap \
    keys --add 0f3c…9a --name b"
)]
pub(super) struct Args {
    /// Make a host known, by the key that `zap keys` shows there
    #[arg(long, value_name = "KEY")]
    add: Option<String>,
    /// What it is called here
    #[arg(long, requires = "add", default_value = "")]
    name: String,
    /// Forget a host
    #[arg(long, value_name = "KEY|NAME", conflicts_with = "add")]
    remove: Option<String>,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

pub(super) fn run(store: &Store, args: &Args) -> Result<u8, Failure> {
    let failed = |e: crate::migrate::keys::KeyError| Failure::of(&e, 1);
    let keys = Keys::of(store).map_err(failed)?;
    if let Some(key) = &args.add {
        keys.add(key, &args.name).map_err(|e| Failure::of(&e, 2))?;
        return Ok(0);
    }
    if let Some(which) = &args.remove {
        let known = keys.remove(which).map_err(failed)?;
        let unknown =
            || Failure { message: format!("no host {which} is known; `zap keys` shows those that are"), code: 6 };
        return if known { Ok(0) } else { Err(unknown()) };
    }
    let known = keys.known().map_err(failed)?;
    if args.json {
        let hosts: Vec<_> = known.iter().map(|k| serde_json::json!({"key": k.key, "name": k.name})).collect();
        super::print_json(&serde_json::json!({"key": keys.own(), "known": hosts}))?;
        return Ok(0);
    }
    let mut text = format!("{} this host\n", keys.own());
    for host in &known {
        text += &format!("{} {}\n", host.key, host.name);
    }
    print(&text)?;
    Ok(0)
}
