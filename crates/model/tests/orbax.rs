//! openpi's JAX checkpoints as they are: tensors bit for bit, actions as openpi's own model computes them.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex};

use pi0_device::{
    Bytes, Device, Dtype, HostTensor, Order, Preferred, Reference, ReferenceWeight, Result, Sink,
    TensorSource, WeightSource, forward,
};
use pi0_model::golden::{read_inputs, read_tensors};
use pi0_model::{Checkpoint, Extent, Kind, ModelError, NamedConfig, OpenOptions, Pi0, SampleOptions};
use pi0_orbax::writer::{Options, Writer};

fn golden() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../golden/orbax")
}

/// Format, shape and CRC-32C of each tensor, under openpi's PyTorch names.
type Truth = BTreeMap<String, (String, Vec<usize>, u32)>;

#[test]
fn tensors_are_those_of_the_converted_checkpoint_bit_for_bit() {
    let text = std::fs::read_to_string(golden().join("truth_pytorch.json")).unwrap();
    let truths: BTreeMap<String, Truth> = serde_json::from_str(&text).unwrap();
    assert_eq!(truths.len(), 2);
    for (name, mut truth) in truths {
        let checkpoint = Checkpoint::open(&golden().join(&name)).unwrap();
        // The tied table stands under its other name there.
        let table = truth.remove(pi0_model::weights::LM_HEAD).unwrap();
        truth.insert(pi0_model::weights::EMBED.into(), table);
        for (tensor, (dtype, shape, sum)) in &truth {
            let t = checkpoint.tensor(tensor);
            t.fetch().unwrap();
            let got = (t.dtype.name(), &t.shape, crc32c::crc32c(t.bytes()));
            assert_eq!(got, (dtype.as_str(), shape, *sum), "{tensor} of {name}");
        }
        assert_eq!(truth.len(), checkpoint.tensors().count(), "{name}");
    }
}

#[test]
fn actions_are_those_of_openpis_jax_model() {
    for (name, run, kind) in [("pi0_base", "pi0", Kind::Pi0), ("pi05_base", "pi05", Kind::Pi05)] {
        let checkpoint = Checkpoint::open(&golden().join(name)).unwrap();
        assert_eq!(checkpoint.config.kind, kind);
        let inputs = read_inputs(&golden().join(format!("{run}.inputs.safetensors"))).unwrap();
        let want = read_tensors(&golden().join(format!("{run}.outputs.safetensors"))).unwrap();
        for (schedule, truth) in [
            (pi0_model::TimeSchedule::Openpi, "actions"),
            (pi0_model::TimeSchedule::Lerobot, "actions_exact_time"),
        ] {
            let mut checkpoint = checkpoint.clone();
            assert_eq!(checkpoint.config.schedule, pi0_model::TimeSchedule::Openpi);
            checkpoint.config.schedule = schedule;
            let model = Pi0::load(Reference, checkpoint, Extent::Cache, &|_| ()).unwrap();
            let got = model.sample_actions(&inputs, &SampleOptions::default()).unwrap();
            let worst =
                got[0].data.iter().zip(&want[truth].data).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            println!("{name} {truth}: {worst:e}");
            // JAX computes the time embedding in f32, where a rounding of the time moves actions by about 1e-4.
            assert!(worst < if truth == "actions" { 3e-4 } else { 1e-5 }, "{name} {truth}: {worst:e}");
        }
    }
}

