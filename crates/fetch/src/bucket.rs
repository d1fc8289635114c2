//! Public buckets of Google Cloud Storage, into openpi's cache: `BUCKET/PREFIX` as in the bucket.

use std::fs;
use std::path::{Path, PathBuf};

use serde::Deserialize;

use crate::address::{encoded, is_path};
use crate::transfer::{Checksum, Client, Remote};
use crate::{Error, Listener, Progress, Result, Settings, disk};

const MOST_PAGES: usize = 100;
const MOST_FILES: usize = 100_000;

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Page {
    #[serde(default)]
    items: Vec<Item>,
    next_page_token: Option<String>,
}

#[derive(Deserialize)]
struct Item {
    name: String,
    size: String,
    crc32c: Option<String>,
}

pub(crate) fn fetch(
    bucket: &str,
    prefix: &str,
    settings: &Settings,
    listener: &Listener<'_>,
) -> Result<PathBuf> {
    let directory = settings.openpi_cache.join(bucket).join(prefix);
    // openpi's own program puts a folder here when it is whole, and so does this one.
    if directory.is_dir() {
        return Ok(directory);
    }
    let address = format!("gs://{bucket}/{prefix}");
    if settings.offline {
        return Err(Error::Offline { address, cache: settings.openpi_cache.clone() });
    }
    let client = Client::new(settings, &settings.storage, None);
    let mut files = list(bucket, &format!("{prefix}/"), settings, &client)?;
    files.retain(|file| !file.path.starts_with("train_state/"));
    if files.is_empty() {
        return Err(Error::Address { address, what: "nothing is there; check the name".into() });
    }
    let name = directory.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let _lock = disk::lock(&directory.with_file_name(format!("{name}.lock")), listener)?;
    if directory.is_dir() {
        return Ok(directory);
    }
    let partial = directory.with_file_name(format!("{name}.partial"));
    fs::create_dir_all(&partial).map_err(|e| Error::disk(&partial, e))?;
    let left = |file: &Remote| {
        let have = [whole(&partial, file), unfinished(&partial, file)];
        file.size.saturating_sub(have.iter().find_map(|p| Some(p.metadata().ok()?.len())).unwrap_or(0))
    };
    let total = files.iter().fold(0u64, |n, file| n.saturating_add(left(file)));
    disk::check_room(&partial, total, "OPENPI_DATA_HOME")?;
    listener(Progress::Total(total));
    for file in &files {
        let path = whole(&partial, file);
        if !path.metadata().is_ok_and(|m| m.len() == file.size) {
            client.fetch(file, &unfinished(&partial, file), &path, listener)?;
        }
    }
    fs::rename(&partial, &directory).map_err(|e| Error::disk(&directory, e))?;
    Ok(directory)
}

fn whole(partial: &Path, file: &Remote) -> PathBuf {
    partial.join(&file.path)
}

fn unfinished(partial: &Path, file: &Remote) -> PathBuf {
    let mut path = partial.join(&file.path).into_os_string();
    path.push(".incomplete");
    path.into()
}

/// The single object `name` of a bucket, if it is there.
pub(crate) fn object(bucket: &str, name: &str, settings: &Settings) -> Result<Option<Remote>> {
    let client = Client::new(settings, &settings.storage, None);
    let (folder, leaf) = name.rsplit_once('/').map_or(("", name), |(folder, leaf)| (folder, leaf));
    let folder = if folder.is_empty() { String::new() } else { format!("{folder}/") };
    let files = list_with(bucket, name, &folder, settings, &client)?;
    Ok(files.into_iter().find(|file| file.path == leaf))
}

fn list(bucket: &str, folder: &str, settings: &Settings, client: &Client<'_>) -> Result<Vec<Remote>> {
    list_with(bucket, folder, folder, settings, client)
}

