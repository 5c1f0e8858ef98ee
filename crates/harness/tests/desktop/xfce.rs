//! What a person does at the full desktop: XFCE and Firefox.

use anyhow::{Context, ensure};
use harness::lab::wait_until;
use harness::viewer::{Region, keys};
use harness::workload::HOME_IN_POD;

use super::person::Person;

/// Where Thunar says how many files there are.
const FILE_COUNT: Region = Region::new(186, 736, 100, 22);
/// The button that makes the editor's window as large as the screen.
const MAXIMIZE: (u16, u16) = (335, 245);
const FIRST_WORD: (u16, u16) = (20, 268);
/// The text of a new terminal.
const NEWCOMER: Region = Region::new(506, 430, 228, 60);
/// A link in the page that Firefox shows.
const LINK: (u16, u16) = (500, 270);
/// The fourth tab.
const TAB: (u16, u16) = (860, 79);

impl Person<'_> {
    pub(crate) fn works_with_xfce(&self) {
        self.is_answered_by_xfce();
        self.finds_a_new_file(FILE_COUNT);
        self.resizes_by_a_button();
        self.copies_into_new_terminals();
        self.loads_a_page();
        self.sees_timers_run();
    }

    fn is_answered_by_xfce(&self) {
        let theme = self.ask(&["xfconf-query", "-c", "xfwm4", "-p", "/general/workspace_count"]).unwrap();
        assert_eq!(theme.trim(), "4", "the settings daemon");
    }

    /// Makes the editor's window as large as the screen, and then as it was.
    fn resizes_by_a_button(&self) {
        self.turn_to("editor", self.editor().middle());
        self.viewer.click(MAXIMIZE, 1).unwrap();
        self.await_width_of_editor("the editor's window to be large", |width| width > 900);
        self.editor_knows_its_size();
        self.viewer.press(&[keys::ALT, keys::function(10)]).unwrap();
        self.await_width_of_editor("the editor's window to be small again", |width| width < 400);
    }

    fn await_width_of_editor(&self, what: &str, wanted: impl Fn(u32) -> bool) {
        wait_until(what, || {
            let said = self.ask(&["xdotool", "search", "--name", "^editor$", "getwindowgeometry"])?;
            let (_, size) = said.split_once("Geometry: ").context("no size")?;
            let (width, _) = size.split_once('x').context("no width")?;
            ensure!(wanted(width.parse()?), "{said}");
            Ok(())
        })
        .unwrap();
    }

    /// Copies a word from the editor into a new terminal, and a text from here into another one.
    fn copies_into_new_terminals(&self) {
        self.selects(FIRST_WORD);
        self.pastes_into_a_new_terminal("Notes");
        self.viewer.cut("from the other side").unwrap();
        self.pastes_into_a_new_terminal("from the other side");
    }

    fn pastes_into_a_new_terminal(&self, text: &str) {
        let program = format!("read text; echo \"$text\" >{HOME_IN_POD}/pasted");
        let terminal = format!("DISPLAY=:1 xterm -T newcomer -geometry 40x6+500+400 -e sh -c '{program}'");
        self.pod.exec(&["sh", "-c", &format!("{terminal} </dev/null >/dev/null 2>&1 &")]).unwrap();
        self.window("newcomer");
        self.turn_to("newcomer", NEWCOMER.middle());
        self.pastes_at(NEWCOMER);
        self.viewer.type_text("\n").unwrap();
        self.await_file("pasted", &format!("{text}\n"));
    }

    /// A page that Firefox has not seen before.
    fn loads_a_page(&self) {
        self.viewer.click(LINK, 1).unwrap();
        self.window("^Fresh page");
    }

    /// The fourth tab's timer ticks ten times a second, and its clocks never step back.
    fn sees_timers_run(&self) {
        self.viewer.click(TAB, 1).unwrap();
        let ticks = || {
            let title =
                self.ask(&["xdotool", "search", "--onlyvisible", "--name", "^(tick|confused)", "getwindowname"])?;
            let ticks = title.split_whitespace().nth(1).filter(|_| title.starts_with("tick"));
            ticks.and_then(|ticks| ticks.parse::<u32>().ok()).with_context(|| format!("the title is {title:?}"))
        };
        let before = wait_until("the tab with the timers", ticks).unwrap();
        wait_until("timers to run", || {
            let now = ticks()?;
            ensure!(now > before + 5, "{now} ticks, from {before}");
            Ok(())
        })
        .unwrap();
    }
}
