//! The page: one file, nothing fetched from anywhere.

use std::fmt::Write;

use super::findings::{Findings, Verdict};
use super::plots::Plot;
use crate::host::HostFacts;
use crate::samples::Sample;

const STYLE: &str = "
body { font: 16px/1.5 system-ui, sans-serif; max-width: 66rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; margin: 1rem 0 } th, td { padding: .25rem .75rem; border-bottom: 1px solid #ddd; text-align: left }
td.number { text-align: right; font-variant-numeric: tabular-nums } td.number, th, .good, .bad { white-space: nowrap } .good { color: #00694d } .bad { color: #a33c00 }
.none { color: #777 } figure { margin: 2rem 0 } figcaption { color: #555 } svg { max-width: 100%; height: auto }
";

/// The whole page.
pub(super) fn render(findings: &Findings, plots: &[Plot], samples: &[Sample], host: &HostFacts) -> String {
    let mut html = format!(
        "<!doctype html>\n<html lang=\"en\"><meta charset=\"utf-8\"><title>Zap: what was reproduced</title>\
         <style>{STYLE}</style>\n<h1>What was reproduced</h1>\n"
    );
    claims(&mut html, findings);
    targets(&mut html, findings);
    for plot in plots {
        // A second XML declaration in the middle of a page would be a mistake; plotters writes none, but be sure.
        let svg = plot.svg.trim_start_matches("<?xml version=\"1.0\" encoding=\"UTF-8\"?>");
        let _ = writeln!(html, "<figure>{svg}<figcaption>{}</figcaption></figure>", escape(plot.caption));
    }
    facts(&mut html, samples, host);
    html
}

fn claims(html: &mut String, findings: &Findings) {
    let _ = writeln!(
        html,
        "<p>Claims of <em>The Design and Implementation of Zap</em> (OSDI 2002), as they are worded there; the paper's \
         tables are not at hand, so no number of theirs is quoted.</p>"
    );
    for claim in &findings.claims {
        let (class, verdict) = match claim.reproduced {
            Some(true) => ("good", "reproduced"),
            Some(false) => ("bad", "not reproduced"),
            None => ("none", "not measured"),
        };
        let (claim, found) = (escape(claim.claim), escape(&claim.found));
        let _ = writeln!(html, "<p><strong>“{claim}”: <span class=\"{class}\">{verdict}.</span></strong> {found}</p>");
    }
}

fn targets(html: &mut String, findings: &Findings) {
    html.push_str(
        "<h2>What it must reach</h2>\n<table><tr><th>measure<th>at most<th>measured<th>95 % interval<th>samples<th>verdict</tr>\n",
    );
    for finding in &findings.targets {
        let (what, unit, limit) = (escape(finding.target.what), finding.target.unit(), finding.target.limit);
        let (value, interval) = match finding.estimate {
            Some(e) => (format!("{:.2} {unit}", e.value), format!("{:.2} to {:.2}", e.low, e.high)),
            None => ("–".into(), "–".into()),
        };
        let class = match finding.verdict {
            Verdict::Within | Verdict::Likely => "good",
            Verdict::Doubtful | Verdict::Missed => "bad",
            Verdict::NotMeasured => "none",
        };
        let _ = writeln!(
            html,
            "<tr><td>{what}<td class=number>{limit} {unit}<td class=number>{value}<td class=number>{interval}\
             <td class=number>{}<td class={class}>{}</tr>",
            finding.samples,
            finding.verdict.words()
        );
    }
    html.push_str("</table>\n");
}

fn facts(html: &mut String, samples: &[Sample], host: &HostFacts) {
    let gib = host.memory_bytes as f64 / f64::from(1 << 30);
    let mut rows = vec![
        ("kernel".to_string(), host.kernel.clone()),
        ("distribution".into(), host.distribution.clone()),
        ("CPU".into(), format!("{} × {}", host.cpus, host.cpu)),
        ("memory".into(), format!("{gib:.1} GiB")),
        ("virtual machine".into(), if host.virtual_machine { "yes" } else { "no" }.into()),
        ("commit".into(), host.commit.clone().unwrap_or_else(|| "unknown".into())),
        ("load at the start".into(), host.load.clone()),
    ];
    rows.extend(host.packages.iter().map(|(name, version)| (name.clone(), version.clone())));
    rows.extend(host.mitigations.iter().map(|(name, state)| (name.clone(), state.clone())));
    html.push_str("<h2>Where it was measured</h2>\n<table>\n");
    for (name, value) in rows {
        let _ = writeln!(html, "<tr><th>{}<td>{}</tr>", escape(&name), escape(&value));
    }
    let mut seeds: Vec<u64> = samples.iter().map(|sample| sample.seed).collect();
    seeds.sort_unstable();
    seeds.dedup();
    let seeds: Vec<String> = seeds.iter().map(u64::to_string).collect();
    let _ = writeln!(
        html,
        "</table>\n<p>{} raw samples, in <code>raw/*.csv</code>; seed {}.</p>",
        samples.len(),
        seeds.join(", ")
    );
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_fetches_nothing_and_escapes_what_it_quotes() {
        let host = HostFacts { kernel: "<6.1>".into(), ..HostFacts::default() };
        let html = render(&Findings::of(&[]), &[], &[], &host);
        assert!(html.contains("&lt;6.1&gt;") && html.contains("not measured"));
        assert!(!html.contains("src=") && !html.contains("href="));
    }
}
