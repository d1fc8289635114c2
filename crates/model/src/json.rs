//! JSON as Python writes and as editors save it.

/// The same JSON without a byte order mark, and with `null` for the `NaN` and `Infinity` that Python writes although JSON has
/// none; or what is wrong with it.
pub fn plain_json(bytes: &[u8]) -> Result<Vec<u8>, &'static str> {
    if bytes.starts_with(b"\xff\xfe") || bytes.starts_with(b"\xfe\xff") {
        return Err("is written in UTF-16; save it as UTF-8");
    }
    let mut rest = bytes.strip_prefix(b"\xef\xbb\xbf").unwrap_or(bytes);
    let mut out = Vec::with_capacity(rest.len());
    let mut quoted = false;
    while let Some((&byte, tail)) = rest.split_first() {
        if quoted && byte == b'\\' {
            out.push(byte);
            out.extend(tail.first());
            rest = tail.get(1..).unwrap_or_default();
            continue;
        }
        quoted ^= byte == b'"';
        let word = [&b"NaN"[..], b"Infinity", b"-Infinity"].into_iter().find(|word| rest.starts_with(word));
        match word.filter(|_| !quoted) {
            Some(word) => {
                out.extend(b"null");
                rest = &rest[word.len()..];
            }
            None => {
                out.push(byte);
                rest = tail;
            }
        }
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_in_strings_stay() {
        let text = r#"{"NaN \" NaN": NaN, "a": -Infinity, "b": "Infinity\\", "c": [Infinity]}"#;
        let plain = String::from_utf8(plain_json(text.as_bytes()).unwrap()).unwrap();
        assert_eq!(plain, r#"{"NaN \" NaN": null, "a": null, "b": "Infinity\\", "c": [null]}"#);
        assert_eq!(plain_json(b"\xef\xbb\xbf{}").unwrap(), b"{}");
        assert!(plain_json(b"\xff\xfe{\0}\0").unwrap_err().contains("UTF-16"));
    }
}
