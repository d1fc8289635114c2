//! The benchmark: facts, stages and operations, as `pi0 bench` prints them.

use super::html::{Cell, escape, facts, figure, table};
use super::svg::{Bar, bars};
use crate::commands::bench::report::{OPERATION_COLUMNS, Report, STAGE_COLUMNS};

/// The section made from `pi0 bench`.
pub fn section(bench: &Report) -> String {
    let mut out = format!("<section><h2>Benchmark</h2>{}", facts(&bench.facts()));
    let mut start = 0.0;
    let rows: Vec<Bar> = bench
        .tables
        .stages
        .iter()
        .map(|l| {
            let bar = Bar {
                name: l.name.clone(),
                start,
                pieces: vec![(0, l.ms.median)],
                label: format!("{:.2} ms", l.ms.median),
            };
            start += l.ms.median;
            bar
        })
        .collect();
    out += &figure("Stages, medians end to end", &bars("ms", &["median time"], &rows));
    out += &format!("<p class=note>{}</p>", escape(&bench.runs()));
    out += &table(&STAGE_COLUMNS, &cells(bench.stages()));
    out += "<h3>Operations</h3>";
    out + &table(&OPERATION_COLUMNS, &cells(bench.operations())) + "</section>"
}

/// A name and numbers.
fn cells(rows: Vec<Vec<String>>) -> Vec<Vec<Cell>> {
    let cell = |(i, text)| if i == 0 { Cell::Text(text) } else { Cell::Number(text) };
    rows.into_iter().map(|row| row.into_iter().enumerate().map(cell).collect()).collect()
}
