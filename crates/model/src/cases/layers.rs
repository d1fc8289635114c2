//! The layers of the two kinds of tower, alone.

use pi0_device::{Device, Modulation, Norm, Scope, Span};

use super::inputs::{rows, upload};
use super::{Module, Outputs, Part, Setup, Tower};
use crate::gemma::{Gemma, GemmaLayer, LayerCache, Norms, split};
use crate::layout::Layout;
use crate::modulation::{Drive, Modulations};
use crate::siglip::{SigLip, SigLipLayer, image_spans};
use crate::weights::{EXPERT, LANGUAGE, PROJECTOR, VISION, Weights};
use crate::{Extent, GemmaConfig, Kind, ModelError, VisionConfig, patchify};

/// Hears nothing of the progress of packing.
fn silent(_: u64) {}

/// The vision tower with `layers` of its layers.
fn siglip<D: Device>(d: &D, setup: &Setup, layers: usize) -> Result<SigLip<D>, ModelError> {
    let config = VisionConfig { num_hidden_layers: layers, ..setup.config().vision.clone() };
    SigLip::load(&config, &Weights::new(d, &setup.checkpoint, &silent).pp(VISION))
}

fn patches<D: Device>(d: &D, setup: &Setup) -> Result<D::Tensor, ModelError> {
    let (c, layout) = (setup.config(), setup.layout()?);
    let values = patchify(&setup.batch, &layout, c);
    Ok(d.upload(layout.images.len() * layout.patches, c.vision.patch_values(), &values)?)
}

pub(super) fn patch_embedding<D: Device>(d: &D, setup: &Setup) -> Result<Outputs, ModelError> {
    let tower = siglip(d, setup, 0)?;
    let _scope = Scope::new(d, format_args!("vision"));
    let y = tower.embed(d, &patches(d, setup)?)?;
    Ok(vec![("embeddings".into(), d.download(&y)?)])
}

pub(super) fn vision<D: Device>(d: &D, setup: &Setup, module: Module) -> Result<Outputs, ModelError> {
    let (c, layout) = (&setup.config().vision, setup.layout()?);
    let x = rows("vision", layout.images.len() * layout.patches, c.hidden_size);
    let spans = image_spans(x.rows(), layout.patches);
    let root = Weights::new(d, &setup.checkpoint, &silent);
    let _scope = Scope::new(d, format_args!("vision"));
    let mut outputs = Outputs::new();
    for i in setup.layer_indices(c.num_hidden_layers) {
        let layer = SigLipLayer::load(c, &root.pp(VISION).pp("encoder.layers").pp(i))?;
        let _scope = Scope::new(d, format_args!("layer{i}"));
        let x = upload(d, &x)?;
        let y = match module {
            Module::VisionAttention => layer.attention(d, &x, &spans)?,
            Module::VisionMlp => layer.mlp(d, &x)?,
            _ => layer.forward(d, &x, &spans)?,
        };
        outputs.push((format!("layer{i}"), d.download(&y)?));
    }
    Ok(outputs)
}

pub(super) fn projector<D: Device>(d: &D, setup: &Setup) -> Result<Outputs, ModelError> {
    let tower = siglip(d, setup, 0)?;
    let projector = Weights::new(d, &setup.checkpoint, &silent).linear_bias(&[PROJECTOR])?;
    let _scope = Scope::new(d, format_args!("vision"));
    let layout = setup.layout()?;
    let x = rows("projector", layout.images.len() * layout.patches, setup.config().vision.hidden_size);
    let y = tower.project(d, &upload(d, &x)?, &projector)?;
    Ok(vec![("tokens".into(), d.download(&y)?)])
}

pub(super) fn vision_tower<D: Device>(d: &D, setup: &Setup) -> Result<Outputs, ModelError> {
    let tower = siglip(d, setup, setup.config().vision.num_hidden_layers)?;
    let projector = Weights::new(d, &setup.checkpoint, &silent).linear_bias(&[PROJECTOR])?;
    let y = tower.forward(d, &patches(d, setup)?, &projector)?;
    Ok(vec![("tokens".into(), d.download(&y)?)])
}

/// How a tower is called in one phase of an inference.
struct Phase {
    name: &'static str,
    positions: Vec<u32>,
    spans: Vec<Span>,
    /// Rows of the cached parts 1, 2 … that attention reads beside the tower's own.
    cached: Vec<usize>,
}

fn phases(tower: Tower, layout: &Layout) -> Vec<Phase> {
    let (prefix, robots) = (layout.prefix_rows(), layout.batch());
    match tower {
        Tower::Prefix => vec![Phase {
            name: "prefix",
            positions: layout.prefix_positions(),
            spans: layout.prefix_spans(),
            cached: vec![],
        }],
        Tower::Expert if !layout.state_rows => vec![Phase {
            name: "step",
            positions: layout.suffix_positions(),
            spans: layout.first_step_spans(),
            cached: vec![prefix],
        }],
        Tower::Expert => {
            let positions = layout.suffix_positions();
            let later = positions[robots..].to_vec();
            let first =
                Phase { name: "first", positions, spans: layout.first_step_spans(), cached: vec![prefix] };
            let later = Phase {
                name: "later",
                positions: later,
                spans: layout.later_step_spans(),
                cached: vec![prefix, robots],
            };
            vec![first, later]
        }
    }
}

