//! Text made safe for HTML, and tables.

/// Escapes what HTML would read as markup.
pub fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out += "&amp;",
            '<' => out += "&lt;",
            '>' => out += "&gt;",
            '"' => out += "&quot;",
            c => out.push(c),
        }
    }
    out
}

/// A cell of a table.
pub enum Cell {
    /// Words, on the left.
    Text(String),
    /// A number, on the right.
    Number(String),
    /// A verdict, in colour and in words.
    Mark(bool, String),
    /// Markup, such as a chart.
    Raw(String),
}

impl Cell {
    /// Words.
    pub fn text(text: impl Into<String>) -> Self {
        Cell::Text(text.into())
    }

    /// A number that is already formatted.
    pub fn number(text: impl Into<String>) -> Self {
        Cell::Number(text.into())
    }

    fn html(&self) -> String {
        match self {
            Cell::Text(t) => format!("<td>{}</td>", escape(t)),
            Cell::Number(t) => format!("<td class=n>{}</td>", escape(t)),
            Cell::Mark(good, t) => {
                format!("<td><span class={}>{}</span></td>", if *good { "good" } else { "bad" }, escape(t))
            }
            Cell::Raw(markup) => format!("<td class=chart>{markup}</td>"),
        }
    }
}

/// A table; its header stands on the side that the first row's cells stand on.
pub fn table(header: &[&str], rows: &[Vec<Cell>]) -> String {
    let class = |i: usize| match rows.first().and_then(|r| r.get(i)) {
        Some(Cell::Number(_)) => " class=n",
        _ => "",
    };
    let head: String =
        header.iter().enumerate().map(|(i, h)| format!("<th{}>{}</th>", class(i), escape(h))).collect();
    let body: String =
        rows.iter().map(|r| format!("<tr>{}</tr>\n", r.iter().map(Cell::html).collect::<String>())).collect();
    format!("<table><thead><tr>{head}</tr></thead><tbody>\n{body}</tbody></table>\n")
}

/// A chart with its title.
pub fn figure(title: &str, chart: &str) -> String {
    format!("<figure><figcaption>{}</figcaption>{chart}</figure>", escape(title))
}

/// Names and what they stand for.
pub fn facts(rows: &[(&str, String)]) -> String {
    let line = |(k, v): &(&str, String)| format!("<dt>{}</dt><dd>{}</dd>", escape(k), escape(v));
    format!("<dl>{}</dl>", rows.iter().map(line).collect::<String>())
}
