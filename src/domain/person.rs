//! Who somebody is, so that two are not one.

use std::fmt;

/// Somebody who acts, by every name that is known.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Person {
    /// The operator's name; on a command line anybody may type it.
    pub operator: String,
    /// The name that whoever let them in vouches for; none on a command line.
    pub voucher: Option<String>,
    /// The database's user. Where somebody vouches, it is the program's, and says nothing of the person.
    pub session: Option<String>,
}

impl Person {
    /// The name that nobody can choose as they like.
    fn proven(&self) -> Option<&str> {
        self.voucher.as_deref().or(self.session.as_deref())
    }

    /// Why two may be one; none: they are two people, as far as can be known.
    pub fn one_with<'p>(&'p self, other: &Self) -> Option<OnePerson<'p>> {
        // Of a name that is vouched for nobody knows which login is theirs.
        if self.voucher.is_some() != other.voucher.is_some() {
            return Some(OnePerson::Mixed);
        }
        let is_one = |name: &str| {
            let same = |theirs: &str| known_as(theirs) == known_as(name);
            same(&other.operator) || other.proven().is_some_and(same)
        };
        [Some(self.operator.as_str()), self.proven()]
            .into_iter()
            .flatten()
            .find(|name| is_one(name))
            .map(OnePerson::Named)
    }
}

/// A name without the space around it and the case of its letters, as the database has it (`settled.known_as`). Of scripts that
/// have a case these are told without it: Latin, Greek, Cyrillic and Armenian, letter by letter, which no locale and no later
/// Unicode changes.
pub fn known_as(name: &str) -> String {
    name.trim().chars().map(without_case).collect()
}

fn without_case(letter: char) -> char {
    match letter {
        // A sigma at the end of a word.
        'ς' => 'σ',
        // What comes after the first is an accent: of one letter only, the capital i with a dot.
        '\0'..='\u{58f}' | '\u{1e00}'..='\u{1eff}' => letter.to_lowercase().next().unwrap_or(letter),
        other => other,
    }
}

/// Why two may be one person.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OnePerson<'p> {
    /// A name that is both of theirs.
    Named(&'p str),
    /// One was signed in to the console, and the other came with a login of the database.
    Mixed,
}

impl fmt::Display for OnePerson<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            OnePerson::Named(name) => write!(f, "{name} can not be both of two people"),
            OnePerson::Mixed => f.write_str(
                "nobody knows that a person whom the console signed in and one with a login of the database are two",
            ),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn person(operator: &str, voucher: Option<&str>, session: Option<&str>) -> Person {
        Person {
            operator: operator.to_owned(),
            voucher: voucher.map(str::to_owned),
            session: session.map(str::to_owned),
        }
    }

    #[test]
    fn two_are_one_by_any_name_that_is_theirs() {
        let ann = person("ann", None, Some("ann_db"));
        for (other, shared) in [
            (person("bob", None, Some("bob_db")), None),
            (person("Ann ", None, Some("bob_db")), Some("ann")),
            (person("\tANN\u{2003}", None, Some("bob_db")), Some("ann")),
            (person("bob", None, Some("ann_db")), Some("ann_db")),
            // Whoever types the name of a login, or signs in by it, is that one.
            (person("ann_db", None, Some("bob_db")), Some("ann_db")),
        ] {
            assert_eq!(ann.one_with(&other), shared.map(OnePerson::Named), "{other:?}");
            assert_eq!(other.one_with(&ann).is_some(), shared.is_some(), "{other:?}");
        }
        // Whoever planned at the console may have a login too, and type another name.
        for name in ["ann", "ann_db", "bob"] {
            let signed_in = person(name, Some(name), Some("console"));
            assert_eq!(ann.one_with(&signed_in), Some(OnePerson::Mixed), "{name}");
            assert_eq!(signed_in.one_with(&ann), Some(OnePerson::Mixed), "{name}");
        }
        let (carl, dora) = (
            person("carl", Some("carl"), Some("console")),
            person("dora", Some("dora"), Some("console")),
        );
        // The console's own login is nobody's.
        assert_eq!(carl.one_with(&dora), None);
        let also_carl = person("dora", Some("Carl"), Some("another console"));
        assert_eq!(carl.one_with(&also_carl), Some(OnePerson::Named("carl")));
        for (name, other, are_one) in [
            ("ÜNAL", "ünal", true),
            ("ΟΔΥΣΣΕΥΣ", "οδυσσευς", true),
            ("Жук", "жУК", true),
            ("Ấn", "ấN", true),
            ("İnci", "inci", true),
            ("ann", "a nn", false),
            ("王伟", "李娜", false),
        ] {
            let found = person(name, None, None).one_with(&person(other, None, None)).is_some();
            assert_eq!(found, are_one, "{name} and {other}");
        }
        // Of an old plan no more is known than the name.
        assert_eq!(person("eve", None, None).one_with(&ann), None);
    }
}
