//! `clone3(2)`.
