use std::{any::Any, collections::BTreeMap, future::Future, sync::Arc};

use crate::{
    model::table::{Column, ColumnSource, ColumnType, Mapping, TableRow},
    ports::{Table, TableError},
    testing::MemoryTable,
};

/// An empty table under test, with the columns of [`columns`].
pub struct TableSubject {
    /// The table.
    pub table: Arc<dyn Table>,
    /// A text that its column `who` refuses.
    pub refused: String,
    /// What is in it: `who` by `id`.
    pub read: Box<dyn Fn() -> BTreeMap<String, Option<String>>>,
    /// What must live as long: a server.
    pub guard: Box<dyn Any>,
}

/// The mapping of every table under test: `id`, `who`, `amount`.
pub fn columns() -> Mapping {
    let column =
        |name: &str, source, kind| Column { name: name.into(), source, kind, required: name == "id" };
    let columns = vec![
        column("id", ColumnSource::Id, ColumnType::Text),
        column("who", ColumnSource::Recipient, ColumnType::Text),
        column("amount", ColumnSource::Field("amount".into()), ColumnType::Integer),
    ];
    Mapping { columns }
}

/// The contract of a warehouse's table. Each case gets an empty one.
pub async fn tables<F: Future<Output = TableSubject>>(make: impl Fn() -> F) {
    nothing_is_written_by_no_rows(make().await).await;
    rows_are_written_once_however_often_they_come(make().await).await;
    a_key_that_is_twice_in_a_statement_is_one_row(make().await).await;
    a_row_that_is_there_is_left_as_it_is(make().await).await;
    all_rows_are_written_or_none(make().await).await;
    texts_come_back_as_they_went(make().await).await;
    two_writers_of_the_same_rows_write_them_once(make().await).await;
    rows_by_themselves_are_written_but_for_those_that_are_refused(make().await).await;
}

fn row(id: &str, who: Option<&str>) -> TableRow {
    MemoryTable::row(&Arc::new(columns()), &[Some(id), who, Some("7")])
}

fn rows(ids: std::ops::Range<u32>) -> Vec<TableRow> {
    let mapping = Arc::new(columns());
    ids.map(|id| MemoryTable::row(&mapping, &[Some(&format!("k{id:05}")), Some("w"), None])).collect()
}

async fn nothing_is_written_by_no_rows(subject: TableSubject) {
    subject.table.insert(&[]).await.unwrap();
    assert!((subject.read)().is_empty());
    assert!(subject.table.statement_bytes_max() > 10_000);
}

async fn rows_are_written_once_however_often_they_come(subject: TableSubject) {
    let rows = rows(0..1_000);
    for _ in 0..2 {
        subject.table.insert(&rows).await.unwrap();
        assert_eq!((subject.read)().len(), 1_000);
    }
}

async fn a_key_that_is_twice_in_a_statement_is_one_row(subject: TableSubject) {
    let rows = [row("a", Some("x")), row("b", None), row("a", Some("x"))];
    subject.table.insert(&rows).await.unwrap();
    let expected = BTreeMap::from([("a".to_owned(), Some("x".to_owned())), ("b".to_owned(), None)]);
    assert_eq!((subject.read)(), expected);
}

async fn a_row_that_is_there_is_left_as_it_is(subject: TableSubject) {
    subject.table.insert(&[row("a", Some("before"))]).await.unwrap();
    subject.table.insert(&[row("a", Some("after")), row("b", None)]).await.unwrap();
    assert_eq!((subject.read)()["a"].as_deref(), Some("before"));
    assert_eq!((subject.read)().len(), 2);
}

async fn all_rows_are_written_or_none(subject: TableSubject) {
    let refused = row("c", Some(&subject.refused));
    let answer = subject.table.insert(&[row("a", None), refused.clone(), row("b", None)]).await;
    assert!(matches!(&answer, Err(TableError::Refused(refusal)) if !refusal.words.is_empty()), "{answer:?}");
    assert!((subject.read)().is_empty());
    let alone = subject.table.insert(&[refused]).await;
    assert!(matches!(alone, Err(TableError::Refused(_))), "{alone:?}");
    subject.table.insert(&[row("a", None), row("b", None)]).await.expect("it goes on after a refusal");
    assert_eq!((subject.read)().len(), 2);
}

async fn texts_come_back_as_they_went(subject: TableSubject) {
    let texts = [
        "",
        " ",
        "=cmd|' /C calc'!A0", // F33
        r"back\slash \' \\' \",
        "'; DROP TABLE t; --",
        "quote\" 'twice''",
        "{1,\"2\",NULL}",
        "NULL",
        "a,b\tc\nd\r\n",
        "$1 :x ?",
        "żółć 中文 \u{1f600} \u{202e}",
        "\\N",
        "\\x41 \\u0041 \\101",
        "--",
        "/*",
    ];
    let ids: Vec<_> = (0..texts.len()).map(|at| format!("k{at:02}")).collect();
    let rows: Vec<_> = ids.iter().zip(texts).map(|(id, text)| row(id, Some(text))).collect();
    subject.table.insert(&rows).await.unwrap();
    let read = (subject.read)();
    for (id, text) in ids.iter().zip(texts) {
        assert_eq!(read[id].as_deref(), Some(text));
    }
}

async fn two_writers_of_the_same_rows_write_them_once(subject: TableSubject) {
    let (one, mut other) = (rows(0..300), rows(100..400));
    other.reverse();
    // A table may refuse one of two for the other's sake; written again, as the stage does, both are there.
    for _ in 0..5 {
        let (first, second) = tokio::join!(subject.table.insert(&one), subject.table.insert(&other));
        if first.is_ok() && second.is_ok() {
            break;
        }
    }
    subject.table.insert(&one).await.unwrap();
    subject.table.insert(&other).await.unwrap();
    assert_eq!((subject.read)().len(), 400);
}

async fn rows_by_themselves_are_written_but_for_those_that_are_refused(subject: TableSubject) {
    if !subject.table.sifts() {
        return;
    }
    subject.table.insert(&[row("a", Some("before"))]).await.unwrap();
    let refused = || row("c", Some(&subject.refused));
    let rows = [row("a", Some("after")), refused(), row("b", None), row("b", Some("twice")), refused()];
    for _ in 0..2 {
        let answer = subject.table.sift(&rows).await.unwrap();
        assert_eq!(answer.iter().map(|(at, _)| *at).collect::<Vec<_>>(), [1, 4]);
        assert!(answer.iter().all(|(_, refusal)| !refusal.words.is_empty() && !refusal.code.is_empty()));
        let expected = BTreeMap::from([("a".to_owned(), Some("before".to_owned())), ("b".to_owned(), None)]);
        assert_eq!((subject.read)(), expected);
    }
    assert_eq!(subject.table.sift(&[]).await, Ok(Vec::new()));
}
