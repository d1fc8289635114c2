//! Model tensors in files, named and shaped as the golden data: what goes in, and every intermediate.

use std::collections::BTreeMap;
use std::path::Path;

use pi0_device::{Agreement, HostTensor, compare};
use safetensors::SafeTensors;
use safetensors::tensor::{Dtype, TensorView};

use crate::layout::Layout;
use crate::{Config, Inputs, ModelError, Rtc};

/// Reads a batch of inputs: `image_{c}` F32 `[B, 3, H, W]`, `image_mask` `[B, C]`, `tokens` `[B, L]`,
/// `token_mask` `[B, L]` and, optionally, `state` F32 `[B, S]` (π0 needs it) and `noise` F32 `[B, T, A]`.
pub fn read_inputs(path: &Path) -> Result<Vec<Inputs>, ModelError> {
    let bytes = std::fs::read(path).map_err(|e| ModelError::Read { path: path.into(), source: e })?;
    let file = SafeTensors::deserialize(&bytes)
        .map_err(|e| ModelError::Damaged { path: path.into(), what: e.to_string() })?;
    let fail = |what: String| ModelError::Config { path: path.into(), what };
    let reals = |name: &str| read_reals(&file, name).map_err(fail);
    let whole = |name: &str| read_whole(&file, name).map_err(fail);

    let (mask_shape, image_mask) = whole("image_mask")?;
    let (token_shape, tokens) = whole("tokens")?;
    let (token_mask_shape, token_mask) = whole("token_mask")?;
    let optional = |name: &str| file.names().contains(&name).then(|| reals(name)).transpose();
    let (state, noise) = (optional("state")?, optional("noise")?);
    let [batch, cameras] = mask_shape[..] else { return Err(fail("image_mask is not a matrix".into())) };
    if token_shape.len() != 2 || token_shape != token_mask_shape {
        return Err(fail(format!("holds tokens {token_shape:?} and token_mask {token_mask_shape:?}")));
    }
    let images = (0..cameras).map(|c| reals(&format!("image_{c}"))).collect::<Result<Vec<_>, _>>()?;
    let mut named: Vec<(String, usize)> = vec![("tokens".into(), token_shape[0])];
    named.extend(state.iter().map(|s| ("state".into(), s.shape[0])));
    named.extend(noise.iter().map(|n| ("noise".into(), n.shape[0])));
    named.extend(images.iter().enumerate().map(|(c, i)| (format!("image_{c}"), i.shape[0])));
    if let Some((name, rows)) = named.iter().find(|(_, rows)| *rows != batch) {
        return Err(fail(format!("holds {name} for {rows} robots and image_mask for {batch}")));
    }

    let part = |t: &HostTensor, b: usize| {
        let n = t.data.len() / batch;
        t.data[b * n..(b + 1) * n].to_vec()
    };
    let length = token_shape[1];
    let input = |b: usize| {
        let valid = (b * length..(b + 1) * length).filter(|&i| token_mask[i] != 0);
        let present = |c: usize| image_mask[b * cameras + c] != 0;
        Ok(Inputs {
            images: (0..cameras).map(|c| present(c).then(|| part(&images[c], b))).collect(),
            tokens: valid
                .map(|i| u32::try_from(tokens[i]).map_err(|_| fail(format!("holds the token {}", tokens[i]))))
                .collect::<Result<_, _>>()?,
            state: state.as_ref().map_or_else(Vec::new, |s| part(s, b)),
            noise: noise.as_ref().map(|n| part(n, b)),
            ..Inputs::default()
        })
    };
    (0..batch).map(input).collect()
}