/// Objects whose names begin with `prefix`, by their paths behind `folder`.
fn list_with(
    bucket: &str,
    prefix: &str,
    folder: &str,
    settings: &Settings,
    client: &Client<'_>,
) -> Result<Vec<Remote>> {
    let mut files = Vec::new();
    let mut token: Option<String> = None;
    for _ in 0..MOST_PAGES {
        let more = token.map_or(String::new(), |t| format!("&pageToken={}", encoded(&t)));
        let url = format!(
            "{}/storage/v1/b/{bucket}/o?prefix={}&fields=items(name,size,crc32c),nextPageToken{more}",
            settings.storage,
            encoded(prefix)
        );
        let (more, next) = page(&client.get_small(&url)?, &url, bucket, folder, settings)?;
        files.extend(more);
        if files.len() > MOST_FILES {
            return Err(Error::wrong(&url, format!("more than {MOST_FILES} files")));
        }
        token = next;
        if token.is_none() {
            return Ok(files);
        }
    }
    Err(Error::wrong(&settings.storage, format!("the listing of {prefix} has no end")))
}

/// The objects of one page of a listing, and what the next page is asked for with.
fn page(
    answer: &[u8],
    url: &str,
    bucket: &str,
    folder: &str,
    settings: &Settings,
) -> Result<(Vec<Remote>, Option<String>)> {
    let page: Page = serde_json::from_slice(answer)
        .map_err(|e| Error::wrong(url, format!("the answer is not the storage's: {e}")))?;
    let mut files = Vec::new();
    for item in page.items {
        let Some(path) = item.name.strip_prefix(folder) else {
            return Err(Error::wrong(url, format!("{:?} was not asked for", item.name)));
        };
        // Placeholders of folders.
        if path.is_empty() || path.ends_with('/') {
            continue;
        }
        if !is_path(path) {
            return Err(Error::wrong(url, format!("the name {path:?} leaves its folder")));
        }
        let size = item.size.parse().ok().filter(|&n: &u64| n < 1 << 50);
        let size = size.ok_or_else(|| Error::wrong(url, format!("{path} has the size {:?}", item.size)))?;
        let checksum = item.crc32c.as_deref().and_then(base64).map(Checksum::Crc32c);
        let checksum = checksum.ok_or_else(|| Error::wrong(url, format!("{path} has no checksum")))?;
        let address = format!("{}/{bucket}/{}", settings.storage, encoded(&item.name));
        files.push(Remote { url: address, path: path.into(), size, checksum: Some(checksum) });
    }
    Ok((files, page.next_page_token))
}

/// Four bytes in base64, the first the highest.
fn base64(text: &str) -> Option<u32> {
    const DIGITS: &[u8] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let digits: Vec<u64> = text
        .trim_end_matches('=')
        .bytes()
        .map(|b| DIGITS.iter().position(|d| *d == b).map(|i| i as u64))
        .collect::<Option<_>>()?;
    // Six digits of six bits hold the four bytes and four bits of nothing.
    (digits.len() == 6).then(|| (digits.iter().fold(0, |n, d| n << 6 | d) >> 4) as u32)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

        /// Whatever the storage answers: an error, or files that stay inside, with sizes and checksums.
        #[test]
        fn any_page(answer in crate::lies::answers(include_bytes!("../tests/data/bucket.json"))) {
            let settings = Settings::from_env();
            if let Ok((files, _)) = page(&answer, "http://storage", "b", "checkpoints/pi0_x/", &settings) {
                for file in files {
                    prop_assert!(is_path(&file.path), "{:?}", file.path);
                    prop_assert!(file.size < 1 << 50 && file.checksum.is_some());
                }
            }
        }
    }

    #[test]
    fn base64_of_four_bytes() {
        assert_eq!(super::base64("4waSgw=="), Some(0xE306_9283));
        assert_eq!(
            (super::base64("4waSgw"), super::base64("4waS"), super::base64("!waSgw==")),
            (Some(0xE306_9283), None, None)
        );
    }
}
