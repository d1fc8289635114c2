//! Which cores are near which memory banks.
//!
//! On NoC 0 what a core reads goes from a DRAM tile to the right along the tile's row, then down the core's column, around
//! the edges of the chip. Where cores read banks wherever they are, links are shared by many, and the banks deliver two
//! thirds of what they could; 48 cores that each read one bank, carefully chosen, were measured at 267 GB/s of 288 (ISA
//! documentation, DRAMTile). So weights lie in blocks ([`Blocks`](crate::dram::Blocks)), every core is given a group of two
//! banks and a tile at which it reads them, as many cores to each group, such that no link carries much more than others,
//! and those cores compute the columns whose weights lie there.

use super::{BANKS, COLUMNS, NOC_SIZE, ROWS};
use crate::transport::Xy;

/// Columns and rows of the chip's cores on NoC 0, in the order of translated coordinates; working rows come first there.
const CORE_COLUMNS: [u8; COLUMNS] = [1, 2, 3, 4, 6, 7, 8, 9];
const CORE_ROWS: [u8; ROWS] = [1, 2, 3, 4, 5, 7, 8, 9, 10, 11];
/// The rows that the bits of the management processor's mask of rows that do not work stand for (tt-umd).
const MASKED_ROWS: [u8; ROWS] = [11, 1, 10, 2, 9, 3, 8, 4, 7, 5];

/// Groups of banks.
const GROUPS: usize = BANKS.len();
/// How often all pairs of cores are looked at, at most.
const ROUNDS: usize = 20;

/// Where cores read weights.
#[derive(Debug, Clone)]
pub(crate) struct Near {
    columns: usize,
    /// The cores, row by row of the grid.
    cores: Vec<Place>,
}

#[derive(Debug, Clone)]
struct Place {
    /// Coordinates on NoC 0.
    at: Xy,
    /// The group of banks that it is near.
    group: usize,
    /// At which of a group's tiles it reads: of its own group the one chosen for it, of others the nearest.
    tiles: [usize; GROUPS],
}

/// A link, by the router that it leaves and whether it goes down.
type Link = (u8, u8, bool);

fn hops(from: Xy, to: Xy) -> (u8, u8) {
    let ahead = |from: u8, to: u8, size: u8| (to + size - from) % size;
    (ahead(from.x, to.x, NOC_SIZE.0), ahead(from.y, to.y, NOC_SIZE.1))
}

/// The links from a DRAM tile to a core: that from the tile into its router too, which counts as another column's.
fn links(from: Xy, to: Xy) -> impl Iterator<Item = Link> {
    let (right, down) = hops(from, to);
    let row = (0..right).map(move |i| ((from.x + i) % NOC_SIZE.0, from.y, false));
    let column = (0..down).map(move |i| (to.x, (from.y + i) % NOC_SIZE.1, true));
    std::iter::once((NOC_SIZE.0 + from.x, from.y, false)).chain(row).chain(column)
}

/// How many cores' data each link carries.
struct Load([[[u16; 2]; 12]; 20]);

impl Load {
    fn new() -> Self {
        Load([[[0; 2]; 12]; 20])
    }

    fn at(&mut self, (x, y, down): Link) -> &mut u16 {
        &mut self.0[usize::from(x)][usize::from(y)][usize::from(down)]
    }

    /// Adds a core; by how much the sum of fourth powers grows, which is what shall be small.
    fn add(&mut self, from: Xy, to: Xy) -> u64 {
        let mut grown = 0;
        for link in links(from, to) {
            let n = self.at(link);
            *n += 1;
            grown += u64::from(*n).pow(4) - u64::from(*n - 1).pow(4);
        }
        grown
    }

    fn remove(&mut self, from: Xy, to: Xy) -> u64 {
        let mut shrunk = 0;
        for link in links(from, to) {
            let n = self.at(link);
            *n -= 1;
            shrunk += u64::from(*n + 1).pow(4) - u64::from(*n).pow(4);
        }
        shrunk
    }

    /// The tile of a group at which one more core reads best.
    fn best(&mut self, group: usize, core: Xy) -> usize {
        let cost = |tile: &usize| {
            let grown = self.add(BANKS[group][*tile], core);
            self.remove(BANKS[group][*tile], core);
            grown
        };
        (0..BANKS[group].len()).min_by_key(cost).unwrap_or(0)
    }
}

