//! Which messages travel in one call (S2.1): by count **and** by bytes.

use std::ops::Range;

/// Cuts messages of these sizes into calls, in order, each as full as it can be. A message larger than
/// `bytes_max` travels alone: the service is to say what it thinks of it.
pub(crate) fn pack(
    sizes: impl IntoIterator<Item = usize>,
    count_max: usize,
    bytes_max: usize,
) -> Vec<Range<usize>> {
    let mut calls = Vec::new();
    let mut call = 0..0;
    let mut bytes = 0usize;
    for size in sizes {
        let full = call.len() == count_max || bytes.saturating_add(size) > bytes_max;
        if full && !call.is_empty() {
            calls.push(call.clone());
            call.start = call.end;
            bytes = 0;
        }
        call.end += 1;
        bytes = bytes.saturating_add(size);
    }
    if !call.is_empty() {
        calls.push(call);
    }
    calls
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn s2_1_a_thousand_single_messages_take_a_hundred_calls_and_two_batches_one() {
        assert_eq!(pack([1_000; 1_000], 10, 1_048_576).len(), 100);
        assert_eq!(pack([30_000; 2], 10, 1_048_576), vec![0..2; 1]);
    }

    #[test]
    fn s2_1_bytes_cut_where_the_count_would_not() {
        // The seed counted to ten only: ten of 200 KB failed whole.
        assert_eq!(pack([200_000; 10], 10, 1_048_576), [0..5, 5..10]);
        assert_eq!(pack([262_144; 5], 10, 1_048_576), [0..4, 4..5], "exactly the limit fits");
        assert_eq!(pack([10, 2_000_000, 10], 10, 1_048_576), [0..1, 1..2, 2..3]);
        assert!(pack([], 10, 1_048_576).is_empty());
    }

    proptest! {
        #[test]
        fn calls_hold_everything_in_order_within_the_limits(
            sizes in prop::collection::vec(0usize..400, 0..200), count_max in 1usize..12, bytes_max in 1usize..1_000,
        ) {
            let calls = pack(sizes.iter().copied(), count_max, bytes_max);
            let mut next = 0;
            for call in &calls {
                prop_assert_eq!(call.start, next);
                next = call.end;
                let bytes: usize = sizes[call.clone()].iter().sum();
                prop_assert!((1..=count_max).contains(&call.len()));
                prop_assert!(bytes <= bytes_max || call.len() == 1);
            }
            prop_assert_eq!(next, sizes.len());
            // No call could have taken the first message of the next.
            for pair in calls.windows(2) {
                let bytes: usize = sizes[pair[0].clone()].iter().sum();
                prop_assert!(pair[0].len() == count_max || bytes + sizes[pair[1].start] > bytes_max);
            }
        }
    }
}
