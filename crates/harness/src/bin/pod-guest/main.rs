//! A program that sets something up, waits while its pod is checkpointed and restarted, and then checks itself from
//! inside: `pod-guest KIND`. It prints `ready` when it has set up, goes on when `/tmp/go` appears, and ends with `ok`, or
//! with 1 and what differs.

#![allow(unsafe_code, reason = "a test program: it makes the raw calls whose effects a checkpoint must keep")]
#![allow(clippy::undocumented_unsafe_blocks, reason = "likewise; each call is on memory of the function around it")]

mod calls;
mod clocks;
mod code;
mod connections;
mod controls;
mod corners;
mod family;
mod fanotify;
mod files;
mod handles;
mod headers;
mod identity;
mod ipc;
mod mappings;
mod memory;
mod mounts;
mod moving;
mod namespaces;
mod nested;
mod nests;
mod network;
mod networks_rare;
mod oddities;
mod openings;
mod plenty;
mod plumbing;
mod portrait;
mod registers;
mod requests;
mod rings;
mod sessions;
mod sharing;
mod shown;
mod signals;
mod sleeps;
mod sockets;
mod stage;
mod survivor;
mod terminals;
mod threads;
mod timers;
mod unkept;
mod watches;
mod wires;

use stage::Kind;

/// Every kind, by topic.
const TOPICS: &[&[Kind]] = &[
    family::KINDS,
    sessions::KINDS,
    sharing::KINDS,
    terminals::KINDS,
    threads::KINDS,
    registers::KINDS,
    signals::KINDS,
    timers::KINDS,
    clocks::KINDS,
    code::KINDS,
    identity::KINDS,
    memory::KINDS,
    mappings::KINDS,
    calls::KINDS,
    sleeps::KINDS,
    survivor::KINDS,
    fanotify::KINDS,
    watches::KINDS,
    namespaces::KINDS,
    handles::KINDS,
    ipc::KINDS,
    controls::KINDS,
    files::KINDS,
    sockets::KINDS,
    nested::KINDS,
    mounts::KINDS,
    plenty::KINDS,
    plumbing::KINDS,
    openings::KINDS,
    oddities::KINDS,
    wires::KINDS,
    network::KINDS,
    networks_rare::KINDS,
    requests::KINDS,
    moving::KINDS,
    nests::KINDS,
    connections::KINDS,
    headers::KINDS,
    shown::KINDS,
    unkept::KINDS,
    rings::KINDS,
    corners::KINDS,
];

fn main() {
    let wanted = std::env::args().nth(1).unwrap_or_default();
    let mut kinds = TOPICS.iter().copied().flatten();
    let Some((_, run)) = kinds.find(|(name, _)| *name == wanted) else {
        TOPICS.iter().copied().flatten().for_each(|(name, _)| println!("{name}"));
        std::process::exit(2);
    };
    match run() {
        Ok(()) => println!("ok"),
        Err(differs) => {
            println!("{wanted}: {differs}");
            std::process::exit(1);
        }
    }
}
