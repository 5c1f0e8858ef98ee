//! One run of an experiment: its rounds, within the time that it may take, and what becomes of it.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use indicatif::{ProgressBar, ProgressStyle};
use rand::SeedableRng;
use rand::rngs::StdRng;
use rand::seq::SliceRandom;

use super::{Extent, Settings};
use crate::peer::PeerSpec;
use crate::progress::{Note, Progress};
use crate::samples::{Circumstances, Recorder};

/// One run of an experiment.
#[derive(Debug)]
pub(crate) struct Session {
    /// How much of it.
    pub(super) extent: Extent,
    /// Other systems to measure beside zap.
    pub(super) peers: Vec<PeerSpec>,
    experiment: &'static str,
    runs: u32,
    wanted: Vec<String>,
    recorder: Recorder,
    progress: Progress,
    rng: StdRng,
    bar: ProgressBar,
    /// Until when everything should be over.
    until: Option<Instant>,
    begun: Instant,
    /// Parts that have not begun.
    parts: u32,
    /// Whether what is measured now is recorded: not while caches warm up.
    recording: bool,
    failed: u32,
}

/// The rounds of one part of an experiment: see [`Session::rounds`].
#[derive(Debug)]
pub(super) struct Rounds {
    part: String,
    /// Whether the first, which warms up, is over.
    is_warm: bool,
    until: Option<Instant>,
    longest: Duration,
    /// The one that is on.
    on: Option<On>,
    done: u32,
}

#[derive(Debug)]
struct On {
    warms_up: bool,
    begun: Instant,
    /// Where in the file of samples.
    from: u64,
}

impl Session {
    /// A session of `experiment`, as `settings` say; `runs` are its own, and `host` is the name of the facts.
    pub(super) fn open(experiment: &'static str, runs: u32, settings: &Settings, host: &str) -> Result<Self> {
        let progress = Progress::open(&settings.out, experiment, settings.resume)?;
        let recorder = Recorder::open(&settings.out, experiment, settings.seed, host)?;
        let bar = if settings.progress { ProgressBar::new(0) } else { ProgressBar::hidden() };
        bar.set_style(
            ProgressStyle::with_template("{prefix:20} {bar:24} {elapsed}, {msg}")
                .unwrap_or_else(|_| ProgressStyle::default_bar()),
        );
        bar.set_prefix(experiment);
        let begun = now();
        Ok(Self {
            extent: settings.extent,
            peers: settings.peers.clone(),
            experiment,
            runs: settings.runs.unwrap_or(runs),
            wanted: settings.workloads.clone(),
            recorder,
            progress,
            rng: StdRng::seed_from_u64(settings.seed),
            bar,
            until: settings.budget.map(|budget| begun + budget),
            begun,
            parts: 1,
            recording: true,
            failed: 0,
        })
    }

    /// Whether a case is to be measured.
    pub(super) fn wants(&self, case: &str) -> bool {
        self.wanted.is_empty() || self.wanted.iter().any(|wanted| wanted == case)
    }

    /// The same, where only `usual` ones are measured if none was asked for by name and not everything is measured.
    pub(super) fn wants_of(&self, usual: &[&str], case: &str) -> bool {
        self.wants(case) && (!self.wanted.is_empty() || self.extent == Extent::Full || usual.contains(&case))
    }

    /// Does `work` with each of `parts`, which have names. One that fails does not keep the others from being measured.
    pub(super) fn each<P>(
        &mut self,
        parts: &[P],
        name: impl Fn(&P) -> String,
        mut work: impl FnMut(&mut Self, &P) -> Result<()>,
    ) -> Result<()> {
        for (part, left) in parts.iter().zip((1..=parts.len() as u32).rev()) {
            self.parts = left;
            self.expect(self.all_rounds());
            if let Err(error) = work(self, part) {
                self.fail(&name(part), &error)?;
            }
            self.expect(0);
        }
        Ok(())
    }

    /// The bar is as long as what has been done, so many rounds more of the part that is on, and all those of the parts after it.
    fn expect(&self, rounds: u64) {
        let others = u64::from(self.parts - 1) * self.all_rounds();
        self.bar.set_length(self.bar.position() + rounds + others);
    }

    /// Those of a part of which nothing is there: one warms up.
    fn all_rounds(&self) -> u64 {
        u64::from(self.runs) + 1
    }

    fn fail(&mut self, part: &str, error: &anyhow::Error) -> Result<()> {
        crate::lab::stop_if_interrupted();
        self.failed += 1;
        self.bar.suspend(|| eprintln!("harness: {}, {part}: {error:#}", self.experiment));
        self.note(part, "failed", &format!("{error:#}"))
    }