/// The previous chunk beside the inputs of a batch, `prev_chunk` F32 `[n, a]` (the same for all robots) or `[B, n, a]`:
/// for each robot its rows, filled up with zeros to `action_dim` columns as lerobot does. None where the file has none.
pub fn read_previous_chunk(
    path: &Path,
    robots: usize,
    action_dim: usize,
) -> Result<Option<Vec<Vec<f32>>>, ModelError> {
    let bytes = std::fs::read(path).map_err(|e| ModelError::Read { path: path.into(), source: e })?;
    let file = SafeTensors::deserialize(&bytes)
        .map_err(|e| ModelError::Damaged { path: path.into(), what: e.to_string() })?;
    if !file.names().contains(&"prev_chunk") {
        return Ok(None);
    }
    let fail = |what: String| ModelError::Config { path: path.into(), what };
    let chunk = read_reals(&file, "prev_chunk").map_err(fail)?;
    let fits = match chunk.shape[..] {
        [_, width] => width <= action_dim,
        [batch, _, width] => batch == robots && width <= action_dim,
        _ => false,
    };
    if !fits {
        let shape = &chunk.shape;
        return Err(fail(format!(
            "holds prev_chunk {shape:?}, wanted [rows, width] or [{robots}, rows, width] of width {action_dim} at most"
        )));
    }
    let padded =
        |row: &[f32]| row.iter().copied().chain(std::iter::repeat_n(0.0, action_dim - row.len())).collect();
    let rows: Vec<Vec<f32>> = chunk.data.chunks_exact(chunk.cols()).map(padded).collect();
    let of_robot = |b: usize| match chunk.shape[..] {
        [batch, n, _] if batch == robots => rows[b * n..(b + 1) * n].concat(),
        _ => rows.concat(),
    };
    Ok(Some((0..robots).map(of_robot).collect()))
}

fn view<'a>(file: &SafeTensors<'a>, name: &str) -> Result<TensorView<'a>, String> {
    let view = file.tensor(name).map_err(|_| format!("holds no tensor {name}"))?;
    if view.shape().is_empty() || view.shape().contains(&0) {
        return Err(format!("holds {name} of shape {:?}", view.shape()));
    }
    Ok(view)
}

fn read_reals(file: &SafeTensors<'_>, name: &str) -> Result<HostTensor, String> {
    let view = view(file, name)?;
    if view.dtype() != Dtype::F32 {
        return Err(format!("holds {name} in {:?}, wanted F32", view.dtype()));
    }
    let values = view.data().chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]));
    Ok(HostTensor::new(view.shape(), values.collect()))
}

fn read_whole(file: &SafeTensors<'_>, name: &str) -> Result<(Vec<usize>, Vec<i64>), String> {
    let view = view(file, name)?;
    let data = view.data();
    let values = match view.dtype() {
        Dtype::U8 | Dtype::BOOL => data.iter().map(|&b| i64::from(b)).collect(),
        Dtype::I32 => {
            data.chunks_exact(4).map(|b| i64::from(i32::from_le_bytes([b[0], b[1], b[2], b[3]]))).collect()
        }
        Dtype::I64 => {
            let word = |b: &[u8]| i64::from_le_bytes([b[0], b[1], b[2], b[3], b[4], b[5], b[6], b[7]]);
            data.chunks_exact(8).map(word).collect()
        }
        other => return Err(format!("holds {name} in {other:?}, wanted whole numbers")),
    };
    Ok((view.shape().to_vec(), values))
}

/// Reads every F32 tensor of a file, such as golden outputs.
pub fn read_tensors(path: &Path) -> Result<BTreeMap<String, HostTensor>, ModelError> {
    let bytes = std::fs::read(path).map_err(|e| ModelError::Read { path: path.into(), source: e })?;
    let file = SafeTensors::deserialize(&bytes)
        .map_err(|e| ModelError::Damaged { path: path.into(), what: e.to_string() })?;
    let fail = |what: String| ModelError::Config { path: path.into(), what };
    file.names().into_iter().map(|n| Ok((n.to_string(), read_reals(&file, n).map_err(fail)?))).collect()
}

