//! Real-time chunking: a new chunk that continues the one still being executed. lerobot's two modes.
//!
//! *Guided*, for any checkpoint: each step, the velocity is corrected so that the chunk it leads to agrees with the
//! unexecuted tail of the previous chunk: fully over the actions that will be executed before this inference ends, then
//! less and less. *Trained*, for π0.5 checkpoints that learned it: the actions that will be executed meanwhile are given
//! to the network as they are, at time 0, and it writes the rest.

/// How a robot's new chunk continues its previous one.
#[derive(Debug, Clone, PartialEq)]
pub enum Rtc {
    /// Pulled towards it.
    Guided(Guidance),
    /// Written behind its next actions, which stay as they are.
    Trained(Clean),
}

/// Actions that are known already.
#[derive(Debug, Clone, PartialEq)]
pub struct Clean {
    /// The unexecuted tail of the last chunk, normalized, `[length, action_dim]`, of which the first `delay` rows count.
    pub previous: Vec<f32>,
    /// Actions that will be executed while this inference runs; 0 samples as without real-time chunking.
    pub delay: usize,
}

impl Clean {
    /// The known actions, `[delay, action_dim]`.
    pub fn rows(&self, action_dim: usize) -> &[f32] {
        &self.previous[..self.delay * action_dim]
    }
}

/// How to follow the previous chunk.
#[derive(Debug, Clone, PartialEq)]
pub struct Guidance {
    /// The unexecuted tail of the last chunk, normalized, `[length, action_dim]`. Its true length, not padded.
    pub previous: Vec<f32>,
    /// Actions that will be executed while this inference runs: `ceil(latency * rate)`.
    pub delay: usize,
    /// Actions over which the two chunks are tied together; 10 is usual.
    pub execution_horizon: usize,
    /// Largest weight of the correction; 10 is usual.
    pub max_weight: f64,
    /// How the tie weakens from `delay` to `execution_horizon`.
    pub schedule: GuidanceSchedule,
}

/// How the tie to the previous chunk weakens after the delay.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum GuidanceSchedule {
    /// Not at all after the delay.
    Zeros,
    /// Fully up to the execution horizon.
    Ones,
    /// Linearly.
    #[default]
    Linear,
    /// Faster than linearly: `u (e^u - 1) / (e - 1)`.
    Exp,
}

impl Guidance {
    /// Weight of each of the first `execution_horizon` actions; zero from there.
    pub(crate) fn weights(&self, action_dim: usize) -> Vec<f64> {
        let end = self.execution_horizon.min(self.previous.len() / action_dim);
        let start = self.delay.min(end);
        let weaken = |i: usize| {
            let u = 1.0 - (i - start + 1) as f64 / (end - start + 1) as f64;
            match self.schedule {
                GuidanceSchedule::Zeros => 0.0,
                GuidanceSchedule::Ones => 1.0,
                GuidanceSchedule::Linear => u,
                GuidanceSchedule::Exp => u * u.exp_m1() / 1f64.exp_m1(),
            }
        };
        (0..end).map(|i| if i < start { 1.0 } else { weaken(i) }).collect()
    }

    /// Strength of the correction at time `t`, which runs from 1 to 0.
    pub(crate) fn strength(&self, t: f64) -> f64 {
        let tau = 1.0 - t;
        if tau <= 0.0 {
            return self.max_weight;
        }
        let squares = t * t + tau * tau;
        (t / tau * (squares / (t * t))).min(self.max_weight)
    }

    /// Corrects `v` where the chunk `x - t v` that it leads to departs from the previous one. Both are
    /// `[horizon, action_dim]`; `t` is the exact time, before its rounding to f32.
    pub fn apply(&self, x: &[f32], v: &mut [f32], t: f64, action_dim: usize) {
        let strength = self.strength(t);
        for (row, weight) in self.weights(action_dim).into_iter().enumerate() {
            for i in row * action_dim..(row + 1) * action_dim {
                let end = f64::from(x[i]) - t * f64::from(v[i]);
                v[i] -= (strength * weight * (f64::from(self.previous[i]) - end)) as f32;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn guidance(schedule: GuidanceSchedule) -> Guidance {
        Guidance { previous: vec![0.5; 12], delay: 3, execution_horizon: 10, max_weight: 10.0, schedule }
    }

    fn close(got: &[f64], want: &[f64]) {
        assert_eq!(got.len(), want.len());
        assert!(got.iter().zip(want).all(|(g, w)| (g - w).abs() < 6e-5), "{got:?} {want:?}");
    }

    #[test]
    fn weights_are_those_of_lerobot() {
        let linear = guidance(GuidanceSchedule::Linear).weights(1);
        close(&linear, &[1.0, 1.0, 1.0, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125]);
        let exp = guidance(GuidanceSchedule::Exp).weights(1);
        close(&exp, &[1.0, 1.0, 1.0, 0.7123, 0.4876, 0.3158, 0.1888, 0.0993, 0.0413, 0.0097]);
        close(&guidance(GuidanceSchedule::Ones).weights(1), &[1.0; 10]);
        close(&guidance(GuidanceSchedule::Zeros).weights(1)[2..5], &[1.0, 0.0, 0.0]);
        // A short tail ties only as far as it reaches.
        assert_eq!(
            Guidance { previous: vec![0.0; 4], ..guidance(GuidanceSchedule::Linear) }.weights(1).len(),
            4
        );
    }

    #[test]
    fn strengths_are_those_of_lerobot() {
        let g = guidance(GuidanceSchedule::Linear);
        let got: Vec<f64> = (0..10).map(|k| g.strength(1.0 - f64::from(k) / 10.0)).collect();
        close(&got, &[10.0, 9.1111, 4.25, 2.7619, 2.1667, 2.0, 2.1667, 2.7619, 4.25, 9.1111]);
    }

    #[test]
    fn the_corrected_velocity_leads_towards_the_previous_chunk() {
        let g = guidance(GuidanceSchedule::Linear);
        let (x, mut v) = (vec![1.0; 12], vec![0.0; 12]);
        g.apply(&x, &mut v, 0.5, 1);
        // x leads to 1, the previous chunk is 0.5: strength 2, so v = 0 - 2 * w * (0.5 - 1) = w.
        assert!((v[0] - 1.0).abs() < 1e-6 && (v[3] - 0.875).abs() < 1e-6 && v[10] == 0.0, "{v:?}");
    }
}
