//! Kinds of picture, as SVG. What colours mean is said beside a picture, never over it.

use anyhow::{Result, anyhow};
use plotters::coord::Shift;
use plotters::coord::ranged1d::{AsRangedCoord, SegmentValue, ValueFormatter};
use plotters::element::DynElement;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

use crate::stats::Estimate;

/// What there is for the picture itself, beside labels and names.
const WIDTH: u32 = 660;
const ROW: u32 = 28;
/// Height of a row of a group.
const GROUPED_ROW: u32 = 14;
/// Half of the last number of a scale is beyond its end.
const MARGIN_RIGHT: u32 = 26;
const FONT: (&str, u32) = ("DejaVu Sans, sans-serif", 14);
const SMALL: (&str, u32) = (FONT.0, 10);
/// What a letter takes in the middle, of the font's size.
const LETTER: f64 = 0.57;
/// Colours that people who see few can tell apart (Okabe and Ito's); no picture has more.
const COLOURS: [RGBColor; 8] = [
    RGBColor(0, 114, 178),
    RGBColor(230, 159, 0),
    RGBColor(0, 158, 115),
    RGBColor(204, 121, 167),
    RGBColor(86, 180, 233),
    RGBColor(213, 94, 0),
    RGBColor(240, 228, 66),
    RGBColor(100, 100, 100),
];

/// A row: a value and its interval.
pub(super) struct Interval {
    pub(super) label: String,
    pub(super) estimate: Estimate,
}

/// A row: parts that add up.
pub(super) struct Bar {
    pub(super) label: String,
    pub(super) parts: Vec<(String, f64)>,
}

/// Dots with whiskers, a row each; `marks` are values to draw a line at. `None` if there are no rows.
pub(super) fn intervals(title: &str, unit: &str, rows: &[Interval], marks: &[f64]) -> Result<Option<String>> {
    if rows.is_empty() {
        return Ok(None);
    }
    // Segments grow upwards, rows are read downwards.
    let rows: Vec<&Interval> = rows.iter().rev().collect();
    let all = rows.iter().flat_map(|row| [row.estimate.low, row.estimate.high]).chain(marks.iter().copied());
    let (low, high) = all.fold((0.0_f64, 0.0_f64), |(low, high), v| (low.min(v), high.max(v)));
    let pad = (high - low).max(1e-9) * 0.05;
    let range = (if low < 0.0 { low - pad } else { 0.0 })..high + pad;
    let labels: Vec<&str> = rows.iter().map(|row| row.label.as_str()).collect();
    rows_chart((title, unit), (&labels, ROW), range, &[], |chart, count| {
        for mark in marks {
            let line = [(*mark, SegmentValue::Exact(0)), (*mark, SegmentValue::Exact(count))];
            chart.draw_series(LineSeries::new(line, BLACK.mix(0.5)))?;
        }
        for (i, row) in rows.iter().enumerate() {
            let (at, e) = (SegmentValue::CenterOf(i), row.estimate);
            let style = COLOURS[0].stroke_width(2);
            chart.draw_series(LineSeries::new([(e.low, at.clone()), (e.high, at.clone())], style))?;
            chart.draw_series([Circle::new((e.value, at), 4, COLOURS[0].filled())])?;
        }
        Ok(())
    })
    .map(Some)
}

