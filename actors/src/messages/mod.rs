//! What crosses between actors: past-tense nouns, one per file. A message that holds much also holds
//! the permit that bounds it.
