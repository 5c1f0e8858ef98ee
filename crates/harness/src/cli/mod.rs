//! The command line: one file a command.

mod demo;
mod gate;
mod keep;
mod list;
mod picture;
mod report;
mod repro;
mod run;

use std::io::IsTerminal;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand};

use crate::experiment::{Extent, Settings};
use crate::peer::PeerSpec;

/// Measures zap, and shows what of the paper is reproduced.
#[derive(Debug, Parser)]
#[command(name = "harness", version, max_term_width = 80)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Experiments and workloads, each with the claim it serves
    List,
    /// Run experiments; their raw samples go to DIR/raw
    ///
    /// Example: harness run checkpoint-restart --runs 20
    Run(run::Arguments),
    /// Plots and one self-contained page, from the raw samples alone
    Report(report::Arguments),
    /// Is this build slower than the baseline? Exit 1 names what, by how much, and how sure that is
    Gate(gate::Arguments),
    /// A desktop before a checkpoint and after the restart, side by side
    ///
    /// Example: harness picture docs/desktop.png
    Picture(picture::Arguments),
    /// A desktop moves between two hosts while a viewer looks: a timeline
    DemoMigrate(demo::Arguments),
    /// Everything the paper shows, then the report
    Repro(repro::Arguments),
    /// Have a generated program that failed be tried by every run of the tests
    ///
    /// Example: harness keep lock-lost-by-a-copy
    Keep(keep::Arguments),
}

/// What every command that measures is told.
#[derive(Debug, Args)]
struct Common {
    /// Repetitions [default: each experiment's own]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    runs: Option<u32>,
    /// The largest sizes too, and more repetitions: takes hours
    #[arg(long)]
    full: bool,
    /// Where results go
    #[arg(long, value_name = "DIR", default_value = "results/latest")]
    out: PathBuf,
    /// Seed of the order of runs [default: drawn, and printed]
    #[arg(long, value_name = "N")]
    seed: Option<u64>,
    /// Keep whole rounds that are in DIR already; measure what is missing
    #[arg(long)]
    resume: bool,
    /// Another system to measure beside zap, where an experiment can: criu=PATH,
    /// or native (the workload by itself, ended and started again)
    #[arg(long, value_name = "NAME[=PATH]")]
    peer: Vec<PeerSpec>,
}

impl Common {
    fn settings(&self) -> Settings {
        let seed = self.seed.unwrap_or_else(rand::random);
        eprintln!("seed {seed}");
        let quiet = ["NO_COLOR", "CI"].iter().any(|name| std::env::var_os(name).is_some());
        let progress = std::io::stderr().is_terminal() && !quiet;
        let extent = if self.full { Extent::Full } else { Extent::Ordinary };
        Settings {
            out: self.out.clone(),
            runs: self.runs,
            workloads: Vec::new(),
            extent,
            seed,
            progress,
            budget: None,
            resume: self.resume,
            peers: self.peer.clone(),
        }
    }
}

/// Runs the command line of this process.
pub fn main() -> ExitCode {
    let result = match Cli::parse().command {
        Command::List => list::run(),
        Command::Run(arguments) => run::run(&arguments),
        Command::Report(arguments) => report::run(&arguments),
        Command::Gate(arguments) => gate::run(&arguments),
        Command::Picture(arguments) => picture::run(&arguments),
        Command::DemoMigrate(arguments) => demo::run(&arguments),
        Command::Repro(arguments) => repro::run(&arguments),
        Command::Keep(arguments) => keep::run(&arguments),
    };
    match result {
        Ok(code) => code,
        Err(error) => {
            eprintln!("harness: {error:#}");
            ExitCode::FAILURE
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    fn too_wide(command: &mut clap::Command) -> Vec<String> {
        let texts = [command.render_help().to_string(), command.render_long_help().to_string()];
        let lines = texts.iter().flat_map(|text| text.lines()).filter(|line| line.chars().count() > 80);
        let mut found: Vec<String> = lines.map(|line| format!("{}: {line}", command.get_name())).collect();
        command.get_subcommands_mut().for_each(|command| found.extend(too_wide(command)));
        found
    }

    #[test]
    fn the_definitions_agree_with_themselves_and_their_help_fits_a_terminal() {
        let mut command = Cli::command();
        command.clone().debug_assert();
        command.build();
        assert_eq!(too_wide(&mut command), Vec::<String>::new());
    }
}
