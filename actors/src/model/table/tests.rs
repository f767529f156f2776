use proptest::prelude::*;

use super::{value::Raw, *};
use crate::model::{
    batch::{RowLayout, put_cell},
    ids::FileId,
    priority::Priority,
    terms::Terms,
};

const ID: MessageId = MessageId { file: FileId([7; 16]), row: 3 };

fn column(name: &str, kind: ColumnType) -> Column {
    Column { name: name.into(), source: ColumnSource::Field(name.into()), kind, required: false }
}

fn key() -> Column {
    Column { name: "id".into(), source: ColumnSource::Id, kind: ColumnType::Text, required: true }
}

fn header(layout: RowLayout, mapping: &Mapping) -> BatchHeader {
    BatchHeader {
        feed: "orders".into(),
        destination: "warehouse".into(),
        file: ID.file,
        layout,
        template: Some(mapping.to_template()),
        content_type: MAPPING_TYPE.into(),
        terms: Terms::default(),
        priority: Priority::Normal,
    }
}

fn object(json: &str) -> Vec<u8> {
    let mut bytes = Vec::new();
    put_cell(&mut bytes, "user-1");
    bytes.extend_from_slice(json.as_bytes());
    bytes
}

fn row(columns: Vec<Column>, json: &str) -> Result<Vec<Option<String>>, String> {
    let mapping = Mapping { columns: [vec![key()], columns].concat() };
    let header = header(RowLayout::Objects, &mapping);
    let row = Mapping::of(&header).unwrap().row(&header, ID, &object(json))?;
    Ok(row.values.into_iter().skip(1).map(|value| value.map(Into::into)).collect())
}

fn normal(kind: ColumnType, text: &str) -> Result<Option<String>, String> {
    value::normalise(kind, &Raw::Text(text.into())).map(|value| value.map(Into::into))
}

#[test]
fn every_source_fills_its_column() {
    let of =
        |name: &str, source| Column { name: name.into(), source, kind: ColumnType::Text, required: true };
    let columns = vec![
        key(),
        of("who", ColumnSource::Recipient),
        of("feed", ColumnSource::Feed),
        column("n", ColumnType::Integer),
    ];
    let mapping = Mapping { columns };
    let layout = RowLayout::Columns { names: vec!["user".into(), "n".into()], recipient: 0 };
    let header = header(layout, &mapping);
    let mut bytes = Vec::new();
    put_cell(&mut bytes, "=cmd|x");
    put_cell(&mut bytes, "+07");
    let row = Mapping::of(&header).unwrap().row(&header, ID, &bytes).unwrap();
    let values: Vec<_> = row.values.iter().map(|value| value.as_deref().unwrap()).collect();
    assert_eq!(values, [ID.to_string().as_str(), "=cmd|x", "orders", "7"], "F33: cells stay as they are");
    assert_eq!(row.key(), ID.to_string());
    assert_eq!(format!("{row:?}"), "TableRow(4 values)", "I10");
}

