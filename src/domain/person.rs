//! Who somebody is, so that two are not one.

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

    /// By which name two are one; none: they are two people, as far as can be known.
    pub fn shared_with<'p>(&'p self, other: &Self) -> Option<&'p str> {
        let is_one = |name: &str| {
            let same = |theirs: &str| theirs.trim().to_lowercase() == name.trim().to_lowercase();
            same(&other.operator) || other.proven().is_some_and(same)
        };
        [Some(self.operator.as_str()), self.proven()]
            .into_iter()
            .flatten()
            .find(|name| is_one(name))
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
            (person("bob", None, Some("ann_db")), Some("ann_db")),
            // Whoever types the name of a login, or signs in by it, is that one.
            (person("ann_db", None, Some("bob_db")), Some("ann_db")),
            (person("bob", Some("ann"), Some("console")), Some("ann")),
            (person("bob", Some("ann_db"), Some("console")), Some("ann_db")),
            // The console's own login is nobody's.
            (person("bob", Some("bob"), Some("ann_db")), None),
        ] {
            assert_eq!(ann.shared_with(&other), shared, "{other:?}");
            assert_eq!(other.shared_with(&ann).is_some(), shared.is_some(), "{other:?}");
        }
        let (carl, dora) = (
            person("carl", Some("carl"), Some("console")),
            person("dora", Some("dora"), Some("console")),
        );
        assert_eq!(carl.shared_with(&dora), None);
        // Of an old plan no more is known than the name.
        assert_eq!(person("eve", None, None).shared_with(&ann), None);
    }
}
