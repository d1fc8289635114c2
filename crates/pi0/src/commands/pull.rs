//! `pi0 pull`: fetches a checkpoint and does nothing else.

use anyhow::{Context, Result};
use pi0_fetch::Address;

use crate::output;
use crate::weights;

/// Fetch a checkpoint from the Hugging Face Hub or from openpi's bucket, and print its folder
#[derive(clap::Args)]
#[command(after_help = "Examples:
  pi0 pull hf://lerobot/pi0_base
  pi0 pull gs://openpi-assets/checkpoints/pi0_base
Read from the environment: HF_HOME, HF_HUB_CACHE, HF_TOKEN, HF_ENDPOINT, HF_HUB_OFFLINE, OPENPI_DATA_HOME, and the
usual ones for proxies. Files that are there already are not fetched again; a transfer that was cut goes on.")]
pub struct Args {
    /// hf://OWNER/NAME, hf://OWNER/NAME@REVISION or gs://BUCKET/FOLDER
    address: String,
}

/// Runs the command.
pub fn run(args: &Args) -> Result<()> {
    let address = Address::parse(&args.address)?.with_context(|| {
        format!("{}: wanted hf://OWNER/NAME[@REVISION] or gs://BUCKET/FOLDER", args.address)
    })?;
    let directory = weights::fetch(&address)?;
    output::print(&format!("{}\n", directory.display()))
}
