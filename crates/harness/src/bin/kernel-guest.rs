//! The programs of a [guest](harness::kernels): its first one, the one that serves commands, and the ways to reach one.
//!
//! `kernel-guest call ADDRESS:PORT COMMAND ARG…` runs a command over there; `kernel-guest pipe ADDRESS:PORT` is a way for the
//! bytes of a migration.

#![allow(missing_docs)]

use std::process::ExitCode;

use anyhow::{Result, bail};
use harness::kernels::{be_init, be_server, command};

fn main() -> Result<ExitCode> {
    if std::process::id() == 1 {
        be_init()?;
    }
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match words[..] {
        ["serve"] => be_server()?,
        ["call", address, ref words @ ..] => {
            return Ok(ExitCode::from(command::call(address.parse()?, words)? as u8));
        }
        ["pipe", address] => command::pipe(address.parse()?)?,
        _ => bail!("kernel-guest serve | call ADDRESS:PORT COMMAND ARG… | pipe ADDRESS:PORT"),
    }
    Ok(ExitCode::SUCCESS)
}
