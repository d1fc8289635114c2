//! What the report adds to the judge's page: benchmarks, as `pi0 bench` prints them.

use pi0_judge::report::html::{Cell, escape, facts, figure, table};
use pi0_judge::report::page;
use pi0_judge::report::svg::{Bar, bars};
use pi0_judge::results::{CheckResults, CoverageResults};
use serde::Serialize;

use crate::commands::bench::launches::LAUNCH_COLUMNS;
use crate::commands::bench::report::{OPERATION_COLUMNS, Report as Bench, STAGE_COLUMNS};

/// What the page is made of.
#[derive(Debug, Serialize)]
pub struct Report {
    /// Results of `pi0 check`.
    pub check: Option<CheckResults>,
    /// Results of `pi0 coverage`.
    pub coverage: Option<CoverageResults>,
    /// Results of `pi0 bench`.
    pub bench: Vec<Bench>,
}

impl Report {
    /// The whole page.
    pub fn page(&self) -> String {
        let benches: Vec<_> = self.bench.iter().map(section).collect();
        page(self.check.as_ref(), self.coverage.as_ref(), &benches)
    }
}

/// The section made from `pi0 bench`.
fn section(bench: &Bench) -> String {
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
    out += &table(&OPERATION_COLUMNS, &cells(bench.operations()));
    if let Some(launches) = &bench.launches {
        out += "<h3>Launches, by the GPU's clock</h3>";
        out += &facts(&launches.facts());
        out += &table(&LAUNCH_COLUMNS, &cells(launches.cells()));
    }
    out + "</section>"
}

/// A name and numbers.
fn cells(rows: Vec<Vec<String>>) -> Vec<Vec<Cell>> {
    let cell = |(i, text)| if i == 0 { Cell::Text(text) } else { Cell::Number(text) };
    rows.into_iter().map(|row| row.into_iter().enumerate().map(cell).collect()).collect()
}