    /// Keeps what somebody said of a part, in their own words: a failure, or a peer that is not there.
    pub(super) fn note(&mut self, part: &str, who: &str, words: &str) -> Result<()> {
        self.progress.note(Note { part: part.into(), who: who.into(), words: words.into() })
    }

    /// The rounds of a part: one that warms up, then as many as were asked for; fewer where its share of the time that is
    /// left allows no more, but one at least.
    pub(super) fn rounds(&mut self, part: &str) -> Rounds {
        let now = now();
        let share = |until: Instant| now + until.saturating_duration_since(now) / self.parts.max(1);
        let done = self.progress.rounds_of(part);
        self.expect(u64::from(self.runs.saturating_sub(done)) + 1);
        Rounds {
            part: part.into(),
            is_warm: false,
            until: self.until.map(share),
            longest: Duration::ZERO,
            on: None,
            done,
        }
    }

    /// The number of the next round, if there is to be one; what was measured in the one before is whole now.
    pub(super) fn next(&mut self, rounds: &mut Rounds) -> Result<Option<u32>> {
        if let Some(On { warms_up, begun, from }) = rounds.on.take() {
            rounds.longest = rounds.longest.max(now() - begun);
            if !warms_up {
                rounds.done += 1;
                self.progress.round(&rounds.part, now() - begun, (from, self.recorder.bytes()?))?;
            }
            self.bar.inc(1);
        }
        self.recording = true;
        let enough = rounds.done >= self.runs;
        let late = rounds.until.is_some_and(|until| now() + rounds.longest > until);
        if enough || (late && rounds.done > 0) || (late && self.is_over()) {
            if rounds.done == 0 {
                self.note(&rounds.part, "failed", "there was no time left to measure it")?;
            }
            return Ok(None);
        }
        self.recording = std::mem::replace(&mut rounds.is_warm, true);
        rounds.on = Some(On { warms_up: !self.recording, begun: now(), from: self.recorder.bytes()? });
        Ok(Some(rounds.done))
    }

    /// Whether the round that is on warms up: nothing of it is recorded. It may do less than others where they take long.
    pub(super) fn warms_up(&self) -> bool {
        !self.recording
    }

    /// Whether the time for everything is used up.
    fn is_over(&self) -> bool {
        self.until.is_some_and(|until| now() > until)
    }

    /// Says what comes next.
    pub(super) fn step(&self, what: &str) {
        self.bar.set_message(format!("{}: {what}", self.time_left()));
        self.bar.tick();
    }

    fn time_left(&self) -> String {
        let (done, all) = (self.bar.position(), self.bar.length().unwrap_or(0));
        let passed = (now() - self.begun).as_secs_f64();
        let by_rounds = (done > 0).then(|| passed / done as f64 * all.saturating_sub(done) as f64);
        let by_clock = self.until.map(|until| until.saturating_duration_since(now()).as_secs_f64());
        match by_rounds.into_iter().chain(by_clock).reduce(f64::min) {
            Some(seconds) => format!("{} left", crate::progress::readable(Duration::from_secs_f64(seconds))),
            None => "time left not known yet".into(),
        }
    }

    /// The arms in an order of their own for each run, so that no arm always goes first.
    pub(super) fn shuffled<T: Clone>(&mut self, arms: &[T]) -> Vec<T> {
        let mut order = arms.to_vec();
        order.shuffle(&mut self.rng);
        order
    }

    pub(super) fn record(&mut self, of: &Circumstances<'_>, metric: &str, value: f64, unit: &str) -> Result<()> {
        if self.recording { self.recorder.record(of, metric, value, unit) } else { Ok(()) }
    }

    pub(super) fn record_duration(&mut self, of: &Circumstances<'_>, metric: &str, value: Duration) -> Result<()> {
        self.record(of, metric, value.as_secs_f64() * 1e6, "us")
    }

    /// The end: an error where a part failed.
    pub(super) fn close(mut self) -> Result<()> {
        self.bar.finish_and_clear();
        if self.failed > 0 {
            bail!("{} of its parts could not be measured", self.failed);
        }
        self.progress.finish()
    }
}

/// Bytes that the files below `directory` take, holes not counted.
pub(super) fn bytes_below(directory: &Path) -> Result<u64> {
    use std::os::unix::fs::MetadataExt;
    let mut bytes = 0;
    for entry in std::fs::read_dir(directory).with_context(|| format!("reading {}", directory.display()))? {
        let entry = entry?;
        let metadata = entry.metadata()?;
        bytes += if metadata.is_dir() { bytes_below(&entry.path())? } else { metadata.blocks() * 512 };
    }
    Ok(bytes)
}