/// A group of rows with one label: a dot for each series that has one.
pub(super) struct Group {
    pub(super) label: String,
    pub(super) points: Vec<(&'static str, Estimate)>,
}

/// Bars with whiskers and their values, a colour for each of `series`. `None` if there are no groups.
pub(super) fn grouped(title: &str, unit: &str, series: &[&str], groups: &[Group]) -> Result<Option<String>> {
    let all = || groups.iter().flat_map(|group| &group.points).map(|(_, estimate)| estimate);
    if all().next().is_none() {
        return Ok(None);
    }
    let (low, high) = all().fold((0.0_f64, 0.0_f64), |(low, high), e| (low.min(e.low), high.max(e.high)));
    let pad = (high - low).max(1e-9) * 0.05;
    let range = (if low < 0.0 { low - pad } else { 0.0 })..high + pad * 2.0;
    // An empty row between groups.
    let of_each = series.len() + 1;
    let mut labels = vec![""; groups.len() * of_each];
    for (place, group) in groups.iter().rev().enumerate() {
        labels[place * of_each + of_each / 2] = &group.label;
    }
    let at = |group: usize, series: usize| (groups.len() - group) * of_each - 1 - series;
    let names: Vec<(&str, RGBColor)> = series.iter().copied().zip(COLOURS).collect();
    let value = TextStyle::from(SMALL.into_font()).pos(Pos::new(HPos::Left, VPos::Center));
    rows_chart((title, unit), (&labels, GROUPED_ROW), range, &names, |chart, count| {
        let zero = [(0.0, SegmentValue::Exact(0)), (0.0, SegmentValue::Exact(count))];
        for (place, group) in groups.iter().enumerate() {
            for (number, (name, colour)) in names.iter().enumerate() {
                let Some((_, e)) = group.points.iter().find(|(of, _)| of == name) else { continue };
                let row = at(place, number);
                let corners = [(0.0, SegmentValue::Exact(row)), (e.value, SegmentValue::Exact(row + 1))];
                let mut bar = Rectangle::new(corners, colour.filled());
                bar.set_margin(1, 1, 0, 0);
                chart.draw_series([bar])?;
                let whisker = [e.low, e.high].map(|end| (end, SegmentValue::CenterOf(row)));
                chart.draw_series(LineSeries::new(whisker, BLACK.mix(0.7)))?;
                let beside = EmptyElement::at((e.high.max(e.value).max(0.0), SegmentValue::CenterOf(row)));
                chart.draw_series([beside + Text::new(short(e.value), (5, 0), value.clone())])?;
            }
        }
        chart.draw_series(LineSeries::new(zero, BLACK.mix(0.5))).map(drop)
    })
    .map(Some)
}

/// Bars of parts and their sums, a row each. `None` if there are no rows.
pub(super) fn stacked(title: &str, unit: &str, bars: &[Bar]) -> Result<Option<String>> {
    if bars.is_empty() {
        return Ok(None);
    }
    let sum = |bar: &Bar| bar.parts.iter().map(|(_, value)| value).sum::<f64>();
    let longest = bars.iter().map(sum).fold(1e-9, f64::max);
    let mut names: Vec<&str> = Vec::new();
    for (name, _) in bars.iter().flat_map(|bar| &bar.parts) {
        if !names.contains(&name.as_str()) {
            names.push(name);
        }
    }
    let names: Vec<(&str, RGBColor)> = names.into_iter().zip(COLOURS.iter().copied().cycle()).collect();
    let bars: Vec<&Bar> = bars.iter().rev().collect();
    let labels: Vec<&str> = bars.iter().map(|bar| bar.label.as_str()).collect();
    let value = TextStyle::from((FONT.0, 12).into_font()).pos(Pos::new(HPos::Left, VPos::Center));
    let shown = if names.len() > 1 { &names[..] } else { &[] };
    rows_chart((title, unit), (&labels, ROW), 0.0..longest * 1.1, shown, |chart, _| {
        for (row, bar) in bars.iter().enumerate() {
            let mut start = 0.0;
            for (part, length) in &bar.parts {
                let colour = names.iter().find(|(name, _)| name == part).map_or(BLACK, |(_, colour)| *colour);
                let corners = [(start, SegmentValue::Exact(row)), (start + length, SegmentValue::Exact(row + 1))];
                let mut rectangle = Rectangle::new(corners, colour.filled());
                rectangle.set_margin(4, 4, 0, 0);
                chart.draw_series([rectangle])?;
                start += length;
            }
            let beside = EmptyElement::at((start, SegmentValue::CenterOf(row)));
            chart.draw_series([beside + Text::new(short(start), (5, 0), value.clone())])?;
        }
        Ok(())
    })
    .map(Some)
}

/// Points of several sorts, and the line on which both coordinates are equal. `None` if there are no points.
pub(super) fn scatter(title: &str, axes: (&str, &str), sorts: &[Line]) -> Result<Option<String>> {
    let all = || sorts.iter().flat_map(|sort| &sort.points);
    if all().next().is_none() {
        return Ok(None);
    }
    let largest = |of: fn(&(f64, f64)) -> f64| all().map(of).fold(1e-9, f64::max) * 1.1;
    let (width, height) = (largest(|p| p.0), largest(|p| p.1));
    plane(title, axes, 0.0..width, 0.0..height, &names(sorts), |chart| {
        let end = width.min(height);
        chart.draw_series(LineSeries::new([(0.0, 0.0), (end, end)], BLACK.mix(0.4)))?;
        for (place, sort) in sorts.iter().enumerate() {
            let colour = colour(sorts, place).mix(0.7);
            // Told apart by their shapes, too.
            let mark = |at: &(f64, f64)| -> DynElement<'_, SVGBackend<'_>, (f64, f64)> {
                match place % 3 {
                    0 => Circle::new(*at, 4, colour.filled()).into_dyn(),
                    1 => TriangleMarker::new(*at, 5, colour.filled()).into_dyn(),
                    _ => Cross::new(*at, 4, colour.stroke_width(2)).into_dyn(),
                }
            };
            chart.draw_series(sort.points.iter().map(mark))?;
        }
        Ok(())
    })
    .map(Some)
}

/// A line, or points of one sort: its name, and points that are all positive where an axis is logarithmic.
#[derive(Clone)]
pub(super) struct Line {
    pub(super) name: String,
    pub(super) points: Vec<(f64, f64)>,
    /// What nothing can be below: drawn in grey.
    pub(super) limit: bool,
}

/// Lines over the logarithms of both axes, in which what is linear has one slope. `None` if there are no points.
pub(super) fn logarithmic(title: &str, axes: (&str, &str), lines: &[Line]) -> Result<Option<String>> {
    let all = || lines.iter().flat_map(|line| &line.points);
    if all().next().is_none() {
        return Ok(None);
    }
    let ends = |of: fn(&(f64, f64)) -> f64| {
        let (low, high) = all().map(of).fold((f64::MAX, f64::MIN), |(low, high), v| (low.min(v), high.max(v)));
        (low / 1.3, high * 1.3)
    };
    let (x, y) = (ends(|p| p.0), ends(|p| p.1));
    let (x, y) = ((x.0..x.1).log_scale(), (y.0..y.1).log_scale());
    plane(title, axes, x, y, &names(lines), |chart| polylines(chart, lines, 4)).map(Some)
}

/// Lines over two scales of numbers, the first one's logarithm where `logarithmic`. `None` if there are no points.
pub(super) fn lines(title: &str, axes: (&str, &str), lines: &[Line], logarithmic: bool) -> Result<Option<String>> {
    let all = || lines.iter().flat_map(|line| &line.points);
    if all().next().is_none() {
        return Ok(None);
    }
    let ends = |of: fn(&(f64, f64)) -> f64| {
        all().map(of).fold((f64::MAX, f64::MIN), |(low, high), value| (low.min(value), high.max(value)))
    };
    let ((left, right), (_, top)) = (ends(|point| point.0), ends(|point| point.1));
    let y = 0.0..top * 1.05 + 1e-9;
    let drawn = if logarithmic {
        let x = (left / 1.1..right * 1.1).log_scale();
        plane(title, axes, x, y, &names(lines), |chart| polylines(chart, lines, 2))
    } else {
        let x = left..right.max(left + 1e-9);
        plane(title, axes, x, y, &names(lines), |chart| polylines(chart, lines, 2))
    };
    drawn.map(Some)
}

fn polylines<'b, X: Ranged<ValueType = f64>, Y: Ranged<ValueType = f64>>(
    chart: &mut ChartContext<'_, SVGBackend<'b>, Cartesian2d<X, Y>>,
    lines: &[Line],
    point: u32,
) -> Drawn<'b> {
    for (place, line) in lines.iter().enumerate() {
        let style = colour(lines, place).stroke_width(2);
        chart.draw_series(LineSeries::new(line.points.iter().copied(), style).point_size(point))?;
    }
    Ok(())
}

