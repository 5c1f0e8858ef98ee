//! Tracers: the threads of zap that hold a pod together. ptrace belongs to threads, so each of them has its share of the
//! processes, on which nobody else can act: what is to be done with it goes to the tracer as a job.
//!
//! Whatever goes wrong, the end of a tracer lets go of every process that it held, which then walks home by itself.

use std::io;
use std::os::fd::AsFd;
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Arc, OnceLock};
use std::thread::JoinHandle;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::error::CaptureError;
use crate::ids::HostPid;
use crate::process::hold::HoldError;
use crate::sys::pidfd::PidFd;

/// How long, in milliseconds, a tracer that has no more jobs may take to end.
const ENDING: u16 = 1000;

type Job<S> = Box<dyn FnOnce(&mut S) + Send>;

/// Some tracers, each with a share `S`. Dropped, they end.
pub struct Crew<S> {
    tracers: Vec<Tracer<S>>,
}

struct Tracer<S> {
    /// `None` once it is to end.
    jobs: Option<Sender<Job<S>>>,
    thread: Option<JoinHandle<()>>,
    /// A handle on the thread itself, where the kernel has such (6.9).
    handle: Arc<OnceLock<PidFd>>,
}

/// Answers of the tracers that are on their way.
#[must_use = "the job is not done before its answers are here"]
pub struct Pending<R>(Vec<Receiver<Result<Vec<R>, HoldError>>>);

impl<S: Default + 'static> Crew<S> {
    /// As many tracers as there are processors, but not more than `most`, and at least one. Their shares are empty.
    pub fn start(most: usize) -> io::Result<Crew<S>> {
        let processors = std::thread::available_parallelism().map_or(1, usize::from);
        let tracers = (0..processors.min(most).max(1)).map(|_| Tracer::start()).collect::<Result<_, _>>()?;
        Ok(Crew { tracers })
    }

    /// How many tracers there are.
    pub fn size(&self) -> usize {
        self.tracers.len()
    }

    /// Gives every tracer its part of a job. They do one job after the other, beside the caller.
    pub fn begin<P: Send + 'static, R: Send + 'static>(
        &self,
        parts: impl IntoIterator<Item = P>,
        job: fn(&mut S, P) -> Result<Vec<R>, HoldError>,
    ) -> Pending<R> {
        let begin = |(tracer, part): (&Tracer<S>, P)| {
            let (answer, receiver) = mpsc::channel();
            tracer.give(Box::new(move |share| drop(answer.send(job(share, part)))));
            receiver
        };
        Pending(self.tracers.iter().zip(parts).map(begin).collect())
    }
}

impl<S: Default + 'static> Tracer<S> {
    fn start() -> io::Result<Tracer<S>> {
        let (jobs, todo) = mpsc::channel::<Job<S>>();
        let handle = Arc::new(OnceLock::new());
        let own = handle.clone();
        let work = move || {
            if let Ok(thread) = PidFd::open(HostPid(nix::unistd::gettid().as_raw())) {
                let _ = own.set(thread);
            }
            let mut share = S::default();
            todo.into_iter().for_each(|job| job(&mut share));
        };
        let thread = std::thread::Builder::new().name("tracer".to_owned()).spawn(work)?;
        Ok(Tracer { jobs: Some(jobs), thread: Some(thread), handle })
    }

    fn give(&self, job: Job<S>) {
        // A tracer that panicked takes no more jobs: whoever waits for the answer learns it.
        let _ = self.jobs.as_ref().map(|jobs| jobs.send(job));
    }
}

impl<S> Drop for Crew<S> {
    fn drop(&mut self) {
        self.tracers.iter_mut().for_each(|tracer| drop(tracer.jobs.take()));
        for tracer in &mut self.tracers {
            // A panic has been told where the answer was missing.
            let _ = tracer.thread.take().map(JoinHandle::join);
            // It is joined before the kernel lets go of what it held: until then nobody else could hold that.
            if let Some(handle) = tracer.handle.get() {
                let _ = poll(&mut [PollFd::new(handle.as_fd(), PollFlags::POLLIN)], PollTimeout::from(ENDING));
            }
        }
    }
}

impl<R> Pending<R> {
    /// Waits until every tracer has done its part: all answers, or the first failure.
    pub fn wait(self) -> Result<Vec<R>, HoldError> {
        let died = || CaptureError::Unexpected { object: "a tracer".into(), what: "panic".into() };
        let answers: Vec<_> = self.0.into_iter().map(|r| r.recv().unwrap_or_else(|_| Err(died().into()))).collect();
        let mut all = Vec::new();
        for answer in answers {
            all.append(&mut answer?);
        }
        Ok(all)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_has_its_share_and_does_its_jobs_in_order() {
        let crew = Crew::<Vec<u32>>::start(2).unwrap();
        let parts = || (0..crew.size() as u32).map(|n| vec![n, n + 10]);
        let _first = crew.begin(parts(), |share, part| {
            share.extend(part);
            Ok(vec![()])
        });
        let all = crew.begin(parts(), |share, part| {
            assert_eq!(*share, part);
            Ok(std::mem::take(share))
        });
        assert_eq!(all.wait().unwrap(), parts().flatten().collect::<Vec<_>>());
    }

    #[test]
    fn a_panic_is_a_failure_and_not_the_end() {
        let crew = Crew::<()>::start(1).unwrap();
        assert!(crew.begin([()], |(), ()| -> Result<Vec<()>, _> { panic!("as it should") }).wait().is_err());
        assert!(crew.begin([()], |(), ()| Ok(vec![()])).wait().is_err());
    }
}
