//! The report as Markdown, for a pull request: tables, and pictures by their names.

use std::fmt::Write;

use super::document::{Block, Cell, Tone};
use super::plots::Plot;

/// The whole text.
pub(super) fn render(blocks: &[Block], plots: &[Plot]) -> String {
    let mut text = String::from("# What was reproduced\n");
    for block in blocks {
        text.push('\n');
        let _ = match block {
            Block::Heading(heading) => writeln!(text, "## {heading}"),
            Block::Text(paragraph) => writeln!(text, "{}", escape(paragraph)),
            Block::Table(head, rows) => {
                let rule = vec!["---"; head.len()].join(" | ");
                let _ = writeln!(text, "| {} |\n| {rule} |", head.join(" | "));
                for row in rows {
                    let cells: Vec<String> = row.iter().map(cell).collect();
                    let _ = writeln!(text, "| {} |", cells.join(" | "));
                }
                Ok(())
            }
            Block::Picture(place) => match plots.get(*place) {
                Some(plot) => writeln!(text, "![{}](plots/{}.png)\n\n{}", plot.name, plot.name, escape(plot.caption)),
                None => Ok(()),
            },
        };
    }
    text
}

fn cell(cell: &Cell) -> String {
    let text = escape(&cell.text);
    let text = match &cell.source {
        Some(source) => format!("[{text}]({source})"),
        None => text,
    };
    match cell.tone {
        Tone::Good | Tone::Bad => format!("**{text}**"),
        _ => text,
    }
}

fn escape(text: &str) -> String {
    text.replace('|', "\\|").replace('<', "&lt;").replace('\n', " ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_stays_one_whatever_is_in_it() {
        let row = vec![Cell::words("a|b\nc"), Cell::verdict("missed", Tone::Bad).of("some")];
        let text = render(&[Block::Table(vec!["x", "y"], vec![row])], &[]);
        assert!(text.contains("| x | y |\n| --- | --- |\n| a\\|b c | **[missed](raw/some.csv)** |\n"), "{text}");
    }
}
