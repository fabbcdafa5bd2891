//! What is asked, by whom, and with which desk: what every screen is given.

use super::{
    answer::NotDone,
    fields::Fields,
    frame::{Frame, barred},
    routes::Screen,
    sessions::Viewer,
};
use crate::desk::Desk;

/// What is asked, and by whom.
pub(super) struct Ask {
    pub(super) viewer: Viewer,
    pub(super) part: String,
    pub(super) fields: Fields,
    /// The desk, for this one's name.
    pub(super) desk: Desk,
    pub(super) read_only: bool,
}

impl Ask {
    /// Why this one may not ask for something; none: they may.
    pub(super) fn barred(&self, screen: Screen) -> Option<String> {
        barred(screen.wants(), Some(&self.viewer), self.read_only)
    }

    /// The number in the path.
    pub(super) fn number(&self, what: &str) -> Result<i64, NotDone> {
        self.part
            .parse()
            .map_err(|_| NotDone::missing(format!("there is no {what} {:?}", self.part)))
    }

    /// A page around which everything else stands.
    pub(super) fn frame(&self, here: &'static str, title: impl Into<String>) -> Frame {
        Frame {
            title: title.into(),
            here,
            who: Some(self.viewer.clone()),
            read_only: self.read_only,
            notice: None,
        }
    }
}
