//! Numbers of several rounds: the middle one, and how far they lie apart.

use serde::Serialize;

/// Median, least and most of what several rounds measured.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub(crate) struct Figure {
    pub(crate) median: f64,
    pub(crate) min: f64,
    pub(crate) max: f64,
}

impl Figure {
    /// Nothing of nothing.
    pub(crate) fn of(values: impl IntoIterator<Item = f64>) -> Option<Self> {
        let mut values: Vec<f64> = values.into_iter().collect();
        values.sort_by(f64::total_cmp);
        let (min, max) = (*values.first()?, *values.last()?);
        let middle = values.len() / 2;
        let median = match values.len() % 2 {
            0 => (values[middle - 1] + values[middle]) / 2.0,
            _ => values[middle],
        };
        Some(Self { median, min, max })
    }

    /// How the first compares with the second, round by round.
    pub(crate) fn ratio(of: &[f64], to: &[f64]) -> Option<Self> {
        Self::of(of.iter().zip(to).map(|(of, to)| of / to))
    }
}

/// Three digits that count, with thousands told apart.
pub(crate) fn plain(value: f64) -> String {
    if value.abs() >= 1_000.0 {
        let digits = format!("{value:.0}");
        let mut text = String::new();
        for (place, digit) in digits.chars().enumerate() {
            if place > 0 && (digits.len() - place) % 3 == 0 {
                text.push(',');
            }
            text.push(digit);
        }
        text
    } else if value.abs() >= 100.0 {
        format!("{value:.0}")
    } else if value.abs() >= 10.0 {
        format!("{value:.1}")
    } else {
        format!("{value:.2}")
    }
}

/// The median with its spread.
pub(crate) fn spread(figure: Option<Figure>) -> String {
    match figure {
        None => "-".to_owned(),
        Some(figure) if figure.min == figure.max => plain(figure.median),
        Some(Figure { median, min, max }) => format!("{} ({} to {})", plain(median), plain(min), plain(max)),
    }
}

/// The median alone.
pub(crate) fn middle(figure: Option<Figure>) -> String {
    figure.map_or_else(|| "-".to_owned(), |figure| plain(figure.median))
}
