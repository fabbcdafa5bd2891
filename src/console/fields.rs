//! What stands in a query or a form: pairs, and what they mean to the desk.

use uuid::Uuid;

use super::answer::NotDone;
use crate::{
    desk::{Author, Moment, Which, bounded, moment},
    domain::{
        address::{is_enterprise_id, parse_uuid},
        dead_letter::{MadeBy, State},
        reason::Reason,
    },
};

/// Pairs, as they came.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Fields(Vec<(String, String)>);

impl Fields {
    /// Reads `a=b&c=d`. What is left empty in a form was not said.
    pub(super) fn read(text: &[u8]) -> Self {
        Self(
            form_urlencoded::parse(text)
                .map(|(name, value)| (name.into_owned(), value.into_owned()))
                .filter(|(_, value)| !value.is_empty())
                .collect(),
        )
    }

    pub(super) fn get(&self, name: &str) -> Option<&str> {
        let found = self.0.iter().find(|(other, _)| other == name);
        found.map(|(_, value)| value.as_str())
    }

    pub(super) fn pairs(&self) -> impl Iterator<Item = (&str, &str)> {
        self.0.iter().map(|(name, value)| (name.as_str(), value.as_str()))
    }

    pub(super) fn all<'f>(&'f self, name: &'f str) -> impl Iterator<Item = &'f str> {
        self.0
            .iter()
            .filter(move |(other, _)| other == name)
            .map(|(_, value)| value.as_str())
    }

    /// A number, where one stands there.
    pub(super) fn number<T: std::str::FromStr>(&self, name: &str) -> Result<Option<T>, NotDone> {
        let read = |text: &str| {
            text.trim()
                .parse()
                .map_err(|_| NotDone::wrong(format!("{name}: {text:?} is no number")))
        };
        self.get(name).map(read).transpose()
    }

    /// After which connection a list goes on.
    pub(super) fn connection_after(&self) -> Result<Option<Uuid>, NotDone> {
        let read =
            |text: &str| parse_uuid(text).ok_or_else(|| NotDone::wrong(format!("{text:?} is no connection's id")));
        self.get("connections_after").map(read).transpose()
    }

    /// A box that was ticked.
    pub(super) fn is_on(&self, name: &str) -> bool {
        self.get(name).is_some()
    }

    /// Why somebody acts.
    pub(super) fn author(&self, operator: &str) -> Result<Author, NotDone> {
        let why = self
            .get("why")
            .ok_or_else(|| NotDone::wrong("say why: it stands in the audit; nothing was done"))?;
        let why = Author::why(why).map_err(|wrong| NotDone::wrong(format!("why: {wrong}; nothing was done")))?;
        Ok(Author {
            operator: operator.to_owned(),
            why,
        })
    }

    /// Which dead letters.
    pub(super) fn which(&self) -> Result<Which, NotDone> {
        let wrong = |name: &str, why: &str| NotDone::wrong(format!("{name}: {why}"));
        let mut which = Which::default();
        for text in self.all("state") {
            if text == "all" {
                which.states = State::ALL.to_vec();
            } else {
                let state = State::parse(text).ok_or_else(|| wrong("state", &format!("{text:?} is none")))?;
                which.states.push(state);
            }
        }
        for text in self.all("reason") {
            let reason = Reason::parse(text).ok_or_else(|| wrong("reason", &format!("{text:?} is none")))?;
            which.reasons.push(reason);
        }
        which.is_final = match self.get("final") {
            None => None,
            Some("yes") => Some(true),
            Some("no") => Some(false),
            Some(other) => return Err(wrong("final", &format!("{other:?} is neither yes nor no"))),
        };
        which.partner = match self.get("partner").map(str::trim) {
            None => None,
            Some(text) if is_enterprise_id(text) => Some(text.to_owned()),
            Some(text) => return Err(wrong("partner", &format!("{text:?} is no enterprise's id"))),
        };
        which.allocation = match self.get("allocation").map(str::trim) {
            None => None,
            Some(text) => Some(parse_uuid(text).ok_or_else(|| wrong("allocation", &format!("{text:?} is no UUID")))?),
        };
        for (name, most, place) in [("nonce", 256, &mut which.nonce), ("group", 64, &mut which.group)] {
            if let Some(text) = self.get(name) {
                bounded(text, most).map_err(|why| wrong(name, &why))?;
                *place = Some(text.to_owned());
            }
        }
        which.made_by = match self.get("made_by") {
            None => None,
            Some(text) => Some(MadeBy::parse(text).ok_or_else(|| wrong("made by", &format!("{text:?} is nobody")))?),
        };
        for (name, place) in [("since", &mut which.since), ("until", &mut which.until)] {
            if let Some(text) = self.get(name) {
                *place = Some(moment(text.trim()).map_err(|why| wrong(name, &why))?);
            }
        }
        Ok(which)
    }
}

