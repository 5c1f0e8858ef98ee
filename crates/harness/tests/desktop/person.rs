//! Someone who works at a desktop, and looks whether everything is as it should be.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use harness::lab::{Pod, wait_until};
use harness::viewer::{Picture, Region, Viewer, keys};
use harness::workload::{Desktop, HOME_IN_POD, SHELL};

/// Places on the screen.
const EDITOR: Region = Region::new(10, 170, 400, 150);
const EDITOR_OF_FULL: Region = Region::new(6, 262, 350, 110);
/// In the counting terminal of either size.
const IN_COUNTER: (u16, u16) = (150, 110);
const EDITOR_CORNER: (u16, u16) = (431, 350);
const FIRST_WORD: (u16, u16) = (20, 173);
const TITLE_OF_EMACS: (u16, u16) = (690, 359);
const EMACS: (u16, u16) = (700, 500);
const LINK: (u16, u16) = (765, 166);
/// Where the window manager says what it does to a window that is dragged.
const DRAG_STATUS: Region = Region::new(422, 744, 180, 20);
/// Where the file manager says how many files there are.
const FILE_COUNT: Region = Region::new(6, 716, 140, 22);

/// See the [module](self).
#[derive(Clone)]
pub(crate) struct Person<'a> {
    pub(crate) viewer: &'a Viewer,
    pub(crate) pod: Pod<'a>,
    desktop: Desktop,
    /// What the notes must say once they are saved.
    notes: String,
    /// The last number that was counted.
    counted: u64,
}

impl<'a> Person<'a> {
    pub(crate) fn sit_down(viewer: &'a Viewer, pod: &Pod<'a>, desktop: Desktop) -> Self {
        let notes = "Notes, saved.\nHalf a line".into();
        let person = Self { viewer, pod: pod.clone(), desktop, notes, counted: 0 };
        // Whatever window appeared last is given the keyboard, perhaps only now: not after a click into another.
        viewer.settled(desktop.moving(), crate::CALM).unwrap();
        person.turn_to("editor", person.editor().middle());
        person.viewer.type_text("A").unwrap();
        person
    }

    /// The desktop has been restarted in another pod.
    pub(crate) fn moves_to(&mut self, pod: &Pod<'a>) {
        self.pod = pod.clone();
    }

    /// Types into the editor, which goes on inserting, and does not save.
    pub(crate) fn write_before(&mut self) {
        self.turn_to("editor", self.editor().middle());
        self.type_into_notes(", some more");
    }

    pub(crate) fn editor(&self) -> Region {
        match self.desktop {
            Desktop::Classic => EDITOR,
            Desktop::Full => EDITOR_OF_FULL,
        }
    }

    fn type_into_notes(&mut self, text: &str) {
        self.viewer.type_text(text).unwrap();
        self.notes += text;
    }

    /// Uses every program of the desktop.
    pub(crate) fn work(&mut self) {
        self.sees_it_count();
        self.saves();
        match self.desktop {
            Desktop::Classic => {
                self.stops_and_continues();
                self.resizes();
                self.copies();
                self.starts_programs();
                self.is_answered();
                self.finds_a_new_file(FILE_COUNT);
                self.follows_a_link();
                self.uses_emacs();
            }
            Desktop::Full => {
                self.stops_and_continues();
                self.works_with_xfce();
            }
        }
        self.sees_it_count();
    }

    /// The shell counts on, without a gap and without repeating itself.
    pub(crate) fn sees_it_count(&mut self) {
        let before = self.counted;
        let numbers = wait_until("the shell to count on", || {
            let numbers = self.numbers()?;
            let last = *numbers.last().context("it has not begun")?;
            ensure!(last > before + 1, "it has come to {last}, from {before}");
            Ok(numbers)
        })
        .unwrap();
        let expected: Vec<u64> = (1..=numbers.len() as u64).collect();
        assert_eq!(numbers, expected, "a gap or a repetition");
        self.counted = numbers.len() as u64;
    }

    fn numbers(&self) -> Result<Vec<u64>> {
        // The last line may be half written.
        let text = self.read("counted")?;
        let whole = text.rsplit_once('\n').map_or("", |(whole, _)| whole);
        whole.lines().map(|line| line.parse().with_context(|| format!("counted {line:?}"))).collect()
    }

