//! What a person does at the full desktop: XFCE and Firefox.

use anyhow::{Context, ensure};
use harness::lab::wait_until;
use harness::viewer::Region;

use super::person::Person;

/// Where Thunar says how many files there are.
const FILE_COUNT: Region = Region::new(186, 736, 100, 22);
/// A link in the page that Firefox shows.
const LINK: (u16, u16) = (500, 270);
/// The fourth tab.
const TAB: (u16, u16) = (860, 79);

impl Person<'_> {
    pub(crate) fn works_with_xfce(&self) {
        self.is_answered_by_xfce();
        self.finds_a_new_file(FILE_COUNT);
        self.starts_a_terminal();
        self.loads_a_page();
        self.sees_timers_run();
    }

    fn is_answered_by_xfce(&self) {
        let theme = self.ask(&["xfconf-query", "-c", "xfwm4", "-p", "/general/workspace_count"]).unwrap();
        assert_eq!(theme.trim(), "4", "the settings daemon");
    }

    fn starts_a_terminal(&self) {
        self.pod.exec(&["sh", "-c", "DISPLAY=:1 xterm -T newcomer </dev/null >/dev/null 2>&1 &"]).unwrap();
        let window = self.window("newcomer");
        self.ask(&["xdotool", "windowkill", &window]).unwrap();
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
