//! Peers of zap in a measurement of checkpoints and restarts: each has its own copy of the workload, and its turns.

use std::time::Instant;

use anyhow::Result;

use super::peers::Peers;
use super::{Session, bytes_below};
use crate::lab::Lab;
use crate::peer::{Criu, CriuCopy, PeerSpec};
use crate::samples::Circumstances;
use crate::workload::{Offer, Workload};

/// What a part says of a peer that was measured, instead of an error.
pub(crate) const MEASURED: &str = "measured: ";

/// The peers of one workload. One that fails is noted with its own words, and has no further turns.
pub(super) struct Rivals<'a> {
    lab: &'a Lab,
    workload: &'a dyn Workload,
    /// CRIU's copy, and who is connected to it.
    criu: Option<(CriuCopy, Peers)>,
    /// Whether CRIU can stop it and start it again, as far as is known.
    restarts: bool,
    native: bool,
}

impl<'a> Rivals<'a> {
    /// Starts the copies of the peers that were asked for.
    pub(super) fn start(session: &mut Session, lab: &'a Lab, workload: &'a dyn Workload) -> Result<Self> {
        let mut rivals = Self { lab, workload, criu: None, restarts: true, native: false };
        for peer in session.peers.clone() {
            match peer {
                PeerSpec::Native => rivals.native = true,
                PeerSpec::Criu(path) => match Self::start_criu(session, lab, workload, &path) {
                    Ok(copy) => rivals.criu = Some(copy),
                    Err(error) => session.note(workload.name(), "criu", &format!("{error:#}"))?,
                },
            }
        }
        Ok(rivals)
    }

    fn start_criu(
        session: &mut Session,
        lab: &Lab,
        workload: &dyn Workload,
        path: &std::path::Path,
    ) -> Result<(CriuCopy, Peers)> {
        let criu = Criu::new(path)?;
        let version = criu.version()?;
        if let Some(objections) = criu.objections()? {
            // It is tried in spite of that: what it objects to may not matter here.
            session.note(workload.name(), "criu", &format!("{version}: criu check says: {objections}"))?;
        }
        let copy = CriuCopy::start(lab, workload, &criu)?;
        let peers = Peers::connect_to(copy.netns(), copy.served_at(), workload)?;
        session.note(workload.name(), "criu", &format!("{MEASURED}{version}"))?;
        Ok((copy, peers))
    }

    /// One turn of each.
    pub(super) fn turn(&mut self, session: &mut Session, parameters: &str, run: u32) -> Result<()> {
        let name = self.workload.name();
        if let Some((mut copy, mut peers)) = self.criu.take() {
            session.step(&format!("{name}: criu"));
            let of = |arm| Circumstances { workload: name, parameters, arm, run };
            match dump(session, &of("criu-leave-running"), &mut copy, true).and_then(|()| peers.use_once()) {
                Ok(()) => self.criu = Some((copy, peers)),
                Err(error) => session.note(name, "criu", &format!("left running: {error:#}"))?,
            }
        }
        if self.restarts
            && let Some((mut copy, mut peers)) = self.criu.take()
        {
            match stop_and_restart(session, (name, parameters, run), &mut copy, &mut peers) {
                Ok(()) => self.criu = Some((copy, peers)),
                Err(error) => {
                    session.note(name, "criu", &format!("stopped and restarted: {error:#}"))?;
                    self.restarts = false;
                    // A fresh one, to be left running in the rounds to come.
                    drop((copy, peers));
                    let paths = session.peers.clone();
                    let path =
                        paths.iter().find_map(|peer| if let PeerSpec::Criu(path) = peer { Some(path) } else { None });
                    self.criu = match path.map(|path| Self::start_criu(session, self.lab, self.workload, path)) {
                        Some(Ok(fresh)) => Some(fresh),
                        _ => None,
                    };
                }
            }
        }
        if self.native {
            session.step(&format!("{name}: natively"));
            if let Err(error) = self.native_turn(session, parameters, run) {
                session.note(name, "native", &format!("{error:#}"))?;
                self.native = false;
            }
        }
        Ok(())
    }

    /// What there would be without any of this: the workload ended, and started again.
    fn native_turn(&self, session: &mut Session, parameters: &str, run: u32) -> Result<()> {
        let of = |arm| Circumstances { workload: self.workload.name(), parameters, arm, run };
        let begun = Instant::now();
        let native = self.lab.start_native(self.workload)?;
        session.record_duration(&of("native-start"), "whole", begun.elapsed())?;
        if self.workload.offers() != Offer::Nothing {
            session.record_duration(&of("native-start"), "first_answer", begun.elapsed())?;
        }
        let begun = Instant::now();
        drop(native);
        session.record_duration(&of("native-end"), "whole", begun.elapsed())
    }
}

fn dump(session: &mut Session, of: &Circumstances<'_>, copy: &mut CriuCopy, leave_running: bool) -> Result<()> {
    let dumped = copy.dump(leave_running)?;
    session.record_duration(of, "whole", dumped.whole)?;
    let stats = dumped.stats;
    session.record(of, "downtime", (stats.freezing_us + stats.frozen_us) as f64, "us")?;
    session.record(of, "phase:freezing", stats.freezing_us as f64, "us")?;
    session.record(of, "phase:memory dump", stats.memory_us as f64, "us")?;
    session.record(of, "phase:memory write", stats.write_us as f64, "us")?;
    session.record(of, "pages", stats.pages as f64, "1")?;
    session.record(of, "image_bytes", bytes_below(copy.images())? as f64, "bytes")
}

fn stop_and_restart(
    session: &mut Session,
    (workload, parameters, run): (&str, &str, u32),
    copy: &mut CriuCopy,
    peers: &mut Peers,
) -> Result<()> {
    let of = |arm| Circumstances { workload, parameters, arm, run };
    dump(session, &of("criu-stop"), copy, false)?;
    let begun = Instant::now();
    let restored = copy.restore()?;
    session.record_duration(&of("criu-restart"), "whole", restored.whole)?;
    if let Some(first_answer) = peers.first_answer_from(copy.netns(), copy.served_at(), begun)? {
        session.record_duration(&of("criu-restart"), "first_answer", first_answer)?;
    }
    session.record(&of("criu-restart"), "phase:forking", restored.stats.forking_us as f64, "us")?;
    session.record(&of("criu-restart"), "phase:restore", restored.stats.restore_us as f64, "us")?;
    peers.use_once()
}