#[test]
fn fields_of_objects_are_found_by_paths_and_keep_their_digits() {
    let json = r#"{"a":{"b":{"c":"d\n"}},"a.b":1,"n":12345678901234567890.123456789012345678,"o":{"x":[1, "é"]},"z":null}"#;
    let columns = vec![
        column("a.b.c", ColumnType::Text),
        column("a.b", ColumnType::Integer),
        column("n", ColumnType::Numeric),
        column("n", ColumnType::Text),
        column("o", ColumnType::Json),
        column("o.x", ColumnType::Text),
        column("z", ColumnType::Text),
        column("z.z", ColumnType::Text),
        column("n.z", ColumnType::Text),
    ];
    let named =
        columns.into_iter().enumerate().map(|(at, column)| Column { name: format!("c{at}"), ..column });
    let number = "12345678901234567890.123456789012345678";
    let expected = [
        Some("d\n"),
        Some("1"),
        Some(number),
        Some(number),
        Some(r#"{"x":[1, "é"]}"#),
        Some(r#"[1, "é"]"#),
        None,
        None,
        None,
    ];
    assert_eq!(row(named.collect(), json).unwrap(), expected.map(|value| value.map(ToOwned::to_owned)));
}

#[test]
fn what_is_missing_is_null_unless_it_is_required() {
    let optional = column("x", ColumnType::Integer);
    let required = Column { required: true, ..optional.clone() };
    for json in ["{}", r#"{"x":null}"#, r#"{"x":""}"#] {
        assert_eq!(row(vec![optional.clone()], json).unwrap(), [None]);
        let error = row(vec![required.clone()], json).unwrap_err();
        assert!(error.contains("`x`") && error.contains("required"), "{error}");
    }
    assert_eq!(row(vec![column("x", ColumnType::Text)], r#"{"x":""}"#).unwrap(), [Some(String::new())]);
    let mapping = Mapping { columns: vec![key(), required] };
    let header = header(RowLayout::Lines, &mapping);
    assert!(Mapping::of(&header).unwrap().row(&header, ID, b"user-1").is_err());
}

#[test]
fn s0_3_values_are_typed_and_errors_name_column_value_and_expectation() {
    let error = row(vec![column("amount", ColumnType::Integer)], r#"{"amount":"12x"}"#).unwrap_err();
    assert_eq!(error, "column `amount`: found \"12x\", expected a whole number of 64 bits");
    let ok =
        |kind, text: &str, expected: &str| assert_eq!(normal(kind, text).unwrap().as_deref(), Some(expected));
    let no = |kind, text: &str| assert!(normal(kind, text).is_err(), "{kind:?} {text}");
    ok(ColumnType::Integer, " -9223372036854775808 ", "-9223372036854775808");
    for text in ["9223372036854775808", "1.0", "1e3", "0x1", "٣", "-", "1 2", "NaN"] {
        no(ColumnType::Integer, text);
    }
    ok(ColumnType::Numeric, "+1.50", "1.50");
    ok(ColumnType::Numeric, "-.5", "-0.5");
    ok(ColumnType::Numeric, "1.25e3", "1250");
    ok(ColumnType::Numeric, "125E-5", "0.00125");
    ok(ColumnType::Numeric, "1.25e1", "12.5");
    for text in
        ["NaN", "Infinity", "1e1000", "1e-1001", "1e99999999999", ".", "1.2.3", "--1", "1,5", "e5", "é"]
    {
        no(ColumnType::Numeric, text);
    }
    ok(ColumnType::Double, "1e308", "1e308");
    ok(ColumnType::Double, "-0.5", "-0.5");
    for text in ["1e309", "inf", "NaN", "nan", "0x1p3", "1_0"] {
        no(ColumnType::Double, text);
    }
    ok(ColumnType::Boolean, "YES", "true");
    ok(ColumnType::Boolean, "0", "false");
    no(ColumnType::Boolean, "2");
    ok(ColumnType::Timestamp, "1700000000", "2023-11-14 22:13:20.000000+00");
    no(ColumnType::Timestamp, "yesterday");
    ok(ColumnType::Date, "2024-02-29", "2024-02-29");
    no(ColumnType::Date, "2023-02-29");
    ok(ColumnType::Json, " {\"a\": [1]} ", "{\"a\": [1]}");
    ok(ColumnType::Json, r#""\\u0000""#, r#""\\u0000""#);
    for text in ["{", "{} {}", r#""\u0000""#, r#"{"a":"\\\u0000"}"#] {
        no(ColumnType::Json, text);
    }
    let nested = |depth: usize| format!("{}\"[[\\\"[\"{}", "[".repeat(depth), "]".repeat(depth));
    ok(ColumnType::Json, &nested(128), &nested(128));
    let raw = nested(129);
    assert!(
        value::normalise(ColumnType::Json, &Raw::Json(&raw)).unwrap_err().contains("128"),
        "F66: a stack has a limit"
    );
    for kind in [ColumnType::Text, ColumnType::Json, ColumnType::Integer] {
        no(kind, "a\0b");
    }
}

#[test]
fn f57_a_mapping_with_a_hostile_name_or_without_a_key_is_refused() {
    let check = |columns: Vec<Column>| Mapping { columns }.validate();
    assert!(check(vec![key(), column("a", ColumnType::Text)]).is_ok());
    assert!(matches!(
        check(vec![key(), column("id\"; drop table x; --", ColumnType::Text)]),
        Err(MappingError::Identifier(_))
    ));
    assert!(matches!(check(vec![]), Err(MappingError::NoKey)));
    assert!(matches!(check(vec![column("a", ColumnType::Text)]), Err(MappingError::NoKey)));
    assert!(matches!(check(vec![key(), column("ID", ColumnType::Text)]), Err(MappingError::Twice(_))));
    let many = std::iter::once(key()).chain((0..1_600).map(|at| column(&format!("c{at}"), ColumnType::Text)));
    assert!(matches!(check(many.collect()), Err(MappingError::TooMany(1_601))));
    let webhook = BatchHeader {
        content_type: "application/json".into(),
        ..header(RowLayout::Lines, &Mapping { columns: vec![key()] })
    };
    assert!(matches!(Mapping::of(&webhook), Err(MappingError::NotATable(_))));
}

#[test]
fn statements_are_divided_by_rows_and_bytes_and_a_giant_row_is_alone() {
    assert_eq!(divide([1; 7], 3, 100), (vec![0..3, 3..6, 6..7], vec![]));
    assert_eq!(divide([40, 40, 40, 101, 100, 1], 10, 100), (vec![0..2, 2..3, 4..5, 5..6], vec![3]));
    assert_eq!(divide([], 3, 100), (vec![], vec![]));
}

proptest! {
    #[test]
    fn every_row_is_in_one_statement_or_too_large(
        sizes in prop::collection::vec(0usize..120, 0..60), rows_max in 1usize..9,
    ) {
        let (statements, too_large) = divide(sizes.iter().copied(), rows_max, 100);
        let mut rows: Vec<_> = statements.iter().cloned().flatten().chain(too_large.iter().copied()).collect();
        rows.sort_unstable();
        prop_assert_eq!(rows, (0..sizes.len()).collect::<Vec<_>>());
        for statement in statements {
            prop_assert!(statement.len() <= rows_max && !statement.is_empty());
            prop_assert!(sizes[statement].iter().sum::<usize>() <= 100);
        }
    }

    #[test]
    fn no_value_makes_it_panic(text: String, json: bool) {
        for kind in [
            ColumnType::Text, ColumnType::Integer, ColumnType::Numeric, ColumnType::Double, ColumnType::Boolean,
            ColumnType::Timestamp, ColumnType::Date, ColumnType::Json,
        ] {
            let raw = if json { Raw::Json(&text) } else { Raw::Text(text.as_str().into()) };
            let _ = value::normalise(kind, &raw);
        }
    }

    #[test]
    fn decimals_keep_their_value(whole in 0u64..1_000_000_000, fraction in "[0-9]{0,6}", exponent in -20i32..20) {
        let text = format!("{whole}.{fraction}e{exponent}");
        let written = normal(ColumnType::Numeric, &text).unwrap().unwrap();
        prop_assert!(!written.contains(['e', 'E']));
        let (before, after): (f64, f64) = (text.parse().unwrap(), written.parse().unwrap());
        prop_assert_eq!(before.to_bits(), after.to_bits());
    }
}
