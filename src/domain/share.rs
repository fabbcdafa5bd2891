//! Whose messages of a batch can wait: what one sent beyond its share, while others wait or are likely to.

use std::collections::{BTreeMap, BTreeSet};

/// Whom a message counts for: a partner of the registry, or nobody: malformed messages and strangers' all together, since
/// whoever writes to an exchange may make up as many enterprises as it likes.
pub type Owner<'a> = Option<&'a str>;

/// One's own share of a batch, where others are about: a quarter.
const PARTNERS_SHARE: usize = 4;
/// What strangers may send before all that they send waits: a sixteenth.
const NOBODYS_SHARE: usize = 16;

/// Which messages of a batch can wait, by their places. `about` are the partners who sent something lately: one who is alone
/// never waits, nor do some who send alike; only who fills the batches while another sends little.
///
/// Of a partner the first ones stay, as many as its share; what is nobody's goes out of the way as a whole.
pub fn surplus(owners: &[Owner<'_>], about: &BTreeSet<&str>, batch_max: usize) -> Vec<bool> {
    let mut counts: BTreeMap<Owner<'_>, usize> = about.iter().map(|partner| (Some(*partner), 0)).collect();
    for owner in owners {
        let count = counts.entry(*owner).or_default();
        *count = count.saturating_add(1);
    }
    let share = batch_max.checked_div(PARTNERS_SHARE).unwrap_or_default().max(1);
    let nobodys = batch_max.checked_div(NOBODYS_SHARE).unwrap_or_default().max(1);
    let little = share.checked_div(2).unwrap_or_default();
    let send_little = counts
        .iter()
        .filter(|(owner, count)| owner.is_some() && **count <= little)
        .count();
    // How many of each may stay; who is not named, all.
    let bounds: BTreeMap<Owner<'_>, usize> = counts
        .iter()
        .filter_map(|(owner, count)| match owner {
            None => (*count > nobodys && counts.len() > 1).then_some((*owner, 0)),
            Some(_) => (*count > share && send_little > 0).then_some((*owner, share)),
        })
        .collect();
    let mut stayed: BTreeMap<Owner<'_>, usize> = BTreeMap::new();
    owners
        .iter()
        .map(|owner| {
            let Some(bound) = bounds.get(owner) else {
                return false;
            };
            let stayed = stayed.entry(*owner).or_default();
            let stays = *stayed < *bound;
            *stayed = stayed.saturating_add(usize::from(stays));
            !stays
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn owners<'a>(counts: &[(Owner<'a>, usize)]) -> Vec<Owner<'a>> {
        counts
            .iter()
            .flat_map(|(owner, count)| std::iter::repeat_n(*owner, *count))
            .collect()
    }

    /// How many of each can wait.
    fn waiting<'a>(counts: &[(Owner<'a>, usize)], about: &[&'a str]) -> Vec<(Owner<'a>, usize)> {
        let owners = owners(counts);
        let about = about.iter().copied().collect();
        let waits = surplus(&owners, &about, 256);
        assert_eq!(waits.len(), owners.len());
        let mut found = BTreeMap::<Owner<'_>, usize>::new();
        for (owner, waits) in owners.iter().zip(waits) {
            let count = found.entry(*owner).or_default();
            *count = count.saturating_add(usize::from(waits));
        }
        found.into_iter().filter(|(_, count)| *count > 0).collect()
    }

    #[test]
    fn who_is_alone_never_waits() {
        for about in [&[][..], &["a"]] {
            assert!(waiting(&[(Some("a"), 256)], about).is_empty());
        }
        assert!(
            waiting(&[(None, 256)], &[]).is_empty(),
            "nor strangers, where nobody else is about"
        );
    }

    #[test]
    fn who_fills_the_batch_leaves_room_for_who_sends_little() {
        assert_eq!(waiting(&[(Some("a"), 255), (Some("b"), 1)], &[]), [(Some("a"), 191)]);
        assert_eq!(
            waiting(&[(Some("a"), 256)], &["b"]),
            [(Some("a"), 192)],
            "also before it comes"
        );
        assert_eq!(
            waiting(&[(Some("a"), 128), (Some("b"), 128)], &["c"]),
            [(Some("a"), 64), (Some("b"), 64)],
            "two at a time"
        );
        let first = surplus(&owners(&[(Some("a"), 100), (Some("b"), 1)]), &BTreeSet::new(), 256);
        assert!(!first[63] && first[64], "the oldest stay");
    }

    #[test]
    fn those_who_send_alike_do_not_wait() {
        for partners in [2, 3, 4, 8, 64] {
            let names: Vec<String> = (0..partners).map(|number| format!("p{number}")).collect();
            let counts: Vec<(Owner<'_>, usize)> =
                names.iter().map(|name| (Some(name.as_str()), 256 / partners)).collect();
            assert!(waiting(&counts, &[]).is_empty(), "{partners}");
        }
        assert!(
            waiting(&[(Some("a"), 64), (Some("b"), 1)], &[]).is_empty(),
            "nor one within its share"
        );
    }

    #[test]
    fn what_is_nobodys_goes_out_of_the_way_as_a_whole() {
        assert_eq!(waiting(&[(None, 255), (Some("b"), 1)], &[]), [(None, 255)]);
        assert_eq!(waiting(&[(None, 200), (Some("b"), 56)], &[]), [(None, 200)]);
        assert_eq!(waiting(&[(None, 17)], &["b"]), [(None, 17)]);
        assert!(waiting(&[(None, 16)], &["b"]).is_empty(), "a few are in nobody's way");
        assert!(surplus(&[], &BTreeSet::new(), 0).is_empty());
        assert_eq!(
            surplus(&[Some("a"), Some("a")], &["b"].into(), 1),
            [false, true],
            "a batch of one has a share of one"
        );
    }
}
