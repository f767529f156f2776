//! Which shard a message belongs to (S3.9), so that messages of one partition key keep their order.

use sha2::{Digest, Sha256};

/// The shard, in `0..shards`, of a partition key: the first 4 bytes of SHA-256 of the key, read as a
/// little-endian **unsigned** number, modulo `shards`. (Read as signed, half the keys would land in
/// negative shards: the defect of the seed.) A message without a key goes anywhere: pass `random`.
///
/// # Panics
/// If `shards` is 0.
pub fn shard(key: Option<&str>, shards: u32, random: u32) -> u32 {
    let number = key.map_or(random, |key| {
        let digest = Sha256::digest(key.as_bytes());
        u32::from_le_bytes([digest[0], digest[1], digest[2], digest[3]])
    });
    number % shards
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn s3_9_vectors() {
        for (key, expected) in [("user-0", 3), ("user-1", 2), ("user-2", 17)] {
            assert_eq!(shard(Some(key), 20, 0), expected, "{key}");
        }
    }

    proptest! {
        #[test]
        fn s3_9_every_key_lands_in_a_shard(key: Option<String>, shards in 1u32.., random: u32) {
            prop_assert!(shard(key.as_deref(), shards, random) < shards);
        }
    }
}
