//! API keys: `Authorization: Api-Key KEY`, as openpi-client sends it.

use std::path::Path;

use axum::http::HeaderMap;
use axum::http::header::AUTHORIZATION;
use subtle::{Choice, ConstantTimeEq};

use crate::Error;

/// The accepted keys; with none, everybody is welcome.
#[derive(Default)]
pub(crate) struct ApiKeys(Vec<Vec<u8>>);

impl ApiKeys {
    /// Reads keys, one a line; empty lines and those that begin with `#` do not count.
    pub fn open(path: &Path) -> Result<Self, Error> {
        let text = std::fs::read_to_string(path).map_err(|e| Error::file(path, e))?;
        let lines = text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#'));
        let keys: Vec<Vec<u8>> = lines.map(|line| line.as_bytes().to_vec()).collect();
        match keys.is_empty() {
            // An empty file must not open the door.
            true => Err(Error::file(path, "holds no API key")),
            false => Ok(Self(keys)),
        }
    }

    /// Whether a request may come in. The time taken tells lengths, never contents.
    pub fn admit(&self, headers: &HeaderMap) -> bool {
        if self.0.is_empty() {
            return true;
        }
        let given = headers.get(AUTHORIZATION).map_or(&b""[..], |value| value.as_bytes());
        let scheme = given.get(..8).is_some_and(|scheme| scheme.eq_ignore_ascii_case(b"api-key "));
        let given = if scheme { &given[8..] } else { &[] };
        let mut found = Choice::from(0);
        for key in &self.0 {
            found |= key.as_slice().ct_eq(given);
        }
        found.into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_whole_keys_of_the_file_open() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), "# robots\nalpha\n\n beta \n").unwrap();
        let keys = ApiKeys::open(file.path()).unwrap();
        let admit = |value: &str| {
            let headers = HeaderMap::from_iter([(AUTHORIZATION, value.parse().unwrap())]);
            keys.admit(&headers)
        };
        assert!(admit("Api-Key alpha") && admit("Api-Key beta") && admit("api-key beta"));
        for bad in ["Api-Key alph", "Api-Key alphaa", "Api-Key", "Api-Key ", "alpha", "Bearer alpha", ""] {
            assert!(!admit(bad), "{bad}");
        }
        assert!(!keys.admit(&HeaderMap::new()));
        assert!(ApiKeys::default().admit(&HeaderMap::new()));
    }

    #[test]
    fn a_file_without_keys_is_an_error() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), "# none\n").unwrap();
        assert!(ApiKeys::open(file.path()).is_err());
    }
}
