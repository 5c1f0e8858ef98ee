//! Memory of other processes.
