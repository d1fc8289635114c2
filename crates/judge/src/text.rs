//! Tables for a terminal.

use comfy_table::{CellAlignment, Table, presets};

/// A plain table; all columns but the first are numbers, aligned right.
pub fn table(header: &[String], rows: impl IntoIterator<Item = Vec<String>>) -> String {
    let mut table = Table::new();
    table.load_preset(presets::NOTHING).set_header(header);
    for row in rows {
        table.add_row(row);
    }
    for column in table.column_iter_mut().skip(1) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    let lines: Vec<_> = table.lines().map(|l| l.trim_end().to_string()).collect();
    lines.join("\n") + "\n"
}
