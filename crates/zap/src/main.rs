//! The `zap` command.

fn main() -> std::process::ExitCode {
    zap::cli::main()
}
