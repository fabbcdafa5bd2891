//! Which dead letters, and the SQL of it.

use serde::{Serialize, Serializer};
use tokio_postgres::types::ToSql;
use uuid::Uuid;

use super::super::time::maybe_shown;
use crate::domain::{
    calendar::CalendarTime,
    dead_letter::{MadeBy, State},
    reason::Reason,
};

/// Which dead letters.
#[derive(Clone, Debug, Default, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Filter {
    #[serde(serialize_with = "states")]
    pub states: Vec<State>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub reasons: Vec<Reason>,
    #[serde(rename = "final", skip_serializing_if = "Option::is_none")]
    pub is_final: Option<bool>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub partner: Option<String>,
    /// Of these alone, whatever else is asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub partners: Option<Vec<String>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub allocation: Option<Uuid>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub nonce: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub group: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none", serialize_with = "maker")]
    pub made_by: Option<MadeBy>,
    /// Only what somebody known made.
    #[serde(skip)]
    pub is_known: bool,
    /// Failed last at this time or later ...
    #[serde(skip_serializing_if = "Option::is_none", serialize_with = "maybe_shown")]
    pub since: Option<CalendarTime>,
    /// ... and before this one.
    #[serde(skip_serializing_if = "Option::is_none", serialize_with = "maybe_shown")]
    pub until: Option<CalendarTime>,
}

impl Filter {
    /// What a plan of it leaves out, if anything: nobody vouches for what these say, so they are planned if somebody asks for
    /// them, and never among others.
    pub fn left_out(&self) -> Option<Filter> {
        self.made_by.is_none().then(|| Filter {
            made_by: Some(MadeBy::Unknown),
            ..self.clone()
        })
    }
}

fn states<S: Serializer>(states: &[State], serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_seq(states.iter().map(|state| state.as_str()))
}

fn maker<S: Serializer>(made_by: &Option<MadeBy>, serializer: S) -> Result<S::Ok, S::Error> {
    made_by.map(MadeBy::as_str).serialize(serializer)
}

/// A filter, ready to become SQL.
pub(super) struct Asked<'f> {
    pub(super) filter: &'f Filter,
    /// By name and by being final, in one.
    reasons: Option<Vec<&'static str>>,
    /// None of these. What a newer version wrote is not final, as far as this one knows.
    not_reasons: Option<Vec<&'static str>>,
    made_by: Option<&'static str>,
}

pub(super) type Parameters<'p> = Vec<&'p (dyn ToSql + Sync)>;

impl<'f> Asked<'f> {
    pub(super) fn of(filter: &'f Filter) -> Self {
        let is_asked = |reason: &Reason| {
            (filter.reasons.is_empty() || filter.reasons.contains(reason))
                && filter.is_final.is_none_or(|is_final| reason.is_final() == is_final)
        };
        let none_named = filter.reasons.is_empty();
        let any = none_named && filter.is_final != Some(true);
        let reasons = || Reason::ALL.into_iter().filter(is_asked).map(Reason::label).collect();
        let finals = || {
            Reason::ALL
                .into_iter()
                .filter(|reason| reason.is_final())
                .map(Reason::label)
                .collect()
        };
        Self {
            filter,
            reasons: (!any).then(reasons),
            not_reasons: (none_named && filter.is_final == Some(false)).then(finals),
            made_by: filter.made_by.map(MadeBy::as_str),
        }
    }

    /// What follows the state in a WHERE. Parameters are added to those there are.
    pub(super) fn conditions<'p>(&'p self, parameters: &mut Parameters<'p>) -> String {
        let filter = self.filter;
        let mut sql = String::new();
        let mut add = |condition: &str, parameter: Option<&'p (dyn ToSql + Sync)>| {
            if let Some(parameter) = parameter {
                parameters.push(parameter);
                let place = format!("${}", parameters.len());
                sql.push_str(" AND ");
                sql.push_str(&condition.replace('?', &place));
            }
        };
        fn sql_of<T: ToSql + Sync>(value: &Option<T>) -> Option<&(dyn ToSql + Sync)> {
            value.as_ref().map(|value| value as &(dyn ToSql + Sync))
        }
        add("d.enterprise_id = ?", sql_of(&filter.partner));
        add("d.enterprise_id = ANY (?)", sql_of(&filter.partners));
        match self.reasons.as_deref() {
            // An equality lets the planner walk the reason's own index in order.
            Some([one]) => add("d.reason = ?", Some(one)),
            Some(_) => add("d.reason = ANY (?)", sql_of(&self.reasons)),
            None => {}
        }
        add("d.reason <> ALL (?)", sql_of(&self.not_reasons));
        add("d.allocation_id = ?", sql_of(&filter.allocation));
        add("d.nonce = ?", sql_of(&filter.nonce));
        add("d.group_id = ?", sql_of(&filter.group));
        add("d.made_by = ?", sql_of(&self.made_by));
        add("d.last_failed_at >= ?", sql_of(&filter.since));
        add("d.last_failed_at < ?", sql_of(&filter.until));
        if filter.made_by.is_some_and(|maker| maker != MadeBy::Settled) {
            // In so many words: an index holds these alone.
            sql.push_str(" AND d.made_by <> 'settled'");
        }
        if filter.is_known {
            sql.push_str(" AND d.made_by <> 'unknown'");
        }
        sql
    }

    /// One SELECT for each state, put together.
    pub(super) fn branches(&self, branch: impl Fn(&str) -> String) -> String {
        let branches: Vec<String> = self
            .filter
            .states
            .iter()
            .map(|state| format!("({})", branch(state.as_str())))
            .collect();
        branches.join("\n        UNION ALL ")
    }

    /// A page of ids in order of arrival: after $1, $2 of them at most.
    pub(super) fn page(&self, conditions: &str) -> String {
        let branches = self.branches(|state| {
            format!(
                "SELECT d.id, d.seq
                FROM settled.dead_letters AS d
                WHERE d.state = '{state}' AND d.seq > $1{conditions}
                ORDER BY d.seq
                LIMIT $2"
            )
        });
        format!("SELECT b.id, b.seq FROM ({branches}) AS b ORDER BY b.seq LIMIT $2")
    }
}