/// Writes tensors as F32.
pub fn write_tensors(path: &Path, tensors: &BTreeMap<String, HostTensor>) -> Result<(), ModelError> {
    let bytes: Vec<(&String, Vec<u8>)> =
        tensors.iter().map(|(n, t)| (n, t.data.iter().flat_map(|x| x.to_le_bytes()).collect())).collect();
    let view = |name: &String, data| TensorView::new(Dtype::F32, tensors[name].shape.clone(), data);
    let views = bytes.iter().map(|(n, data)| Ok((n.as_str(), view(n, data)?))).collect::<Result<Vec<_>, _>>();
    let fail = |e: safetensors::SafeTensorError| ModelError::config(path, e.to_string());
    let file = safetensors::serialize(views.map_err(fail)?, None).map_err(fail)?;
    std::fs::write(path, file).map_err(|e| ModelError::Read { path: path.into(), source: e })
}

/// Turns the taps of one [`Pi0::sample_actions`](crate::Pi0::sample_actions) into tensors with the golden data's
/// names and shapes. Rows that were never computed (masked cameras, padding) are zero.
pub fn golden_taps(
    taps: Vec<(String, HostTensor)>,
    batch: &[Inputs],
    config: &Config,
    times: &[f32],
    padded_tokens: usize,
) -> Result<BTreeMap<String, HostTensor>, ModelError> {
    let layout = Layout::new(config, batch)?;
    let g = Golden { layout: &layout, batch, config, cameras: batch[0].images.len(), padded_tokens };
    let mut out = BTreeMap::new();
    for (name, tap) in taps {
        if let Some(rest) = name.strip_prefix("vision.") {
            for camera in 0..g.cameras {
                out.insert(
                    format!("vision.cam{camera}.{rest}"),
                    g.vision(camera, rest == "patch_conv", &tap),
                );
            }
        } else if let Some(rest) = name.strip_prefix("prefix.") {
            let cache = rest.ends_with("_cache");
            let t = g.prefix(&tap);
            out.insert(name, if cache { g.heads(t) } else { t });
        } else if let Some(rest) = name.strip_prefix("step0.suffix.") {
            if let Some(norm) = rest.strip_suffix(".modulation") {
                for (part, values) in g.modulation(&tap, 0, times.len()) {
                    out.insert(format!("suffix.{norm}.{part}"), values);
                }
            } else if !rest.ends_with("_cache") {
                out.insert(format!("suffix.{rest}"), g.suffix(&tap));
            }
        } else if let Some(what @ ("time_emb" | "cond")) = name.strip_prefix("suffix.") {
            for (step, &t) in times.iter().enumerate() {
                out.insert(format!("step{step}.{what}"), g.of_time(&tap, step, times.len()));
                let time =
                    HostTensor::new([times.len() + 1, 1], times.iter().map(|_| t).chain([0.0]).collect());
                let mut time = g.of_time(&time, step, times.len());
                time.shape.pop();
                out.insert(format!("step{step}.time"), time);
            }
        } else if let Some("time_mlp_in" | "time_mlp_out") = name.strip_prefix("suffix.") {
            out.insert(name, g.of_time(&tap, 0, times.len()));
        } else if name == "suffix.state_emb" {
            out.insert(name, tap);
        } else if let Some(step) = name.strip_suffix(".answer.logits") {
            // Later ones of a batch lack those who have ended.
            if tap.rows() == batch.len() {
                out.insert(format!("{step}.logits"), tap);
            }
        } else if name.starts_with("step") && !name.contains("suffix") && config.answer.is_none() {
            out.insert(name, g.suffix(&tap));
        }
    }
    g.geometry(&mut out);
    if config.answer.is_some() {
        // What stands behind the prompt is written, and has no fixed number of rows.
        out.retain(|name, _| !name.starts_with("suffix."));
        return Ok(out);
    }
    g.guidance(times.len(), &mut out);
    Ok(out)
}

/// How long the prompts of golden outputs were padded, as their masks have it; the model's longest where they have none.
pub fn padded_tokens(want: &BTreeMap<String, HostTensor>, batch: &[Inputs], config: &Config) -> usize {
    let images = batch.first().map_or(0, |i| i.images.len()) * config.vision.patches();
    let of_mask = |mask: &HostTensor| mask.cols().checked_sub(*mask.shape.get(1)? + images);
    let behind = images + usize::from(config.last_of_prompt().is_some());
    let of_prefix = || want.get("prefix.pad_mask").and_then(|mask| mask.cols().checked_sub(behind));
    want.get("suffix.attend").and_then(of_mask).or_else(of_prefix).unwrap_or(config.max_tokens)
}