/// That of a line; limits are grey.
fn colour(lines: &[Line], place: usize) -> RGBColor {
    if lines[place].limit { COLOURS[7] } else { COLOURS[place % 6] }
}

fn names(lines: &[Line]) -> Vec<(&str, RGBColor)> {
    lines.iter().enumerate().map(|(place, line)| (&*line.name, colour(lines, place))).collect()
}

/// A chart of two scales of numbers, drawn by `draw`.
fn plane<'b, X, Y>(
    title: &str,
    axes: (&str, &str),
    x: X,
    y: Y,
    names: &[(&str, RGBColor)],
    draw: impl FnOnce(&mut Plane<'_, '_, X, Y>) -> Drawn<'b>,
) -> Result<String>
where
    X: AsRangedCoord<Value = f64, CoordDescType: ValueFormatter<f64>>,
    Y: AsRangedCoord<Value = f64, CoordDescType: ValueFormatter<f64>>,
{
    let mut svg = String::new();
    {
        let failed = |e: &dyn std::fmt::Display| anyhow!("drawing {title}: {e}");
        let width = WIDTH + 100;
        let root = SVGBackend::with_string(&mut svg, (width + width_of_names(names), 420)).into_drawing_area();
        root.fill(&WHITE).map_err(|e| failed(&e))?;
        let (left, right) = root.split_horizontally(width);
        let mut chart = ChartBuilder::on(&left)
            .caption(title, (FONT.0, 18))
            .margin(10)
            .margin_right(MARGIN_RIGHT)
            .x_label_area_size(44)
            .y_label_area_size(64)
            .build_cartesian_2d(x, y)
            .map_err(|e| failed(&e))?;
        let mut mesh = chart.configure_mesh();
        mesh.x_desc(axes.0)
            .y_desc(axes.1)
            .x_label_formatter(&number)
            .y_label_formatter(&number)
            .label_style(FONT)
            .axis_desc_style(FONT)
            .light_line_style(TRANSPARENT);
        mesh.draw().map_err(|e| failed(&e))?;
        draw(&mut chart).map_err(|e| failed(&e))?;
        legend(&right, names).map_err(|e| failed(&e))?;
        root.present().map_err(|e| failed(&e))?;
    }
    Ok(svg)
}

