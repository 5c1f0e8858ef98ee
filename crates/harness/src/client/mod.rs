//! An HTTP client that knows every byte it should get.
//!
//! [`content`] says what a file of a given size contains; [`Connection`] fetches over one keep-alive connection and
//! verifies as it reads; [`Crowd`] holds many connections, some in the middle of a download; [`Prober`] measures the
//! longest time without an answer; [`Trace`] sees what is on the wire; [`load`] drives as many requests as a server can take.

mod connection;
pub mod content;
mod crowd;
pub mod load;
mod probe;
mod trace;

pub use connection::{Connection, Download, HttpError};
pub use crowd::Crowd;
pub use probe::{Gaps, Prober};
pub use trace::{Seen, Trace};
