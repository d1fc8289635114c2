//! The three kinds of chart, as SVG.

use super::html::escape;

/// Colours that differ for colour-blind readers and in print.
pub const COLOURS: [&str; 10] = [
    "#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#8c6d31", "#6a5acd", "#999999",
    "#444444",
];

/// One line of a chart.
pub struct Series {
    /// Its name.
    pub name: String,
    /// x and y; y above 0.
    pub points: Vec<(f64, f64)>,
}

const WIDTH: f64 = 460.0;

fn f(x: f64) -> String {
    format!("{x:.1}")
}

fn text(x: f64, y: f64, anchor: &str, content: &str) -> String {
    format!("<text x='{}' y='{}' text-anchor='{anchor}'>{}</text>", f(x), f(y), escape(content))
}

/// Lines over a logarithmic y axis. `bound` is drawn dashed where there is one.
pub fn lines(x_label: &str, y_label: &str, series: &[Series], bound: Option<f64>) -> String {
    let (left, right, top, bottom) = (58.0, 12.0, 22.0, 40.0);
    let height = 240.0;
    let points = || series.iter().flat_map(|s| &s.points);
    let positive = |y: &f64| *y > 0.0;
    let ys: Vec<f64> = points().map(|p| p.1).chain(bound).filter(positive).collect();
    if ys.is_empty() {
        return "<p class=note>All values are equal: there is no error to draw.</p>".into();
    }
    let low = ys.iter().copied().fold(f64::INFINITY, f64::min).log10().floor();
    let high = ys.iter().copied().fold(0.0, f64::max).log10().ceil().max(low + 1.0);
    let last = points().map(|p| p.0).fold(1.0, f64::max);
    let x = |v: f64| left + v / last * (WIDTH - left - right);
    let y = |v: f64| top + (high - v.max(10f64.powf(low)).log10()) / (high - low) * (height - top - bottom);

    let mut out = format!("<svg viewBox='0 0 {WIDTH} {height}' role='img' aria-label='{}'>", escape(y_label));
    let every = ((high - low) / 6.0).ceil().max(1.0);
    let mut exponent = low;
    while exponent <= high {
        let line = y(10f64.powf(exponent));
        out +=
            &format!("<line x1='{left}' x2='{}' y1='{1}' y2='{1}' class='grid'/>", f(WIDTH - right), f(line));
        out += &format!(
            "<text x='{}' y='{}' text-anchor='end'>10<tspan dy='-4' font-size='8'>{exponent}</tspan></text>",
            f(left - 6.0),
            f(line + 4.0)
        );
        exponent += every;
    }
    let step = (last / 8.0).ceil().max(1.0);
    let mut tick = 0.0;
    while tick <= last {
        out += &text(x(tick), height - bottom + 14.0, "middle", &format!("{tick}"));
        tick += step;
    }
    out += &text((left + WIDTH - right) / 2.0, height - 6.0, "middle", x_label);
    out += &text(left - 50.0, 12.0, "start", y_label);
    if let Some(bound) = bound {
        let line = y(bound);
        out += &format!(
            "<line x1='{left}' x2='{}' y1='{1}' y2='{1}' class='bound'/>",
            f(WIDTH - right),
            f(line)
        );
        out += &text(WIDTH - right, line - 4.0, "end", "threshold");
    }
    for (s, colour) in series.iter().zip(COLOURS.iter().cycle()) {
        let path: Vec<_> = s.points.iter().map(|p| format!("{},{}", f(x(p.0)), f(y(p.1)))).collect();
        out += &format!(
            "<polyline points='{}' fill='none' stroke='{colour}' stroke-width='1.8'/>",
            path.join(" ")
        );
        for p in &s.points {
            let title = format!("{} {}: {:.2e}", escape(&s.name), p.0, p.1);
            out += &format!(
                "<circle cx='{}' cy='{}' r='2.6' fill='{colour}'><title>{title}</title></circle>",
                f(x(p.0)),
                f(y(p.1))
            );
        }
    }
    out += "</svg>";
    let names: Vec<_> = series.iter().map(|s| s.name.as_str()).collect();
    out + &legend(&names)
}

/// A row of a bar chart: pieces laid end to end from `start`.
pub struct Bar {
    /// Its name.
    pub name: String,
    /// Where it begins; 0 except in a waterfall.
    pub start: f64,
    /// Index of a piece's colour, and its length.
    pub pieces: Vec<(usize, f64)>,
    /// Written behind it.
    pub label: String,
}

