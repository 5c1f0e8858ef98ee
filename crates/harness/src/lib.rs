//! Experiments, statistics, plots and property tests for zap.
