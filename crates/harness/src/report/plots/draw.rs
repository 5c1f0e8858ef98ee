//! Three kinds of picture, as SVG.

use anyhow::{Result, anyhow};
use plotters::coord::CoordTranslate;
use plotters::coord::ranged1d::{AsRangedCoord, SegmentValue, ValueFormatter};
use plotters::prelude::*;

use crate::stats::Estimate;

const WIDTH: u32 = 900;
const ROW: u32 = 28;
/// Height of a row of a group.
const GROUPED_ROW: u32 = 11;
const LABELS: u32 = 220;
/// Half of the last number of a scale is beyond its end.
const MARGIN_RIGHT: u32 = 26;
const FONT: (&str, u32) = ("DejaVu Sans, sans-serif", 14);
/// Colours that people who see few can tell apart (the first eight are Okabe and Ito's).
const COLOURS: [RGBColor; 11] = [
    RGBColor(0, 114, 178),
    RGBColor(230, 159, 0),
    RGBColor(0, 158, 115),
    RGBColor(204, 121, 167),
    RGBColor(86, 180, 233),
    RGBColor(213, 94, 0),
    RGBColor(240, 228, 66),
    RGBColor(100, 100, 100),
    RGBColor(136, 34, 85),
    RGBColor(170, 200, 60),
    RGBColor(0, 60, 90),
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
    rows_chart((title, unit), (&labels, ROW), range, false, |chart, count| {
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

/// Dots with whiskers, a colour for each of `series`. `None` if there are no groups.
pub(super) fn grouped(title: &str, unit: &str, series: &[&str], groups: &[Group], mark: f64) -> Result<Option<String>> {
    let all = || groups.iter().flat_map(|group| &group.points).map(|(_, estimate)| estimate);
    if all().next().is_none() {
        return Ok(None);
    }
    let (low, high) = all().fold((mark, mark), |(low, high), e| (low.min(e.low), high.max(e.high)));
    let pad = (high - low).max(1e-9) * 0.05;
    // An empty row between groups, and one below the last for the legend.
    let of_each = series.len() + 1;
    let mut labels = vec![""; groups.len() * of_each];
    for (place, group) in groups.iter().rev().enumerate() {
        labels[place * of_each + of_each / 2] = &group.label;
    }
    let at = |group: usize, series: usize| (groups.len() - group) * of_each - 1 - series;
    rows_chart((title, unit), (&labels, GROUPED_ROW), low - pad..high + pad * 6.0, true, |chart, count| {
        let line = [(mark, SegmentValue::Exact(0)), (mark, SegmentValue::Exact(count))];
        chart.draw_series(LineSeries::new(line, BLACK.mix(0.5)))?;
        for (number, name) in series.iter().enumerate() {
            let colour = COLOURS[number % COLOURS.len()];
            let points: Vec<_> = (0..)
                .zip(groups)
                .flat_map(|(place, group)| {
                    let own = group.points.iter().filter(|(of, _)| of == name);
                    own.map(move |(_, estimate)| (place, *estimate))
                })
                .collect();
            for (place, e) in &points {
                let row = SegmentValue::CenterOf(at(*place, number));
                chart.draw_series(LineSeries::new([(e.low, row.clone()), (e.high, row)], colour.stroke_width(2)))?;
            }
            let dots = points.iter().map(|(place, e)| {
                Circle::new((e.value, SegmentValue::CenterOf(at(*place, number))), 3, colour.filled())
            });
            chart.draw_series(dots)?.label(*name).legend(key(colour));
        }
        Ok(())
    })
    .map(Some)
}

/// Bars of parts, a row each, with a legend where there is more than one part. `None` if there are no rows.
pub(super) fn stacked(title: &str, unit: &str, bars: &[Bar]) -> Result<Option<String>> {
    if bars.is_empty() {
        return Ok(None);
    }
    let bars: Vec<&Bar> = bars.iter().rev().collect();
    let longest = bars.iter().map(|bar| bar.parts.iter().map(|(_, v)| v).sum::<f64>()).fold(1e-9, f64::max);
    let mut names: Vec<&str> = Vec::new();
    for (name, _) in bars.iter().rev().flat_map(|bar| &bar.parts) {
        if !names.contains(&name.as_str()) {
            names.push(name);
        }
    }
    let labels: Vec<&str> = bars.iter().map(|bar| bar.label.as_str()).collect();
    // Room for the legend beside the bars.
    let room = if names.len() > 1 { 1.25 } else { 1.05 };
    rows_chart((title, unit), (&labels, ROW), 0.0..longest * room, names.len() > 1, |chart, _| {
        for (n, name) in names.iter().enumerate() {
            let colour = COLOURS[n % COLOURS.len()];
            let rectangles = bars.iter().enumerate().filter_map(|(i, bar)| {
                let position = bar.parts.iter().position(|(part, _)| part == name)?;
                let start: f64 = bar.parts[..position].iter().map(|(_, v)| v).sum();
                let corners =
                    [(start, SegmentValue::Exact(i)), (start + bar.parts[position].1, SegmentValue::Exact(i + 1))];
                let mut rectangle = Rectangle::new(corners, colour.filled());
                rectangle.set_margin(4, 4, 0, 0);
                Some(rectangle)
            });
            let series = chart.draw_series(rectangles)?;
            if names.len() > 1 {
                series.label(*name).legend(key(colour));
            }
        }
        Ok(())
    })
    .map(Some)
}

/// Points, and the line on which both coordinates are equal. `None` if there are no points.
pub(super) fn scatter(title: &str, axes: (&str, &str), points: &[(f64, f64)]) -> Result<Option<String>> {
    if points.is_empty() {
        return Ok(None);
    }
    let largest = |of: fn(&(f64, f64)) -> f64| points.iter().map(of).fold(1e-9, f64::max) * 1.1;
    let (width, height) = (largest(|p| p.0), largest(|p| p.1));
    plane(title, axes, 0.0..width, 0.0..height, None, |chart| {
        let end = width.min(height);
        chart.draw_series(LineSeries::new([(0.0, 0.0), (end, end)], BLACK.mix(0.4)))?;
        chart.draw_series(points.iter().map(|point| Circle::new(*point, 4, COLOURS[0].mix(0.7).filled())))?;
        Ok(())
    })
    .map(Some)
}

/// A line of a plot of both axes' logarithms: its name, and points that are all positive.
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
    // Room for the legend above the lines.
    let room = (y.1 / y.0).powf(0.12 * lines.len() as f64);
    let (x, y) = ((x.0..x.1).log_scale(), (y.0..y.1 * room).log_scale());
    plane(title, axes, x, y, Some(SeriesLabelPosition::UpperLeft), |chart| {
        for (place, line) in lines.iter().enumerate() {
            let colour = if line.limit { COLOURS[7] } else { COLOURS[place % 6] };
            let drawn = LineSeries::new(line.points.iter().copied(), colour.stroke_width(2)).point_size(4);
            chart.draw_series(drawn)?.label(&line.name).legend(key(colour));
        }
        Ok(())
    })
    .map(Some)
}

/// Lines over two scales of numbers, the first one's logarithm where `logarithmic`. `None` if there are no points.
pub(super) fn lines(
    title: &str,
    axes: (&str, &str),
    lines: &[Line],
    logarithmic: bool,
    legend_at: SeriesLabelPosition,
) -> Result<Option<String>> {
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
        polylines(title, axes, (left / 1.1..right * 1.1).log_scale(), y, legend_at, lines)
    } else {
        polylines(title, axes, left..right.max(left + 1e-9), y, legend_at, lines)
    };
    drawn.map(Some)
}

fn polylines<X, Y>(
    title: &str,
    axes: (&str, &str),
    x: X,
    y: Y,
    legend_at: SeriesLabelPosition,
    lines: &[Line],
) -> Result<String>
where
    X: AsRangedCoord<Value = f64, CoordDescType: ValueFormatter<f64>>,
    Y: AsRangedCoord<Value = f64, CoordDescType: ValueFormatter<f64>>,
{
    plane(title, axes, x, y, Some(legend_at), |chart| {
        for (place, line) in lines.iter().enumerate() {
            let colour = COLOURS[place % COLOURS.len()];
            let drawn = LineSeries::new(line.points.iter().copied(), colour.stroke_width(2)).point_size(2);
            chart.draw_series(drawn)?.label(&line.name).legend(key(colour));
        }
        Ok(())
    })
}

/// A chart of two scales of numbers, drawn by `draw`.
fn plane<'b, X, Y>(
    title: &str,
    axes: (&str, &str),
    x: X,
    y: Y,
    legend_at: Option<SeriesLabelPosition>,
    draw: impl FnOnce(&mut Plane<'_, '_, X, Y>) -> Drawn<'b>,
) -> Result<String>
where
    X: AsRangedCoord<Value = f64, CoordDescType: ValueFormatter<f64>>,
    Y: AsRangedCoord<Value = f64, CoordDescType: ValueFormatter<f64>>,
{
    let mut svg = String::new();
    {
        let root = SVGBackend::with_string(&mut svg, (WIDTH, 420)).into_drawing_area();
        let failed = |e: &dyn std::fmt::Display| anyhow!("drawing {title}: {e}");
        root.fill(&WHITE).map_err(|e| failed(&e))?;
        let mut chart = ChartBuilder::on(&root)
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
        if let Some(position) = legend_at {
            legend(&mut chart, position).map_err(|e| failed(&e))?;
        }
        root.present().map_err(|e| failed(&e))?;
    }
    Ok(svg)
}

