//! The modules of π0-FAST's answer. The tokens are given, so that a rounding changes numbers and not the sentence.

use pi0_device::{Device, HostTensor, Scope};

use super::inputs::{rows, upload};
use super::whole::{load, random_prefix};
use super::{Outputs, Setup};
use crate::pi0::PrefixCache;
use crate::{ModelError, Pi0};

/// The token that robot `robot` is given in step `step`.
fn token(setup: &Setup, robot: usize, step: usize) -> u32 {
    ((7 * robot + 31 * step + 3) % setup.config().vocab_size) as u32
}

/// The robots that still write in step `step`: they end one by one, the last one never.
fn writing(setup: &Setup, step: usize) -> Vec<usize> {
    (step.saturating_sub(1).min(setup.batch.len() - 1)..setup.batch.len()).collect()
}

/// Logits over random rows.
pub(super) fn head<D: Device>(d: &D, setup: &Setup) -> Result<Outputs, ModelError> {
    let model = load(d, setup)?;
    let rows = upload(d, &rows("last", 5, setup.config().gemma.width))?;
    Ok(vec![("logits".into(), model.logits(model.answer()?, &rows)?)])
}

/// The last rows of a prompt.
pub(super) fn prompt<D: Device>(d: &D, setup: &Setup) -> Result<Outputs, ModelError> {
    let (_, last) = load(d, setup)?.read_prompt(&setup.batch, &setup.layout()?)?;
    Ok(vec![("last".into(), d.download(&last)?)])
}

/// The rows of given tokens, over a random prefix.
pub(super) fn tokens<D: Device>(d: &D, setup: &Setup) -> Result<Outputs, ModelError> {
    let model = load(d, setup)?;
    read(setup, &model, &random_prefix(d, setup)?, |last| Ok(d.download(last)?))
}

/// Logits behind the prompt and behind each of the given tokens.
pub(super) fn whole<D: Device>(d: &D, setup: &Setup) -> Result<Outputs, ModelError> {
    let model = load(d, setup)?;
    let (prefix, last) = model.read_prompt(&setup.batch, &setup.layout()?)?;
    let logits = |last: &D::Tensor| model.logits(model.answer()?, last);
    let mut outputs = vec![("step0".into(), logits(&last)?)];
    outputs.extend(read(setup, &model, &prefix, logits)?);
    Ok(outputs)
}

fn read<D: Device>(
    setup: &Setup,
    model: &Pi0<D>,
    prefix: &PrefixCache<D>,
    output: impl Fn(&D::Tensor) -> Result<HostTensor, ModelError>,
) -> Result<Outputs, ModelError> {
    let layout = setup.layout()?;
    let mut written = model.nothing_written(setup.batch.len(), setup.steps)?;
    let mut outputs = Outputs::new();
    for step in 1..=setup.steps {
        let _scope = Scope::new(model.device(), format_args!("step{step}"));
        let robots = writing(setup, step);
        let tokens: Vec<_> = robots.iter().map(|&robot| vec![token(setup, robot, step)]).collect();
        let last = model.read_tokens(&tokens, &robots, &layout, prefix, &mut written)?;
        outputs.push((format!("step{step}"), output(&last)?));
    }
    Ok(outputs)
}
