//! Entries of inbound queues that were taken, packed (B22).
//!
//! A queue delivers at least once, so whoever takes an entry keeps its id for as long as it may come again. An item per
//! id costs more than the message itself. The ids of a feed are packed by the minute in which their entries were sent,
//! which is the same at every delivery: so an entry that comes again meets the group that has it.
//!
//! A group is a *head*, whose version counts the steps that added to it, and *chunks*. The last ids are in the head,
//! which is rewritten with each step; when they are too many for that, they go into a chunk, which is never written again.

use std::collections::HashSet;

use sha2::{Digest as _, Sha256};

use super::time::UnixMs;

/// Ids in a head: with its attributes it takes no more than 1 KB, which is what a write unit is for.
const HEAD_IDS_MAX: usize = 50;

/// Bytes of a packed id.
const ID_BYTES: usize = 16;

/// An entry's id, packed: the first 128 bits of its SHA-256.
type PackedId = [u8; ID_BYTES];

fn pack(id: &str) -> PackedId {
    let mut packed = [0; ID_BYTES];
    packed.copy_from_slice(&Sha256::digest(id)[..ID_BYTES]);
    packed
}

/// The minute of an entry that was sent at `sent_at`.
pub fn minute_of(sent_at: UnixMs) -> u64 {
    sent_at.0 / 60_000
}

/// The entries of one feed and minute that were taken, as far as they are known.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct EntryGroup {
    /// The version of its head; 0 before the head is first written.
    version: u64,
    /// Those in the head.
    head: Vec<PackedId>,
    ids: HashSet<PackedId>,
}

/// What a step adds to a group, to be written if the head's version is still that of the group.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GroupChange {
    /// The head's new version.
    pub version: u64,
    /// How many ids the group has then.
    pub count: u64,
    head: Vec<PackedId>,
    chunk: Option<Vec<PackedId>>,
    added: Vec<PackedId>,
}

impl GroupChange {
    /// The ids in the head.
    pub fn head(&self) -> Vec<u8> {
        self.head.concat()
    }

    /// A chunk, which is to be stored under the new version.
    pub fn chunk(&self) -> Option<Vec<u8>> {
        self.chunk.as_ref().map(|ids| ids.concat())
    }
}

impl EntryGroup {
    /// Its head's version; 0 while it has none.
    pub fn version(&self) -> u64 {
        self.version
    }

    /// How many ids it has.
    pub fn len(&self) -> usize {
        self.ids.len()
    }

    /// Whether it has none.
    pub fn is_empty(&self) -> bool {
        self.ids.is_empty()
    }

    /// Whether an entry was taken.
    pub fn has(&self, id: &str) -> bool {
        self.ids.contains(&pack(id))
    }

    /// What adds ids to it.
    pub fn add<'a>(&self, ids: impl IntoIterator<Item = &'a str>) -> GroupChange {
        let mut added: Vec<_> = ids.into_iter().map(pack).filter(|id| !self.ids.contains(id)).collect();
        added.sort_unstable();
        added.dedup();
        let (mut head, mut chunk) = ([&self.head[..], &added].concat(), None);
        if head.len() > HEAD_IDS_MAX {
            chunk = Some(std::mem::take(&mut head));
        }
        let count = (self.ids.len() + added.len()) as u64;
        GroupChange { version: self.version + 1, count, head, chunk, added }
    }

    /// Takes note that a change of it was written.
    pub fn written(&mut self, change: GroupChange) {
        (self.version, self.head) = (change.version, change.head);
        self.ids.extend(change.added);
    }

    /// Takes in a head and the chunks that were stored since this group was read. `None` if something is damaged, or a
    /// chunk is missing: they were read one after the other, while a step was being stored.
    #[must_use]
    pub fn read<'a>(
        mut self,
        version: u64,
        count: u64,
        head: &[u8],
        chunks: impl IntoIterator<Item = &'a [u8]>,
    ) -> Option<Self> {
        for chunk in chunks {
            self.ids.extend(unpack(chunk)?);
        }
        self.version = version;
        self.head = unpack(head)?.collect();
        self.ids.extend(self.head.iter().copied());
        (self.ids.len() as u64 >= count).then_some(self)
    }
}

fn unpack(bytes: &[u8]) -> Option<impl Iterator<Item = PackedId>> {
    let (ids, []) = bytes.as_chunks::<ID_BYTES>() else { return None };
    Some(ids.iter().copied())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// A group as it is stored.
    #[derive(Default)]
    struct Stored {
        version: u64,
        count: u64,
        head: Vec<u8>,
        chunks: Vec<(u64, Vec<u8>)>,
    }

    impl Stored {
        fn write(&mut self, change: &GroupChange) {
            self.chunks.extend(change.chunk().map(|chunk| (change.version, chunk)));
            (self.version, self.count, self.head) = (change.version, change.count, change.head());
        }

        fn read_after(&self, group: EntryGroup) -> Option<EntryGroup> {
            let seen = group.version();
            let chunks = self.chunks.iter().filter(|(version, _)| *version > seen);
            group.read(self.version, self.count, &self.head, chunks.map(|(_, chunk)| &chunk[..]))
        }
    }

    fn ids(numbers: impl IntoIterator<Item = u32>) -> Vec<String> {
        numbers.into_iter().map(|number| format!("e{number}")).collect()
    }

    proptest! {
        #[test]
        fn b22_whoever_reads_a_group_whenever_knows_every_entry(
            steps in prop::collection::vec((0u32..400, 1u32..120, any::<bool>()), 1..20),
        ) {
            let (mut stored, mut writer, mut reader) = (Stored::default(), EntryGroup::default(), EntryGroup::default());
            let mut taken = HashSet::new();
            for (first, count, reads) in steps {
                let step = ids(first..first + count);
                let change = writer.add(step.iter().map(String::as_str));
                prop_assert!(change.head().len() <= HEAD_IDS_MAX * ID_BYTES);
                stored.write(&change);
                writer.written(change);
                taken.extend(step);
                if reads {
                    reader = stored.read_after(reader).unwrap();
                    prop_assert_eq!(&reader, &writer);
                }
            }
            for anew in [stored.read_after(reader), stored.read_after(EntryGroup::default())] {
                let anew = anew.unwrap();
                prop_assert_eq!((&anew, anew.len()), (&writer, taken.len()));
                prop_assert!(taken.iter().all(|id| anew.has(id)) && !anew.has("other"));
            }
        }

        #[test]
        fn nothing_panics(bytes in prop::collection::vec(any::<u8>(), 0..100), count: u64) {
            let _ = EntryGroup::default().read(1, count, &bytes, [&bytes[..]]);
        }
    }

    #[test]
    fn b22_a_head_without_its_chunk_is_read_again() {
        let many = ids(0..100);
        let change = EntryGroup::default().add(many.iter().map(String::as_str));
        let chunk = change.chunk().expect("too many for a head");
        assert_eq!((chunk.len(), change.head().len(), change.count), (1_600, 0, 100));
        let read = |chunks: &[&[u8]]| {
            EntryGroup::default().read(1, change.count, &change.head(), chunks.iter().copied())
        };
        assert_eq!(read(&[]), None);
        assert_eq!(read(&[&chunk[..1_599]]), None, "cut off");
        assert_eq!(read(&[&chunk]).map(|group| group.len()), Some(100));
        assert_eq!((minute_of(UnixMs(59_999)), minute_of(UnixMs(60_000))), (0, 1));
    }
}
