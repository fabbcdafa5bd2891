//! Charts, as SVG made here: no script draws them, and who can not see them has a sentence.

use std::fmt::Write as _;

use jiff::{SignedDuration, Timestamp};

use super::shown::{Markup, escaped};
use crate::desk::MinuteOfBatches;

/// Minutes of the chart.
const MINUTES: usize = 60;

/// Messages a minute: what settled, and what did not, one upon the other.
pub(super) fn minutes(now: Timestamp, found: &[MinuteOfBatches]) -> Option<Markup> {
    const WIDTH: i64 = 720;
    const HEIGHT: i64 = 120;
    let this_minute = now.as_second().div_euclid(60);
    let mut bars = vec![None; MINUTES];
    for minute in found {
        let ago = this_minute.checked_sub(minute.at.as_second().div_euclid(60))?;
        if let Some(bar) = usize::try_from(ago)
            .ok()
            .and_then(|ago| (MINUTES - 1).checked_sub(ago))
            .and_then(|place| bars.get_mut(place))
        {
            *bar = Some(minute);
        }
    }
    let most = bars.iter().flatten().map(|minute| minute.received).max()?;
    let total: i64 = found.iter().map(|minute| minute.received).sum();
    let refused: i64 = found.iter().map(|minute| minute.rejected).sum();
    let mut svg = format!(
        "<svg class=\"bars\" viewBox=\"0 0 {WIDTH} {}\" role=\"img\" aria-label=\"{total} messages in the last hour, {refused} \
         of them rejected; at most {most} in a minute\" preserveAspectRatio=\"none\">",
        HEIGHT + 1
    );
    let step = WIDTH / i64::try_from(MINUTES).unwrap_or(1);
    let scaled = |number: i64| (number * HEIGHT).checked_div(most).unwrap_or_default().min(HEIGHT);
    for (place, bar) in bars.iter().enumerate() {
        let Some(minute) = bar else { continue };
        let x = i64::try_from(place).unwrap_or_default() * step;
        let mut top = HEIGHT;
        let _whole = write!(
            svg,
            "<g><title>{}: {} settled, {} duplicate, {} parked, {} rejected</title>",
            minute.at.strftime("%H:%M"),
            minute.settled,
            minute.duplicate,
            minute.parked,
            minute.rejected
        );
        for (class, number) in [
            ("settled", minute.settled),
            ("other", minute.duplicate + minute.parked),
            ("rejected", minute.rejected),
        ] {
            // What there is can be seen, however little it is.
            let height = scaled(number).max(i64::from(number > 0));
            top -= height;
            let _drawn = write!(
                svg,
                "<rect class=\"{class}\" x=\"{x}\" y=\"{}\" width=\"{}\" height=\"{height}\"/>",
                top.max(0),
                step - 2
            );
        }
        svg.push_str("</g>");
    }
    let _line = write!(
        svg,
        "<rect class=\"ground\" x=\"0\" y=\"{HEIGHT}\" width=\"{WIDTH}\" height=\"1\"/></svg>"
    );
    let begin = now.saturating_sub(SignedDuration::from_mins(59)).unwrap_or(now);
    let _legend = write!(
        svg,
        "<p class=\"axis\" aria-hidden=\"true\"><span>{}</span><span><b class=\"settled\"></b>settled <b class=\"other\"></b>parked \
         or duplicate <b class=\"rejected\"></b>rejected · top {most}</span><span>{}</span></p>",
        begin.strftime("%H:%M"),
        now.strftime("%H:%M")
    );
    Some(Markup(svg))
}

/// A small course of numbers, the newest last.
pub(super) fn course(numbers: &[i64], said: &str) -> Markup {
    const HEIGHT: i64 = 18;
    const STEP: i64 = 4;
    let most = numbers.iter().copied().max().unwrap_or_default();
    let width = i64::try_from(numbers.len()).unwrap_or_default() * STEP;
    let mut svg = format!(
        "<svg class=\"course\" viewBox=\"0 0 {width} {HEIGHT}\" width=\"{width}\" height=\"{HEIGHT}\" role=\"img\" \
         aria-label=\"{}\">",
        escaped(said)
    );
    for (place, number) in numbers.iter().enumerate() {
        let height = (number * HEIGHT)
            .checked_div(most)
            .unwrap_or_default()
            .max(i64::from(*number > 0) * 2);
        let x = i64::try_from(place).unwrap_or_default() * STEP;
        let (class, height) = if height == 0 { ("ground", 1) } else { ("bar", height) };
        let _drawn = write!(
            svg,
            "<rect class=\"{class}\" x=\"{x}\" y=\"{}\" width=\"{}\" height=\"{height}\"/>",
            HEIGHT - height,
            STEP - 1
        );
    }
    svg.push_str("</svg>");
    Markup(svg)
}

/// A piece of the branches of a life: which of them go on here, where this moment is, and from where it branched off.
pub(super) fn branch(lanes: &[(bool, bool)], here: usize, from: Option<usize>) -> Markup {
    const GAP: usize = 20;
    const MIDDLE: usize = 13;
    let x = |lane: usize| 10 + lane * GAP;
    let width = x(lanes.len().saturating_sub(1)) + 10;
    let mut svg = format!("<svg class=\"branch\" width=\"{width}\" aria-hidden=\"true\">");
    for (lane, (above, below)) in lanes.iter().enumerate() {
        let (begin, end) = match (above, below) {
            (true, true) => ("0".to_owned(), "100%".to_owned()),
            (true, false) => ("0".to_owned(), MIDDLE.to_string()),
            (false, true) => (MIDDLE.to_string(), "100%".to_owned()),
            (false, false) => continue,
        };
        let x = x(lane);
        let _drawn = write!(
            svg,
            "<line class=\"lane-{lane}\" x1=\"{x}\" y1=\"{begin}\" x2=\"{x}\" y2=\"{end}\"/>"
        );
    }
    if let Some(from) = from {
        let _drawn = write!(
            svg,
            "<line class=\"lane-{here}\" x1=\"{}\" y1=\"{MIDDLE}\" x2=\"{}\" y2=\"{MIDDLE}\"/>",
            x(from),
            x(here)
        );
    }
    let _dot = write!(
        svg,
        "<circle class=\"lane-{here}\" cx=\"{}\" cy=\"{MIDDLE}\" r=\"5\"/></svg>",
        x(here)
    );
    Markup(svg)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn minute(at: i64, settled: i64, rejected: i64) -> MinuteOfBatches {
        MinuteOfBatches {
            at: Timestamp::from_second(at * 60).expect("a time"),
            received: settled + rejected,
            settled,
            duplicate: 0,
            parked: 0,
            rejected,
        }
    }

    #[test]
    fn a_minute_stands_in_its_place() {
        let now = Timestamp::from_second(60_000 * 60 + 30).expect("a time");
        let found = [minute(59_000, 9, 9), minute(59_941, 5, 0), minute(60_000, 9, 1)];
        let Markup(svg) = minutes(now, &found).expect("bars");
        assert!(svg.contains("x=\"0\"") && svg.contains("x=\"708\""), "{svg}");
        assert_eq!(svg.matches("<g>").count(), 2, "what is older is left out");
        assert!(svg.contains("at most 10 in a minute"), "{svg}");
        assert!(minutes(now, &[]).is_none());
    }

    #[test]
    fn a_course_shows_what_there_is() {
        let Markup(svg) = course(&[0, 1, 100], "a <course>");
        assert!(
            svg.contains("a &lt;course&gt;") && svg.matches("class=\"bar\"").count() == 2,
            "{svg}"
        );
        assert!(course(&[], "none").0.contains("</svg>"));
    }
}
