//! openpi's JAX checkpoints: from the arrays of a `params` directory to the tensors of the network.
//!
//! JAX keeps one array for all layers, with the layer as its first axis, and matrices as `[in, out]`. Each tensor is a
//! sub-array whose axes change places while it is decompressed. Letters: L layers, N heads, K heads of keys and values,
//! H width of a head, D width, F width of an MLP.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use half::{bf16, f16};
use pi0_device::{Buffer, Bytes, Dtype, Lazy, Order, Preferred, Sink};
use pi0_orbax::{Array, Reader, Tree};

use super::ahead::{Ahead, Form, Tensors};
use super::sizes::Heads;
use super::stored::Stored;
use crate::ModelError;
use crate::weights::{EMBED, EXPERT, LANGUAGE, PROJECTOR, VISION};

/// Which axes of a sub-array make each axis of the tensor, outermost first.
type Axes = &'static [&'static [usize]];

const SAME: Axes = &[&[0]];
const MATRIX: Axes = &[&[0], &[1]];
const TRANSPOSED: Axes = &[&[1], &[0]];
const FLAT: Axes = &[&[0, 1]];

/// Arrays in more chunks than this are read one chunk after the other.
const MOST_CHUNKS: usize = 64;

/// A tensor for each layer: the array, the module's leaf, the index behind the layer if there is one, and the axes.
type Row = (&'static str, &'static str, &'static [usize], Axes);

/// `PaliGemma/img/Transformer/encoderblock/…` and what it becomes in a layer of the vision tower.
const VISION_LAYER: [Row; 16] = [
    ("LayerNorm_0/scale", "layer_norm1.weight", &[], SAME),
    ("LayerNorm_0/bias", "layer_norm1.bias", &[], SAME),
    ("LayerNorm_1/scale", "layer_norm2.weight", &[], SAME),
    ("LayerNorm_1/bias", "layer_norm2.bias", &[], SAME),
    ("MlpBlock_0/Dense_0/kernel", "mlp.fc1.weight", &[], TRANSPOSED),
    ("MlpBlock_0/Dense_0/bias", "mlp.fc1.bias", &[], SAME),
    ("MlpBlock_0/Dense_1/kernel", "mlp.fc2.weight", &[], TRANSPOSED),
    ("MlpBlock_0/Dense_1/bias", "mlp.fc2.bias", &[], SAME),
    // [D, N, H] to [N H, D].
    ("MultiHeadDotProductAttention_0/query/kernel", "self_attn.q_proj.weight", &[], &[&[1, 2], &[0]]),
    ("MultiHeadDotProductAttention_0/query/bias", "self_attn.q_proj.bias", &[], FLAT),
    ("MultiHeadDotProductAttention_0/key/kernel", "self_attn.k_proj.weight", &[], &[&[1, 2], &[0]]),
    ("MultiHeadDotProductAttention_0/key/bias", "self_attn.k_proj.bias", &[], FLAT),
    ("MultiHeadDotProductAttention_0/value/kernel", "self_attn.v_proj.weight", &[], &[&[1, 2], &[0]]),
    ("MultiHeadDotProductAttention_0/value/bias", "self_attn.v_proj.bias", &[], FLAT),
    // [N, H, D] to [D, N H].
    ("MultiHeadDotProductAttention_0/out/kernel", "self_attn.out_proj.weight", &[], &[&[2], &[0, 1]]),
    ("MultiHeadDotProductAttention_0/out/bias", "self_attn.out_proj.bias", &[], SAME),
];

/// `PaliGemma/llm/layers/…` and what it becomes in a layer of a Gemma tower. The first part of a name gets the
/// expert's `_1`.
const GEMMA_LAYER: [Row; 11] = [
    // [N, D, H] to [N H, D].
    ("attn/q_einsum*/w", "self_attn.q_proj.weight", &[], &[&[0, 2], &[1]]),
    ("attn/kv_einsum*/w", "self_attn.k_proj.weight", &[0], &[&[0, 2], &[1]]),
    ("attn/kv_einsum*/w", "self_attn.v_proj.weight", &[1], &[&[0, 2], &[1]]),
    // [N, H, D] to [D, N H].
    ("attn/attn_vec_einsum*/w", "self_attn.o_proj.weight", &[], &[&[2], &[0, 1]]),
    ("mlp*/gating_einsum", "mlp.gate_proj.weight", &[0], TRANSPOSED),
    ("mlp*/gating_einsum", "mlp.up_proj.weight", &[1], TRANSPOSED),
    ("mlp*/linear", "mlp.down_proj.weight", &[], TRANSPOSED),
    ("pre_attention_norm*/scale", "input_layernorm.weight", &[], SAME),
    ("pre_ffw_norm*/scale", "post_attention_layernorm.weight", &[], SAME),
    ("pre_attention_norm*/Dense_0/kernel", "input_layernorm.dense.weight", &[], TRANSPOSED),
    ("pre_attention_norm*/Dense_0/bias", "input_layernorm.dense.bias", &[], SAME),
];

/// The rest of it.
const GEMMA_LAYER_MORE: [Row; 2] = [
    ("pre_ffw_norm*/Dense_0/kernel", "post_attention_layernorm.dense.weight", &[], TRANSPOSED),
    ("pre_ffw_norm*/Dense_0/bias", "post_attention_layernorm.dense.bias", &[], SAME),
];

/// What is not in layers.
fn singles() -> Vec<(String, String, &'static [usize], Axes)> {
    let mut rows: Vec<(String, String, &'static [usize], Axes)> = Vec::new();
    let mut put = |from: &str, to: String, at, axes| rows.push((from.into(), to, at, axes));
    // Height, width, channels, outputs to outputs, channels, height, width.
    let patches = format!("{VISION}.embeddings.patch_embedding");
    put("PaliGemma/img/embedding/kernel", format!("{patches}.weight"), &[], &[&[3], &[2], &[0], &[1]]);
    put("PaliGemma/img/embedding/bias", format!("{patches}.bias"), &[], SAME);
    let positions = format!("{VISION}.embeddings.position_embedding.weight");
    put("PaliGemma/img/pos_embedding", positions, &[0], MATRIX);
    let norm = "PaliGemma/img/Transformer/encoder_norm";
    put(&format!("{norm}/scale"), format!("{VISION}.post_layernorm.weight"), &[], SAME);
    put(&format!("{norm}/bias"), format!("{VISION}.post_layernorm.bias"), &[], SAME);
    put("PaliGemma/img/head/kernel", format!("{PROJECTOR}.weight"), &[], TRANSPOSED);
    put("PaliGemma/img/head/bias", format!("{PROJECTOR}.bias"), &[], SAME);
    put("PaliGemma/llm/embedder/input_embedding", EMBED.into(), &[], MATRIX);
    for (tower, suffix) in [(LANGUAGE, ""), (EXPERT, "_1")] {
        let norm = format!("PaliGemma/llm/final_norm{suffix}");
        put(&format!("{norm}/scale"), format!("{tower}.norm.weight"), &[], SAME);
        put(&format!("{norm}/Dense_0/kernel"), format!("{tower}.norm.dense.weight"), &[], TRANSPOSED);
        put(&format!("{norm}/Dense_0/bias"), format!("{tower}.norm.dense.bias"), &[], SAME);
    }
    for name in super::names::PROJECTIONS {
        put(&format!("{name}/kernel"), format!("{name}.weight"), &[], TRANSPOSED);
        put(&format!("{name}/bias"), format!("{name}.bias"), &[], SAME);
    }
    rows
}

/// Opens a `params` directory: every tensor, still compressed, and the heads that shapes of tensors do not show.
pub(super) fn open(params: &Path) -> Result<(Vec<Stored>, Heads, Arc<Ahead>), ModelError> {
    let tree = Tree::open(params).map_err(of_orbax)?;
    let arrays = &tree.arrays;
    let shape = |name: &str| arrays.get(name).map(|a| a.shape());
    let q = shape("PaliGemma/llm/layers/attn/q_einsum/w");
    if arrays.keys().any(|name| name.contains("qkv_einsum")) {
        return Err(ModelError::config(
            params,
            "has as many heads of keys as of queries, which is not supported",
        ));
    }
    let kv = shape("PaliGemma/llm/layers/attn/kv_einsum/w");
    let query = shape("PaliGemma/img/Transformer/encoderblock/MultiHeadDotProductAttention_0/query/kernel");
    let heads = match (q, kv, query) {
        (Some(&[_, heads, _, head_dim]), Some(&[_, 2, kv_heads, _, _]), Some(&[_, _, vision, _])) => {
            Heads { vision, gemma: heads, kv: kv_heads, head_dim }
        }
        _ => {
            let what = "holds no policy of openpi's: wanted PaliGemma/llm/layers/attn/q_einsum/w, kv_einsum/w and \
                        PaliGemma/img/…/query/kernel with their axes";
            return Err(ModelError::config(params, what));
        }
    };

    let mut plan = Plan::default();
    for (from, to, at, axes) in singles() {
        plan.put(arrays, &from, to, at.to_vec(), axes);
    }
    let mut layered = |prefix: &str, rows: &[Row], suffix: &str, tower: &str| {
        for (from, to, at, axes) in rows {
            let from = format!("{prefix}{}", from.replacen('*', suffix, 1));
            let layers = arrays.get(&from).and_then(|a| a.shape().first()).copied().unwrap_or(0);
            // So many layers were never written; a forged number must not make a list of them.
            for layer in 0..layers.min(1000) {
                let at = [&[layer], *at].concat();
                plan.put(arrays, &from, format!("{tower}.layers.{layer}.{to}"), at, axes);
            }
        }
    };
    layered("PaliGemma/img/Transformer/encoderblock/", &VISION_LAYER, "", &format!("{VISION}.encoder"));
    for (tower, suffix) in [(LANGUAGE, ""), (EXPERT, "_1")] {
        layered("PaliGemma/llm/layers/", &GEMMA_LAYER, suffix, tower);
        layered("PaliGemma/llm/layers/", &GEMMA_LAYER_MORE, suffix, tower);
    }
    plan.finish(&tree, heads)
}

/// An error of the reader as one of the model.
fn of_orbax(e: pi0_orbax::Error) -> ModelError {
    match e {
        pi0_orbax::Error::Read { path, source } => ModelError::Read { path, source },
        pi0_orbax::Error::Damaged { path, what } => ModelError::Damaged { path, what },
        pi0_orbax::Error::Unsupported { path, what } => {
            ModelError::Config { path, what: format!("has {what}") }
        }
        pi0_orbax::Error::NotOrbax { path, what } => ModelError::Config { path, what },
    }
}

/// A tensor to be read.
#[derive(Debug)]
struct Part {
    name: String,
    original: String,
    /// Number of its array.
    array: usize,
    at: Vec<usize>,
    strides: Vec<usize>,
    shape: Vec<usize>,
    stored: pi0_orbax::Dtype,
    /// Adapters that are added to it.
    adapters: Option<(Arc<Array>, Arc<Array>)>,
    /// How its chunks lie one behind the other, if that is an order that tensors can have.
    as_stored: Option<AsStored>,
}

/// A sub-array as its chunks hold it.
#[derive(Debug)]
struct AsStored {
    /// Chunks along each axis.
    grid: Vec<usize>,
    /// What they are one behind the other.
    order: Order,
}

impl AsStored {
    /// For a sub-array of the sizes `shape` in chunks of the sizes `chunk`, whose `axes` are those of the tensor.
    fn of(shape: &[usize], chunk: &[usize], axes: Axes) -> Option<Self> {
        if shape.iter().zip(chunk).any(|(n, c)| !n.is_multiple_of(*c)) {
            return None;
        }
        let grid: Vec<usize> = shape.iter().zip(chunk).map(|(n, c)| n / c).collect();
        if grid.iter().product::<usize>() > MOST_CHUNKS {
            return None;
        }
        // Chunks along an axis are parts of the whole if the axes before it are cut into single values.
        let outermost = |axes: &[usize]| {
            axes.iter().enumerate().all(|(i, &a)| grid[a] == 1 || axes[..i].iter().all(|&b| chunk[b] == 1))
        };
        let parts = |axes: &[usize]| axes.iter().map(|&a| grid[a]).product::<usize>();
        let order = match axes {
            [[0], [1]] if outermost(&[0, 1]) => Order::Rows,
            // Inputs before outputs.
            [out, inputs] if inputs.iter().all(|i| out.iter().all(|o| i < o)) => (outermost(out)
                && outermost(inputs))
            .then(|| Order::Columns { splits: parts(inputs), groups: parts(out) })?,
            // Heads, inputs, outputs of a head.
            [[0, 2], [1]] if shape[0] == 1 => Order::Columns { splits: grid[1], groups: grid[2] },
            [[0, 2], [1]] if grid[2] == 1 && (grid[0] == 1 || grid[1] == 1) => {
                Order::Columns { splits: grid[1], groups: shape[0] }
            }
            _ => return None,
        };
        Some(Self { grid, order })
    }

    /// Coordinates of a chunk.
    fn chunk(&self, mut number: usize) -> Vec<usize> {
        let mut at = vec![0; self.grid.len()];
        for (at, n) in at.iter_mut().zip(&self.grid).rev() {
            (*at, number) = (number % n, number / n);
        }
        at
    }

    fn chunks(&self) -> usize {
        self.grid.iter().product()
    }
}

impl Part {
    /// Whether it is a matrix of a linear layer that the references do not keep in f32.
    fn layer(&self) -> bool {
        let linear = self.name.contains(".layers.") && !self.name.contains(".dense.")
            || self.name.starts_with(PROJECTOR);
        linear && self.shape.len() == 2
    }

    /// Its format, adapters added.
    fn dtype(&self) -> Result<Dtype, String> {
        match self.stored {
            _ if self.adapters.is_some() => Ok(Dtype::F32),
            pi0_orbax::Dtype::F32 => Ok(Dtype::F32),
            pi0_orbax::Dtype::Bf16 => Ok(Dtype::Bf16),
            pi0_orbax::Dtype::F16 => Ok(Dtype::F16),
            pi0_orbax::Dtype::Other(name, _) => Err(name.into()),
        }
    }

    fn count(&self) -> usize {
        self.shape.iter().product()
    }

    /// Where in the order of loading it comes: the embedding table first, since it takes longest and stays.
    fn order(&self) -> (usize, usize) {
        let layer = self.name.split(".layers.").nth(1).and_then(|rest| rest.split('.').next()?.parse().ok());
        let stages = [EMBED, VISION, PROJECTOR, LANGUAGE, EXPERT];
        let stage = stages.iter().position(|stage| self.name.starts_with(stage)).unwrap_or(stages.len());
        let first = self.name.contains(".embeddings.");
        (stage, if first { 0 } else { layer.map_or(usize::MAX, |layer: usize| layer + 1) })
    }
}

#[derive(Default)]
struct Plan {
    parts: Vec<Part>,
    arrays: Vec<Arc<Array>>,
    numbers: BTreeMap<String, usize>,
    used: Vec<String>,
}

impl Plan {
    /// A tensor from the sub-array of `from` at `at`, if there is such an array and it has these axes.
    fn put(
        &mut self,
        arrays: &BTreeMap<String, Arc<Array>>,
        from: &str,
        name: String,
        at: Vec<usize>,
        axes: Axes,
    ) {
        let Some(array) = arrays.get(from) else { return };
        let rank: usize = axes.iter().map(|a| a.len()).sum();
        let shape = array.shape();
        if shape.len() != at.len() + rank || at.iter().zip(shape).any(|(i, n)| i >= n) {
            // Reported as unexpected, with its shape, beside what is missing.
            return;
        }
        let rest = &shape[at.len()..];
        let mut strides = vec![1; rank];
        let mut stride = 1;
        for &axis in axes.iter().rev().flat_map(|group| group.iter().rev()) {
            strides[axis] = stride;
            stride *= rest[axis];
        }
        let number = *self.numbers.entry(from.into()).or_insert_with(|| {
            self.arrays.push(array.clone());
            self.arrays.len() - 1
        });
        self.used.push(from.into());
        // Adapters lie beside `w` or carry the array's name.
        let beside = |leaf: &str| match from.strip_suffix("/w") {
            Some(module) => format!("{module}/lora_{leaf}"),
            None => format!("{from}_lora_{leaf}"),
        };
        let adapters = match (arrays.get(&beside("a")), arrays.get(&beside("b"))) {
            (Some(a), Some(b)) if fit(shape, a.shape(), b.shape()) => {
                self.used.extend([beside("a"), beside("b")]);
                Some((a.clone(), b.clone()))
            }
            _ => None,
        };
        let place: String = at.iter().map(|i| format!("[{i}]")).collect();
        let as_stored = AsStored::of(rest, &array.chunk()[at.len()..], axes);
        self.parts.push(Part {
            name,
            as_stored,
            original: format!("{from}{place}"),
            array: number,
            at,
            strides,
            shape: axes.iter().map(|group| group.iter().map(|&a| rest[a]).product()).collect(),
            stored: array.dtype(),
            adapters,
        });
    }

    fn finish(mut self, tree: &Tree, heads: Heads) -> Result<(Vec<Stored>, Heads, Arc<Ahead>), ModelError> {
        self.parts.sort_by_key(Part::order);
        let mut stored: Vec<Stored> = Vec::with_capacity(self.parts.len());
        // One for each chunk of a tensor.
        let mut readers: Vec<Vec<Mutex<Reader>>> = self.arrays.iter().map(|_| Vec::new()).collect();
        for part in &self.parts {
            let (readers, chunks) =
                (&mut readers[part.array], part.as_stored.as_ref().map_or(1, AsStored::chunks));
            let more = readers.len()..chunks.max(readers.len());
            readers.extend(more.map(|_| Mutex::new(Reader::new(self.arrays[part.array].clone()))));
        }
        let facts: Vec<_> = self
            .parts
            .iter()
            .map(|p| (p.original.clone(), p.name.clone(), p.dtype(), p.shape.clone()))
            .collect();
        let ends = readers.iter().scan(0, |end, readers| {
            *end += readers.len();
            Some(*end)
        });
        let streams = [0].into_iter().chain(ends).collect();
        let ahead = Ahead::new(Box::new(Parts { parts: self.parts, readers, streams }));
        for (index, (original, name, dtype, shape)) in facts.into_iter().enumerate() {
            let bytes = Bytes::Lazy(Lazy::new(ahead.tensor(index, Form::default())));
            stored.push(Stored { original, name, dtype, shape, bytes });
        }
        // Arrays that nothing was made of are not hidden.
        for (path, array) in &tree.arrays {
            if !self.used.contains(path) {
                stored.push(Stored {
                    original: path.clone(),
                    name: path.replace('/', "."),
                    dtype: Err(array.dtype().name().into()),
                    shape: array.shape().to_vec(),
                    bytes: Bytes::Owned(Arc::default()),
                });
            }
        }
        Ok((stored, heads, ahead))
    }
}

/// Whether adapters belong to a weight: `[…, X, r]` and `[…, r, Y]` beside `[…, X, Y]`.
fn fit(w: &[usize], a: &[usize], b: &[usize]) -> bool {
    let n = w.len();
    n >= 2
        && a.len() == n
        && b.len() == n
        && w[..n - 2] == a[..n - 2]
        && w[..n - 2] == b[..n - 2]
        && (w[n - 2], w[n - 1]) == (a[n - 2], b[n - 1])
        && a[n - 1] == b[n - 2]
}

/// The tensors, in order.
#[derive(Debug)]
struct Parts {
    parts: Vec<Part>,
    /// Of each array.
    readers: Vec<Vec<Mutex<Reader>>>,
    /// The number of the first stream of each array: every reader is one.
    streams: Vec<usize>,
}

impl Tensors for Parts {
    fn count(&self) -> usize {
        self.parts.len()
    }

    fn bytes(&self, index: usize, form: Form) -> usize {
        let part = &self.parts[index];
        let size = part.dtype().map_or(part.stored.size(), Dtype::size);
        part.count() * if form.round.is_some() { size / 2 } else { size }
    }

    fn name(&self, index: usize) -> &str {
        &self.parts[index].original
    }

    fn chunks(&self, index: usize) -> usize {
        self.parts[index].as_stored.as_ref().map_or(1, AsStored::chunks)
    }

    fn stream(&self, index: usize, chunk: usize) -> usize {
        self.streams[self.parts[index].array] + chunk
    }

    fn stays(&self, index: usize) -> bool {
        self.parts[index].name == EMBED
    }

    fn form(&self, index: usize, preferred: &Preferred) -> (Form, Order) {
        let part = &self.parts[index];
        let f32 = part.stored == pi0_orbax::Dtype::F32;
        let rows = (Form::default(), Order::Rows);
        let Some(AsStored { order, .. }) = &part.as_stored else { return rows };
        match order {
            Order::Rows if part.name == EMBED && f32 && part.adapters.is_none() => {
                (Form { round: preferred.table, ..Form::default() }, Order::Rows)
            }
            Order::Columns { .. } if part.layer() && preferred.columns && preferred.pieces => {
                (Form { columns: true, pieces: true, ..Form::default() }, *order)
            }
            Order::Columns { .. } if part.layer() && preferred.columns => {
                // Adapters are added first.
                let round = preferred.layers.filter(|_| f32 && part.adapters.is_none());
                (Form { columns: true, round, ..Form::default() }, *order)
            }
            _ => rows,
        }
    }

    fn read(&self, index: usize, form: Form, mut into: Buffer) -> Result<Buffer, String> {
        let part = &self.parts[index];
        if form.columns || form.round.is_some() {
            let as_stored = part.as_stored.as_ref().ok_or("this form was not offered")?;
            if part.adapters.is_some() {
                // In pieces of whole rows, each of which gets what is added to it while it is in a cache.
                const PIECE: usize = 1 << 18;
                let width = self.reader(part, 0).array().chunk().last().copied().unwrap_or(1);
                let row = (width * part.dtype()?.size()).max(1);
                let whole = Whole { unit: (PIECE / row).max(1) * row, memory: Mutex::new(into) };
                (0..as_stored.chunks()).try_for_each(|chunk| self.pour(index, chunk, &whole))?;
                return Ok(whole.memory.into_inner().unwrap_or_else(PoisonError::into_inner));
            }
            self.read_chunks(part, as_stored, form, &mut into).map_err(|e| e.to_string())?;
            return Ok(into);
        }
        let stored = part.count() * part.stored.size();
        if into.len() != stored {
            into = vec![0; stored].into();
        }
        let mut reader = self.reader(part, 0);
        reader.read(&part.at, &part.strides, &mut into).map_err(|e| e.to_string())?;
        drop(reader);
        match &part.adapters {
            Some((a, b)) => Ok(merge(part, a, b, &into).map_err(|e| e.to_string())?.into()),
            None => Ok(into),
        }
    }

    fn pour(&self, index: usize, chunk: usize, sink: &dyn Sink) -> Result<(), String> {
        let part = &self.parts[index];
        let as_stored = part.as_stored.as_ref().ok_or("this form was not offered")?;
        let first = chunk * (self.bytes(index, Form::default()) / as_stored.chunks());
        let place = as_stored.chunk(chunk);
        let adapted = part.adapters.as_ref().map(|(a, b)| Adapted::new(part, a, b)).transpose();
        let mut adapted = adapted.map_err(|e| e.to_string())?;
        let mut reader = self.reader(part, chunk);
        let sizes = reader.array().chunk()[part.at.len()..].to_vec();
        // Adapters make f32 of whatever is stored.
        let [made, stored] = [part.dtype()?.size(), part.stored.size()];
        let mut take = |at: usize, bytes: &[u8]| match &mut adapted {
            None => sink.take(first + at, bytes),
            Some(adapted) => {
                sink.take(first + at / stored * made, adapted.add(&place, &sizes, at / stored, bytes));
            }
        };
        let unit = sink.unit() / made * stored;
        reader.pour_part(&part.at, &place, unit, &mut take).map_err(|e| e.to_string())
    }
}

/// Memory for all pieces of a tensor.
#[derive(Debug)]
struct Whole {
    unit: usize,
    memory: Mutex<Buffer>,
}

impl Sink for Whole {
    fn unit(&self) -> usize {
        self.unit
    }

    fn take(&self, at: usize, bytes: &[u8]) {
        self.memory.lock().unwrap_or_else(PoisonError::into_inner)[at..at + bytes.len()]
            .copy_from_slice(bytes);
    }

    fn end(&self, _: Result<(), String>) {}
}

impl Parts {
    fn reader(&self, part: &Part, chunk: usize) -> MutexGuard<'_, Reader> {
        self.readers[part.array][chunk].lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Reads a tensor chunk behind chunk, several at a time.
    fn read_chunks(
        &self,
        part: &Part,
        as_stored: &AsStored,
        form: Form,
        into: &mut [u8],
    ) -> pi0_orbax::Result<()> {
        let chunks = as_stored.chunks();
        let each = into.len() / chunks;
        let one = |(chunk, into): (usize, &mut [u8])| {
            self.reader(part, chunk).read_part(&part.at, &as_stored.chunk(chunk), form.round, into)
        };
        let threads = std::thread::available_parallelism().map_or(1, usize::from).min(chunks);
        let queue = Mutex::new(into.chunks_exact_mut(each.max(1)).enumerate());
        let work = || loop {
            let next = queue.lock().unwrap_or_else(PoisonError::into_inner).next();
            match next {
                Some(next) => one(next)?,
                None => return Ok(()),
            }
        };
        std::thread::scope(|scope| {
            let others: Vec<_> = (1..threads)
                .filter_map(|_| {
                    std::thread::Builder::new().name("pi0-read".into()).spawn_scoped(scope, work).ok()
                })
                .collect();
            let first = work();
            others.into_iter().fold(first, |result, other| {
                let other = other.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
                result.and(other)
            })
        })
    }
}

/// Values as f32, exactly.
fn to_f32(bytes: &[u8], dtype: pi0_orbax::Dtype) -> Vec<f32> {
    let halves = || bytes.chunks_exact(2).map(|b| [b[0], b[1]]);
    match dtype {
        pi0_orbax::Dtype::Bf16 => halves().map(|b| bf16::from_le_bytes(b).to_f32()).collect(),
        pi0_orbax::Dtype::F16 => halves().map(|b| f16::from_le_bytes(b).to_f32()).collect(),
        _ => bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect(),
    }
}

/// The values of a factor that belong to a tensor, and their sizes.
fn factor(part: &Part, array: &Arc<Array>) -> pi0_orbax::Result<(Vec<f32>, Vec<usize>)> {
    let sizes = array.shape()[part.at.len()..].to_vec();
    let mut strides = vec![1; sizes.len()];
    for i in (1..sizes.len()).rev() {
        strides[i - 1] = strides[i] * sizes[i];
    }
    let mut bytes = vec![0; sizes.iter().product::<usize>() * array.dtype().size()];
    Reader::new(array.clone()).read(&part.at, &strides, &mut bytes)?;
    Ok((to_f32(&bytes, array.dtype()), sizes))
}

/// Adapters that are added to pieces of a tensor: `w + a b`, rounded once to f32; openpi's configurations scale by
/// alpha / rank = 1.
struct Adapted {
    stored: pi0_orbax::Dtype,
    /// `[…, X, r]`.
    a: Vec<f32>,
    /// `[…, r, Y]`.
    b: Vec<f64>,
    /// Sizes of the tensor's array behind the layer, `[…, X, Y]`, and the rank.
    sizes: Vec<usize>,
    rank: usize,
    out: Vec<u8>,
}

impl Adapted {
    fn new(part: &Part, a: &Arc<Array>, b: &Arc<Array>) -> pi0_orbax::Result<Self> {
        let ((a, mut sizes), (b, of_b)) = (factor(part, a)?, factor(part, b)?);
        let last = sizes.len() - 1;
        let rank = std::mem::replace(&mut sizes[last], of_b[last]);
        let b = b.into_iter().map(f64::from).collect();
        Ok(Self { stored: part.stored, a, b, sizes, rank, out: Vec::new() })
    }

    /// The values `bytes`, whole rows from value `at` of the chunk `place` on, with what is added to them, in f32. Chunks
    /// have the sizes `chunk`.
    fn add(&mut self, place: &[usize], chunk: &[usize], at: usize, bytes: &[u8]) -> &[u8] {
        let mut values = to_f32(bytes, self.stored);
        let n = chunk.len();
        let (width, first) = (chunk[n - 1], place[n - 1] * chunk[n - 1]);
        let [x, y] = [self.sizes[n - 2], self.sizes[n - 1]];
        for (row, values) in (at / width..).zip(values.chunks_exact_mut(width)) {
            // Which row of which matrix it is.
            let mut rest = row / chunk[n - 2];
            let (mut matrix, mut step) = (0, 1);
            for axis in (0..n - 2).rev() {
                matrix += (place[axis] * chunk[axis] + rest % chunk[axis]) * step;
                rest /= chunk[axis];
                step *= self.sizes[axis];
            }
            let line = place[n - 2] * chunk[n - 2] + row % chunk[n - 2];
            let a = &self.a[(matrix * x + line) * self.rank..][..self.rank];
            let b = &self.b[matrix * self.rank * y..][..self.rank * y];
            super::adapter::add_product(values, a, b, first..first + width, 1.0);
        }
        self.out.clear();
        self.out.extend(values.iter().flat_map(|x| x.to_le_bytes()));
        &self.out
    }
}

/// The same of a tensor in C order, for devices that take no pieces and for chunks that no order of bytes describes.
fn merge(part: &Part, a: &Arc<Array>, b: &Arc<Array>, w: &[u8]) -> pi0_orbax::Result<Vec<u8>> {
    let mut out = to_f32(w, part.stored);
    let ((a, shape_a), (b, shape_b)) = (factor(part, a)?, factor(part, b)?);
    let n = shape_a.len();
    let (x, rank, y) = (shape_a[n - 2], shape_a[n - 1], shape_b[n - 1]);
    let (outer, [of_x, of_y]) = part.strides.split_at(n - 2) else { unreachable!("two axes at least") };
    let batches: usize = shape_a[..n - 2].iter().product();
    let mut sums = vec![0.0f64; x];
    for batch in 0..batches {
        let (mut base, mut rest) = (0, batch);
        for (size, stride) in shape_a[..n - 2].iter().zip(outer).rev() {
            base += rest % size * stride;
            rest /= size;
        }
        let a = &a[batch * x * rank..][..x * rank];
        let b = &b[batch * rank * y..][..rank * y];
        // Columns of `a` as rows: the innermost loop runs over neighbours.
        let columns: Vec<f32> = (0..rank).flat_map(|r| (0..x).map(move |i| a[i * rank + r])).collect();
        for j in 0..y {
            sums.fill(0.0);
            for (r, column) in columns.chunks_exact(x.max(1)).enumerate() {
                let factor = f64::from(b[r * y + j]);
                for (sum, &value) in sums.iter_mut().zip(column) {
                    *sum += factor * f64::from(value);
                }
            }
            for (i, sum) in sums.iter().enumerate() {
                let w = &mut out[base + i * of_x + j * of_y];
                *w = (f64::from(*w) + sum) as f32;
            }
        }
    }
    Ok(out.into_iter().flat_map(f32::to_le_bytes).collect())
}
