//! Sockets: unix, TCP, UDP. Kinds of open file; their table lines are in [`crate::files::KINDS`].
