//! What the world is told of a partner itself: that it was suspended, put in quarantine, let go on, or soon has no key. It is
//! said from its row in the outbox and `events.source` alone, so that every copy is identical. Why an operator did it is not told.

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::{
    calendar::rfc3339,
    delivery::Publication,
    event::partner_event,
    event_id::{KEY_ENDING, QUARANTINED, RESUMED, SUSPENDED, key_ending_id, partner_act_id},
};

/// As it waits in the outbox: the acts' by the trigger `told` of the partners' table, the keys' by a worker.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", deny_unknown_fields, rename_all_fields = "camelCase")]
pub enum PartnerNotice {
    #[serde(rename = "partner.suspended")]
    Suspended { enterprise_id: String, since: Timestamp },
    #[serde(rename = "partner.quarantined")]
    Quarantined { enterprise_id: String, since: Timestamp },
    /// What it was until then, and since when: one of the two, or both.
    #[serde(rename = "partner.resumed")]
    Resumed {
        enterprise_id: String,
        since: Timestamp,
        suspended_since: Option<Timestamp>,
        quarantined_since: Option<Timestamp>,
    },
    #[serde(rename = "key.ending")]
    KeyEnding {
        enterprise_id: String,
        public_key: String,
        ends_at: Timestamp,
        /// The event's time. When a worker noticed is nowhere written, and would be another time for each worker.
        registered_at: Timestamp,
    },
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct PartnerData<'a> {
    enterprise_id: &'a str,
    since: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    suspended_since: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    quarantined_since: Option<String>,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct KeyData<'a> {
    enterprise_id: &'a str,
    public_key: &'a str,
    ends_at: String,
}

impl PartnerNotice {
    pub fn event_id(&self) -> Uuid {
        match self {
            PartnerNotice::Suspended { enterprise_id, since } => partner_act_id(SUSPENDED, enterprise_id, *since),
            PartnerNotice::Quarantined { enterprise_id, since } => partner_act_id(QUARANTINED, enterprise_id, *since),
            PartnerNotice::Resumed {
                enterprise_id, since, ..
            } => partner_act_id(RESUMED, enterprise_id, *since),
            PartnerNotice::KeyEnding {
                enterprise_id,
                public_key,
                ends_at,
                ..
            } => key_ending_id(enterprise_id, public_key, *ends_at),
        }
    }

