//! Processes: tree, sessions, threads, credentials, signals, timers, limits, scheduling.
