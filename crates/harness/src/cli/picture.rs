//! `harness picture`.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Result, ensure};
use clap::{Args, ValueEnum};

use crate::lab::{Lab, PodOptions, clean_up_on_interrupt};
use crate::viewer::Viewer;
use crate::workload::Desktop;

/// Long enough for anything drawn late to be seen.
const CALM: Duration = Duration::from_millis(800);

#[derive(Debug, Args)]
pub(super) struct Arguments {
    /// How much of a desktop
    #[arg(long, value_enum, default_value_t = Size::Classic)]
    size: Size,
    /// The PNG file to write
    #[arg(value_name = "FILE")]
    file: PathBuf,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Size {
    /// A window manager, terminals, editors, a file manager, a browser
    Classic,
    /// An XFCE session and Firefox
    Full,
}

pub(super) fn run(arguments: &Arguments) -> Result<ExitCode> {
    let desktop = match arguments.size {
        Size::Classic => Desktop::Classic,
        Size::Full => Desktop::Full,
    };
    clean_up_on_interrupt()?;
    let lab = Lab::new()?;
    let image = lab.directory().join("image");
    let pod = lab.start_pod(&desktop, "desk", &PodOptions::default())?;
    let viewer = Viewer::connect(lab.client(), Desktop::screen_at(pod.served_at()?))?;
    let before = viewer.settled(desktop.moving(), CALM)?;
    pod.checkpoint(&image, &[])?;
    let (pod, _, _) = lab.restart(&image, &[])?;
    let after = viewer.settled(desktop.moving(), CALM)?;
    ensure!(after.difference(&before, desktop.moving()).is_none(), "the desktop looks different after its restart");
    before.beside(&after).write_png(&arguments.file)?;
    pod.remove()?;
    eprintln!("{}: before a checkpoint, and after the restart", arguments.file.display());
    Ok(ExitCode::SUCCESS)
}
