//! Experiments, statistics, plots and property tests for zap.
//!
//! An [`experiment`] runs [`workload`]s in a [`lab`] (private network namespaces and a private registry of pods) and
//! writes raw [`samples`]; [`report`] turns samples into plots, tables and a page, with the [`stats`].

#![cfg_attr(not(test), warn(clippy::unwrap_used))]

pub mod cli;
pub mod client;
pub mod escape;
pub mod experiment;
pub mod gate;
pub mod host;
pub mod kernels;
pub mod lab;
pub mod micro;
pub mod peer;
pub mod program;
pub mod progress;
pub mod report;
pub mod samples;
pub mod shrink;
pub mod stats;
#[allow(unsafe_code)]
pub mod sys;
pub mod targets;
pub mod verification;
pub mod viewer;
pub mod workload;