    /// Its event. It is a message of its own in either format: it belongs to no batch.
    pub fn event(&self, source: &str) -> Publication {
        let id = self.event_id();
        let act = |kind, enterprise_id: &str, since: Timestamp, was: [Option<Timestamp>; 2]| {
            let [suspended_since, quarantined_since] = was.map(|was| was.map(rfc3339));
            let data = PartnerData {
                enterprise_id,
                since: rfc3339(since),
                suspended_since,
                quarantined_since,
            };
            partner_event((kind, id), enterprise_id, since, data, source)
        };
        match self {
            PartnerNotice::Suspended { enterprise_id, since } => act(SUSPENDED, enterprise_id, *since, [None; 2]),
            PartnerNotice::Quarantined { enterprise_id, since } => act(QUARANTINED, enterprise_id, *since, [None; 2]),
            PartnerNotice::Resumed {
                enterprise_id,
                since,
                suspended_since,
                quarantined_since,
            } => act(RESUMED, enterprise_id, *since, [*suspended_since, *quarantined_since]),
            PartnerNotice::KeyEnding {
                enterprise_id,
                public_key,
                ends_at,
                registered_at,
            } => {
                let data = KeyData {
                    enterprise_id,
                    public_key,
                    ends_at: rfc3339(*ends_at),
                };
                partner_event((KEY_ENDING, id), enterprise_id, *registered_at, data, source)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::domain::delivery::PublicationKind;

    fn at(text: &str) -> Timestamp {
        text.parse().expect("a time")
    }

    fn whose() -> String {
        "northwind".into()
    }

    /// Each with its id, its time and its data, written out: whoever changes one of them breaks the contract.
    fn table() -> [(PartnerNotice, &'static str, &'static str, &'static str, Value); 4] {
        let since = at("2026-11-20T08:15:02.113456Z");
        let quarantined = at("2026-11-19T23:59:59.9999Z");
        let public_key = "02c6047f9441ed7d6d3045406e95c07cd85c778e4b8cef3ca7abac09b95c709ee5";
        let time = "2026-11-20T08:15:02.113Z";
        [
            (
                PartnerNotice::Suspended {
                    enterprise_id: whose(),
                    since,
                },
                "partner.suspended",
                "4f252e88-9bff-51e7-a02c-2b3638afb76c",
                time,
                json!({"enterpriseId": "northwind", "since": time}),
            ),
            (
                PartnerNotice::Quarantined {
                    enterprise_id: whose(),
                    since,
                },
                "partner.quarantined",
                "cb408a93-0978-5149-9b48-03abf4f3b5e4",
                time,
                json!({"enterpriseId": "northwind", "since": time}),
            ),
            (
                PartnerNotice::Resumed {
                    enterprise_id: whose(),
                    since,
                    suspended_since: None,
                    quarantined_since: Some(quarantined),
                },
                "partner.resumed",
                "d57a5329-649f-579e-8db0-ece39b989250",
                time,
                json!({
                    "enterpriseId": "northwind", "since": time, "quarantinedSince": "2026-11-19T23:59:59.999Z",
                }),
            ),
            (
                PartnerNotice::KeyEnding {
                    enterprise_id: whose(),
                    public_key: public_key.into(),
                    ends_at: at("2027-01-31T00:00:00Z"),
                    registered_at: since,
                },
                "key.ending",
                "b95cbcce-3324-5160-94cd-4faf0d703d25",
                time,
                json!({
                    "enterpriseId": "northwind", "publicKey": public_key, "endsAt": "2027-01-31T00:00:00.000Z",
                }),
            ),
        ]
    }

    #[test]
    fn every_notice_has_its_id_and_its_words() {
        for (notice, kind, id, time, data) in table() {
            assert_eq!(notice.event_id().to_string(), id, "{kind}");
            let event = notice.event("/settled");
            assert_eq!(event.kind, PublicationKind::Event);
            assert_eq!(event.exchange, "settlement.events");
            assert_eq!(event.routing_key, format!("{kind}.northwind"));
            let properties = &event.properties;
            assert_eq!(properties.message_id.as_deref(), Some(id));
            assert_eq!(properties.content_type.as_deref(), Some("application/cloudevents+json"));
            assert_eq!(properties.delivery_mode, Some(2));
            assert_eq!(properties.headers, None);
            let told: Value = serde_json::from_slice(&event.body).expect("JSON");
            let expected = json!({
                "specversion": "1.0", "id": id, "source": "/settled", "type": kind, "subject": "northwind",
                "time": time, "datacontenttype": "application/json", "data": data,
            });
            assert_eq!(told, expected);
        }
    }

    #[test]
    fn what_is_stored_is_read_again_and_as_a_database_writes_times() {
        for (notice, ..) in table() {
            let text = serde_json::to_string(&notice).expect("JSON");
            assert_eq!(serde_json::from_str::<PartnerNotice>(&text).expect("a notice"), notice);
        }
        let stored = json!({
            "type": "partner.resumed", "enterpriseId": "northwind", "since": "2026-11-20T09:15:02.113456+01:00",
            "suspendedSince": null, "quarantinedSince": "2026-11-19T23:59:59.9999+00:00",
        });
        let [_, _, (resumed, ..), _] = table();
        assert_eq!(
            serde_json::from_value::<PartnerNotice>(stored).expect("a notice"),
            resumed
        );
        assert!(
            serde_json::from_value::<PartnerNotice>(json!({"type": "partner.renamed", "enterpriseId": "x"})).is_err()
        );
    }
}
