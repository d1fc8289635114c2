//! The committed binaries are what the sources give, where the compiler is at hand.

use std::path::Path;
use std::process::Command;

/// Needs `SLANGC`, or `slangc` on the path, of the version that made the binaries.
#[test]
fn binaries_are_those_of_the_sources() {
    let kernels = Path::new(env!("CARGO_MANIFEST_DIR")).join("kernels");
    let compiler = std::env::var("SLANGC").unwrap_or_else(|_| "slangc".into());
    let Ok(version) = Command::new(&compiler).arg("-v").output() else {
        eprintln!("skipped: there is no {compiler}; tools/get-slangc.sh makes one");
        return;
    };
    let said = String::from_utf8_lossy(&[version.stdout, version.stderr].concat()).trim().to_string();
    let wanted = std::fs::read_to_string(kernels.join("spv/COMPILER")).unwrap();
    if said != wanted.trim() {
        eprintln!("skipped: slangc is {said}, the binaries were made by {}", wanted.trim());
        return;
    }
    let out = std::env::temp_dir().join(format!("pi0-kernels-{}", std::process::id()));
    let status = Command::new(kernels.join("build.sh")).arg(&out).env("SLANGC", &compiler).status().unwrap();
    assert!(status.success());
    let mut count = 0;
    for entry in std::fs::read_dir(&out).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap();
        let (new, old) =
            (std::fs::read(&path).unwrap(), std::fs::read(kernels.join("spv").join(name)).unwrap());
        assert!(new == old, "{} differs from its source: run kernels/build.sh", name.to_string_lossy());
        count += 1;
    }
    std::fs::remove_dir_all(&out).unwrap();
    assert_eq!(count, std::fs::read_dir(kernels.join("spv")).unwrap().count());
}