/// Random keys and values of the cached parts of one layer.
fn cached<D: Device>(
    d: &D,
    phase: &Phase,
    width: usize,
    layer: usize,
) -> Result<Vec<LayerCache<D>>, ModelError> {
    let part = |(i, n): (usize, &usize)| {
        let random = |what: &str| upload(d, &rows(&format!("{what}{i}.{layer}"), *n, width));
        Ok(LayerCache { k: random("k")?, v: random("v")? })
    };
    phase.cached.iter().enumerate().map(part).collect()
}

pub(super) fn gemma<D: Device>(
    d: &D,
    setup: &Setup,
    tower: Tower,
    part: Part,
) -> Result<Outputs, ModelError> {
    let (config, path, scope) = match tower {
        Tower::Prefix => (&setup.config().gemma, LANGUAGE, "prefix"),
        Tower::Expert => (&setup.config().expert, EXPERT, "suffix"),
    };
    let weights = Weights::new(d, &setup.checkpoint, &silent).pp(path);
    let _scope = Scope::new(d, format_args!("{scope}"));
    let modulations = match (tower, setup.config().kind) {
        (Tower::Expert, Kind::Pi05) => Some(random_modulations(d, setup.steps + 1, config)?),
        _ => None,
    };
    let mut outputs = Outputs::new();
    for phase in phases(tower, &setup.layout()?) {
        // Every row of the table drives some row, in an order that no step has.
        let rows: Vec<u32> = (0..phase.positions.len()).map(|i| (i * i % (setup.steps + 1)) as u32).collect();
        let drive = modulations.as_ref().map(|modulations| Drive { modulations, rows: &rows });
        let run = GemmaRun { d, setup, config, weights: &weights, phase: &phase, drive };
        match part {
            Part::RmsNorm => run.norms(&mut outputs)?,
            Part::GatedAdd => run.gated_add(&mut outputs)?,
            Part::Rope => run.rope(&mut outputs)?,
            Part::Stack => run.stack(&mut outputs)?,
            _ => run.layers(part, &mut outputs)?,
        }
    }
    Ok(outputs)
}

struct GemmaRun<'a, D: Device> {
    d: &'a D,
    setup: &'a Setup,
    config: &'a GemmaConfig,
    weights: &'a Weights<'a, D>,
    phase: &'a Phase,
    /// Where the tower's norms are adaptive.
    drive: Option<Drive<'a, D>>,
}

/// Modulations that no time network made: so that a tower is judged apart from it.
fn random_modulations<D: Device>(
    d: &D,
    rows_each: usize,
    config: &GemmaConfig,
) -> Result<Modulations<D>, ModelError> {
    let table = |name: String| {
        let mut t = rows(&name, rows_each, 3 * config.width);
        // Sizes as of a trained network, not those that try a norm's eps.
        for r in 0..rows_each {
            let size = t.row(r).iter().map(|x| x * x).sum::<f32>().sqrt() / (t.cols() as f32).sqrt();
            t.row_mut(r).iter_mut().for_each(|x| *x *= 0.5 / size);
        }
        upload(d, &t)
    };
    let layers = (0..config.depth)
        .map(|i| Ok([table(format!("modulation{i}.0"))?, table(format!("modulation{i}.1"))?]))
        .collect::<Result<_, ModelError>>()?;
    Ok(Modulations::of_tables(layers, table("modulation".into())?))
}

