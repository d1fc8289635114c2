//! The page as one document: style, markup and script in a file each, joined here.

use std::fmt::Write as _;
use std::hash::{BuildHasher, Hasher};
use std::sync::LazyLock;

use super::View;

const STYLE: &str = include_str!("page.css");
const BODY: &str = include_str!("page.html");
const SCRIPT: &str = include_str!("page.js");

/// The live page.
pub(crate) struct Shell {
    pub text: &'static str,
    /// Its content security policy: nothing from outside, no script but its own.
    pub policy: String,
}

/// The live page, which holds no data.
pub(crate) fn shell() -> Shell {
    static SHELL: LazyLock<(String, String)> = LazyLock::new(|| {
        let nonce = || std::hash::RandomState::new().build_hasher().finish();
        let nonce = format!("{:016x}{:016x}", nonce(), nonce());
        (assemble("π0: what the policy sees", "null", &nonce), nonce)
    });
    let (text, nonce) = &*SHELL;
    let policy = format!(
        "default-src 'none'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; img-src data:; connect-src 'self'; \
         base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    );
    Shell { text, policy }
}

/// A file that shows observations one after the other, without a server.
pub fn document(title: &str, views: &[View]) -> String {
    let data =
        serde_json::to_string(&serde_json::json!({"title": title, "views": views})).unwrap_or_default();
    assemble(title, &data, "static")
}

/// JSON inside of a script: neither a tag nor a comment of HTML may begin in it.
fn inside_script(json: &str) -> String {
    let mut out = String::with_capacity(json.len());
    for c in json.chars() {
        match c {
            '<' | '>' | '&' | '\u{2028}' | '\u{2029}' => drop(write!(out, "\\u{:04x}", u32::from(c))),
            c => out.push(c),
        }
    }
    out
}

fn assemble(title: &str, data: &str, nonce: &str) -> String {
    let title: String = title
        .chars()
        .map(|c| match c {
            '<' => "&lt;".to_owned(),
            '&' => "&amp;".to_owned(),
            c => c.to_string(),
        })
        .collect();
    let data = inside_script(data);
    format!(
        "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n\
         <meta name=\"color-scheme\" content=\"light dark\">\n<title>{title}</title>\n\
         <style nonce=\"{nonce}\">\n{STYLE}</style>\n</head>\n<body>\n{BODY}\
         <script nonce=\"{nonce}\">\n\"use strict\";\nconst DATA = {data};\n{SCRIPT}</script>\n</body>\n</html>\n"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_leaves_the_script() {
        let json = serde_json::to_string("</script><script>alert(1)</script><!--&").unwrap();
        let inside = inside_script(&json);
        assert!(!inside.contains(['<', '>', '&']), "{inside}");
        assert_eq!(
            serde_json::from_str::<String>(&inside).unwrap(),
            "</script><script>alert(1)</script><!--&"
        );
        let page = document("<b>&", &[]);
        assert!(page.contains("<title>&lt;b>&amp;</title>"));
    }

    #[test]
    fn the_page_fetches_nothing_from_outside() {
        for part in [STYLE, BODY, SCRIPT] {
            let links = part.matches("http").count();
            // The one name that is no address.
            assert_eq!(links, part.matches("http://www.w3.org/2000/svg").count());
        }
        assert!(shell().policy.contains("default-src 'none'"));
    }
}
