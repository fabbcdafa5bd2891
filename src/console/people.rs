//! Who has which role, and for which partners: the lists of the settings, read.

use std::sync::Arc;

use super::who::{ConsoleRole, Partners};
use crate::{config::ConsoleSettings, domain::address::is_enterprise_id};

/// The lists, the highest role first.
pub(super) struct People([(ConsoleRole, Vec<Entry>); 3]);

struct Entry {
    who: Who,
    /// For this partner alone.
    partner: Option<String>,
}

enum Who {
    Everybody,
    Group(String),
    Name(String),
}

impl Entry {
    /// `ann`, `@desk`, `*`; each with ` for PARTNER` or without.
    fn read(list: &str, text: &str) -> Result<Self, String> {
        let (who, partner) = match text.rsplit_once(" for ") {
            Some((who, partner)) => (who.trim(), Some(partner.trim())),
            None => (text.trim(), None),
        };
        let wrong = |why: &str| format!("console.{list} has {text:?}: {why}");
        if who.is_empty() || who == "@" {
            return Err(wrong("it names nobody"));
        }
        if let Some(partner) = partner.filter(|partner| !is_enterprise_id(partner)) {
            return Err(wrong(&format!("{partner:?} is no enterprise's id")));
        }
        Ok(Self {
            who: match who.strip_prefix('@') {
                Some(group) => Who::Group(group.to_owned()),
                None if who == "*" => Who::Everybody,
                None => Who::Name(who.to_owned()),
            },
            partner: partner.map(str::to_owned),
        })
    }

    fn holds(&self, name: &str, groups: &[String]) -> bool {
        match &self.who {
            Who::Everybody => true,
            Who::Group(group) => groups.contains(group),
            Who::Name(other) => other == name,
        }
    }
}

impl People {
    /// As the settings have them.
    ///
    /// # Errors
    /// A sentence about the entry that is wrong.
    pub(super) fn of(settings: &ConsoleSettings) -> Result<Self, String> {
        let read = |name: &str, list: &[String]| -> Result<Vec<Entry>, String> {
            list.iter().map(|text| Entry::read(name, text)).collect()
        };
        Ok(Self([
            (ConsoleRole::Approver, read("approvers", &settings.approvers)?),
            (ConsoleRole::Operator, read("operators", &settings.operators)?),
            (ConsoleRole::Reader, read("readers", &settings.readers)?),
        ]))
    }

    /// Somebody's role, by the highest list that has them, and the partners that they are limited to there.
    pub(super) fn find(&self, name: &str, groups: &[String]) -> Option<(ConsoleRole, Partners)> {
        self.0.iter().find_map(|(role, list)| {
            let held: Vec<&Entry> = list.iter().filter(|entry| entry.holds(name, groups)).collect();
            if held.is_empty() {
                return None;
            }
            // Named once without a partner, they are not limited.
            let partners: Option<Vec<String>> = held.into_iter().map(|entry| entry.partner.clone()).collect();
            Some((*role, partners.map(Arc::from)))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn people(approvers: &[&str], operators: &[&str], readers: &[&str]) -> Result<People, String> {
        let read = |name: &str, list: &[&str]| -> Result<Vec<Entry>, String> {
            list.iter().map(|text| Entry::read(name, text)).collect()
        };
        Ok(People([
            (ConsoleRole::Approver, read("approvers", approvers)?),
            (ConsoleRole::Operator, read("operators", operators)?),
            (ConsoleRole::Reader, read("readers", readers)?),
        ]))
    }

    #[test]
    fn the_highest_list_that_names_somebody_counts() {
        use ConsoleRole::{Approver, Operator, Reader};
        let people = people(
            &["bob", "@leads"],
            &[
                "ann for acme",
                "ann for globex",
                "@desk for acme",
                "@desk",
                "zoe for acme",
            ],
            &["*"],
        )
        .expect("they can be read");
        let found = |name: &str, groups: &[&str]| {
            let groups: Vec<String> = groups.iter().map(|group| (*group).to_owned()).collect();
            let (role, partners) = people.find(name, &groups).expect("everybody may look");
            (role, partners.map(|partners| partners.join(" ")))
        };
        assert_eq!(found("bob", &[]), (Approver, None));
        assert_eq!(found("eve", &["leads"]), (Approver, None));
        assert_eq!(found("ann", &[]), (Operator, Some("acme globex".to_owned())));
        assert_eq!(found("ann", &["leads"]), (Approver, None));
        assert_eq!(found("eve", &["desk"]), (Operator, None), "once without a partner");
        assert_eq!(found("zoe", &["desk"]), (Operator, None));
        assert_eq!(found("eve", &["x"]), (Reader, None));
        assert!(people.find("", &[]).is_some_and(|(role, _)| role == Reader));
    }

    #[test]
    fn who_is_on_no_list_has_no_role_and_what_names_nobody_is_refused() {
        let few = people(&[], &[], &["ann for acme"]).expect("they can be read");
        assert!(few.find("eve", &[]).is_none() && few.find("", &[]).is_none());
        for wrong in [
            "",
            " ",
            "@",
            " for acme",
            "@ for acme",
            "ann for ",
            "ann for a.b",
            "* for *",
        ] {
            let why = people(&[], &[wrong], &[]).err().expect(wrong);
            assert!(why.contains("console.operators"), "{wrong}: {why}");
        }
    }
}
