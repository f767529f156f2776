//! How our values are stored in the database.

use std::{
    borrow::Cow,
    error::Error,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use bytes::{BufMut as _, BytesMut};
use postrider_actors::model::{ids::FileId, time::UnixMs};
use tokio_postgres::types::{FromSql, IsNull, ToSql, Type, accepts, to_sql_checked};
use uuid::Uuid;

/// The last millisecond of the year 9999: what comes later was never meant.
const LATEST_MS: u64 = 253_402_300_799_999;

/// Days from the Unix epoch to Postgres' own.
const POSTGRES_EPOCH_DAYS: i32 = 10_957;

const DAY_MS: u64 = 24 * 60 * 60 * 1000;

/// A `date`, as days since the Unix epoch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct Day(pub i32);

impl Day {
    /// Before all.
    pub(super) const EARLIEST: Self = Self(0);
    /// After all: in the year 9999.
    pub(super) const LATEST: Self = Self((LATEST_MS / DAY_MS) as i32);

    /// The day of UTC that a time is in.
    pub(super) fn of(at: UnixMs) -> Self {
        Self((at.0.min(LATEST_MS) / DAY_MS) as i32)
    }
}

impl ToSql for Day {
    fn to_sql(&self, _: &Type, out: &mut BytesMut) -> Result<IsNull, Box<dyn Error + Sync + Send>> {
        out.put_i32(self.0 - POSTGRES_EPOCH_DAYS);
        Ok(IsNull::No)
    }

    accepts!(DATE);
    to_sql_checked!();
}

impl<'a> FromSql<'a> for Day {
    fn from_sql(_: &Type, raw: &'a [u8]) -> Result<Self, Box<dyn Error + Sync + Send>> {
        Ok(Self(i32::from_be_bytes(raw.try_into()?).saturating_add(POSTGRES_EPOCH_DAYS)))
    }

    accepts!(DATE);
}

/// Where a version of a row lies, a `tid`: as the server sent it, to be sent back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Tid([u8; 6]);

/// Which transaction made it, an `xid`: the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Xid([u8; 4]);

macro_rules! opaque {
    ($name:ident, $kind:ident) => {
        impl ToSql for $name {
            fn to_sql(&self, _: &Type, out: &mut BytesMut) -> Result<IsNull, Box<dyn Error + Sync + Send>> {
                out.put_slice(&self.0);
                Ok(IsNull::No)
            }

            accepts!($kind);
            to_sql_checked!();
        }

        impl<'a> FromSql<'a> for $name {
            fn from_sql(_: &Type, raw: &'a [u8]) -> Result<Self, Box<dyn Error + Sync + Send>> {
                Ok(Self(raw.try_into()?))
            }

            accepts!($kind);
        }
    };
}
opaque!(Tid, TID);
opaque!(Xid, XID);

/// For a `timestamptz`.
pub(super) fn time(at: UnixMs) -> SystemTime {
    UNIX_EPOCH + Duration::from_millis(at.0.min(LATEST_MS))
}

/// From a `timestamptz`.
pub(super) fn unix(time: SystemTime) -> UnixMs {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO);
    UnixMs(since.as_millis().try_into().unwrap_or(LATEST_MS))
}

pub(super) fn file(id: FileId) -> Uuid {
    Uuid::from_bytes(id.0)
}

/// Postgres takes no NUL in a text, and would refuse all rows of the statement for it. Where one has come so
/// far, it is shown as what it is: unreadable.
pub(super) fn text(text: &str) -> Cow<'_, str> {
    if text.contains('\0') { Cow::Owned(text.replace('\0', "\u{fffd}")) } else { Cow::Borrowed(text) }
}

pub(super) fn texts(value: Option<&str>) -> Option<Cow<'_, str>> {
    value.map(text)
}

/// A row's number may have all 64 bits: a receipt may name any. The cast back gives it again.
pub(super) fn row(row: u64) -> i64 {
    row.cast_signed()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_beyond_what_the_database_takes_are_its_last() {
        assert_eq!(unix(time(UnixMs(1_700_000_000_123))), UnixMs(1_700_000_000_123));
        assert_eq!(unix(time(UnixMs(u64::MAX))), UnixMs(LATEST_MS));
        assert_eq!(Day::of(UnixMs(0)), Day(0));
        assert_eq!(Day::of(UnixMs(DAY_MS - 1)), Day(0));
        assert_eq!(Day::of(UnixMs(1_700_000_000_000)), Day(19_675));
        assert_eq!(row(u64::MAX).cast_unsigned(), u64::MAX);
        assert_eq!(text("a\0b"), "a\u{fffd}b");
    }
}