#[test]
fn sizes_come_from_the_arrays_and_the_rest_from_what_is_named() {
    let dir = tempfile::tempdir().unwrap();
    copy(&golden().join("pi0_base/params"), &dir.path().join("params"));
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    let given = Checkpoint::open(&golden().join("pi0_base")).unwrap();
    let (a, b) = (&checkpoint.config, &given.config);
    assert_eq!(
        (&a.vision, &a.gemma, &a.expert, a.vocab_size),
        (&b.vision, &b.gemma, &b.expert, b.vocab_size)
    );
    assert_eq!((a.horizon, a.max_tokens, b.horizon, b.max_tokens), (50, 48, 4, 8));
    assert!(checkpoint.origin.sizes.contains("published") && given.origin.sizes == "arch.json");

    let named = NamedConfig {
        name: "pi0_droid".into(),
        kind: Kind::Pi0,
        horizon: 10,
        action_dim: 32,
        max_tokens: None,
    };
    let options = OpenOptions { named: Some(named.clone()), ..OpenOptions::default() };
    let droid = Checkpoint::open_with(dir.path(), &options).unwrap();
    assert_eq!(droid.config.horizon, 10);
    assert!(droid.origin.sizes.contains("--config pi0_droid"), "{}", droid.origin.sizes);
    let arch = OpenOptions { arch: Some(golden().join("pi0_base/arch.json")), ..OpenOptions::default() };
    assert_eq!(Checkpoint::open_with(dir.path(), &arch).unwrap().config.horizon, 4);

    let other = NamedConfig { kind: Kind::Pi05, ..named };
    let options = OpenOptions { named: Some(other), ..OpenOptions::default() };
    assert!(Checkpoint::open_with(dir.path(), &options).unwrap_err().to_string().contains("π0.5"));
    // The arrays' own folder leads to the same.
    assert_eq!(Checkpoint::open(&dir.path().join("params")).unwrap().directory, dir.path());
}

/// The reference, which takes matrices piece by piece where that is offered, and keeps what they became.
struct Pieces {
    unit: usize,
    taken: Mutex<BTreeMap<String, Vec<f32>>>,
    rest: Reference,
}

/// How a pouring ended.
type End = std::result::Result<(), String>;

/// What came so far, and how it ended.
#[derive(Debug)]
struct Gathered {
    unit: usize,
    state: Mutex<(Vec<u8>, Option<End>)>,
    ended: Condvar,
}

impl Sink for Gathered {
    fn unit(&self) -> usize {
        self.unit
    }

    fn take(&self, at: usize, bytes: &[u8]) {
        self.state.lock().unwrap().0[at..at + bytes.len()].copy_from_slice(bytes);
    }

    fn end(&self, result: End) {
        self.state.lock().unwrap().1 = Some(result);
        self.ended.notify_all();
    }
}

impl Device for Pieces {
    type Tensor = Arc<HostTensor>;
    type Weight = ReferenceWeight;

    fn name(&self) -> &'static str {
        "pieces"
    }

    fn preferred(&self) -> Preferred {
        Preferred { columns: true, pieces: self.unit > 0, ..Preferred::default() }
    }

    fn prepare(&self, source: &WeightSource) -> Result<ReferenceWeight> {
        let mut source = source.clone();
        if let WeightSource::Linear { parts, .. } = &mut source {
            for weight in parts.iter_mut().map(|part| &mut part.weight) {
                if !weight.pours() {
                    if weight.order() != Order::Rows {
                        weight.fetch()?;
                        self.taken.lock().unwrap().insert(weight.name.clone(), weight.to_f32());
                    }
                    continue;
                }
                let state = Mutex::new((vec![0; weight.byte_count()], None));
                let unit = self.unit * weight.rows() * weight.dtype.size();
                let gathered = Arc::new(Gathered { unit, state, ended: Condvar::new() });
                weight.pour(gathered.clone());
                let state = gathered.state.lock().unwrap();
                let mut state = gathered.ended.wait_while(state, |state| state.1.is_none()).unwrap();
                state.1.take().unwrap().unwrap();
                let bytes = Bytes::Owned(Arc::new(std::mem::take(&mut state.0)));
                let whole = TensorSource::new(&weight.name, weight.dtype, weight.shape.clone(), bytes)?;
                *weight = whole.in_order(weight.order())?;
                self.taken.lock().unwrap().insert(weight.name.clone(), weight.to_f32());
            }
        }
        self.rest.prepare(&source)
    }

    forward! { Reference.rest: shape upload download embed linear layer_norm rms_norm ada_rms_norm attention rope
    gelu silu geglu add add_scaled gated_add concat_rows slice_rows slice_cols }
}

