//! From actions as a robot got them back to the network's units: what real-time chunking continues from.

use super::OutputStep;
use crate::{Error, Policy, Prepared, Result};

impl Policy {
    /// The inverse of [`postprocess`](Self::postprocess), for the unexecuted tail of an earlier chunk: `[rows, cols]` in
    /// the robot's units to `[rows, action_dim]`, normalized. Relative actions become relative to the state of
    /// `prepared`, the observation from which the next chunk is planned. Dimensions that the robot does not have
    /// are zero, as in lerobot.
    ///
    /// # Errors
    /// The width is not that of this policy's actions, or a value is not finite.
    pub fn normalize_actions(&self, actions: &[f64], cols: usize, prepared: &Prepared) -> Result<Vec<f32>> {
        if cols != self.cols || !actions.len().is_multiple_of(cols.max(1)) {
            let (got, wanted) = (actions.len(), self.cols);
            return Err(Error::Actions(format!("actions have {wanted} values, got {got} in rows of {cols}")));
        }
        let mut out = Vec::with_capacity(actions.len() / cols.max(1) * self.facts.action_dim);
        for (t, row) in actions.chunks_exact(cols.max(1)).enumerate() {
            let mut action = row.to_vec();
            for step in self.after.iter().rev() {
                step.undo(&mut action, &prepared.reference);
            }
            action.resize(self.facts.action_dim, 0.0);
            if let Some(i) = action.iter().position(|x| !(*x as f32).is_finite()) {
                return Err(Error::Actions(format!("value {i} of action {t} is {}", action[i])));
            }
            out.extend(action.iter().map(|&x| x as f32));
        }
        Ok(out)
    }
}

impl OutputStep {
    /// Takes back what the step did. `reference` is the state that relative actions refer to.
    pub(crate) fn undo(&self, action: &mut [f64], reference: &[f64]) {
        match self {
            // What was cropped is lost; the caller fills in zeros.
            OutputStep::Crop(_) => {}
            OutputStep::Unnormalize(normalizer) => normalizer.forward(action),
            OutputStep::Absolute(mask) | OutputStep::AbsoluteF32(mask) => {
                for ((x, state), _) in action.iter_mut().zip(reference).zip(mask).filter(|(_, on)| **on) {
                    *x -= state;
                }
            }
            OutputStep::Aloha(units) => units.decode_action(action),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pipeline::run_outputs;
    use crate::pipeline::{Formula, Normalizer, Stats};
    use crate::robot::{AlohaUnits, Robot};

    #[test]
    fn every_step_is_undone() {
        let width = 14;
        let stats = |scale: f64| Stats {
            a: (0..width).map(|i| 0.1 * f64::from(i)).collect(),
            b: (0..width).map(|i| scale + 0.01 * f64::from(i)).collect(),
        };
        let steps = |units, formula, scale| {
            vec![
                OutputStep::Unnormalize(Normalizer { formula, stats: stats(scale), eps: 1e-8 }),
                OutputStep::Absolute(Robot::Aloha.delta_mask()),
                OutputStep::Aloha(units),
            ]
        };
        let reference: Vec<f64> = (0..width).map(|i| f64::from(i).sin()).collect();
        for (units, formula) in [
            (AlohaUnits::OpenPi, Formula::OpenPiZScore),
            (AlohaUnits::Lerobot, Formula::LerobotMeanStd),
            (AlohaUnits::OpenPi, Formula::OpenPiQuantile),
            (AlohaUnits::OpenPi, Formula::LerobotRange),
        ] {
            let steps = steps(units, formula, 2.0);
            let original: Vec<f64> = (0..width).map(|i| f64::from(i * i).cos()).collect();
            let mut action = original.clone();
            run_outputs(&steps, &mut action, &reference);
            assert!(action.iter().zip(&original).any(|(a, b)| (a - b).abs() > 0.1), "{formula:?}: no effect");
            for step in steps.iter().rev() {
                step.undo(&mut action, &reference);
            }
            for (got, wanted) in action.iter().zip(&original) {
                assert!((got - wanted).abs() < 1e-6, "{formula:?}: {got} {wanted}");
            }
        }
    }
}
