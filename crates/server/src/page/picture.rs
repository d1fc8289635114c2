//! Pictures as browsers take them.

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use image::codecs::png::{CompressionType, FilterType, PngEncoder};
use image::{ExtendedColorType, ImageEncoder};

/// A square picture, `[size, size, 3]`.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Picture {
    pub rgb: Vec<u8>,
    pub size: u32,
}

impl Picture {
    /// A `data:` URL of a PNG, which loses nothing.
    pub fn url(&self) -> Option<String> {
        let mut png = Vec::with_capacity(self.rgb.len() / 2);
        let encoder = PngEncoder::new_with_quality(&mut png, CompressionType::Fast, FilterType::Sub);
        encoder.write_image(&self.rgb, self.size, self.size, ExtendedColorType::Rgb8).ok()?;
        Some(format!("data:image/png;base64,{}", BASE64_STANDARD.encode(png)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_picture_comes_back_byte_for_byte() {
        let rgb: Vec<u8> = (0..3 * 9 * 9).map(|i: usize| (i * 37 % 256) as u8).collect();
        let url = Picture { rgb: rgb.clone(), size: 9 }.url().unwrap();
        let png = BASE64_STANDARD.decode(url.strip_prefix("data:image/png;base64,").unwrap()).unwrap();
        assert_eq!(image::load_from_memory(&png).unwrap().into_rgb8().into_raw(), rgb);
    }

    #[test]
    fn the_networks_numbers_become_the_bytes_that_they_were() {
        let image: Vec<f32> = (0..3 * 16 * 16).map(|i| (i % 256) as f32 / 255.0 * 2.0 - 1.0).collect();
        let picture = super::super::network_picture(&image).unwrap();
        for (i, x) in picture.rgb.iter().enumerate() {
            assert_eq!(usize::from(*x), (i % 3 * 256 + i / 3) % 256);
        }
        assert!(super::super::network_picture(&image[1..]).is_none());
        assert_eq!(super::super::network_picture(&[-3.0; 12]).unwrap().rgb, [0; 12]);
    }
}
