//! How the `zap` command is linked.

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    // At a fixed address: a loader that has to adjust a hundred pages of pointers first takes longer than most commands.
    println!("cargo::rustc-link-arg-bin=zap=-no-pie");
}
