//! Records training samples: `record OUT.safetensors SAMPLES SEED [KEEP_FOUND]`.

use std::error::Error;
use std::path::Path;

use pi0_demo::record::{KEEP, Recording, write};

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [out, samples, seed, rest @ ..] = arguments.as_slice() else {
        return Err("usage: record OUT.safetensors SAMPLES SEED [KEEP_FOUND]".into());
    };
    let recording = Recording {
        samples: samples.parse()?,
        seed: seed.parse()?,
        image_size: 56,
        horizon: 8,
        keep_found: rest.first().map_or(Ok(KEEP), |text| text.parse())?,
    };
    Ok(write(Path::new(out), &recording)?)
}
