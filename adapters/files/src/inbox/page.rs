//! `NAME.report.html`: the report for a person, one page that can be mailed to whoever asks. It needs nothing beside itself, asks
//! nothing of the network and holds no script. Names, reasons and answers are text, never markup (F56).

use std::fmt::{self, Write as _};

use postrider_actors::model::{
    file::{DestinationCounts, FileReport, FileState},
    finish::Thousands,
    time::{UnixMs, rfc3339},
};

/// Text in a page.
struct Escaped<'a>(&'a str);

impl fmt::Display for Escaped<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.chars().try_for_each(|char| match char {
            '&' => f.write_str("&amp;"),
            '<' => f.write_str("&lt;"),
            '>' => f.write_str("&gt;"),
            '"' => f.write_str("&quot;"),
            '\'' => f.write_str("&#39;"),
            // What reorders text, or is not to be seen, is shown as what it is.
            char if postrider_settings::escape::is_unsafe(char) => write!(f, "{}", char.escape_unicode()),
            char => f.write_char(char),
        })
    }
}

const STYLE: &str = "
:root{color-scheme:light dark;--paper:light-dark(#fff,#12161c);--sunk:light-dark(#eef0f4,#1b212a);--ink:light-dark(#12161d,#e9edf2);
--ink3:light-dark(#5c6675,#8f9aaa);--line:light-dark(#e0e3e9,#262d37);--sent:light-dark(#2257c4,#6f9eff);--dead:light-dark(#c0232e,#ff7d79);
--ok:light-dark(#19734a,#58c98f)}
body{margin:0 auto;max-width:880px;padding:32px 20px;background:var(--paper);color:var(--ink);font:14px/20px system-ui,sans-serif}
h1{font-size:26px;line-height:32px;margin:0 0 4px;overflow-wrap:anywhere}h2{font-size:15px;margin:32px 0 8px}p{margin:0 0 8px}
.sub{color:var(--ink3)}table{border-collapse:collapse;width:100%;font-size:13px}th{font-weight:500;text-align:left;color:var(--ink3)}
td,th{padding:6px 12px 6px 0;border-bottom:1px solid var(--line);vertical-align:top;overflow-wrap:anywhere}
td.n,th.n{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
tr.sum td,tr.sum th{border-top:3px double var(--ink);border-bottom:0;font-weight:600;color:var(--ink)}
.mono{font-family:ui-monospace,monospace;font-size:12px}.sent{color:var(--sent)}.dead{color:var(--dead)}.ok{color:var(--ok)}
.bar{display:flex;height:10px;border-radius:6px;overflow:hidden;background:var(--sunk);margin:0 0 8px}.bar i{display:block;min-width:1px}
@media print{body{padding:0}}";

/// The page.
pub(super) fn page(report: &FileReport) -> String {
    let mut page = String::with_capacity(8 << 10);
    // Writing to a String can't fail.
    let _ = write(report, &mut page);
    page
}

fn write(report: &FileReport, to: &mut String) -> fmt::Result {
    let name = Escaped(&report.file.name);
    write!(
        to,
        "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\">\n\
         <meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n\
         <title>{name} – delivery report</title>\n<style>{STYLE}</style></head>\n<body>\n\
         <h1>{name}</h1>\n<p class=\"sub\">Feed {}, delivery report of {}</p>\n<p>{}</p>\n",
        Escaped(&report.file.feed),
        rfc3339(report.settled_at.or(report.closed_at).unwrap_or(report.file.claimed_at)),
        Escaped(&headline(report)),
    )?;
    for (destination, counts) in &report.destinations {
        ledger(report, destination, counts, to)?;
    }
    steps(report, to)?;
    write!(
        to,
        "<h2>File</h2>\n<table>\n<tr><th scope=\"row\">Id</th><td class=\"mono\">{}</td></tr>\n\
         <tr><th scope=\"row\">SHA-256</th><td class=\"mono\">{}</td></tr>\n\
         <tr><th scope=\"row\">Size</th><td>{} bytes</td></tr>\n",
        report.file.id,
        Escaped(&report.file.sha256),
        Thousands(report.file.bytes),
    )?;
    for line in report.file.terms.lines() {
        let (word, value) = line.split_once(": ").unwrap_or(("terms", &line));
        writeln!(to, "<tr><th scope=\"row\">{}</th><td>{}</td></tr>", Escaped(word), Escaped(value))?;
    }
    to.write_str("</table>\n<p class=\"sub\">Written by Postrider. The same, for programs, is in the .report.json beside it.</p>\n</body></html>\n")
}

/// The answer, as a sentence.
fn headline(report: &FileReport) -> String {
    let sum = |of: fn(&DestinationCounts) -> u64| report.destinations.values().map(of).sum::<u64>();
    let (sent, dead, open) =
        (sum(|counts| counts.sent), sum(|counts| counts.dead), sum(DestinationCounts::open));
    let rows = Thousands(report.rows);
    let mut text = match (&report.state, open) {
        (FileState::Failed(reason) | FileState::SourceLost(reason), _) => {
            format!("The file failed: {reason}. Of {rows} rows that were read, ")
        }
        (_, 0) => format!("All {rows} rows have their final state: "),
        (_, open) => format!("Not final: {} messages are still open. Of {rows} rows, ", Thousands(open)),
    };
    let _ = write!(text, "{} messages sent, {} dead", Thousands(sent), Thousands(dead));
    for (word, count) in [
        ("unsent", sum(|counts| counts.unsent)),
        ("cancelled", sum(|counts| counts.cancelled)),
        ("rejected", report.rejected),
        ("duplicates", report.duplicates),
    ] {
        if count > 0 {
            let _ = write!(text, ", {} {word}", Thousands(count));
        }
    }
    text + if report.is_balanced() { ". It balances." } else { ". It does NOT balance." }
}

/// What became of the rows at one destination, and that it adds up.
fn ledger(
    report: &FileReport,
    destination: &str,
    counts: &DestinationCounts,
    to: &mut String,
) -> fmt::Result {
    let parts = [
        ("sent", counts.sent, "sent"),
        ("dead", counts.dead, "dead"),
        ("retrying", counts.retrying, ""),
        ("pending", counts.pending(), ""),
        ("unsent: their time was over", counts.unsent, ""),
        ("cancelled by an operator", counts.cancelled, ""),
        ("rejected rows", report.rejected, ""),
        ("duplicates left out", report.duplicates, ""),
    ];
    writeln!(to, "<h2>{}</h2>\n<div class=\"bar\" aria-hidden=\"true\">", Escaped(destination))?;
    for (word, count, _) in parts.iter().filter(|(_, count, _)| *count > 0) {
        let color = match *word {
            "sent" => "var(--sent)",
            "dead" => "var(--dead)",
            _ => "var(--ink3)",
        };
        write!(to, "<i style=\"flex:{count};background:{color}\"></i>")?;
    }
    to.write_str("</div>\n<table>\n")?;
    for (word, count, class) in parts.iter().filter(|(word, count, _)| *count > 0 || *word == "sent") {
        writeln!(
            to,
            "<tr><th scope=\"row\" class=\"{class}\">{word}</th><td class=\"n\">{}</td><td class=\"n\">{}</td></tr>",
            Thousands(*count),
            share(*count, report.rows)
        )?;
    }
    let total: u64 = parts.iter().map(|(_, count, _)| count).sum();
    let mark = if total == report.rows {
        "<span class=\"ok\">balanced</span>"
    } else {
        "<span class=\"dead\">NOT balanced</span>"
    };
    writeln!(
        to,
        "<tr class=\"sum\"><th scope=\"row\">{} rows read</th><td class=\"n\">{}</td><td class=\"n\">{mark}</td></tr>\n</table>",
        Thousands(report.rows),
        Thousands(total)
    )?;
    let Some(failures) = report.failures.get(destination).filter(|failures| !failures.is_empty()) else {
        return Ok(());
    };
    to.write_str("<p></p>\n<table>\n<tr><th>Dead by</th><th class=\"n\">status</th><th class=\"n\">messages</th></tr>\n")?;
    for failure in failures {
        let status = if failure.status == 0 { "–".to_owned() } else { failure.status.to_string() };
        writeln!(
            to,
            "<tr><td>{}</td><td class=\"n\">{status}</td><td class=\"n\">{}</td></tr>",
            failure.reason.as_str(),
            Thousands(failure.messages)
        )?;
    }
    to.write_str("</table>\n")
}

/// A share in percent: rounded down, and never 100 % of what is less.
fn share(count: u64, of: u64) -> String {
    let mille = u128::from(count) * 1_000 / u128::from(of.max(1));
    format!("{}.{} %", mille / 10, mille % 10)
}

fn steps(report: &FileReport, to: &mut String) -> fmt::Result {
    to.write_str("<h2>Times</h2>\n<table>\n")?;
    let mut step = |word: &str, at: Option<UnixMs>| match at {
        Some(at) => writeln!(to, "<tr><th scope=\"row\">{word}</th><td>{}</td></tr>", rfc3339(at)),
        None => writeln!(to, "<tr><th scope=\"row\">{word}</th><td>not yet</td></tr>"),
    };
    step("Claimed", Some(report.file.claimed_at))?;
    step("Last row read", report.closed_at)?;
    step("Last message settled", report.settled_at)?;
    if let Some(took) = report.took() {
        writeln!(to, "<tr><th scope=\"row\">Took</th><td>{:.1} s</td></tr>", took.as_secs_f64())?;
    }
    if let Some(per_s) = report.sent_per_s() {
        writeln!(
            to,
            "<tr><th scope=\"row\">Sent per second</th><td>{}</td></tr>",
            Thousands(per_s.round() as u64)
        )?;
    }
    to.write_str("</table>\n")
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use postrider_actors::model::{
        file::{DeadBy, FileRecord},
        ids::FileId,
        outcome::Reason,
        priority::Priority,
        terms::Terms,
    };

    use super::*;

    fn report(change: impl FnOnce(&mut FileReport)) -> FileReport {
        let counts = DestinationCounts { accepted: 970, sent: 960, dead: 10, ..DestinationCounts::default() };
        let dead = vec![DeadBy { reason: Reason::Status, status: 404, messages: 10 }];
        let mut report = FileReport {
            file: FileRecord {
                id: FileId([1; 16]),
                feed: "alerts".into(),
                name: "users.csv".into(),
                bytes: 12_345,
                sha256: "00".into(),
                claimed_at: UnixMs(1_800_000_000_000),
                destinations: vec!["support".into()],
                terms: Terms { finish_by: Some(UnixMs(1_800_000_100_000)), ..Terms::default() },
                priority: Priority::Normal,
            },
            state: FileState::Ingested,
            closed_at: Some(UnixMs(1_800_000_001_000)),
            settled_at: Some(UnixMs(1_800_000_010_000)),
            rows: 1_000,
            rejected: 10,
            duplicates: 20,
            destinations: BTreeMap::from([("support".to_owned(), counts)]),
            held: BTreeMap::new(),
            priorities: BTreeMap::new(),
            failures: BTreeMap::from([("support".to_owned(), dead)]),
        };
        change(&mut report);
        report
    }

    #[test]
    fn the_page_says_what_became_of_every_row_and_that_it_adds_up() {
        let page = page(&report(|_| {}));
        for says in [
            "All 1,000 rows have their final state: 960 messages sent, 10 dead, 10 rejected, 20 duplicates. It balances.",
            "<td class=\"n\">960</td><td class=\"n\">96.0 %</td>",
            "1,000 rows read",
            "balanced</span>",
            "<td>status</td><td class=\"n\">404</td><td class=\"n\">10</td>",
            "<td>2027-01-15T08:00:10.000Z</td>",
            "<td>10.0 s</td>",
            "finish_by",
        ] {
            assert!(page.contains(says), "{says}: {page}");
        }
        let odd = self::page(&report(|report| report.rows = 1_001));
        assert!(odd.contains("It does NOT balance.") && odd.contains("NOT balanced"), "{odd}");
    }

    #[test]
    fn f56_names_and_reasons_are_text_and_the_page_asks_for_nothing() {
        let evil = "<script>alert(1)</script>\"' onload=x \u{202e}&.csv";
        let page = page(&report(|report| {
            report.file.name = evil.into();
            report.file.feed = "</title><img src=x>".into();
            report.state = FileState::Failed("<b>no</b>".into());
            report.destinations = [("<i>".to_owned(), DestinationCounts::default())].into();
        }));
        for markup in ["<script", "<img", "<b>", "<i>", "\u{202e}", "onload=x \u{202e}"] {
            assert!(!page.contains(markup), "{markup}: {page}");
        }
        assert!(page.contains("&lt;script&gt;alert(1)&lt;/script&gt;&quot;&#39;"), "{page}");
        assert!(
            page.contains("default-src 'none'") && !page.contains("http://") && !page.contains("https://")
        );
    }

    #[test]
    fn a_share_is_never_more_than_it_is() {
        assert_eq!(
            (share(999_999, 1_000_000), share(0, 0), share(5, 5)),
            ("99.9 %".into(), "0.0 %".into(), "100.0 %".into())
        );
    }
}