/// Compares intermediates with golden ones, over the rows that mean something: not those of masked cameras or
/// padding. Golden tensors that were not produced, or in another shape, are errors of their own line.
pub fn compare_taps(
    got: &BTreeMap<String, HostTensor>,
    want: &BTreeMap<String, HostTensor>,
    batch: &[Inputs],
) -> Vec<(String, Result<Agreement, String>)> {
    let pad_mask = want.get("prefix.pad_mask");
    let row = |name: &String, want: &HostTensor| {
        let got = got.get(name).ok_or("was not produced")?;
        if got.shape != want.shape {
            return Err(format!("has shape {:?}, wanted {:?}", got.shape, want.shape));
        }
        let chunk = |robots: usize| want.data.len() / robots;
        let valid: Vec<bool> = match name.split('.').collect::<Vec<_>>()[..] {
            ["vision", camera, ..] => {
                let camera: usize =
                    camera.trim_start_matches("cam").parse().map_err(|_| "names no camera")?;
                let present = |i: &Inputs| i.images.get(camera).is_some_and(Option::is_some);
                batch.iter().flat_map(|i| std::iter::repeat_n(present(i), chunk(batch.len()))).collect()
            }
            ["prefix", "pad_mask" | "positions"] => vec![true; want.data.len()],
            ["prefix", ..] => {
                let mask = pad_mask.ok_or("has no prefix.pad_mask beside it")?;
                // [B, S, D], or [B, heads, S, D] for a cache.
                let heads = if want.shape.len() == 4 { want.shape[1] } else { 1 };
                let rows = (0..mask.rows()).flat_map(|b| (0..heads).flat_map(move |_| mask.row(b)));
                rows.flat_map(|&m| std::iter::repeat_n(m != 0.0, want.cols())).collect()
            }
            _ => vec![true; want.data.len()],
        };
        let keep = |t: &HostTensor| -> Vec<f32> {
            t.data.iter().zip(&valid).filter(|(_, valid)| **valid).map(|(&x, _)| x).collect()
        };
        Ok(compare(&keep(got), &keep(want)))
    };
    want.iter().map(|(name, t)| (name.clone(), row(name, t))).collect()
}

/// Places packed rows where the golden data has them.
struct Golden<'a> {
    layout: &'a Layout,
    batch: &'a [Inputs],
    config: &'a Config,
    cameras: usize,
    padded_tokens: usize,
}