    fn read(&self, file: &str) -> Result<String> {
        self.pod.exec(&["cat", &format!("{HOME_IN_POD}/{file}")])
    }

    /// What a program of the desktop's own session says.
    pub(crate) fn ask(&self, command: &[&str]) -> Result<String> {
        let bus = format!("DBUS_SESSION_BUS_ADDRESS=unix:path={HOME_IN_POD}/run/bus");
        self.pod.exec(&[&["env", "DISPLAY=:1", &bus], command].concat())
    }

    pub(crate) fn await_file(&self, file: &str, content: &str) {
        wait_until(&format!("{file} to be saved"), || {
            let now = self.read(file)?;
            ensure!(now == content, "it says {now:?}, not {content:?}");
            Ok(())
        })
        .unwrap();
    }

    /// Clicks into a window and waits until it has the keyboard, as a person does: the window manager takes its time.
    pub(crate) fn turn_to(&self, name: &str, place: (u16, u16)) {
        self.viewer.click(place, 1).unwrap();
        wait_until("a window to have the keyboard", || {
            let active = self.ask(&["xdotool", "getactivewindow", "getwindowname"])?;
            ensure!(active.starts_with(name), "{name} was clicked into, {} has it", active.trim());
            Ok(())
        })
        .unwrap();
    }

    /// Waits for a window whose name has `name` in it; gives its number.
    pub(crate) fn window(&self, name: &str) -> String {
        let found = || Ok(self.ask(&["xdotool", "search", "--onlyvisible", "--name", name])?.trim().to_string());
        wait_until(&format!("the window {name}"), found).unwrap()
    }

    /// Finishes the line in the same editor, and saves.
    fn saves(&mut self) {
        self.turn_to("editor", self.editor().middle());
        // In the line that is being inserted.
        self.type_into_notes(" and the end.");
        self.viewer.press(&[keys::ESCAPE]).unwrap();
        self.viewer.type_text(":w\n").unwrap();
        self.await_file("notes.txt", &format!("{}\n", self.notes));
    }

    /// Job control: Ctrl-Z, fg.
    fn stops_and_continues(&mut self) {
        self.turn_to("counter", IN_COUNTER);
        self.viewer.press(&[keys::CONTROL, keys::of('z')]).unwrap();
        let state = || self.pod.exec(&["sh", "-c", "cut -d' ' -f3 /proc/$(pgrep -o -x count)/stat"]);
        wait_until("the counting to stop", || {
            let state = state()?;
            ensure!(state.trim() == "T", "its state is {state}");
            Ok(())
        })
        .unwrap();
        self.counted = self.numbers().unwrap().len() as u64;
        self.viewer.type_text("fg\n").unwrap();
        self.sees_it_count();
    }

    /// Drags a window by its frame. Whoever lets go before the window manager has taken hold drags nothing: it says what
    /// it does at the lower edge of the screen.
    fn drags(&self, from: (u16, u16), to: (u16, u16)) {
        let before = self.viewer.refresh().unwrap().part(DRAG_STATUS);
        let toward = |a: u16, b: u16| if a < b { a + 8 } else { a - 8 };
        self.viewer.mouse(from, None).unwrap();
        self.viewer.mouse(from, Some(1)).unwrap();
        self.viewer.mouse((toward(from.0, to.0), toward(from.1, to.1)), Some(1)).unwrap();
        let holds = |picture: &Picture| (picture.part(DRAG_STATUS) != before).then_some(());
        self.viewer.await_picture("the window manager to take hold of a window", holds).unwrap();
        self.viewer.mouse(to, Some(1)).unwrap();
        self.viewer.mouse(to, None).unwrap();
    }

    /// Makes the editor's window larger by its corner.
    fn resizes(&self) {
        let (x, y) = EDITOR_CORNER;
        self.drags((x, y), (x + 60, y + 26));
        self.turn_to("editor", self.editor().middle());
        self.editor_knows_its_size();
    }

    /// The editor has been told that its window is larger.
    pub(crate) fn editor_knows_its_size(&self) {
        wait_until("the editor to know its new size", || {
            self.viewer.type_text(":call writefile([&columns . ' ' . &lines], 'size')\n")?;
            let size = self.read("size")?;
            let (columns, lines) = size.trim().split_once(' ').context("no size")?;
            let (columns, lines): (u32, u32) = (columns.parse()?, lines.parse()?);
            ensure!(columns > 74 && lines > 14, "it believes to have {columns} columns and {lines} lines");
            Ok(())
        })
        .unwrap();
    }

