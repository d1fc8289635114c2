//! Frames of videos, through an installed `ffmpeg`: it decodes AV1 and H.264, which no well-kept Rust crate does alike.

use std::io::{BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use crate::{Error, Frame, Result};

/// Longest side of a frame that is accepted.
const MAX_SIDE: usize = 1 << 14;

/// The program.
#[derive(Debug, Clone)]
pub struct Ffmpeg(PathBuf);

impl Ffmpeg {
    /// What to tell who has none.
    pub const MISSING: &str = "the dataset's pictures are videos, and no ffmpeg was found to decode them: install it \
                               (Debian: apt install ffmpeg), or name it with --ffmpeg";

    /// The program of that name, or of the search path. None where it does not run.
    pub fn find(named: Option<&Path>) -> Option<Self> {
        let program = named.unwrap_or(Path::new("ffmpeg"));
        let mut command = Command::new(program);
        command.arg("-version").stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        command.status().is_ok_and(|status| status.success()).then(|| Self(program.to_owned()))
    }

    /// The frames of these numbers, counted from the one at `from` seconds.
    pub(crate) fn frames(&self, path: &Path, from: f64, fps: f64, wanted: &[usize]) -> Result<Vec<Frame>> {
        let Some(last) = wanted.iter().max() else { return Ok(Vec::new()) };
        if !path.is_file() {
            return Err(Error::file(path, "the video is not there"));
        }
        let mut command = Command::new(&self.0);
        command.args(["-v", "error", "-nostdin"]);
        // The first frame that is not before this moment is ours; half a frame keeps rounding out of it.
        let start = from - 0.5 / fps;
        if start > 0.0 {
            command.arg("-ss").arg(format!("{start:.6}"));
        }
        command.arg("-i").arg(path);
        command.args(["-map", "0:v:0", "-fps_mode", "passthrough", "-frames:v", &(last + 1).to_string()]);
        command.args(["-f", "image2pipe", "-c:v", "ppm", "-"]);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let cannot = |why: String| Error::Video(format!("{} on {}: {why}", self.0.display(), path.display()));
        let mut child = Running(command.spawn().map_err(|e| cannot(e.to_string()))?);
        // Complaints are read beside the frames, so that neither pipe fills while the other is waited for.
        let complaints = child.0.stderr.take().map(|mut stderr| {
            std::thread::spawn(move || {
                let mut text = String::new();
                let _ = (&mut stderr).take(1 << 16).read_to_string(&mut text);
                let _ = std::io::copy(&mut stderr, &mut std::io::sink());
                text
            })
        });
        let mut frames: Vec<Option<Frame>> = vec![None; wanted.len()];
        let mut read = 0;
        if let Some(stdout) = child.0.stdout.take() {
            let mut stdout = BufReader::new(stdout);
            while let Some(frame) = ppm(&mut stdout).map_err(|why| cannot(why.to_string()))? {
                for (slot, _) in frames.iter_mut().zip(wanted).filter(|(_, number)| **number == read) {
                    *slot = Some(frame.clone());
                }
                read += 1;
            }
        }
        let status = child.0.wait().map_err(|e| cannot(e.to_string()))?;
        let complaints = complaints.and_then(|thread| thread.join().ok()).unwrap_or_default();
        let complaint = complaints.lines().next().unwrap_or("no reason given");
        if !status.success() {
            return Err(cannot(complaint.to_owned()));
        }
        let found: Option<Vec<Frame>> = frames.into_iter().collect();
        found.ok_or_else(|| {
            cannot(format!("frame {last} is wanted from {from:.3} s on, there are {read} ({complaint})"))
        })
    }
}

/// A program that does not outlive the wish for its pictures.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        // Neither fails once it has ended and was waited for.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The next picture of a stream of binary PPM; none at its end.
fn ppm(from: &mut impl Read) -> std::io::Result<Option<Frame>> {
    let wrong = || std::io::Error::other("its output is no stream of PPM pictures");
    let mut header = [0; 3];
    let mut first = [0];
    if from.read(&mut first)? == 0 {
        return Ok(None);
    }
    from.read_exact(&mut header[..2])?;
    if [first[0], header[0]] != *b"P6" {
        return Err(wrong());
    }
    let mut word = || {
        let (mut number, mut digits, mut byte) = (0usize, 0, [0]);
        loop {
            from.read_exact(&mut byte)?;
            match byte[0] {
                digit @ b'0'..=b'9' if digits < 6 => {
                    (number, digits) = (10 * number + usize::from(digit - b'0'), digits + 1)
                }
                b' ' | b'\n' if digits > 0 => return Ok(number),
                _ => return Err(wrong()),
            }
        }
    };
    let (width, height, most) = (word()?, word()?, word()?);
    if !(1..=MAX_SIDE).contains(&width) || !(1..=MAX_SIDE).contains(&height) || most != 255 {
        return Err(wrong());
    }
    let mut rgb = vec![0; 3 * width * height];
    from.read_exact(&mut rgb)?;
    Ok(Some(Frame { height, width, rgb }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pictures_are_read_one_after_the_other() {
        let bytes = b"P6\n2 1\n255\nabcdefP6\n1 1\n255\nxyz";
        let mut from = &bytes[..];
        let a = ppm(&mut from).unwrap().unwrap();
        assert_eq!((a.width, a.height, &a.rgb[..]), (2, 1, &b"abcdef"[..]));
        assert_eq!(ppm(&mut from).unwrap().unwrap().rgb, b"xyz");
        assert!(ppm(&mut from).unwrap().is_none());
        for bad in [
            &b"P5\n1 1\n255\nx"[..],
            b"P6\n0 1\n255\n",
            b"P6\n99999 1\n255\n",
            b"P6\n2 1\n255\nabc",
            b"P6\n1234567 1\n",
        ] {
            assert!(ppm(&mut &bad[..]).is_err());
        }
    }

    #[test]
    fn a_program_that_is_not_there_is_not_found() {
        assert!(Ffmpeg::find(Some(Path::new("/nowhere/ffmpeg"))).is_none());
        assert!(Ffmpeg::MISSING.contains("--ffmpeg"));
    }
}
