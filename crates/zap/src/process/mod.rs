//! Processes: tree, sessions, threads, credentials, signals, timers, limits, scheduling.

pub mod ahead;
pub mod capture;
pub mod controls;
pub mod credentials;
pub mod crew;
pub mod discover;
pub mod filters;
pub mod finish;
pub mod grow;
mod growing;
pub mod handles;
pub mod hold;
pub mod limits;
pub mod own_directories;
pub mod proc_files;
pub mod segments;
pub mod sharing;
pub mod signals;
pub mod state;
pub mod statuses;
pub mod stops;
pub mod threads;
pub mod timers;
pub mod tree;
pub mod vfork;
