//! The formats that a feed reads.

/// One accepted row of a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ParsedRow {
    /// Its number in the file, from 1.
    pub row: u64,
    /// Where its laid-out bytes end in the block; they begin where the row before ends.
    pub end: u32,
    /// The byte after it in the decompressed stream.
    pub offset: u64,
}
