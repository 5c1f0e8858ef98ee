//! The story of a checkpoint: hold → capture → write → let go.
