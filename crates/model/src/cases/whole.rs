//! The modules outside the towers, and those made of whole towers.

use pi0_device::{Device, Scope};

use super::inputs::{rows, upload};
use super::{Outputs, Setup};
use crate::gemma::LayerCache;
use crate::modulation::{Modulations, condition};
use crate::pi0::{Condition, PrefixCache};
use crate::weights::Weights;
use crate::{Extent, Kind, ModelError, Pi0, SampleOptions};

pub(super) fn load<'d, D: Device>(d: &'d D, setup: &Setup) -> Result<Pi0<&'d D>, ModelError> {
    Pi0::load(d, setup.checkpoint.clone(), Extent::Cache, &|_| ())
}

/// The embedded times as they come back from the device, and what the network makes of them first: of π0 the time half
/// of the suffix's first layer, of π0.5 the vector that drives the norms.
pub(super) fn time_embedding<D: Device>(d: &D, setup: &Setup) -> Result<Outputs, ModelError> {
    let c = setup.config();
    match c.kind {
        Kind::Pi0 => {
            let width = c.expert.width;
            let values = crate::time_embedding(&setup.times(), width, c.min_period, c.max_period);
            let weights = Weights::new(d, &setup.checkpoint, &|_| ());
            let time_mlp_in = weights.linear_exact("action_time_mlp_in", true, Some(width..2 * width))?;
            let _scope = Scope::new(d, format_args!("suffix"));
            let embedded = d.upload(setup.steps, width, &values)?;
            let y = d.linear(&embedded, &time_mlp_in)?;
            Ok(vec![("time_emb".into(), d.download(&embedded)?), ("time_mlp_in".into(), d.download(&y)?)])
        }
        Kind::Pi05 | Kind::Pi0Fast => {
            let made = condition(d, &setup.checkpoint, &setup.times())?;
            made.iter().map(|(name, rows)| Ok((name.to_string(), d.download(rows)?))).collect()
        }
    }
}

/// Every table of modulations.
pub(super) fn modulations<D: Device>(d: &D, setup: &Setup) -> Result<Outputs, ModelError> {
    let made = Modulations::new(d, &setup.checkpoint, &setup.times())?;
    let tables = made.tables().enumerate();
    tables.map(|(i, table)| Ok((format!("norm{i}"), d.download(table)?))).collect()
}

pub(super) fn prefix<D: Device>(d: &D, setup: &Setup) -> Result<Outputs, ModelError> {
    let embs = load(d, setup)?.embed_prefix(&setup.batch, &setup.layout()?)?;
    Ok(vec![("embs".into(), d.download(&embs)?)])
}

/// State rows, and the action rows of each step over fresh random actions.
pub(super) fn suffix<D: Device>(d: &D, setup: &Setup) -> Result<Outputs, ModelError> {
    let (model, layout, c) = (load(d, setup)?, setup.layout()?, setup.config());
    let steps = model.prepare_steps(&setup.batch, &layout, &setup.times())?;
    let mut outputs = Outputs::new();
    if let Condition::Rows { states, .. } = &steps.condition {
        outputs.push(("states".into(), d.download(states)?));
    }
    for step in 0..setup.steps {
        let x_t = upload(d, &rows(&format!("x{step}"), layout.batch() * c.horizon, c.action_dim))?;
        let _scope = Scope::new(d, format_args!("suffix"));
        let embs = model.embed_suffix(&x_t, step, &steps)?;
        outputs.push((format!("step{step}"), d.download(&embs)?));
    }
    Ok(outputs)
}

/// Velocities of the first step, and of the last, which reuses the first one's state rows; over a random prefix.
pub(super) fn denoise<D: Device>(d: &D, setup: &Setup) -> Result<Outputs, ModelError> {
    let (model, layout, c) = (load(d, setup)?, setup.layout()?, setup.config());
    let prefix = random_prefix(d, setup)?;
    let steps = model.prepare_steps(&setup.batch, &layout, &setup.times())?;
    let mut state_cache = None;
    let mut outputs = Outputs::new();
    for step in [0, setup.steps - 1] {
        let x_t = upload(d, &rows(&format!("x{step}"), layout.batch() * c.horizon, c.action_dim))?;
        let v_t = model.denoise_step(&x_t, step, &steps, &prefix, &mut state_cache)?;
        outputs.push((format!("step{step}.v_t"), d.download(&v_t)?));
    }
    Ok(outputs)
}

pub(super) fn paligemma<D: Device>(d: &D, setup: &Setup) -> Result<Outputs, ModelError> {
    let (model, layout) = (load(d, setup)?, setup.layout()?);
    let embs = model.embed_prefix(&setup.batch, &layout)?;
    let cache = model.prefix_cache(embs, &layout)?;
    let mut outputs = Outputs::new();
    for (i, layer) in cache.0.iter().enumerate() {
        outputs.push((format!("layer{i}.k"), d.download(&layer.k)?));
        outputs.push((format!("layer{i}.v"), d.download(&layer.v)?));
    }
    Ok(outputs)
}

pub(super) fn pi0<D: Device>(d: &D, setup: &Setup) -> Result<Outputs, ModelError> {
    let options = SampleOptions { steps: Some(setup.steps), ..Default::default() };
    let chunks = load(d, setup)?.sample_actions(&setup.batch, &options)?;
    Ok(chunks.into_iter().enumerate().map(|(i, chunk)| (format!("robot{i}"), chunk)).collect())
}

/// Keys and values of a prefix that no network made.
pub(super) fn random_prefix<'d, D: Device>(
    d: &'d D,
    setup: &Setup,
) -> Result<PrefixCache<&'d D>, ModelError> {
    let (layout, c) = (setup.layout()?, setup.config());
    let width = c.gemma.num_kv_heads * c.gemma.head_dim;
    let random = |what: &str, layer| upload(d, &rows(&format!("{what}{layer}"), layout.prefix_rows(), width));
    let cache = (0..c.gemma.depth).map(|i| Ok(LayerCache { k: random("k", i)?, v: random("v", i)? }));
    Ok(PrefixCache(cache.collect::<Result<_, ModelError>>()?))
}