/// In pieces of any size, or (0) in JAX's order of axes at once, adapters added, every matrix is what it is in C order.
#[test]
fn pieces_are_the_tensors_they_are_of() {
    for (name, least) in [("pi0_base", 40), ("pi05_base", 30), ("pi0_lora", 40)] {
        for unit in [0, 1, 2, 7, 1000] {
            let checkpoint = Checkpoint::open(&golden().join(name)).unwrap();
            let whole: BTreeMap<_, _> =
                checkpoint.tensors().map(|t| (t.name.clone(), t.unfetched())).collect();
            let device = Pieces { unit, taken: Mutex::default(), rest: Reference };
            let model = Pi0::load(device, checkpoint, Extent::Whole, &|_| ()).unwrap();
            let taken = model.device().taken.lock().unwrap();
            assert!(taken.len() >= least, "{} of {name}", taken.len());
            for (tensor, values) in taken.iter() {
                let want = whole[tensor].to_f32();
                assert!(
                    values.iter().zip(&want).all(|(a, b)| a.to_bits() == b.to_bits()),
                    "{tensor} of {name} in pieces of {unit}"
                );
            }
        }
    }
}

fn copy(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in from.read_dir().unwrap() {
        let (entry, to) = (entry.unwrap(), to.to_path_buf());
        let to = to.join(entry.file_name());
        if entry.path().is_dir() {
            copy(&entry.path(), &to)
        } else {
            std::fs::copy(entry.path(), to).unwrap();
        }
    }
}

#[test]
fn adapters_in_the_checkpoint_are_added_in_f32() {
    let checkpoint = Checkpoint::open(&golden().join("pi0_lora")).unwrap();
    let tree = pi0_orbax::Tree::open(&golden().join("pi0_lora/params")).unwrap();
    let values = |name: &str| {
        let array = &tree.arrays[name];
        let bytes = array.read().unwrap();
        let read = |b: &[u8]| match b {
            [a, b] => half::bf16::from_le_bytes([*a, *b]).to_f64(),
            b => f64::from(f32::from_le_bytes(b.try_into().unwrap())),
        };
        (array.shape().to_vec(), bytes.chunks_exact(array.dtype().size()).map(read).collect::<Vec<_>>())
    };
    // W[l, n, d, h] + sum over r of A[l, n, d, r] B[l, n, r, h], at [n H + h, d].
    let q = "PaliGemma/llm/layers/attn/q_einsum";
    let ((shape, w), (sa, a), (_, b)) =
        (values(&format!("{q}/w")), values(&format!("{q}/lora_a")), values(&format!("{q}/lora_b")));
    let ([layers, heads, depth, width], rank) = (shape[..].try_into().unwrap(), sa[3]);
    for l in 0..layers {
        let name = format!(
            "paligemma_with_expert.paligemma.model.language_model.layers.{l}.self_attn.q_proj.weight"
        );
        let t = checkpoint.tensor(&name);
        t.fetch().unwrap();
        assert_eq!((t.dtype, &t.shape[..]), (Dtype::F32, &[heads * width, depth][..]));
        let got = t.to_f32();
        for (n, d, h) in
            (0..heads).flat_map(|n| (0..depth).flat_map(move |d| (0..width).map(move |h| (n, d, h))))
        {
            let head = l * heads + n;
            let sum: f64 =
                (0..rank).map(|r| a[(head * depth + d) * rank + r] * b[(head * rank + r) * width + h]).sum();
            assert!(sum != 0.0);
            let want = w[(head * depth + d) * width + h] + sum;
            let got = f64::from(got[(n * width + h) * depth + d]);
            assert!((got - want).abs() <= 1.3e-7 * want.abs().max(1e-3), "{name} {got} {want}");
        }
    }
    // A frozen weight without adapters keeps its format.
    assert_eq!(checkpoint.bytes_by_dtype().len(), 2);
    assert_eq!(checkpoint.find_not_finite().unwrap(), None);
}