impl Near {
    /// For a grid on a chip of which some rows do not work.
    pub(super) fn new((columns, rows): (usize, usize), harvested: u32) -> Self {
        let broken =
            |row: u8| MASKED_ROWS.iter().enumerate().any(|(bit, r)| *r == row && harvested >> bit & 1 == 1);
        let working = CORE_ROWS.into_iter().filter(|row| !broken(*row)).take(rows);
        let places = working.flat_map(|y| CORE_COLUMNS.into_iter().take(columns).map(move |x| Xy { x, y }));
        let nearest = |at: Xy| {
            BANKS.map(|group| {
                let far = |tile: &usize| {
                    let (right, down) = hops(group[*tile], at);
                    right + down
                };
                (0..group.len()).min_by_key(far).unwrap_or(0)
            })
        };
        let mut cores: Vec<Place> = places.map(|at| Place { at, group: 0, tiles: nearest(at) }).collect();
        // The halves of the grid each have as many cores of every group, since cores that share may be those of a half.
        let half = |core: usize| core / columns.max(1) / (rows / 2).max(1);
        let mut load = Load::new();
        for (i, c) in cores.iter_mut().enumerate() {
            c.group = i % GROUPS;
            c.tiles[c.group] = load.best(c.group, c.at);
            load.add(BANKS[c.group][c.tiles[c.group]], c.at);
        }
        for _ in 0..ROUNDS {
            let mut better = false;
            for a in 0..cores.len() {
                better |= improve(&mut load, &mut cores, a, a);
                for b in (0..a).filter(|b| half(*b) == half(a)) {
                    better |= improve(&mut load, &mut cores, a, b);
                }
            }
            if !better {
                break;
            }
        }
        Near { columns, cores }
    }

    /// Columns of the grid.
    pub(crate) fn columns(&self) -> usize {
        self.columns
    }

    /// The coordinates at which a core reads the banks of each group.
    pub(super) fn tiles(&self, core: usize) -> [Xy; GROUPS] {
        let tiles = self.cores.get(core).map_or([0; GROUPS], |c| c.tiles);
        std::array::from_fn(|group| BANKS[group][tiles[group]])
    }

    /// Chooses cores of the rectangle from `first` to `last` for members of which each reads a block of a weight: cores near
    /// that block where there are such, no core twice, the first one in any case.
    pub(crate) fn choose(&self, first: (usize, usize), last: (usize, usize), blocks: &[u32]) -> Vec<usize> {
        let columns = self.columns;
        let area = (first.1..=last.1).flat_map(|y| (first.0..=last.0).map(move |x| y * columns + x));
        let group = |member: usize| blocks[member] as usize % GROUPS;
        let mut free: Vec<usize> = area.collect();
        let corner = free.first().copied().unwrap_or(0);
        let mut chosen = vec![None; blocks.len()];
        let corner_group = self.cores.get(corner).map_or(0, |c| c.group);
        let at_corner = (0..blocks.len()).find(|m| group(*m) == corner_group).unwrap_or(0);
        if let Some(member) = chosen.get_mut(at_corner) {
            *member = Some(corner);
            free.retain(|core| *core != corner);
        }
        for g in 0..GROUPS {
            let members: Vec<usize> =
                (0..blocks.len()).filter(|m| group(*m) == g && chosen[*m].is_none()).collect();
            let cores: Vec<usize> = free.iter().copied().filter(|c| self.cores[*c].group == g).collect();
            // Spread over all that are near, if there are more than are needed.
            let some = cores.len().min(members.len());
            let spread = (0..some).map(|i| cores[i * cores.len() / some]);
            for (member, core) in members.into_iter().zip(spread) {
                chosen[member] = Some(core);
                free.retain(|c| *c != core);
            }
        }
        let mut rest = free.into_iter();
        chosen.into_iter().filter_map(|core| core.or_else(|| rest.next())).collect()
    }
}