    /// Selects a word in the editor.
    pub(crate) fn selects(&self, word: (u16, u16)) {
        // Longer than a double click, so that the click before is not one of these.
        std::thread::sleep(Duration::from_millis(300));
        self.viewer.click_twice(word).unwrap();
        self.viewer.await_text("a word to be selected", |text| text == "Notes").unwrap();
    }

    /// Copies a word from the editor into the shell in tmux, and a text from here.
    fn copies(&self) {
        self.selects(FIRST_WORD);
        self.turn_to("tmux", SHELL.middle());
        self.pastes("Notes");
        self.viewer.cut("from the other side").unwrap();
        self.pastes("from the other side");
    }

    fn pastes(&self, text: &str) {
        self.viewer.type_text("clear; echo ").unwrap();
        self.pastes_at(SHELL);
        self.viewer.type_text(" >~/pasted\n").unwrap();
        self.await_file("pasted", &format!("{text}\n"));
    }

    /// Pastes into a terminal, and waits until it is to be seen there.
    pub(crate) fn pastes_at(&self, terminal: Region) {
        let before = self.viewer.settled(self.desktop.moving(), crate::CALM).unwrap().part(terminal);
        self.viewer.click(terminal.middle(), 2).unwrap();
        let pasted = |picture: &Picture| (picture.part(terminal) != before).then_some(());
        self.viewer.await_picture("what was copied to be pasted", pasted).unwrap();
    }

    /// Starts programs from the shell in tmux, one with a window of its own.
    fn starts_programs(&self) {
        self.viewer
            .type_text("xterm -T newcomer -geometry 20x4-0-60 -e sh -c 'echo $((6 * 7)) >~/answer; read x' &\n")
            .unwrap();
        let window = self.window("newcomer");
        self.await_file("answer", "42\n");
        self.ask(&["xdotool", "windowclose", &window]).unwrap();
    }

    /// The bus and a service on it.
    fn is_answered(&self) {
        let call = ["dbus-send", "--session", "--print-reply"];
        let to = ["--dest=org.freedesktop.DBus", "/org/freedesktop/DBus", "org.freedesktop.DBus.ListNames"];
        let names = self.ask(&[&call[..], &to].concat()).unwrap();
        assert!(names.contains("org.a11y.Bus"), "{names}");
        let to = ["--dest=org.a11y.Bus", "/org/a11y/bus", "org.a11y.Bus.GetAddress"];
        let address = self.ask(&[&call[..], &to].concat()).unwrap();
        assert!(address.contains("unix:path="), "{address}");
    }

    /// The file manager counts files: it notices one more.
    pub(crate) fn finds_a_new_file(&self, count: Region) {
        let before = self.viewer.refresh().unwrap().part(count);
        self.pod.exec(&["touch", &format!("{HOME_IN_POD}/files/three.txt")]).unwrap();
        let seen = |picture: &Picture| (picture.part(count) != before).then_some(());
        self.viewer.await_picture("the file manager to notice a new file", seen).unwrap();
    }

    /// The browser fetches another page.
    fn follows_a_link(&self) {
        self.viewer.click(LINK, 1).unwrap();
        self.window("Second page");
    }

    /// Moves the window of emacs, and edits in it.
    fn uses_emacs(&self) {
        let place = || self.ask(&["xdotool", "search", "--onlyvisible", "--name", "^emacs$", "getwindowgeometry"]);
        let before = wait_until("the place of emacs", place).unwrap();
        let (x, y) = TITLE_OF_EMACS;
        self.drags((x, y), (x - 20, y + 12));
        wait_until("emacs to be elsewhere", || {
            ensure!(place()? != before, "it is at {before}");
            Ok(())
        })
        .unwrap();
        self.turn_to("emacs", EMACS);
        self.viewer.press(&[keys::ALT, keys::of('>')]).unwrap();
        self.viewer.type_text("The end.").unwrap();
        for key in ['x', 's'] {
            self.viewer.press(&[keys::CONTROL, keys::of(key)]).unwrap();
        }
        self.await_file("page.txt", "A page for the editor.\nThe end.\n");
    }
}
