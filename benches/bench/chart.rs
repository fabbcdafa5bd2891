//! Two charts, drawn by hand: rates as bars, latency percentiles as lines. SVG, with a background of its own.

use crate::figures::{Figure, plain};

const WIDTH: f64 = 860.0;
const LEFT: f64 = 270.0;
const BAR: f64 = 26.0;
const COLOURS: [&str; 6] = ["#2a7de1", "#e8833a", "#3fa66a", "#a45bc0", "#c94a4a", "#7f7f7f"];

fn frame(title: &str, height: f64, content: &str) -> String {
    format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\" font-family=\"sans-serif\" \
         font-size=\"13\">\n\
         <rect width=\"{WIDTH}\" height=\"{height}\" fill=\"#ffffff\"/>\n\
         <text x=\"16\" y=\"26\" font-size=\"16\">{title}</text>\n{content}</svg>\n"
    )
}

fn text(x: f64, y: f64, anchor: &str, words: &str) -> String {
    let words = words.replace('&', "&amp;").replace('<', "&lt;");
    format!("<text x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"{anchor}\">{words}</text>\n")
}

fn colour(number: usize) -> &'static str {
    COLOURS[number % COLOURS.len()]
}

/// One bar each, with the spread over rounds as a line on it.
pub(crate) fn bars(title: &str, rows: &[(String, Figure)]) -> String {
    let most = rows.iter().map(|(_, figure)| figure.max).fold(1.0, f64::max);
    let scale = (WIDTH - LEFT - 110.0) / most;
    let mut content = String::new();
    for (number, (name, Figure { median, min, max })) in rows.iter().enumerate() {
        let y = 48.0 + number as f64 * (BAR + 12.0);
        let middle = y + BAR / 2.0;
        content += &text(LEFT - 10.0, middle + 4.0, "end", name);
        content += &format!(
            "<rect x=\"{LEFT}\" y=\"{y:.1}\" width=\"{:.1}\" height=\"{BAR}\" fill=\"{}\"/>\n\
             <line x1=\"{:.1}\" y1=\"{middle:.1}\" x2=\"{:.1}\" y2=\"{middle:.1}\" stroke=\"#222\" stroke-width=\"2\"/>\n",
            median * scale,
            colour(number),
            LEFT + min * scale,
            LEFT + max * scale,
        );
        content += &text(LEFT + max * scale + 8.0, middle + 4.0, "start", &plain(*median));
    }
    frame(title, 60.0 + rows.len() as f64 * (BAR + 12.0), &content)
}

/// Percentiles of several measurements, with logarithmic milliseconds.
pub(crate) fn percentiles(title: &str, names: &[&str], lines: &[(String, Vec<f64>)]) -> String {
    const TOP: f64 = 50.0;
    const BOTTOM: f64 = 330.0;
    let values = || {
        lines
            .iter()
            .flat_map(|(_, values)| values)
            .copied()
            .filter(|value| *value > 0.0)
    };
    let low = values().fold(f64::INFINITY, f64::min).min(1.0).log10().floor();
    let high = values().fold(10.0, f64::max).log10().ceil();
    let right = WIDTH - 220.0;
    let x = |place: usize| 70.0 + (right - 70.0) * place as f64 / (names.len() - 1).max(1) as f64;
    let y = |value: f64| BOTTOM - (BOTTOM - TOP) * (value.max(1e-3).log10() - low) / (high - low);
    let mut content = String::new();
    let mut decade = low;
    while decade <= high {
        let at = y(10_f64.powf(decade));
        content += &format!("<line x1=\"70\" y1=\"{at:.1}\" x2=\"{right}\" y2=\"{at:.1}\" stroke=\"#ddd\"/>\n");
        content += &text(60.0, at + 4.0, "end", &format!("{} ms", 10_f64.powf(decade)));
        decade += 1.0;
    }
    for (place, name) in names.iter().enumerate() {
        content += &text(x(place), BOTTOM + 22.0, "middle", name);
    }
    for (number, (name, values)) in lines.iter().enumerate() {
        let points: Vec<String> = values
            .iter()
            .enumerate()
            .map(|(place, value)| format!("{:.1},{:.1}", x(place), y(*value)))
            .collect();
        let points = points.join(" ");
        let colour = colour(number);
        content += &format!("<polyline points=\"{points}\" fill=\"none\" stroke=\"{colour}\" stroke-width=\"2.5\"/>\n");
        let legend = TOP + 14.0 + number as f64 * 22.0;
        content += &format!(
            "<rect x=\"{:.1}\" y=\"{:.1}\" width=\"14\" height=\"14\" fill=\"{colour}\"/>\n",
            right + 20.0,
            legend - 11.0
        );
        content += &text(right + 42.0, legend + 1.0, "start", name);
    }
    frame(title, BOTTOM + 40.0, &content)
}
