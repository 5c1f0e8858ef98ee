//! A report as a document of no particular form: what [`page`](super::page) and [`markdown`](super::markdown) write down.

/// A part of it.
#[derive(Clone, Debug)]
pub(super) enum Block {
    /// A heading of the second level.
    Heading(String),
    /// A paragraph.
    Text(String),
    /// A table: its head, and its rows.
    Table(Vec<&'static str>, Vec<Vec<Cell>>),
    /// A picture, by its place among the plots.
    Picture(usize),
}

/// What a cell of a table says.
#[derive(Clone, Debug, Default)]
pub(super) struct Cell {
    pub(super) text: String,
    pub(super) tone: Tone,
    /// The file of raw samples that it comes from, relative to the report.
    pub(super) source: Option<String>,
}

/// How it is said.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Tone {
    /// As words.
    #[default]
    Words,
    /// As a number: to the right.
    Number,
    /// As good news.
    Good,
    /// As bad news.
    Bad,
    /// As no news.
    None,
}

impl Cell {
    pub(super) fn words(text: impl Into<String>) -> Self {
        Self { text: text.into(), ..Self::default() }
    }

    pub(super) fn number(text: impl Into<String>) -> Self {
        Self { text: text.into(), tone: Tone::Number, source: None }
    }

    pub(super) fn verdict(text: impl Into<String>, tone: Tone) -> Self {
        Self { text: text.into(), tone, source: None }
    }

    /// The same, with a link to the samples of an experiment.
    pub(super) fn of(self, experiment: &str) -> Self {
        Self { source: Some(format!("raw/{experiment}.csv")), ..self }
    }
}
