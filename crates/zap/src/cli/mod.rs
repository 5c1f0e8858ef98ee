//! The command line: one file a command. Parse, call the library, print; no logic.

mod attach;
mod check;
mod checkpoint;
mod completions;
mod console;
mod exec;
mod follow;
mod following;
mod inspect;
mod keys;
mod kill;
mod logs;
mod ls;
mod migrate;
mod options;
mod ps;
mod receive;
mod restart;
mod rm;
mod run;
mod stop;
mod suspend;
mod verify;
mod wait;

use std::io::{self, Write};
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

use crate::monitor::protocol::Failure;
use crate::pod::Store;

/// Runs unmodified programs in pods; stops a pod, writes it down, and starts it again.
#[derive(Parser)]
#[command(name = "zap", version, propagate_version = true, max_term_width = 80, arg_required_else_help = true)]
#[command(after_help = "Exit codes: 0 done, 1 failed, 2 usage, 3 refused (the pod runs on), 4 this host lacks \
    something, 5 the image is damaged, 6 no such pod or name taken. run, exec, restart and wait end with the command's \
    own code.\n\nExample:\n  zap run --name web -d -- python3 -m http.server\n  zap checkpoint web -o web.zap\n  \
    zap restart web.zap -d")]
pub struct Cli {
    /// Directory of this host's pods [default: /run/zap, with storage in /var/lib/zap]
    #[arg(long, global = true, env = "ZAP_STATE", value_name = "DIR", hide_env_values = true)]
    state: Option<PathBuf>,

    /// Log to stderr; twice for more
    #[arg(short, long, global = true, action = clap::ArgAction::Count)]
    verbose: u8,

    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    Run(Box<run::Args>),
    Exec(exec::Args),
    Ls(ls::Args),
    Ps(ps::Args),
    Logs(logs::Args),
    Attach(attach::Args),
    Wait(wait::Args),
    Kill(kill::Args),
    Stop(stop::Args),
    Rm(rm::Args),
    Suspend(suspend::Args),
    Resume(suspend::ResumeArgs),
    Checkpoint(checkpoint::Args),
    Restart(restart::Args),
    Migrate(migrate::Args),
    Receive(receive::Args),
    Follow(follow::Args),
    Keys(keys::Args),
    Inspect(inspect::Args),
    Verify(verify::Args),
    Check(check::Args),
    Completions(completions::Args),
    #[command(hide = true)]
    Man(completions::ManArgs),
}

/// Runs the command line of this process. The first argument of a monitor is not for people.
pub fn main() -> ExitCode {
    if std::env::args_os().nth(1).is_some_and(|a| a == crate::monitor::ARGUMENT) {
        return crate::monitor::main();
    }
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(e) => {
            // A pipe that was closed is not an error.
            let _ = e.print();
            return ExitCode::from(if e.use_stderr() { 2 } else { 0 });
        }
    };
    log(cli.verbose);
    match run(cli) {
        Ok(code) => ExitCode::from(code),
        Err(failure) => {
            let _ = writeln!(io::stderr(), "zap: {failure}");
            ExitCode::from(failure.code)
        }
    }
}

fn log(verbose: u8) {
    let level = match verbose {
        0 => return,
        1 => "zap=debug",
        _ => "zap=trace",
    };
    let _ = tracing_subscriber::fmt().with_writer(io::stderr).with_env_filter(level).try_init();
}

fn run(cli: Cli) -> Result<u8, Failure> {
    let store = Store::new(cli.state.as_deref());
    match cli.command {
        Command::Run(args) => run::run(&store, *args),
        Command::Exec(args) => exec::run(&store, args),
        Command::Ls(args) => ls::run(&store, &args),
        Command::Ps(args) => ps::run(&store, &args),
        Command::Logs(args) => logs::run(&store, &args),
        Command::Attach(args) => attach::run(&store, &args),
        Command::Wait(args) => wait::run(&store, &args),
        Command::Kill(args) => kill::run(&store, &args),
        Command::Stop(args) => stop::run(&store, &args),
        Command::Rm(args) => rm::run(&store, &args),
        Command::Suspend(args) => suspend::run(&store, &args),
        Command::Resume(args) => suspend::resume(&store, &args),
        Command::Checkpoint(args) => checkpoint::run(&store, args),
        Command::Restart(args) => restart::run(&store, args),
        Command::Migrate(args) => migrate::run(&store, args),
        Command::Receive(args) => receive::run(&store, &args),
        Command::Follow(args) => follow::run(&store, &args),
        Command::Keys(args) => keys::run(&store, &args),
        Command::Inspect(args) => inspect::run(&store, &args),
        Command::Verify(args) => verify::run(&args),
        Command::Check(args) => check::run(&store, &args),
        Command::Completions(args) => completions::run(&args),
        Command::Man(args) => completions::man(&args),
    }
}

/// Codes 1 of commands that end with another command's code.
fn or_125(failure: Failure) -> Failure {
    Failure { code: if failure.code == 1 { 125 } else { failure.code }, ..failure }
}

fn usage(message: impl Into<String>) -> Failure {
    Failure { message: message.into(), code: 2 }
}

/// Prints to stdout; that nobody reads it is no error.
fn print(text: &str) -> Result<(), Failure> {
    match io::stdout().write_all(text.as_bytes()).and_then(|()| io::stdout().flush()) {
        Err(e) if e.kind() != io::ErrorKind::BrokenPipe => {
            Err(Failure { message: format!("writing to stdout: {e}"), code: 1 })
        }
        _ => Ok(()),
    }
}

/// Prints a line to stderr; that nobody reads it is no error.
fn print_error(line: &str) {
    let _ = writeln!(io::stderr(), "zap: {line}");
}

/// Prints one JSON document.
fn print_json<T: serde::Serialize>(value: &T) -> Result<(), Failure> {
    let text = serde_json::to_string_pretty(value).map_err(|e| Failure { message: e.to_string(), code: 1 })?;
    print(&(text + "\n"))
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
