//! What crosses between actors: past-tense nouns, one per file. A message that holds much also holds
//! the permit that bounds it; the permit is given back when the message is dropped, even by a panic.

mod file_claimed;
mod file_closed;
mod inlet;
mod parsed_rows;

pub use file_claimed::FileClaimed;
pub use file_closed::FileClosed;
pub use inlet::{Inlet, Letter};
pub use parsed_rows::ParsedRows;
