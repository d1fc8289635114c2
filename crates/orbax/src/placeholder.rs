//! What downloads leave where a file should be.

/// What `bytes` are, if they are no file's own: a noun and what to do.
pub fn placeholder(bytes: &[u8]) -> Option<&'static str> {
    let begins = |heads: &[&[u8]]| heads.iter().any(|head| bytes.starts_with(head));
    if begins(&[b"version https://git-lfs"]) {
        return Some(
            "a git-lfs pointer, not the file itself: run `git lfs install` and `git lfs pull` in its folder, or download \
             the file",
        );
    }
    begins(&[b"<!DOCTYPE", b"<!doctype", b"<html", b"<?xml"])
        .then_some("a web page, not the file itself: what was downloaded is a message of the server")
}