/// A question as pairs again, for a link or hidden in a form.
pub(super) fn pairs_of(which: &Which) -> Vec<(&'static str, String)> {
    let mut pairs: Vec<(&'static str, String)> = Vec::new();
    if which.states.len() == State::ALL.len() {
        pairs.push(("state", "all".to_owned()));
    } else {
        pairs.extend(which.states.iter().map(|state| ("state", state.as_str().to_owned())));
    }
    pairs.extend(which.reasons.iter().map(|reason| ("reason", reason.to_string())));
    let said = |moment: Moment| match moment {
        Moment::At(time) => time.to_string(),
        Moment::Ago(ago) => format!("{}ms", ago.as_millis()),
    };
    let more = [
        (
            "final",
            which
                .is_final
                .map(|is_final| if is_final { "yes" } else { "no" }.to_owned()),
        ),
        ("partner", which.partner.clone()),
        ("allocation", which.allocation.map(|id: Uuid| id.to_string())),
        ("nonce", which.nonce.clone()),
        ("group", which.group.clone()),
        ("made_by", which.made_by.map(|maker| maker.as_str().to_owned())),
        ("since", which.since.map(said)),
        ("until", which.until.map(said)),
    ];
    pairs.extend(more.into_iter().filter_map(|(name, value)| Some((name, value?))));
    pairs
}

/// Pairs as what follows a `?`.
pub(super) fn query_of<'p>(pairs: impl IntoIterator<Item = &'p (&'static str, String)>) -> String {
    let mut query = form_urlencoded::Serializer::new(String::new());
    for (name, value) in pairs {
        query.append_pair(name, value);
    }
    query.finish()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_question_survives_its_link() {
        let query = "state=open&state=discarded&reason=internal&final=no&partner=acme&nonce=a%26b+c&group=ab&made_by=unknown&\
                     since=2h&until=2030-01-31T00%3A00%3A00Z&allocation=3F2504E0-4F89-41D3-9A0C-0305E82C3301&empty=";
        let which = Fields::read(query.as_bytes()).which().expect("a question");
        assert_eq!(which.nonce.as_deref(), Some("a&b c"));
        assert_eq!(which.states, [State::Open, State::Discarded]);
        let again = Fields::read(query_of(&pairs_of(&which)).as_bytes()).which();
        assert_eq!(again.expect("a question"), which);
        let all = Fields::read(b"state=all").which().expect("a question");
        assert_eq!(pairs_of(&all), [("state", "all".to_owned())]);
        assert_eq!(Fields::read(b"").which().expect("nothing"), Which::default());
    }

    #[test]
    fn what_can_not_be_is_said() {
        for (query, says) in [
            ("state=x", "state"),
            ("reason=bad", "reason"),
            ("partner=a.b", "partner"),
            ("allocation=7", "allocation"),
            ("final=maybe", "final"),
            ("since=yesterday", "since"),
            ("nonce=a%00", "nonce"),
            ("made_by=me", "made by"),
        ] {
            let refused = Fields::read(query.as_bytes()).which().expect_err(query);
            assert!(refused.notice.text.starts_with(says), "{query}: {refused:?}");
        }
        assert!(Fields::read(b"n=x").number::<i64>("n").is_err());
        assert!(Fields::read(b"why=+").author("ann").is_err());
        assert!(Fields::read(b"why=internal").author("ann").is_err());
    }
}
