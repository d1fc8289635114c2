//! Errors of predicted actions against recorded ones.

use serde::{Deserialize, Serialize};

/// Sums over differences.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct Sums {
    /// How many.
    pub count: u64,
    /// Of absolute differences.
    pub absolute: f64,
    /// Of squares.
    pub squares: f64,
    /// The largest absolute difference.
    pub largest: f64,
}

impl Sums {
    fn add(&mut self, difference: f64) {
        let absolute = difference.abs();
        self.count += 1;
        self.absolute += absolute;
        self.squares += difference * difference;
        self.largest = self.largest.max(absolute);
    }

    fn merge(&mut self, other: &Self) {
        self.count += other.count;
        self.absolute += other.absolute;
        self.squares += other.squares;
        self.largest = self.largest.max(other.largest);
    }

    /// Mean absolute error; 0 of nothing.
    pub fn mean(&self) -> f64 {
        self.absolute / self.count.max(1) as f64
    }

    /// Root of the mean square.
    pub fn root_mean_square(&self) -> f64 {
        (self.squares / self.count.max(1) as f64).sqrt()
    }
}

/// Errors of one episode. What a resumed evaluation needs to go on.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct EpisodeErrors {
    /// Its number.
    pub episode: usize,
    /// Chunks that were predicted.
    pub chunks: u64,
    /// By dimension.
    pub dimensions: Vec<Sums>,
    /// By step of the chunk, all dimensions together.
    pub steps: Vec<Sums>,
    /// By dimension: sum and sum of squares of the recorded actions of all frames, and their number.
    pub recorded: Vec<[f64; 3]>,
}

impl EpisodeErrors {
    /// Of an episode whose recorded actions are these, `[frames][width]`.
    pub fn new(episode: usize, recorded: &[Vec<f64>]) -> Self {
        let width = recorded.first().map_or(0, Vec::len);
        let mut sums = vec![[0.0; 3]; width];
        for action in recorded {
            for (sum, x) in sums.iter_mut().zip(action) {
                *sum = [sum[0] + x, sum[1] + x * x, sum[2] + 1.0];
            }
        }
        Self { episode, dimensions: vec![Sums::default(); width], recorded: sums, ..Self::default() }
    }

    /// Adds a chunk, `[rows][cols]`, against the actions that were recorded from there on. What lies behind the end of
    /// the episode is not compared.
    pub fn add<'a>(&mut self, chunk: impl Iterator<Item = &'a [f64]>, recorded: &[Vec<f64>]) {
        self.chunks += 1;
        for (t, (predicted, recorded)) in chunk.zip(recorded).enumerate() {
            if self.steps.len() <= t {
                self.steps.resize(t + 1, Sums::default());
            }
            for ((p, r), sums) in predicted.iter().zip(recorded).zip(&mut self.dimensions) {
                sums.add(p - r);
                self.steps[t].add(p - r);
            }
        }
    }

    /// All of the episode.
    pub fn total(&self) -> Sums {
        self.dimensions.iter().fold(Sums::default(), |mut all, sums| {
            all.merge(sums);
            all
        })
    }
}

/// Errors of all episodes.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct OpenLoop {
    /// By dimension.
    pub dimensions: Vec<Sums>,
    /// Standard deviation of the recorded actions, by dimension.
    pub deviations: Vec<f64>,
    /// By step of the chunk.
    pub steps: Vec<Sums>,
    /// Everything.
    pub total: Sums,
    /// Chunks that were predicted.
    pub chunks: u64,
}

impl OpenLoop {
    /// Adds up episodes.
    pub fn of(episodes: &[EpisodeErrors]) -> Self {
        let mut all = Self::default();
        let mut recorded: Vec<[f64; 3]> = Vec::new();
        for episode in episodes {
            all.chunks += episode.chunks;
            merge(&mut all.dimensions, &episode.dimensions);
            merge(&mut all.steps, &episode.steps);
            all.total.merge(&episode.total());
            recorded.resize(recorded.len().max(episode.recorded.len()), [0.0; 3]);
            for (sum, more) in recorded.iter_mut().zip(&episode.recorded) {
                (0..3).for_each(|i| sum[i] += more[i]);
            }
        }
        let deviation = |[sum, squares, n]: &[f64; 3]| (squares / n - (sum / n).powi(2)).max(0.0).sqrt();
        all.deviations = recorded.iter().map(deviation).collect();
        all
    }
}

fn merge(all: &mut Vec<Sums>, more: &[Sums]) {
    all.resize(all.len().max(more.len()), Sums::default());
    all.iter_mut().zip(more).for_each(|(sums, more)| sums.merge(more));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_are_those_of_a_hand_calculation() {
        let recorded = vec![vec![0.0, 10.0], vec![1.0, 20.0], vec![2.0, 30.0]];
        let mut episode = EpisodeErrors::new(3, &recorded);
        let chunk = [[0.5, 10.0], [1.0, 18.0]];
        episode.add(chunk.iter().map(|row| &row[..]), &recorded);
        // The second row lies behind the end.
        episode.add(chunk.iter().map(|row| &row[..]), &recorded[2..]);
        assert_eq!(episode.dimensions[0].count, 3);
        assert_eq!(episode.dimensions[0].absolute, 0.5 + 0.0 + 1.5);
        assert_eq!(episode.dimensions[1].absolute, 0.0 + 2.0 + 20.0);
        assert_eq!(episode.dimensions[1].largest, 20.0);
        assert_eq!((episode.steps[0].count, episode.steps[1].count), (4, 2));
        assert_eq!(episode.steps[1].mean(), 1.0);
        let all = OpenLoop::of(&[episode.clone(), episode]);
        assert_eq!((all.chunks, all.total.count), (4, 12));
        assert!((all.deviations[0] - (2.0f64 / 3.0).sqrt()).abs() < 1e-12);
        assert!((all.total.root_mean_square() - ((0.25 + 4.0 + 2.25 + 400.0) / 6.0f64).sqrt()).abs() < 1e-12);
    }
}
