//! Who is limited to some partners sees and touches what is theirs. What is somebody else's is answered as what is not there.

use std::sync::Arc;

use serde_json::Value;

use super::{Desk, PlanRecord, Refusal, act::no_such_plan};

impl Desk {
    /// The same desk for somebody who is limited to some partners; none: who is not.
    #[must_use]
    pub fn limited_to(&self, partners: Option<Arc<[String]>>) -> Self {
        Self {
            limits: partners,
            ..self.clone()
        }
    }

    pub(super) fn limits(&self) -> Option<&[String]> {
        self.limits.as_deref()
    }

    /// Whether what is a partner's, or nobody's, may be seen here.
    pub(super) fn sees(&self, enterprise_id: Option<&str>) -> bool {
        let is_theirs = |limits: &[String]| enterprise_id.is_some_and(|id| limits.iter().any(|one| one == id));
        self.limits().is_none_or(is_theirs)
    }

    /// A plan.
    ///
    /// # Errors
    /// There is none, or it may hold what is not to be seen here; the database is away.
    pub(super) async fn plan_record(&self, plan: i64) -> Result<PlanRecord, Refusal> {
        let found = self.store.plan(plan).await?;
        found
            .filter(|record| self.limits().is_none_or(|limits| is_within(&record.filters, limits)))
            .ok_or_else(|| no_such_plan(plan))
    }
}

/// Whether a selection was of these partners alone.
fn is_within(filters: &Value, limits: &[String]) -> bool {
    let is_one = |value: &Value| value.as_str().is_some_and(|id| limits.iter().any(|one| one == id));
    match (&filters["partner"], &filters["partners"]) {
        (Value::String(_), _) => is_one(&filters["partner"]),
        (_, Value::Array(several)) => !several.is_empty() && several.iter().all(is_one),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_selection_is_within_limits_only_if_it_was_made_so() {
        let limits = ["acme".to_owned(), "globex".to_owned()];
        for (filters, expected) in [
            (json!({"partner": "acme"}), true),
            (json!({"partner": "other"}), false),
            (json!({"partners": ["globex", "acme"]}), true),
            (json!({"partners": ["acme", "other"]}), false),
            (json!({"partner": "other", "partners": ["acme"]}), false),
            (json!({"partners": []}), false),
            (json!({"states": ["open"]}), false),
            (json!({"partner": null}), false),
        ] {
            assert_eq!(is_within(&filters, &limits), expected, "{filters}");
        }
    }
}
