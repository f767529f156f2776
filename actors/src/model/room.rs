//! Whether a feed may take more in, by what is open at its destinations (F71).
//!
//! Each destination has its own watermark. A feed goes on as long as one of its destinations is below: a secondary that is
//! down must not stop the primary. It waits when all of them are full, or when one holds so much that the store's size
//! is at stake.

use std::{collections::BTreeMap, sync::Arc};

use postrider_settings::Outbox;

/// Open messages of each destination that has any.
pub type OpenMessages = BTreeMap<Arc<str>, u64>;

/// The destinations that hold a feed up; none if it may go on. A feed that was held goes on at three quarters of the bounds.
pub fn holders<'a>(
    bounds: &Outbox,
    open: &OpenMessages,
    destinations: impl IntoIterator<Item = &'a str>,
    was_held: bool,
) -> Vec<&'a str> {
    let bound = |most: u64| if was_held { most / 4 * 3 + 1 } else { most };
    let (full, too_much) =
        (bound(bounds.high_watermark), bound(bounds.max_backlog.max(bounds.high_watermark)));
    let of = |name: &str| open.get(name).copied().unwrap_or(0);
    let all: Vec<_> = destinations.into_iter().collect();
    if all.iter().all(|name| of(name) >= full) {
        return all;
    }
    all.into_iter().filter(|name| of(name) >= too_much).collect()
}

#[cfg(test)]
mod tests {
    use postrider_settings::Keys as _;

    use super::*;

    #[test]
    fn f71_a_feed_is_held_by_all_of_its_destinations_or_by_one_with_far_too_much() {
        let bounds = Outbox { high_watermark: 100, max_backlog: 1_000, ..Outbox::declared() };
        for (primary, secondary, was_held, expected) in [
            (0, 0, false, &[][..]),
            (0, 99, false, &[]),
            (0, 500, false, &[]), // the secondary is down, the primary goes on
            (99, 999, false, &[]),
            (0, 1_000, false, &["secondary"]),
            (100, 100, false, &["primary", "secondary"]),
            (100, 99, false, &[]),
            (76, 100, true, &["primary", "secondary"]),
            (75, 100, true, &[]),
            (0, 751, true, &["secondary"]),
            (0, 750, true, &[]),
        ] {
            let open = OpenMessages::from([
                ("primary".into(), primary),
                ("secondary".into(), secondary),
                ("x".into(), 9_999),
            ]);
            let held = holders(&bounds, &open, ["primary", "secondary"], was_held);
            assert_eq!(held, expected, "{primary} {secondary} {was_held}");
        }
        let tight = Outbox { high_watermark: 100, max_backlog: 1, ..Outbox::declared() };
        let open = OpenMessages::from([("a".into(), 99)]);
        assert_eq!(holders(&tight, &open, ["a"], false), Vec::<&str>::new(), "never below the watermark");
        assert_eq!(holders(&tight, &OpenMessages::new(), ["a"], true), Vec::<&str>::new());
    }
}
