//! Places and limits, from the environment variables that the projects' own programs read.

use std::path::PathBuf;
use std::time::Duration;

/// Where to fetch from and to, and how patiently.
#[derive(Debug, Clone)]
pub struct Settings {
    /// The hub, without a closing slash.
    pub hub: String,
    /// The hub's cache: `models--OWNER--NAME` are in it.
    pub hub_cache: PathBuf,
    /// Who asks, for models that need to know.
    pub token: Option<String>,
    /// Never use the network.
    pub offline: bool,
    /// Google Cloud Storage, without a closing slash.
    pub storage: String,
    /// openpi's cache: buckets are in it.
    pub openpi_cache: PathBuf,
    /// Bytes of one request.
    pub part: u64,
    /// How long connecting may take, and an answer's beginning.
    pub answer: Duration,
    /// How long a part may take.
    pub part_time: Duration,
    /// Failures one after another, without a byte between them, after which a file is given up.
    pub attempts: u32,
    /// Pause after the first of them; each further one is twice as long.
    pub pause: Duration,
}

impl Settings {
    /// HF_ENDPOINT, HF_HUB_CACHE, HF_HOME, HF_TOKEN, HF_TOKEN_PATH, HF_HUB_OFFLINE, STORAGE_EMULATOR_HOST, OPENPI_DATA_HOME.
    pub fn from_env() -> Self {
        let var = |name: &str| std::env::var(name).ok().filter(|value| !value.is_empty());
        let path = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
        let home = std::env::home_dir().unwrap_or_else(|| PathBuf::from("."));
        let cache = path("XDG_CACHE_HOME").unwrap_or_else(|| home.join(".cache"));
        let hub_home = path("HF_HOME").unwrap_or_else(|| cache.join("huggingface"));
        let token_file = path("HF_TOKEN_PATH").unwrap_or_else(|| hub_home.join("token"));
        let token = var("HF_TOKEN").or_else(|| std::fs::read_to_string(token_file).ok());
        let address = |name: &str, default: &str| {
            let value = var(name).unwrap_or_else(|| default.into());
            let value = if value.contains("://") { value } else { format!("http://{value}") };
            value.trim_end_matches('/').to_owned()
        };
        let yes = |value: String| matches!(value.to_ascii_uppercase().as_str(), "1" | "ON" | "YES" | "TRUE");
        Self {
            hub: address("HF_ENDPOINT", "https://huggingface.co"),
            hub_cache: path("HF_HUB_CACHE").unwrap_or_else(|| hub_home.join("hub")),
            token: token.map(|t| t.trim().to_owned()).filter(|t| !t.is_empty()),
            offline: var("HF_HUB_OFFLINE").is_some_and(yes),
            storage: address("STORAGE_EMULATOR_HOST", "https://storage.googleapis.com"),
            // openpi does not ask XDG_CACHE_HOME.
            openpi_cache: path("OPENPI_DATA_HOME").unwrap_or_else(|| home.join(".cache/openpi")),
            part: 64 << 20,
            answer: Duration::from_secs(30),
            part_time: Duration::from_secs(600),
            attempts: 6,
            pause: Duration::from_millis(500),
        }
    }
}