/// The mark of a series in a legend.
fn key<'b>(colour: RGBColor) -> impl Fn((i32, i32)) -> Rectangle<(i32, i32)> + 'b {
    move |(x, y)| Rectangle::new([(x, y - 5), (x + 10, y + 5)], colour.filled())
}

fn legend<'a, 'b: 'a, C: CoordTranslate>(
    chart: &mut ChartContext<'a, SVGBackend<'b>, C>,
    position: SeriesLabelPosition,
) -> Drawn<'b> {
    chart
        .configure_series_labels()
        .position(position)
        .label_font(FONT)
        .background_style(WHITE.mix(0.85))
        .border_style(BLACK.mix(0.2))
        .draw()
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
    named: bool,
    draw: impl FnOnce(&mut RowChart<'_, '_>, usize) -> Drawn<'b>,
) -> Result<String> {
    let mut svg = String::new();
    {
        let failed = |e: &dyn std::fmt::Display| anyhow!("drawing {title}: {e}");
        let height = 90 + row * labels.len() as u32;
        let root = SVGBackend::with_string(&mut svg, (WIDTH, height)).into_drawing_area();
        root.fill(&WHITE).map_err(|e| failed(&e))?;
        let mut chart = ChartBuilder::on(&root)
            .caption(title, (FONT.0, 18))
            .margin(10)
            .margin_right(MARGIN_RIGHT)
            .x_label_area_size(44)
            .y_label_area_size(LABELS)
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
            .light_line_style(TRANSPARENT);
        mesh.y_labels(labels.len().max(2)).y_label_formatter(&row_label).disable_y_mesh();
        mesh.draw().map_err(|e| failed(&e))?;
        draw(&mut chart, labels.len()).map_err(|e| failed(&e))?;
        if named {
            legend(&mut chart, SeriesLabelPosition::LowerRight).map_err(|e| failed(&e))?;
        }
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
        assert!(logarithmic("t", ("x", "y"), &[]).unwrap().is_none());
    }

    #[test]
    fn lines_are_named_in_the_picture() {
        let line = |name: &str| Line { name: name.into(), points: vec![(1.0, 10.0), (100.0, 1000.0)], limit: false };
        let svg = logarithmic("T", ("x", "y"), &[line("restart"), line("write")]).unwrap().unwrap();
        assert!(svg.contains("restart") && svg.contains("write") && svg.contains("<polyline"));
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
        assert!(scatter("T", ("x", "y"), &[(1.0, 2.0)]).unwrap().unwrap().contains("<circle"));
    }
}