/// Two cores trade groups, or one core another tile of its group, if that is better.
fn improve(load: &mut Load, cores: &mut [Place], a: usize, b: usize) -> bool {
    let (ga, gb) = (cores[a].group, cores[b].group);
    if a != b && ga == gb {
        return false;
    }
    let each: &[(usize, usize)] = if a == b { &[(a, ga)] } else { &[(a, gb), (b, ga)] };
    let now = |cores: &[Place], core: usize| BANKS[cores[core].group][cores[core].tiles[cores[core].group]];
    let before: u64 = each.iter().map(|(core, _)| load.remove(now(cores, *core), cores[*core].at)).sum();
    let mut after = 0;
    let new: Vec<usize> = each
        .iter()
        .map(|(core, group)| {
            let tile = load.best(*group, cores[*core].at);
            after += load.add(BANKS[*group][tile], cores[*core].at);
            tile
        })
        .collect();
    if after < before {
        for ((core, group), tile) in each.iter().zip(new) {
            cores[*core].group = *group;
            cores[*core].tiles[*group] = tile;
        }
        return true;
    }
    for ((core, group), tile) in each.iter().zip(new) {
        load.remove(BANKS[*group][tile], cores[*core].at);
    }
    for (core, _) in each {
        load.add(now(cores, *core), cores[*core].at);
    }
    false
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    /// The most loaded link's share of what all banks deliver, if each core reads as much.
    fn busiest(flows: impl IntoIterator<Item = (Xy, Xy, f64)>) -> f64 {
        let mut load = std::collections::HashMap::new();
        let mut all = 0.0;
        for (from, to, bytes) in flows {
            links(from, to).for_each(|link| *load.entry(link).or_insert(0.0) += bytes);
            all += bytes;
        }
        load.into_values().fold(0.0, f64::max) / all
    }

    /// A link carries 32 bytes a cycle, 28.8 GB/s at 0.9 GHz: a tenth of all that the banks deliver.
    #[test]
    fn no_link_carries_what_many_cores_read() {
        for (what, grid, harvested) in [
            ("n150", (8, 9), 1),
            ("n300", (8, 8), 0b11),
            ("n300", (8, 8), 0b10_0100_0000),
            ("whole", (8, 10), 0),
        ] {
            let near = Near::new(grid, harvested);
            let cores = &near.cores;
            let rows: HashSet<u8> = cores.iter().map(|c| c.at.y).collect();
            assert_eq!(rows.len(), grid.1);
            assert!(!rows.contains(&MASKED_ROWS[0]) || harvested & 1 == 0);
            let own = |c: &Place| (BANKS[c.group][c.tiles[c.group]], c.at, 1.0);
            let placed = busiest(cores.iter().map(own));
            // As activations lie: every core reads all banks, each at the tile whose turn it is.
            let spread = |(i, c): (usize, &Place)| -> Vec<_> {
                (0..12).map(|bank| (BANKS[bank / 2][(i + bank % 2) % 3], c.at, 1.0)).collect()
            };
            let anywhere = busiest(cores.iter().enumerate().flat_map(spread));
            println!(
                "{what} {harvested:b}: of 288 GB/s the busiest link carries {:.1} near, {:.1} anywhere",
                288.0 * placed,
                288.0 * anywhere
            );
            assert!(placed < 0.075 && anywhere > 0.08, "{what}: {placed} {anywhere}");
            for g in 0..GROUPS {
                let n = cores.iter().filter(|c| c.group == g).count();
                assert!((cores.len() / GROUPS..=cores.len().div_ceil(GROUPS)).contains(&n), "{what}: {n}");
            }
        }
    }

    #[test]
    fn members_are_near_their_blocks_and_one_is_first() {
        for (grid, members, first, last) in [
            ((8, 10), 80, (0, 0), (7, 9)),
            ((8, 8), 40, (0, 0), (7, 7)),
            ((8, 8), 32, (0, 4), (7, 7)),
            ((3, 2), 5, (0, 0), (2, 1)),
            ((8, 8), 2, (0, 3), (1, 3)),
            ((1, 2), 2, (0, 0), (0, 1)),
        ] {
            let near = Near::new(grid, 0);
            for halves in [1, 2] {
                let blocks: Vec<u32> = (0..members).map(|m| (m * 12 / halves / members) as u32).collect();
                let chosen = near.choose(first, last, &blocks);
                assert_eq!(chosen.iter().collect::<HashSet<_>>().len(), members, "{grid:?} {chosen:?}");
                assert!(chosen.contains(&(first.1 * grid.0 + first.0)), "{grid:?} {chosen:?}");
                let inside = |c: usize| {
                    (first.0..=last.0).contains(&(c % grid.0)) && (first.1..=last.1).contains(&(c / grid.0))
                };
                assert!(chosen.iter().all(|c| inside(*c)), "{grid:?} {chosen:?}");
                let close = chosen
                    .iter()
                    .zip(&blocks)
                    .filter(|(c, b)| near.cores[**c].group == **b as usize % GROUPS);
                assert!(members < 6 || close.count() * 10 >= members * 8, "{grid:?} {chosen:?}");
            }
        }
    }
}
