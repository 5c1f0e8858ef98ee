//! How far a migration is, for whoever watches it.

use std::sync::{Arc, Mutex, PoisonError};

use serde::{Deserialize, Serialize};

use super::strategies::Strategy;

/// What is going on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Stage {
    /// The pod runs, and the destination is asked whether it could live there.
    #[default]
    Asking,
    /// The pod runs; what it has written is sent.
    Round {
        /// The first is 1.
        number: u64,
        /// Bytes that it is going to send, as far as that is known.
        bytes: u64,
    },
    /// The rest is captured, with the pod held, and sent.
    Rest,
    /// All has been sent; the destination rebuilds it, and takes it over.
    HandingOver,
    /// It is being let go there: this cannot be taken back.
    Given,
    /// It runs there, and its memory follows.
    Following {
        /// How much that is altogether.
        bytes: u64,
    },
}

/// How far it is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Progress {
    /// What is going on …
    pub stage: Stage,
    /// … how many bytes had been sent when that began …
    pub sent_before: u64,
    /// … and how many have now.
    pub sent: u64,
}

impl Progress {
    /// Bytes that are left to be sent in this stage, where that is known.
    pub fn left(&self) -> Option<u64> {
        match self.stage {
            Stage::Round { bytes, .. } | Stage::Following { bytes } => {
                Some(bytes.saturating_sub(self.sent - self.sent_before.min(self.sent)))
            }
            _ => None,
        }
    }

    /// Whether the pod would go on at the source if the migration were broken off now.
    pub fn can_be_taken_back(&self) -> bool {
        !matches!(self.stage, Stage::Given | Stage::Following { .. })
    }
}

/// Where it is noted. Copies are the same note.
#[derive(Clone, Default)]
pub struct Track(Arc<Mutex<Note>>);

#[derive(Default)]
struct Note {
    stage: Stage,
    sent_before: u64,
    count: Option<Box<dyn Fn() -> u64 + Send>>,
}

impl Track {
    /// How many bytes have been sent is asked for there.
    pub fn counting(&self, sent: impl Fn() -> u64 + Send + 'static) {
        self.note(|note| note.count = Some(Box::new(sent)));
    }

    fn note<T>(&self, act: impl FnOnce(&mut Note) -> T) -> T {
        act(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Something else begins.
    pub fn begin(&self, stage: Stage) {
        self.note(|note| (note.stage, note.sent_before) = (stage, note.sent()));
    }

    /// How far it is now.
    pub fn now(&self) -> Progress {
        self.note(|note| Progress { stage: note.stage, sent_before: note.sent_before, sent: note.sent() })
    }
}

impl Note {
    fn sent(&self) -> u64 {
        self.count.as_ref().map_or(0, |count| count())
    }
}

/// A strategy, whose rounds are noted.
pub struct Tracked<'a> {
    /// The strategy.
    pub strategy: &'a dyn Strategy,
    /// Where they are noted.
    pub track: Track,
    /// Bytes of memory that the pod has, roughly.
    pub memory: u64,
}

impl Strategy for Tracked<'_> {
    fn name(&self) -> &'static str {
        self.strategy.name()
    }

    fn about(&self) -> &'static str {
        self.strategy.about()
    }

    fn another_round(&self, so_far: &[u64]) -> bool {
        let another = self.strategy.another_round(so_far);
        self.track.begin(match another {
            // No more than what the last one had to send: a round has less to do than the one before, or is the last.
            true => Stage::Round {
                number: so_far.len() as u64 + 1,
                bytes: so_far.last().map_or(self.memory, |bytes| bytes / 2),
            },
            false => Stage::Rest,
        });
        another
    }

    fn leaves_pages(&self) -> bool {
        self.strategy.leaves_pages()
    }

    fn needs_store(&self) -> bool {
        self.strategy.needs_store()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU64, Ordering};

    use super::*;
    use crate::migrate::strategies::PreCopy;

    #[test]
    fn what_is_left_is_told_by_what_was_sent_since() {
        let (track, sent) = (Track::default(), Arc::new(AtomicU64::new(5)));
        let counted = sent.clone();
        track.counting(move || counted.load(Ordering::Relaxed));
        assert_eq!((track.now().stage, track.now().left()), (Stage::Asking, None));
        let tracked = Tracked { strategy: &PreCopy, track: track.clone(), memory: 100 << 20 };
        assert!(tracked.another_round(&[]));
        sent.fetch_add(30 << 20, Ordering::Relaxed);
        assert_eq!(track.now().left(), Some(70 << 20));
        assert!(tracked.another_round(&[90 << 20]));
        assert_eq!(track.now().left(), Some(45 << 20));
        assert!(!tracked.another_round(&[90 << 20, 1]) && track.now().can_be_taken_back());
        track.begin(Stage::Following { bytes: 10 });
        sent.fetch_add(11, Ordering::Relaxed);
        assert!(track.now().left() == Some(0) && !track.now().can_be_taken_back());
    }
}
