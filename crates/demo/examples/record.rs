//! Records training samples: `record OUT.safetensors SAMPLES SEED [IMAGE_SIZE] [HORIZON]`.

use std::error::Error;
use std::path::Path;

use pi0_demo::record::{Recording, write};

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [out, samples, seed, rest @ ..] = arguments.as_slice() else {
        return Err("usage: record OUT.safetensors SAMPLES SEED [IMAGE_SIZE] [HORIZON]".into());
    };
    let number = |index: usize, default| rest.get(index).map_or(Ok(default), |text| text.parse());
    let recording = Recording {
        samples: samples.parse()?,
        seed: seed.parse()?,
        image_size: number(0, 56)?,
        horizon: number(1, 8)?,
    };
    Ok(write(Path::new(out), &recording)?)
}
