//! Addresses of checkpoints.

use crate::{Error, Result};

/// Where a checkpoint is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Address {
    /// A repository of the Hugging Face Hub.
    Hub {
        /// `OWNER/NAME`.
        repository: String,
        /// A branch, tag or commit.
        revision: String,
    },
    /// A folder in a public bucket of Google Cloud Storage.
    Bucket {
        /// The bucket.
        bucket: String,
        /// The folder, without a closing slash.
        prefix: String,
    },
}

impl Address {
    /// Reads `hf://…` and `gs://…`; none for anything else, which is a path.
    pub fn parse(text: &str) -> Result<Option<Self>> {
        let wrong = |what: &str| Error::Address { address: text.into(), what: what.into() };
        if let Some(rest) = text.strip_prefix("hf://") {
            let (repository, revision) = rest.split_once('@').unwrap_or((rest, "main"));
            let repository = repository.trim_end_matches('/');
            let parts: Vec<&str> = repository.split('/').collect();
            if parts.len() != 2 || !parts.iter().all(|p| is_name(p)) {
                return Err(wrong("wanted hf://OWNER/NAME, or hf://OWNER/NAME@REVISION"));
            }
            if !revision.split('/').all(is_name) {
                return Err(wrong("the revision behind @ is a branch, a tag or a commit"));
            }
            return Ok(Some(Self::Hub { repository: repository.into(), revision: revision.into() }));
        }
        if let Some(rest) = text.strip_prefix("gs://") {
            let (bucket, prefix) = rest.split_once('/').unwrap_or((rest, ""));
            let prefix = prefix.trim_end_matches('/');
            if !is_name(bucket) || prefix.is_empty() || !prefix.split('/').all(is_name) {
                return Err(wrong(
                    "wanted gs://BUCKET/FOLDER, such as gs://openpi-assets/checkpoints/pi0_base",
                ));
            }
            return Ok(Some(Self::Bucket { bucket: bucket.into(), prefix: prefix.into() }));
        }
        Ok(None)
    }
}

/// A part of a name that is safe in an address and in a path.
pub(crate) fn is_name(part: &str) -> bool {
    let plain = part.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.' | '+' | '='));
    plain && !part.is_empty() && !matches!(part, "." | "..") && part.len() <= 255
}

/// A path of a listing that stays in its folder.
pub(crate) fn is_path(path: &str) -> bool {
    let plain = |part: &str| {
        let odd = |c: char| c.is_control() || matches!(c, '\\' | ':');
        !matches!(part, "" | "." | "..") && part.len() <= 255 && !part.contains(odd)
    };
    path.len() <= 1024 && path.split('/').all(plain)
}

/// A path as it stands in an address.
pub(crate) fn encoded(path: &str) -> String {
    let byte = |b: u8| match b {
        b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'-' | b'_' | b'.' | b'~' | b'/' => {
            char::from(b).to_string()
        }
        b => format!("%{b:02X}"),
    };
    path.bytes().map(byte).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_and_paths_are_told_apart() {
        let hub = |repository: &str, revision: &str| {
            Some(Address::Hub { repository: repository.into(), revision: revision.into() })
        };
        assert_eq!(Address::parse("hf://lerobot/pi0_base").unwrap(), hub("lerobot/pi0_base", "main"));
        assert_eq!(Address::parse("hf://a/b@v1.0").unwrap(), hub("a/b", "v1.0"));
        assert_eq!(
            Address::parse("gs://openpi-assets/checkpoints/pi0_base/").unwrap(),
            Some(Address::Bucket { bucket: "openpi-assets".into(), prefix: "checkpoints/pi0_base".into() })
        );
        for path in ["models/tiny", "/a", "hf:/x", "."] {
            assert_eq!(Address::parse(path).unwrap(), None);
        }
        for wrong in [
            "hf://a",
            "hf://a/b/c",
            "hf://../b",
            "hf://a/b@",
            "hf://a/b@..",
            "gs://b",
            "gs://b/../c",
            "gs:///x",
            "hf://a/b c",
        ] {
            assert!(Address::parse(wrong).is_err(), "{wrong}");
        }
        assert!(
            is_path("params/d/0a b")
                && !is_path("../x")
                && !is_path("a//b")
                && !is_path("/a")
                && !is_path("a\\b")
        );
        assert_eq!(encoded("a b/ü#"), "a%20b/%C3%BC%23");
    }
}