/// Horizontal bars over a common linear scale; `names` are those of the pieces.
pub fn bars(unit: &str, names: &[&str], rows: &[Bar]) -> String {
    // Letters of 11 pixels are some 6.4 wide on average.
    let room = |texts: &mut dyn Iterator<Item = &String>| {
        6.4 * texts.map(|t| t.chars().count()).max().unwrap_or(0) as f64 + 12.0
    };
    let left = room(&mut rows.iter().map(|b| &b.name)).max(118.0);
    let right = room(&mut rows.iter().map(|b| &b.label)).max(60.0);
    let (width, row_height) = (940.0, 19.0);
    let end = |b: &Bar| b.start + b.pieces.iter().map(|p| p.1).sum::<f64>();
    let last = rows.iter().map(end).fold(0.0, f64::max);
    let scale = if last > 0.0 { (width - left - right) / last } else { 0.0 };
    let height = row_height * rows.len() as f64 + 26.0;
    let mut out = format!("<svg viewBox='0 0 {width} {height}' role='img' aria-label='bars'>");
    let step = nice_step(last);
    let mut tick = 0.0;
    while step > 0.0 && tick <= last {
        let x = left + tick * scale;
        out += &format!("<line x1='{0}' x2='{0}' y1='0' y2='{1}' class='grid'/>", f(x), f(height - 20.0));
        out += &text(x, height - 7.0, "middle", &format!("{} {unit}", trim(tick)));
        tick += step;
    }
    for (i, bar) in rows.iter().enumerate() {
        let y = row_height * i as f64;
        out += &text(left - 6.0, y + 13.0, "end", &bar.name);
        let mut x = left + bar.start * scale;
        for &(colour, length) in &bar.pieces {
            let title =
                format!("{}, {}: {:.3} {unit}", escape(&bar.name), names.get(colour).unwrap_or(&""), length);
            let fill = COLOURS[colour % COLOURS.len()];
            out += &format!(
                "<rect x='{}' y='{}' width='{:.2}' height='{}' fill='{fill}'><title>{title}</title></rect>",
                f(x),
                f(y + 3.0),
                (length * scale).max(0.0),
                f(row_height - 6.0)
            );
            x += length * scale;
        }
        out += &text(x + 5.0, y + 13.0, "start", &bar.label);
    }
    out += "</svg>";
    let used: Vec<usize> = rows.iter().flat_map(|b| b.pieces.iter().map(|p| p.0)).collect();
    out + &legend_of(names.iter().enumerate().filter(|(i, _)| used.contains(i)).map(|(i, n)| (i, *n)))
}

/// How far a value is towards its threshold, both on a logarithmic scale of six decades.
pub fn gauge(value: f64, bound: f64) -> String {
    let decades = 6.0;
    let ratio = if value <= 0.0 { 0.0 } else { (1.0 + (value / bound).log10() / decades).clamp(0.0, 1.15) };
    let (width, mark) = (130.0, 110.0);
    let fill = if value > bound { "#b3261e" } else { "#0072b2" };
    format!(
        "<svg class='gauge' viewBox='0 0 {width} 10' width='{width}' height='10' role='img' \
         aria-label='{:.0} % of the threshold'><rect x='0' y='3' width='{mark}' height='4' fill='#e4e7ec'/>\
         <rect x='0' y='2' width='{:.1}' height='6' fill='{fill}'/>\
         <line x1='{mark}' x2='{mark}' y1='0' y2='10' stroke='#444' stroke-width='1.5'/></svg>",
        100.0 * value / bound,
        ratio * mark
    )
}

fn legend(names: &[&str]) -> String {
    legend_of(names.iter().copied().enumerate())
}

fn legend_of<'a>(names: impl Iterator<Item = (usize, &'a str)>) -> String {
    let item = |(i, name): (usize, &str)| {
        format!("<span><i style='background:{}'></i>{}</span>", COLOURS[i % COLOURS.len()], escape(name))
    };
    format!("<div class=legend>{}</div>", names.map(item).collect::<String>())
}

/// A step of 1, 2 or 5 times a power of ten that divides `last` into at most eight.
fn nice_step(last: f64) -> f64 {
    if last <= 0.0 || !last.is_finite() {
        return 0.0;
    }
    let power = 10f64.powf((last / 8.0).log10().floor());
    [1.0, 2.0, 5.0, 10.0].into_iter().map(|m| m * power).find(|s| last / s <= 8.0).unwrap_or(last)
}

fn trim(x: f64) -> String {
    let text = format!("{x:.4}");
    text.trim_end_matches('0').trim_end_matches('.').to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_are_round() {
        for (last, step) in [(8.0, 1.0), (9.0, 2.0), (0.7, 0.1), (100.0, 20.0), (0.0, 0.0)] {
            assert!((nice_step(last) - step).abs() < 1e-12, "{last}: {}", nice_step(last));
        }
    }

    #[test]
    fn charts_escape_names_and_take_nothing() {
        let bar = Bar { name: "<a>".into(), start: 0.0, pieces: vec![(0, 1.0)], label: "&".into() };
        let chart = bars("ms", &["x"], &[bar]);
        assert!(chart.contains("&lt;a&gt;") && !chart.contains("<a>"));
        assert!(bars("ms", &[], &[]).contains("</svg>"));
        assert!(lines("x", "y", &[], None).contains("no error"));
        let zero = Series { name: "z".into(), points: vec![(0.0, 0.0), (1.0, 1e-3)] };
        assert!(!lines("x", "y", &[zero], Some(1e-2)).contains("NaN"));
    }
}
