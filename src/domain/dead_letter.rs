//! Dead letters: what one says of itself, the message inside it as the partner sent it, and how it joins what is known.

mod cause;
mod death;
mod filing;
mod group;
pub(super) mod headers;
mod identity;
mod open;
mod path;
mod ruling;
mod state;
mod taken;
pub(super) mod write;

pub use cause::{Cause, MadeBy};
pub use filing::{Arrival, FiledRow, Filing, Known, failed_at, file, letters_of};
pub use group::{group_of, shape_of};
pub use identity::Identity;
pub use open::{Trusted, explain, open, unstorable};
pub use path::{may_be_cut, may_be_cut_twice};
pub use ruling::{Ruling, ruling};
pub use state::State;
pub use taken::taken;
pub use write::set_apart;

#[cfg(test)]
mod tests;