impl<D: Device> GemmaRun<'_, D> {
    fn rows(&self, cols: usize) -> Result<D::Tensor, ModelError> {
        upload(self.d, &rows(self.phase.name, self.phase.positions.len(), cols))
    }

    fn push(&self, outputs: &mut Outputs, name: String, y: &D::Tensor) -> Result<(), ModelError> {
        outputs.push((format!("{}.{name}", self.phase.name), self.d.download(y)?));
        Ok(())
    }

    /// How the tower's norms are loaded.
    fn kind_of_norms(&self) -> Norms {
        if self.drive.is_some() { Norms::Adaptive } else { Norms::Rms }
    }

    /// Runs `f` on what drives each norm of the layers that run alone, and the final one.
    fn each_driven(
        &self,
        drive: Drive<'_, D>,
        outputs: &mut Outputs,
        f: impl Fn(&Modulation<'_, D::Tensor>) -> pi0_device::Result<D::Tensor>,
    ) -> Result<(), ModelError> {
        for i in self.setup.layer_indices(self.config.depth) {
            let _scope = Scope::new(self.d, format_args!("layer{i}"));
            let names = ["input_layernorm", "post_attention_layernorm"];
            for (name, by) in names.into_iter().zip(drive.layer(self.d, i)) {
                self.push(outputs, format!("layer{i}.{name}"), &f(&by)?)?;
            }
        }
        self.push(outputs, "norm".into(), &f(&drive.last(self.d))?)
    }

    fn norms(&self, outputs: &mut Outputs) -> Result<(), ModelError> {
        let x = self.rows(self.config.width)?;
        if let Some(drive) = self.drive {
            return self.each_driven(drive, outputs, |by| self.d.ada_rms_norm(&x, by));
        }
        for i in self.setup.layer_indices(self.config.depth) {
            let layer = self.weights.pp("layers").pp(i);
            let _scope = Scope::new(self.d, format_args!("layer{i}"));
            for name in ["input_layernorm", "post_attention_layernorm"] {
                let y = self.d.rms_norm(&x, &layer.rms_norm(name)?)?;
                self.push(outputs, format!("layer{i}.{name}"), &y)?;
            }
        }
        let y = self.d.rms_norm(&x, &self.weights.rms_norm("norm")?)?;
        self.push(outputs, "norm".into(), &y)
    }

    /// Gated sums of two random activations.
    fn gated_add(&self, outputs: &mut Outputs) -> Result<(), ModelError> {
        let Some(drive) = self.drive else { return Ok(()) };
        let count = self.phase.positions.len();
        let x = self.rows(self.config.width)?;
        let y = upload(self.d, &rows("branch", count, self.config.width))?;
        self.each_driven(drive, outputs, |by| self.d.gated_add(&x, &y, by))
    }

    /// Rotates rows as wide as q and as wide as k.
    fn rope(&self, outputs: &mut Outputs) -> Result<(), ModelError> {
        let c = self.config;
        for (name, heads) in [("q", c.num_heads), ("k", c.num_kv_heads)] {
            let y = self.d.rope(&self.rows(heads * c.head_dim)?, &self.phase.positions, c.head_dim)?;
            self.push(outputs, name.into(), &y)?;
        }
        Ok(())
    }

    fn layers(&self, part: Part, outputs: &mut Outputs) -> Result<(), ModelError> {
        let (d, c, phase) = (self.d, self.config, self.phase);
        let x = self.rows(c.width)?;
        for i in self.setup.layer_indices(c.depth) {
            let weights = self.weights.pp("layers").pp(i);
            let layer = GemmaLayer::load(c, &weights, self.kind_of_norms(), Extent::Whole)?;
            let drive = self.drive.map(|drive| drive.layer(d, i));
            let [first, second] = split(drive);
            let Some(whole) = layer.whole() else { continue };
            let earlier = cached(d, phase, c.num_kv_heads * c.head_dim, i)?;
            let earlier: Vec<_> = earlier.iter().map(LayerCache::key_value).collect();
            let _scope = Scope::new(d, format_args!("layer{i}"));
            let (y, cache) = match part {
                Part::Mlp => (Some(layer.mlp(d, &x, whole, second)?), None),
                Part::Attention => {
                    let (y, cache) =
                        layer.attention(d, &x, whole, &phase.positions, &earlier, &phase.spans, first)?;
                    (Some(y), Some(cache))
                }
                _ => {
                    let (y, cache) = layer.forward(d, &x, &phase.positions, &earlier, &phase.spans, drive)?;
                    (y, Some(cache))
                }
            };
            if let Some(cache) = cache {
                self.push(outputs, format!("layer{i}.k"), &cache.k)?;
                self.push(outputs, format!("layer{i}.v"), &cache.v)?;
            }
            if let Some(y) = y {
                self.push(outputs, format!("layer{i}"), &y)?;
            }
        }
        Ok(())
    }

    fn stack(&self, outputs: &mut Outputs) -> Result<(), ModelError> {
        let (d, c) = (self.d, self.config);
        let tower = Gemma::load(c, self.weights, self.kind_of_norms(), Extent::Whole)?;
        let mut parts: Vec<Vec<LayerCache<D>>> = self.phase.cached.iter().map(|_| Vec::new()).collect();
        for layer in 0..c.depth {
            let caches = cached(d, self.phase, c.num_kv_heads * c.head_dim, layer)?;
            parts.iter_mut().zip(caches).for_each(|(part, cache)| part.push(cache));
        }
        let parts: Vec<&[LayerCache<D>]> = parts.iter().map(Vec::as_slice).collect();
        let x = self.rows(c.width)?;
        let (positions, spans, mut caches) = (&self.phase.positions, &self.phase.spans, Vec::new());
        let out = tower.forward(d, x, positions, &parts, spans, self.drive, |layer| caches.push(layer))?;
        for (i, cache) in caches.iter().enumerate() {
            self.push(outputs, format!("layer{i}.k"), &cache.k)?;
            self.push(outputs, format!("layer{i}.v"), &cache.v)?;
        }
        if let (Some(out), Some(norm)) = (out, tower.norm(d, self.drive)) {
            self.push(outputs, "out".into(), &out)?;
            let normed = match norm {
                Norm::Layer(w) => d.layer_norm(&out, w)?,
                Norm::Rms(w) => d.rms_norm(&out, w)?,
                Norm::Ada(by) => d.ada_rms_norm(&out, &by)?,
            };
            self.push(outputs, "norm".into(), &normed)?;
        }
        Ok(())
    }
}