impl Golden<'_> {
    fn prefix_width(&self) -> usize {
        let last = usize::from(self.config.last_of_prompt().is_some());
        self.cameras * self.layout.patches + self.padded_tokens + last
    }

    /// Packed row of each padded prefix row of a robot, where there is one.
    fn prefix_rows(&self, robot: usize) -> Vec<Option<usize>> {
        let patches = self.layout.patches;
        let mut rows = vec![None; self.prefix_width()];
        for (i, &(_, camera)) in self.layout.images.iter().enumerate().filter(|(_, (r, _))| *r == robot) {
            for p in 0..patches {
                rows[camera * patches + p] = Some(i * patches + p);
            }
        }
        let tokens = self.layout.token_rows[robot].clone();
        for (i, row) in tokens.clone().enumerate() {
            rows[self.cameras * patches + i] = Some(row);
        }
        if self.config.last_of_prompt().is_some() {
            // It stands behind the padding.
            let own = self.cameras * patches + tokens.len() - 1;
            rows[own] = None;
            rows[self.prefix_width() - 1] = Some(tokens.end - 1);
        }
        rows
    }

    fn vision(&self, camera: usize, channels_first: bool, tap: &HostTensor) -> HostTensor {
        let (patches, cols) = (self.layout.patches, tap.cols());
        let mut out = HostTensor::zeros([self.layout.batch(), patches, cols]);
        for (i, &(robot, _)) in self.layout.images.iter().enumerate().filter(|(_, (_, c))| *c == camera) {
            for p in 0..patches {
                let row = tap.row(i * patches + p);
                if channels_first {
                    let start = robot * patches * cols;
                    row.iter().enumerate().for_each(|(c, &x)| out.data[start + c * patches + p] = x);
                } else {
                    out.row_mut(robot * patches + p).copy_from_slice(row);
                }
            }
        }
        if channels_first {
            let side = self.config.vision.image_size / self.config.vision.patch_size;
            out.shape = vec![self.layout.batch(), cols, side, side];
        }
        out
    }

    fn prefix(&self, tap: &HostTensor) -> HostTensor {
        let width = self.prefix_width();
        let mut out = HostTensor::zeros([self.layout.batch(), width, tap.cols()]);
        for robot in 0..self.layout.batch() {
            for (to, from) in self.prefix_rows(robot).into_iter().enumerate() {
                if let Some(from) = from {
                    out.row_mut(robot * width + to).copy_from_slice(tap.row(from));
                }
            }
        }
        out
    }

    /// `[B, S, heads D]` to `[B, heads, S, D]`.
    fn heads(&self, t: HostTensor) -> HostTensor {
        let (heads, dim) = (self.config.gemma.num_kv_heads, self.config.gemma.head_dim);
        let [batch, rows] = [t.shape[0], t.shape[1]];
        let mut out = HostTensor::zeros([batch, heads, rows, dim]);
        for (b, r, h) in
            (0..batch).flat_map(|b| (0..rows).flat_map(move |r| (0..heads).map(move |h| (b, r, h))))
        {
            let from = &t.row(b * rows + r)[h * dim..(h + 1) * dim];
            out.row_mut((b * heads + h) * rows + r).copy_from_slice(from);
        }
        out
    }

    /// Suffix rows: state rows of all robots and then actions, or actions alone.
    fn suffix(&self, tap: &HostTensor) -> HostTensor {
        let (batch, horizon) = (self.layout.batch(), self.layout.horizon);
        let states = tap.rows() - batch * horizon;
        let per_robot = horizon + usize::from(states > 0);
        let mut out = HostTensor::zeros([batch, per_robot, tap.cols()]);
        for (b, i) in (0..batch).flat_map(|b| (0..horizon).map(move |i| (b, i))) {
            let to = b * per_robot + per_robot - horizon + i;
            out.row_mut(to).copy_from_slice(tap.row(states + b * horizon + i));
        }
        for b in 0..states {
            out.row_mut(b * per_robot).copy_from_slice(tap.row(b));
        }
        out
    }

    /// What follows from the time alone: row `step` for every robot, `[B, W]`. Where some actions are known, and so have
    /// time 0, which is row `clean`, every action has its own: `[B, T, W]`.
    fn of_time(&self, rows: &HostTensor, step: usize, clean: usize) -> HostTensor {
        let known = |inputs: &Inputs| match &inputs.rtc {
            Some(Rtc::Trained(known)) => known.delay,
            _ => 0,
        };
        let (batch, cols) = (self.layout.batch(), rows.cols());
        if self.batch.iter().all(|i| known(i) == 0) {
            return HostTensor::new([batch, cols], rows.row(step).repeat(batch));
        }
        let row = |inputs, t| rows.row(if t < known(inputs) { clean } else { step });
        let data = self.batch.iter().flat_map(|i| (0..self.layout.horizon).flat_map(move |t| row(i, t)));
        HostTensor::new([batch, self.layout.horizon, cols], data.copied().collect())
    }

    /// The three parts of a table of modulations, of one step.
    fn modulation(&self, table: &HostTensor, step: usize, clean: usize) -> [(&'static str, HostTensor); 3] {
        let width = table.cols() / 3;
        let part = |i: usize| {
            let rows = (0..table.rows()).flat_map(|r| &table.row(r)[i * width..(i + 1) * width]);
            self.of_time(&HostTensor::new([table.rows(), width], rows.copied().collect()), step, clean)
        };
        [("scale", part(0)), ("shift", part(1)), ("gate", part(2))]
    }

    /// What guided real-time chunking goes by in each step, on the host: where the chunk leads without it (`x1`), and
    /// how strongly it is corrected. As the references, for a batch that is guided alike.
    fn guidance(&self, steps: usize, out: &mut BTreeMap<String, HostTensor>) {
        let Some(Rtc::Guided(g)) = self.batch.first().and_then(|i| i.rtc.as_ref()) else { return };
        let (horizon, dim) = (self.layout.horizon, self.config.action_dim);
        let weights = g.weights(dim).into_iter().map(|w| w as f32).chain(std::iter::repeat(0.0));
        out.insert("rtc.weights".into(), HostTensor::new([horizon], weights.take(horizon).collect()));
        let noise: Option<Vec<f32>> =
            self.batch.iter().map(|i| i.noise.as_deref()).collect::<Option<Vec<_>>>().map(|n| n.concat());
        for step in 0..steps {
            let t = 1.0 - step as f64 / steps as f64;
            let strength = HostTensor::new([1], vec![g.strength(t) as f32]);
            out.insert(format!("step{step}.guidance_weight"), strength);
            let x = match step {
                0 => noise.as_ref(),
                _ => out.get(&format!("step{}.x_next", step - 1)).map(|x| &x.data),
            };
            let Some((x, v)) = x.zip(out.get(&format!("step{step}.v_t"))) else { continue };
            let end = |(&x, &v): (&f32, &f32)| (f64::from(x) - t * f64::from(v)) as f32;
            let x1 = HostTensor::new(v.shape.clone(), x.iter().zip(&v.data).map(end).collect());
            out.insert(format!("step{step}.x1"), x1);
        }
    }

    /// Masks and positions, which are not tensors of the network: read off the spans that attention is given.
    fn geometry(&self, out: &mut BTreeMap<String, HostTensor>) {
        let (batch, width) = (self.layout.batch(), self.prefix_width());
        // Suffix row 0 is the state's, if there is one, the others the actions'; packed, all states come first.
        let (horizon, state) = (self.layout.horizon, usize::from(self.layout.state_rows));
        let suffix = state + horizon;
        let packed_row = |b: usize, row: usize| {
            if row < state { b } else { self.layout.states() + b * horizon + row - state }
        };
        let packed = self.layout.prefix_positions();
        let mut pad_mask = HostTensor::zeros([batch, width]);
        let mut positions = HostTensor::zeros([batch, width]);
        let mut attend = HostTensor::zeros([batch, suffix, width + suffix]);
        let spans = self.layout.first_step_spans();
        for b in 0..batch {
            let rows = self.prefix_rows(b);
            let mut last = -1.0;
            for (i, row) in rows.iter().enumerate() {
                if let Some(row) = row {
                    last = packed[*row] as f32;
                    pad_mask.row_mut(b)[i] = 1.0;
                }
                positions.row_mut(b)[i] = last;
            }
            for s in 0..suffix {
                let span = spans
                    .iter()
                    .find(|span| span.queries.contains(&packed_row(b, s)))
                    .expect("spans cover all rows");
                let sees = |part: usize, row: usize| {
                    span.keys.iter().any(|k| k.part == part && k.rows.contains(&row))
                };
                let line = attend.row_mut(b * suffix + s);
                for (i, row) in rows.iter().enumerate() {
                    line[i] = f32::from(u8::from(row.is_some_and(|row| sees(1, row))));
                }
                for other in 0..suffix {
                    line[width + other] = f32::from(u8::from(sees(0, packed_row(b, other))));
                }
            }
        }
        let suffix_rows: Vec<f32> = self.layout.suffix_positions().iter().map(|&p| p as f32).collect();
        let tap = HostTensor::new([suffix_rows.len(), 1], suffix_rows);
        let mut suffix_positions = self.suffix(&tap);
        suffix_positions.shape.pop();
        out.insert("prefix.pad_mask".into(), pad_mask);
        out.insert("prefix.positions".into(), positions);
        out.insert("suffix.positions".into(), suffix_positions);
        out.insert("suffix.attend".into(), attend);
    }
}
