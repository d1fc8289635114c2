//! How much cache a core has, as the system tells.

use crate::threads::allowed;

/// What is assumed where the system does not tell: what every processor with AVX-512 has.
const UNKNOWN: usize = 512 << 10;
/// Bounds of what is believed: virtual machines tell of caches that their processor does not have.
const BELIEVED: [usize; 2] = [256 << 10, 2 << 20];
/// The most of the third level that is believed: a virtual machine shares it with others.
const BELIEVED_THIRD: usize = 32 << 20;

/// Bytes of second-level cache that one core has for itself: the least of the cores that this process may use.
pub(crate) fn second_level() -> usize {
    let of_core = |cpu| level_of(cpu, 2).map(|(size, cores)| size / cores);
    let least = allowed().into_iter().filter_map(of_core).min();
    least.unwrap_or(UNKNOWN).clamp(BELIEVED[0], BELIEVED[1])
}

/// Bytes of the cache behind it, which cores share: the least that one of the cores that this process may use sees; 0
/// where the system does not tell.
pub(crate) fn third_level() -> usize {
    let least = allowed().into_iter().filter_map(|cpu| level_of(cpu, 3)).map(|(size, _)| size).min();
    least.unwrap_or(0).min(BELIEVED_THIRD)
}

/// Bytes of the cache of some level that a logical processor sees, and how many cores have it together.
fn level_of(cpu: usize, level: usize) -> Option<(usize, usize)> {
    let read = |path: &str| std::fs::read_to_string(format!("/sys/devices/system/cpu/cpu{cpu}/{path}")).ok();
    let siblings = count(&read("topology/thread_siblings_list")?)?;
    (0..8).find_map(|i| {
        let of = |what: &str| read(&format!("cache/index{i}/{what}"));
        if of("level")?.trim() != level.to_string() || of("type")?.trim() == "Instruction" {
            return None;
        }
        let cores = (count(&of("shared_cpu_list")?)? / siblings.max(1)).max(1);
        Some((bytes(&of("size")?)?, cores))
    })
}

/// How many numbers a list such as `0-3,8` names.
fn count(list: &str) -> Option<usize> {
    list.trim().split(',').try_fold(0, |sum, run| {
        let (first, last) = run.split_once('-').unwrap_or((run, run));
        let (first, last) = (first.parse::<usize>().ok()?, last.parse::<usize>().ok()?);
        Some(sum + last.checked_sub(first)? + 1)
    })
}

/// Bytes from `1024K` or `2M`.
fn bytes(size: &str) -> Option<usize> {
    let size = size.trim();
    let unit = match size.chars().last()? {
        'K' => 1 << 10,
        'M' => 1 << 20,
        _ => return size.parse().ok(),
    };
    size[..size.len() - 1].parse::<usize>().ok()?.checked_mul(unit)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_system_writes_is_read() {
        assert_eq!(
            [count("0\n"), count("0-3,8"), count("0,2,4-5"), count(""), count("3-1")],
            [Some(1), Some(5), Some(4), None, None]
        );
        assert_eq!(
            [bytes("1024K\n"), bytes("2M"), bytes("77"), bytes("K"), bytes("")],
            [Some(1 << 20), Some(2 << 20), Some(77), None, None]
        );
        assert!((BELIEVED[0]..=BELIEVED[1]).contains(&second_level()));
        assert!(third_level() <= BELIEVED_THIRD);
    }
}
