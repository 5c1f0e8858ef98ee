//! The command line: one file a command. Parse, call the library, print; no logic.

/// Runs the command line of this process.
pub fn main() -> std::process::ExitCode {
    std::process::ExitCode::SUCCESS
}