/// What texts of a size take.
fn width_of<'t>(texts: impl Iterator<Item = &'t str>, size: u32) -> u32 {
    let letters = texts.map(|text| text.chars().count()).max().unwrap_or(0);
    (letters as f64 * f64::from(size) * LETTER) as u32
}

/// What names take beside a picture.
fn width_of_names(names: &[(&str, RGBColor)]) -> u32 {
    if names.is_empty() { 0 } else { width_of(names.iter().map(|(name, _)| *name), FONT.1) + 34 }
}

/// What each colour means, beside the picture, where it can be over nothing.
fn legend<'b>(area: &DrawingArea<SVGBackend<'b>, Shift>, names: &[(&str, RGBColor)]) -> Drawn<'b> {
    for ((name, colour), place) in names.iter().zip(0..) {
        let y = 56 + place * 22;
        area.draw(&Rectangle::new([(4, y - 5), (15, y + 6)], colour.filled()))?;
        let beside = TextStyle::from(FONT.into_font()).pos(Pos::new(HPos::Left, VPos::Center));
        area.draw(&Text::new(*name, (22, y), beside))?;
    }
    Ok(())
}

type Plane<'a, 'b, X, Y> = ChartContext<
    'a,
    SVGBackend<'b>,
    Cartesian2d<<X as AsRangedCoord>::CoordDescType, <Y as AsRangedCoord>::CoordDescType>,
>;
type RowChart<'a, 'b> = ChartContext<
    'a,
    SVGBackend<'b>,
    Cartesian2d<
        plotters::coord::types::RangedCoordf64,
        plotters::coord::ranged1d::SegmentedCoord<plotters::coord::types::RangedCoordusize>,
    >,
>;
type Drawn<'b> = Result<(), DrawingAreaErrorKind<<SVGBackend<'b> as DrawingBackend>::ErrorType>>;

/// A value beside its bar, with the digits that count.
fn short(value: f64) -> String {
    match value.abs() {
        large if large >= 100.0 => format!("{value:.0}"),
        middling if middling >= 1.0 => format!("{value:.1}"),
        _ => format!("{value:.2}"),
    }
}

/// A number of a scale, without zeros behind the point.
fn number(value: &f64) -> String {
    let text = format!("{value:.3}");
    let text = text.trim_end_matches('0').trim_end_matches('.');
    if text == "-0" { "0".into() } else { text.into() }
}

