//! An X desktop behind a VNC port, with the programs of `workloads/xdesktop`.

use std::net::SocketAddr;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use super::{Offer, Recipe, Workload, folder};
use crate::client::Connection;
use crate::lab::{Lab, Netns, wait_until};
use crate::viewer::{Region, Viewer};

/// Where the folder is in a pod.
const FOLDER_IN_POD: &str = "/srv/xdesktop";
/// Where everything that is written is in a pod.
pub const HOME_IN_POD: &str = "/var/local/desktop";
/// The port of the screen.
const VNC_PORT: u16 = 5900;

/// The number of the X display natively: one that nobody else on the host is likely to have.
pub const NATIVE_DISPLAY: u32 = 97;

/// How much of a desktop.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Desktop {
    /// A window manager, terminals, editors, a file manager, a small browser.
    Classic,
    /// An XFCE session and Firefox.
    Full,
}

impl Desktop {
    /// Its size in the workload's own terms.
    pub fn size(self) -> &'static str {
        match self {
            Desktop::Classic => "classic",
            Desktop::Full => "full",
        }
    }

    /// Where the screen of a desktop is that serves at `address`.
    pub fn screen_at(address: SocketAddr) -> SocketAddr {
        (address.ip(), VNC_PORT).into()
    }

    /// What moves by itself.
    pub fn moving(self) -> &'static [Region] {
        match self {
            Desktop::Classic => &[COUNTER, CLOCK, FREE_SPACE],
            Desktop::Full => &FULL_MOVES,
        }
    }

    fn environment(self, home: &str) -> Vec<(String, String)> {
        let pairs = [("ZAP_DESKTOP", self.size()), ("ZAP_HOME", home)];
        pairs.map(|(key, value)| (key.to_string(), value.to_string())).into()
    }
}

/// The terminal of the classic desktop in which a shell counts.
pub const COUNTER: Region = Region::new(0, 0, 316, 138);
/// The clock of the classic desktop.
pub const CLOCK: Region = Region::new(316, 0, 124, 140);
/// The text of the shell in tmux of the classic desktop.
pub const SHELL: Region = Region::new(10, 380, 400, 140);
/// Where the file manager of the classic desktop says how much room the disk has.
const FREE_SPACE: Region = Region::new(150, 714, 280, 26);

/// The counting shell, the panel's clock, the title of the tab with timers, how much room the disk has, and the lower edge
/// of the panel's buttons: its shade is another (by one) once all of the panel has been painted at once, which happens
/// first when the clock comes to another minute.
const FULL_MOVES: [Region; 5] = [
    Region::new(0, 28, 316, 168),
    Region::new(904, 0, 90, 27),
    Region::new(800, 60, 170, 40),
    Region::new(300, 734, 190, 28),
    Region::new(108, 26, 660, 1),
];

impl Workload for Desktop {
    fn name(&self) -> &'static str {
        match self {
            Desktop::Classic => "desktop-classic",
            Desktop::Full => "desktop-full",
        }
    }

    fn claim(&self) -> &'static str {
        "sub-second checkpoint and restart: a desktop, with a viewer that stays connected"
    }

    fn offers(&self) -> Offer {
        Offer::Screen
    }

    fn in_pod(&self, _lab: &Lab) -> Result<Recipe> {
        Ok(Recipe {
            command: vec![format!("{FOLDER_IN_POD}/start")],
            environment: self.environment(HOME_IN_POD),
            binds: vec![format!("{}:{FOLDER_IN_POD}:ro", folder("xdesktop")?.display())],
            ..Recipe::default()
        })
    }

    fn natively(&self, _lab: &Lab, directory: &Path) -> Result<Recipe> {
        let start = folder("xdesktop")?.join("start").to_string_lossy().into_owned();
        let mut environment = self.environment(&directory.to_string_lossy());
        environment.push(("ZAP_DISPLAY".into(), NATIVE_DISPLAY.to_string()));
        Ok(Recipe { command: vec![start], environment, ..Recipe::default() })
    }

    /// The desktop says so itself, once every window is there.
    fn ready_for(&self, from: &Netns, address: SocketAddr) -> Result<()> {
        wait_until("every window of the desktop", || {
            from.enter(|| {
                let said = Connection::open(address, Duration::from_secs(1))?.get("/ready").context("asking")?;
                ensure!(said == b"ready\n", "it says {:?}", String::from_utf8_lossy(&said));
                Ok(())
            })?
        })
    }

    fn health(&self, lab: &Lab, address: SocketAddr) -> Result<()> {
        let viewer = Viewer::connect(lab.client(), Self::screen_at(address))?;
        let picture = viewer.refresh()?;
        ensure!(picture.shows_something(), "the screen is empty");
        viewer.await_update().context("nothing moves on the screen")
    }
}
