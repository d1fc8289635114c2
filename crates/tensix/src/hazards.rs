pub(crate) fn check(_code: &[u32]) -> Vec<String> {
    Vec::new()
}
