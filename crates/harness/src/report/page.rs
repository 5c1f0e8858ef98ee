//! The page: one file, nothing fetched from anywhere.

use std::fmt::Write;

use super::document::{Block, Cell, Tone};
use super::plots::Plot;

const STYLE: &str = "
:root { color-scheme: light }
* { box-sizing: border-box }
body { font: 16px/1.5 system-ui, 'DejaVu Sans', sans-serif; max-width: 68rem; margin: 1.5rem auto; padding: 0 1rem; color: #222; background: #fff; overflow-wrap: anywhere }
h1 { line-height: 1.2 } h2 { margin-top: 2.5rem }
.table { overflow-x: auto } table { border-collapse: collapse; margin: 1rem 0; width: 100%; overflow-wrap: normal }
th, td { padding: .3rem .6rem; border-bottom: 1px solid #ddd; text-align: left; vertical-align: top }
th.number { text-align: right } td.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap }
.good { color: #00694d; font-weight: 600 } .bad { color: #a33c00; font-weight: 600 } .none { color: #666 }
a { color: inherit; text-decoration-color: #999 }
figure { margin: 2rem 0; overflow-x: auto } figcaption { color: #555 } svg { display: block; max-width: 100%; height: auto }
@media (max-width: 40rem) {
  body { padding: 0 .6rem } figure svg { min-width: 34rem; max-width: none }
  .table thead { display: none } .table tr { display: block; border-bottom: 2px solid #ccc; padding: .4rem 0 }
  .table td { display: flex; justify-content: space-between; gap: 1rem; border: 0; padding: .1rem 0; text-align: right; white-space: normal }
  .table td.words, .table td.good, .table td.bad, .table td.none { justify-content: flex-start; text-align: left }
  .table td.words::before, .table td.good::before, .table td.bad::before, .table td.none::before { width: 5.5rem }
  .table td::before { content: attr(data-of); color: #666; font-weight: 400; text-align: left; flex: none; max-width: 40% }
}
";

/// The whole page.
pub(super) fn render(blocks: &[Block], plots: &[Plot]) -> String {
    let mut html = format!(
        "<!doctype html>\n<html lang=\"en\"><meta charset=\"utf-8\">\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\"><title>Zap: what was reproduced</title>\
         <style>{STYLE}</style>\n<h1>What was reproduced</h1>\n"
    );
    for block in blocks {
        let _ = match block {
            Block::Heading(heading) => writeln!(html, "<h2>{}</h2>", escape(heading)),
            Block::Text(text) => writeln!(html, "<p>{}</p>", escape(text)),
            Block::Table(head, rows) => {
                table(&mut html, head, rows);
                Ok(())
            }
            Block::Picture(place) => match plots.get(*place) {
                Some(plot) => {
                    writeln!(html, "<figure>{}<figcaption>{}</figcaption></figure>", svg(plot), escape(plot.caption))
                }
                None => Ok(()),
            },
        };
    }
    html
}

/// A second XML declaration in the middle of a page would be a mistake; plotters writes none, but be sure.
fn svg(plot: &Plot) -> String {
    let svg = plot.svg.trim_start_matches("<?xml version=\"1.0\" encoding=\"UTF-8\"?>");
    // With the size as a view box the picture shrinks as a whole where there is less room.
    match (attribute(svg, "width"), attribute(svg, "height")) {
        (Some(width), Some(height)) if !svg.contains("viewBox") => {
            svg.replacen("<svg ", &format!("<svg viewBox=\"0 0 {width} {height}\" role=\"img\" "), 1)
        }
        _ => svg.into(),
    }
}

fn attribute<'a>(svg: &'a str, name: &str) -> Option<&'a str> {
    let (_, rest) = svg.split_once(&format!(" {name}=\""))?;
    Some(rest.split_once('"')?.0)
}

fn table(html: &mut String, head: &[&str], rows: &[Vec<Cell>]) {
    html.push_str("<div class=table><table><thead><tr>");
    for (place, of) in head.iter().enumerate() {
        let number = rows.first().and_then(|row| row.get(place)).is_some_and(|cell| cell.tone == Tone::Number);
        let class = if number { " class=number" } else { "" };
        let _ = write!(html, "<th{class}>{}", escape(of));
    }
    html.push_str("</tr></thead>\n");
    for row in rows {
        html.push_str("<tr>");
        for (cell, of) in row.iter().zip(head) {
            let class = match cell.tone {
                Tone::Words => "words",
                Tone::Number => "number",
                Tone::Good => "good",
                Tone::Bad => "bad",
                Tone::None => "none",
            };
            let text = escape(&cell.text);
            let text = match &cell.source {
                Some(source) => format!("<a href=\"{}\">{text}</a>", escape(source)),
                None => format!("<span>{text}</span>"),
            };
            let _ = write!(html, "<td class={class} data-of=\"{}\">{text}", escape(of));
        }
        html.push_str("</tr>\n");
    }
    html.push_str("</table></div>\n");
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_fetches_nothing_and_escapes_what_it_quotes() {
        let row = vec![Cell::words("<6.1>"), Cell::number("1 ms").of("some")];
        let html = render(&[Block::Table(vec!["a", "b"], vec![row])], &[]);
        assert!(html.contains("&lt;6.1&gt;") && html.contains("<a href=\"raw/some.csv\">1 ms</a>"));
        assert!(!html.contains("src=") && !html.contains("http"));
    }

    #[test]
    fn a_picture_has_a_view_box() {
        let plot =
            Plot { name: "p".into(), caption: "c", svg: "<svg width=\"900\" height=\"420\" x=\"\"><g/></svg>".into() };
        assert!(render(&[Block::Picture(0)], &[plot]).contains("viewBox=\"0 0 900 420\""));
    }
}