#[cfg(not(test))]
fn now() -> Instant {
    Instant::now()
}

/// Time passes where a test says so.
#[cfg(test)]
fn now() -> Instant {
    tests::NOW.get()
}

#[cfg(test)]
mod tests {
    use super::*;

    thread_local! {
        pub(super) static NOW: std::cell::Cell<Instant> = std::cell::Cell::new(Instant::now());
    }

    const PARTS: [&str; 2] = ["first", "second"];

    /// Runs two parts whose rounds take that long each, and gives how many rounds of each there were.
    fn rounds(settings: &Settings, each: Duration, fails: &str) -> ([u32; 2], Result<()>) {
        let mut session = Session::open("some", 5, settings, "abc@1").unwrap();
        let mut counts = [0; 2];
        session
            .each(
                &PARTS,
                |part| (*part).into(),
                |session, part| {
                    let mut rounds = session.rounds(part);
                    let mut warmed_up = false;
                    while let Some(run) = session.next(&mut rounds)? {
                        NOW.set(NOW.get() + each);
                        assert_eq!(
                            session.warms_up(),
                            !std::mem::replace(&mut warmed_up, true),
                            "the first and no other"
                        );
                        let of = Circumstances { workload: part, parameters: "", arm: "a", run };
                        session.record(&of, "whole", 1.0, "us")?;
                        if session.recording {
                            counts[usize::from(part == &PARTS[1])] += 1;
                            anyhow::ensure!(*part != fails, "it broke");
                        }
                    }
                    Ok(())
                },
            )
            .unwrap();
        (counts, session.close())
    }

    fn recorded(out: &Path) -> usize {
        crate::samples::read_all(out).unwrap().len()
    }

    #[test]
    fn time_is_shared_and_one_round_is_made_in_any_case() {
        let out = tempfile::tempdir().unwrap();
        let settings = Settings::fast(out.path().into());
        let unbounded = rounds(&settings, Duration::ZERO, "");
        assert_eq!((unbounded.0, recorded(out.path())), ([5, 5], 10));
        // Each has 100 ms: one round that warms up, then two of 30 ms.
        let some = Settings { budget: Some(Duration::from_millis(200)), ..settings.clone() };
        let (counts, _) = rounds(&some, Duration::from_millis(30), "");
        assert_eq!(counts, [2, 2]);
        let little = Settings { budget: Some(Duration::from_millis(25)), ..settings };
        let (counts, _) = rounds(&little, Duration::from_millis(5), "");
        assert_eq!(counts, [1, 2]);
    }

    #[test]
    fn the_bar_counts_what_there_is_to_do() {
        let out = tempfile::tempdir().unwrap();
        let settings = Settings::fast(out.path().into());
        let mut session = Session::open("some", 5, &settings, "abc@1").unwrap();
        let mut seen = Vec::new();
        let work = |session: &mut Session, part: &&str| {
            let mut rounds = session.rounds(part);
            while session.next(&mut rounds)?.is_some() {
                seen.push((session.bar.position(), session.bar.length().unwrap()));
                anyhow::ensure!(seen.len() != 3, "it broke");
            }
            Ok(())
        };
        session.each(&PARTS, |part| (*part).into(), work).unwrap();
        // Two rounds of the first, one of which warms up, and a third in which it breaks.
        let first = [(0, 12), (1, 12), (2, 12)];
        let second = (2..8).map(|done| (done, 8));
        assert_eq!(seen, first.into_iter().chain(second).collect::<Vec<_>>());
        assert_eq!((session.bar.position(), session.bar.length()), (8, Some(8)));
    }

    #[test]
    fn a_part_that_fails_is_noted_and_tried_again_by_who_resumes() {
        let out = tempfile::tempdir().unwrap();
        let settings = Settings::fast(out.path().into());
        let (counts, end) = rounds(&settings, Duration::ZERO, "first");
        assert_eq!(counts, [1, 5]);
        assert!(end.is_err() && !crate::progress::is_finished(out.path(), "some"));
        let notes = crate::progress::notes(out.path(), ["some"].into_iter()).unwrap();
        assert_eq!((notes.len(), &*notes[0].1.words), (1, "it broke"));
        assert_eq!(recorded(out.path()), 6);
        // The sample of the round that was cut off goes, what is whole stays.
        let (counts, end) = rounds(&Settings { resume: true, ..settings }, Duration::ZERO, "");
        assert_eq!((counts, recorded(out.path())), ([5, 0], 10));
        assert!(end.is_ok() && crate::progress::is_finished(out.path(), "some"));
    }
}
