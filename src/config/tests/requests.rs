//! What a request holds, and when it goes.

use super::assert_each_is_named;

#[test]
fn each_mistake_about_bundles_is_named() {
    assert_each_is_named(&[
        ("[destinations.support]\nbundle = 1001", &["destinations.support.bundle", "from 0 to 1000"]),
        (
            "[destinations.support]\nbundle = 501",
            &["destinations.support.bundle", "found 501", "at most batch.max_messages (500)"],
        ),
        (
            "[destinations.support]\nbundle = 100\ncontent_type = \"text/plain\"",
            &["destinations.support.content_type", "found \"text/plain\"", "it must be JSON"],
        ),
        (
            "[destinations.support]\nresults = \"/items\"",
            &["destinations.support.results", "set `bundle` too"],
        ),
        (
            "[destinations.support]\nbundle = 9\nresults = \"items\"",
            &["support.results", "does not start with `/`"],
        ),
        (
            "[destinations.support]\nbundle = 9\nprovider_id = \"/id\"",
            &["destinations.support.provider_id", "in its `results`"],
        ),
        (
            "[destinations.support]\nbundle = 9\nresults = \"/items\"\ntemplate = '{\"to\": {{ recipient }}}'",
            &["destinations.support.template", "`results` names messages by their ids", "{{ id }}"],
        ),
    ]);
}

#[test]
fn each_mistake_about_the_order_is_named() {
    assert_each_is_named(&[
        (
            "[destinations.support]\nordering = \"fifo\"",
            &["destinations.support.ordering", "\"none\", \"per_key\""],
        ),
        (
            "[destinations.support]\nordering_key = \"account\"",
            &["destinations.support.ordering_key", "set ordering = \"per_key\" too"],
        ),
        (
            "profile = \"aws\"\n[destinations.support]\nordering = \"per_key\"",
            &["destinations.support.ordering", "several machines", "profile = \"embedded\""],
        ),
        (
            "[feeds.t]\npath=\"/srv/postrider/t\"\nformat=\"text\"\ndestinations=[\"support\"]\n\
             [destinations.support]\nordering = \"per_key\"\nordering_key = \"account\"",
            &["destinations.support.ordering_key", "the feed t is text"],
        ),
    ]);
}
