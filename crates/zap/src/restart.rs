//! The story of a restart: read → verify → rebuild → let go.
