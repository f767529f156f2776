-- The least that the daemon's role needs, for the schema `postrider`. Run it once as the schema's owner, after
-- `postrider migrate`; the role has to exist:
--
--     CREATE ROLE postrider_daemon LOGIN PASSWORD '…';
--
-- It may read and change rows. It may neither make nor drop tables: partitions come and go through two functions
-- that run as the owner.
GRANT USAGE ON SCHEMA postrider TO postrider_daemon;
GRANT SELECT ON postrider.meta, postrider.message_words TO postrider_daemon;
GRANT SELECT, UPDATE (last_recorded) ON postrider.partitions TO postrider_daemon;
GRANT SELECT, INSERT ON postrider.destinations TO postrider_daemon;
GRANT SELECT, INSERT, UPDATE ON postrider.messages, postrider.sources TO postrider_daemon;
GRANT SELECT, INSERT, UPDATE, DELETE ON
    postrider.files,
    postrider.receipt_inbox,
    postrider.receipt_parked,
    postrider.receipt_rejects,
    postrider.receipt_events,
    postrider.status_changes
    TO postrider_daemon;
GRANT EXECUTE ON FUNCTION postrider.make_partition(date), postrider.drop_partition(date, date) TO postrider_daemon;