#[test]
fn merged_weights_are_those_of_the_reference() {
    let Some(root) = std::env::var_os("PI0_ORBAX").map(PathBuf::from) else {
        eprintln!("skipped: Orbax fixtures outside the repository (set PI0_ORBAX=DIR)");
        return;
    };
    let bytes = std::fs::read(root.join("truth/p0_lora.merged.safetensors")).unwrap();
    let truth = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let checkpoint = Checkpoint::open(&root.join("train_pi0_lora/1999")).unwrap();
    let mut worst = 0.0f32;
    for (name, want) in truth.iter() {
        let name = if name == pi0_model::weights::LM_HEAD { pi0_model::weights::EMBED } else { name };
        let t = checkpoint.tensor(name);
        t.fetch().unwrap();
        assert_eq!(t.shape, want.shape(), "{name}");
        let want = want.data().chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap()));
        worst =
            t.to_f32().iter().zip(want).map(|(a, b)| (a - b).abs() / b.abs().max(1e-3)).fold(worst, f32::max);
    }
    assert!(worst < 1.3e-7, "{worst:e}");
    // Every other fixture of the two networks opens, and its tensors can be read.
    for case in [
        "train_pi0_ema/1999",
        "train_pi05_fsdp2x2/1999",
        "train_fast_two_hosts/1999",
        "published_fast_numpy",
        "published_pi05_libero",
        "zarr2_dirs_bf16",
        "zarr3_ocdbt",
        "zarr3_dirs_bf16",
        "ocdbt_bf16_value",
        "orbax_new",
        "orbax_new_v1",
    ] {
        let checkpoint = Checkpoint::open(&root.join(case)).unwrap_or_else(|e| panic!("{case}: {e}"));
        assert_eq!(checkpoint.find_not_finite().unwrap(), None, "{case}");
    }
}

/// A π0 checkpoint in which one array is another.
fn altered(name: &str, shape: &[usize]) -> std::result::Result<Checkpoint, ModelError> {
    let tree = pi0_orbax::Tree::open(&golden().join("pi0_base/params")).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let mut writer = Writer::create(&dir.path().join("params"), Options::default()).unwrap();
    for (path, array) in &tree.arrays {
        let (shape, bytes) = match path == name {
            true => (shape.to_vec(), vec![0; 4 * shape.iter().product::<usize>()]),
            false => (array.shape().to_vec(), array.read().unwrap()),
        };
        writer.array(path, array.dtype(), &shape, &shape, &mut |_, out| out.write_all(&bytes)).unwrap();
    }
    writer.finish().unwrap();
    Checkpoint::open(dir.path())
}

#[test]
fn arrays_of_other_shapes_are_listed() {
    altered("", &[]).unwrap();
    for (name, shape, word) in [
        ("PaliGemma/llm/layers/mlp/linear", vec![2, 40, 25], "linear[0] has shape [25, 40], wanted [24, 40]"),
        (
            "PaliGemma/llm/layers/mlp/linear",
            vec![80, 24],
            "unexpected PaliGemma/llm/layers/mlp/linear [80, 24]",
        ),
        ("PaliGemma/llm/layers/attn/q_einsum/w", vec![2, 3, 24], "no policy of openpi's"),
        ("PaliGemma/img/pos_embedding", vec![1, 5, 16], "no square"),
        ("action_out_proj/bias", vec![31], "action_out_proj"),
        ("PaliGemma/llm/layers/mlp/gating_einsum", vec![1500, 2, 24, 40], "depth"),
    ] {
        let e = altered(name, &shape).unwrap_err().to_string();
        assert!(e.contains(word), "{name} {shape:?}: {e}");
    }
}
