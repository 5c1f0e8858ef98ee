//! The table that a run ends with.

use super::findings::{Finding, Findings};

/// The claims and targets as text, at most 100 columns wide.
pub(super) fn render(findings: &Findings) -> String {
    let mut text = String::from("\nClaims\n");
    for claim in &findings.claims {
        text += &format!("  {:3} \"{}\": {}\n", claim.id, claim.claim, claim.state.words());
        for line in wrapped(&claim.found, 94) {
            text += &format!("    {line}\n");
        }
    }
    text += "\nWhat it must reach (median with 95 % interval)\n";
    let rows: Vec<[String; 4]> = findings.targets.iter().map(row).collect();
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
    let (a, b, c) = (width(0), width(1), width(2));
    for [what, limit, measured, verdict] in &rows {
        text += &format!("  {what:a$}  {limit:>b$}  {measured:>c$}  {verdict}\n");
    }
    text
}

fn row(finding: &Finding) -> [String; 4] {
    let unit = finding.target.unit();
    let measured = match finding.estimate {
        None => "–".into(),
        Some(e) if finding.samples < 2 => format!("{:.1} (one run) {unit}", e.value),
        Some(e) => format!("{:.1} ({:.1}–{:.1}) {unit}", e.value, e.low, e.high),
    };
    let verdict = finding.verdict.words().to_string();
    [finding.target.what.into(), format!("≤ {} {unit}", finding.target.limit), measured, verdict]
}

/// `text` in lines of at most `width` characters, broken at spaces.
fn wrapped(text: &str, width: usize) -> Vec<String> {
    let mut lines: Vec<String> = Vec::new();
    for word in text.split(' ') {
        match lines.last_mut() {
            Some(line) if line.chars().count() + 1 + word.chars().count() <= width => {
                line.push(' ');
                line.push_str(word);
            }
            _ => lines.push(word.into()),
        }
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_broken_at_spaces() {
        assert_eq!(wrapped("one two three", 7), ["one two", "three"]);
        assert_eq!(wrapped("unbreakable", 3), ["unbreakable"]);
    }

    #[test]
    fn a_table_without_samples_says_so() {
        let text = render(&Findings::of(&[]));
        assert!(text.contains("not measured"));
        assert!(text.lines().all(|line| line.chars().count() <= 110), "{text}");
    }
}
