//! A desktop in a pod, with a viewer connected, through checkpoints and restarts.

#![allow(clippy::unwrap_used)]

mod desktop {
    pub(crate) mod person;
    mod xfce;
}

use std::path::PathBuf;
use std::time::Duration;

use desktop::person::Person;
use harness::lab::{Lab, Pod, PodOptions};
use harness::viewer::{Picture, Viewer};
use harness::workload::Desktop;

/// Long enough for anything drawn late to be seen.
const CALM: Duration = Duration::from_millis(600);

struct Office {
    lab: Lab,
    desktop: Desktop,
}

impl Office {
    fn new(desktop: Desktop) -> Self {
        Self { lab: Lab::new().unwrap(), desktop }
    }

    fn start(&self) -> Pod<'_> {
        self.lab.start_pod(&self.desktop, "desk", &PodOptions::default()).unwrap()
    }

    fn image(&self, name: &str) -> PathBuf {
        self.lab.directory().join(name)
    }

    fn viewer(&self, pod: &Pod<'_>) -> Viewer {
        Viewer::connect(self.lab.client(), Desktop::screen_at(pod.served_at().unwrap())).unwrap()
    }

    fn settled(&self, viewer: &Viewer) -> Picture {
        viewer.settled(self.desktop.moving(), CALM).unwrap()
    }

    /// The screen must be as before, outside what moves by itself.
    fn assert_same(&self, when: &str, before: &Picture, after: &Picture) {
        let moving = self.desktop.moving();
        assert!(before.compared(moving) >= 0.6, "only {:.0} % is compared", before.compared(moving) * 100.0);
        if let Some(region) = before.difference(after, moving) {
            let directory = std::env::temp_dir();
            for (name, picture) in [("before", before), ("after", after)] {
                let path = directory.join(format!("zap-{}-{name}.png", self.desktop.size()));
                picture.write_png(&path).unwrap();
            }
            panic!("{when}, the screen differs in {region:?}: see zap-*.png in {}", directory.display());
        }
    }
}

fn a_person_works_undisturbed(desktop: Desktop) {
    let office = Office::new(desktop);
    let pod = office.start();
    let viewer = office.viewer(&pod);
    let mut person = Person::sit_down(&viewer, &pod, office.desktop);
    person.write_before();
    person.work();
}

fn a_viewer_sees_nothing_of_being_left_running(desktop: Desktop) {
    let office = Office::new(desktop);
    let pod = office.start();
    let viewer = office.viewer(&pod);
    let mut person = Person::sit_down(&viewer, &pod, office.desktop);
    person.write_before();
    let before = office.settled(&viewer);
    let (stats, _) = pod.checkpoint(&office.image("image"), &["--leave-running"]).unwrap();
    assert!(stats.processes > 15, "{stats:?}");
    office.assert_same("left running", &before, &viewer.refresh().unwrap());
    person.work();
}

fn a_viewer_stays_across_a_restart(desktop: Desktop) {
    let office = Office::new(desktop);
    let pod = office.start();
    let viewer = office.viewer(&pod);
    let mut person = Person::sit_down(&viewer, &pod, office.desktop);
    person.write_before();
    let before = office.settled(&viewer);
    pod.checkpoint(&office.image("image"), &[]).unwrap();
    assert!(office.lab.pods().unwrap().is_empty(), "a checkpoint that stops a pod leaves none");
    // Not for anything to happen: a person must not notice that the desktop lay on a disk for a while.
    std::thread::sleep(Duration::from_secs(5));
    let (pod, _, _) = office.lab.restart(&office.image("image"), &[]).unwrap();
    office.assert_same("restarted", &before, &viewer.refresh().unwrap());
    person.moves_to(&pod);
    person.work();
}

fn ten_restarts_in_a_row(desktop: Desktop) {
    let office = Office::new(desktop);
    let mut pod = office.start();
    let viewer = office.viewer(&pod);
    let mut person = Person::sit_down(&viewer, &pod, office.desktop);
    for round in 0..10 {
        person.write_before();
        let before = office.settled(&viewer);
        let image = office.image(&format!("image{round}"));
        pod.checkpoint(&image, &[]).unwrap();
        pod = office.lab.restart(&image, &[]).unwrap().0;
        std::fs::remove_dir_all(&image).unwrap();
        office.assert_same(&format!("in round {round}"), &before, &viewer.refresh().unwrap());
        person.moves_to(&pod);
        person.sees_it_count();
    }
    person.work();
}

fn two_desktops_from_one_image(desktop: Desktop) {
    let office = Office::new(desktop);
    let pod = office.start();
    let viewer = office.viewer(&pod);
    let mut person = Person::sit_down(&viewer, &pod, office.desktop);
    person.write_before();
    let before = office.settled(&viewer);
    let image = office.image("image");
    pod.checkpoint(&image, &[]).unwrap();
    let (first, _, _) = office.lab.restart(&image, &[]).unwrap();
    let (second, _, _) = office.lab.restart(&image, &[]).unwrap();
    assert_ne!(first.served_at().unwrap(), second.served_at().unwrap(), "each has an address of its own");
    // The first viewer's connection goes on with the first, which has the address; the second gets a new one.
    let other = office.viewer(&second);
    for (pod, viewer) in [(&first, &viewer), (&second, &other)] {
        office.assert_same("one of two", &before, &office.settled(viewer));
        person.viewer = viewer;
        person.moves_to(pod);
        person.clone().work();
    }
}

macro_rules! on_each_size {
    ($($module:ident: $desktop:expr),*) => {$(
        mod $module {
            use super::*;

            #[test]
            fn a_person_works_undisturbed() {
                super::a_person_works_undisturbed($desktop);
            }

            #[test]
            fn a_viewer_sees_nothing_of_being_left_running() {
                super::a_viewer_sees_nothing_of_being_left_running($desktop);
            }

            #[test]
            fn a_viewer_stays_across_a_restart() {
                super::a_viewer_stays_across_a_restart($desktop);
            }

            #[test]
            fn ten_restarts_in_a_row() {
                super::ten_restarts_in_a_row($desktop);
            }

            #[test]
            fn two_desktops_from_one_image() {
                super::two_desktops_from_one_image($desktop);
            }
        }
    )*};
}

on_each_size!(classic: Desktop::Classic, full: Desktop::Full);
