//! After an act: what is said above the page that it belongs to, and what was typed into a form that was refused, which stands
//! there again. Where the page itself can not be had, the form does alone.

use askama::Template;
use axum::response::Response;
use hyper::StatusCode;

use super::{
    answer::{NotDone, Notice, page},
    ask::Ask,
    fields::Fields,
    frame::Frame,
};

/// What came of an act.
#[derive(Clone, Debug)]
pub(super) struct After {
    pub(super) notice: Notice,
    /// The form that was refused; none: it was done.
    refused: Option<&'static str>,
}

impl After {
    /// Of the form of this name: done, or why not.
    pub(super) fn of(form: &'static str, came: Result<Notice, NotDone>) -> Self {
        match came {
            Ok(notice) => Self { notice, refused: None },
            Err(not_done) => Self {
                notice: not_done.notice,
                refused: Some(form),
            },
        }
    }
}

/// What stands in the fields of a page's forms.
#[derive(Debug, Default)]
pub(super) struct Typed {
    form: Option<&'static str>,
    fields: Fields,
}

impl Typed {
    pub(super) fn of(ask: &Ask, after: Option<&After>) -> Self {
        after
            .and_then(|after| after.refused)
            .map_or_else(Self::default, |form| Self {
                form: Some(form),
                fields: ask.fields.clone(),
            })
    }

    /// Whether it is this form that was refused.
    pub(super) fn is(&self, form: &str) -> bool {
        self.form == Some(form)
    }

    /// What was typed into a form's field; nothing, where it was not this form.
    pub(super) fn text(&self, form: &str, name: &str) -> &str {
        self.or(form, name, "")
    }

    /// The same, or what the form begins with.
    pub(super) fn or<'t>(&'t self, form: &str, name: &str, otherwise: &'t str) -> &'t str {
        if self.is(form) {
            return self.fields.get(name).unwrap_or_default();
        }
        otherwise
    }

    pub(super) fn is_on(&self, form: &str, name: &str) -> bool {
        self.is(form) && self.fields.is_on(name)
    }
}

#[derive(Template)]
#[template(path = "again.html")]
struct AgainPage {
    frame: Frame,
    heading: String,
    /// None: it was done.
    form: Option<FormAlone>,
}

struct FormAlone {
    action: String,
    shown: Vec<(String, String)>,
    hidden: Vec<(String, String)>,
}

/// Fields that a person fills in; the others say what it is about.
const TYPED: [&str; 3] = ["why", "canary", "rate"];

/// The page after an act; or, where it can not be had, what came of the act, with its form as it was filled in.
pub(super) fn or_form(
    ask: &Ask,
    action: String,
    after: &After,
    answered: Result<Response, NotDone>,
) -> Result<Response, NotDone> {
    let status = match answered {
        Err(away) if away.status == StatusCode::SERVICE_UNAVAILABLE => away.status,
        answered => return answered,
    };
    let pairs = |typed: bool| -> Vec<(String, String)> {
        ask.fields
            .pairs()
            .filter(|(name, _)| *name != "form_token" && TYPED.contains(name) == typed)
            .map(|(name, value)| (name.to_owned(), value.to_owned()))
            .collect()
    };
    let form = after.refused.map(|_| {
        let mut shown = pairs(true);
        if !shown.iter().any(|(name, _)| name == "why") {
            shown.push(("why".to_owned(), String::new()));
        }
        FormAlone {
            action,
            shown,
            hidden: pairs(false),
        }
    });
    let heading = if form.is_some() { "Not now" } else { "Done" };
    let again = AgainPage {
        frame: ask.frame("", heading).with(Some(after.notice.clone())),
        heading: heading.to_owned(),
        form,
    };
    Ok(page(status, &again))
}