/// A chart with a labelled row each, drawn top to bottom by `draw`.
fn rows_chart<'b>(
    (title, unit): (&str, &str),
    (labels, row): (&[&str], u32),
    range: std::ops::Range<f64>,
    names: &[(&str, RGBColor)],
    draw: impl FnOnce(&mut RowChart<'_, '_>, usize) -> Drawn<'b>,
) -> Result<String> {
    let mut svg = String::new();
    {
        let failed = |e: &dyn std::fmt::Display| anyhow!("drawing {title}: {e}");
        let height = (90 + row * labels.len() as u32).max(70 + 22 * names.len() as u32);
        let of_labels = width_of(labels.iter().copied(), FONT.1) + 24;
        let width = WIDTH + of_labels;
        let root = SVGBackend::with_string(&mut svg, (width + width_of_names(names), height)).into_drawing_area();
        root.fill(&WHITE).map_err(|e| failed(&e))?;
        let (left, right) = root.split_horizontally(width);
        let mut chart = ChartBuilder::on(&left)
            .caption(title, (FONT.0, 18))
            .margin(10)
            .margin_right(MARGIN_RIGHT)
            .x_label_area_size(44)
            .y_label_area_size(of_labels)
            // A range of one has no key points, and so no label: a single row is drawn below an empty one.
            .build_cartesian_2d(range, (0..labels.len().saturating_sub(1).max(1)).into_segmented())
            .map_err(|e| failed(&e))?;
        let row_label = |row: &SegmentValue<usize>| match row {
            SegmentValue::CenterOf(i) => labels.get(*i).copied().unwrap_or_default().to_string(),
            _ => String::new(),
        };
        let mut mesh = chart.configure_mesh();
        mesh.x_desc(unit)
            .x_label_formatter(&number)
            .label_style(FONT)
            .axis_desc_style(FONT)
            .light_line_style(TRANSPARENT)
            // The lines of the scale are enough; marks keep labels at a distance, where they are not seen.
            .axis_style(TRANSPARENT);
        mesh.y_labels(labels.len().max(2)).y_label_formatter(&row_label).disable_y_mesh();
        mesh.draw().map_err(|e| failed(&e))?;
        draw(&mut chart, labels.len()).map_err(|e| failed(&e))?;
        legend(&right, names).map_err(|e| failed(&e))?;
        root.present().map_err(|e| failed(&e))?;
    }
    Ok(svg)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_to_draw_is_no_plot() {
        assert!(intervals("t", "u", &[], &[1.0]).unwrap().is_none());
        assert!(stacked("t", "u", &[]).unwrap().is_none());
        assert!(scatter("t", ("x", "y"), &[]).unwrap().is_none());
        assert!(grouped("t", "u", &["a"], &[]).unwrap().is_none());
        assert!(logarithmic("t", ("x", "y"), &[]).unwrap().is_none());
    }

    #[test]
    fn lines_are_named_in_the_picture() {
        let line = |name: &str| Line { name: name.into(), points: vec![(1.0, 10.0), (100.0, 1000.0)], limit: false };
        let svg = logarithmic("T", ("x", "y"), &[line("restart"), line("write")]).unwrap().unwrap();
        assert!(svg.contains("restart") && svg.contains("write") && svg.contains("<polyline"));
    }

    #[test]
    fn a_long_label_has_its_room() {
        let estimate = Estimate { value: 2.0, low: 1.0, high: 3.0 };
        let width = |label: &str| {
            let groups = [Group { label: label.into(), points: vec![("a", estimate)] }];
            let svg = grouped("t", "u", &["a"], &groups).unwrap().unwrap();
            svg.split_once("width=\"").unwrap().1.split_once('"').unwrap().0.parse::<u32>().unwrap()
        };
        assert!(width(&"m".repeat(60)) > width("m") + 59 * 7);
    }

    #[test]
    fn numbers_of_a_scale_are_short() {
        let texts = [0.0, -0.00001, 10.0, 0.30000000000000004, -2.5].map(|value| number(&value));
        assert_eq!(texts, ["0", "0", "10", "0.3", "-2.5"]);
    }

    #[test]
    fn labels_and_parts_are_in_the_picture() {
        let estimate = Estimate { value: 2.0, low: -1.0, high: 3.0 };
        let svg =
            intervals("Title", "ms", &[Interval { label: "some row".into(), estimate }], &[0.0]).unwrap().unwrap();
        assert!(svg.starts_with("<svg") && svg.contains("some row") && svg.contains("Title"));
        let parts = vec![("hold".to_string(), 1.0), ("look".to_string(), 2.0)];
        let svg = stacked("Title", "ms", &[Bar { label: "a".into(), parts }]).unwrap().unwrap();
        assert!(svg.contains("hold") && svg.contains("look"));
        let sort = |name: &str| Line { name: name.into(), points: vec![(1.0, 2.0)], limit: false };
        let svg = scatter("T", ("x", "y"), &[sort("a"), sort("b")]).unwrap().unwrap();
        assert!(svg.contains("<circle") && svg.contains("<polygon"));
    }
}
