//! `Traced` and `Tapped`: what they record, and what they let through.

use std::ops::Range;
use std::time::Duration;

use pi0_device::{
    Dense, Device, Error, Fallback, HostTensor, LinearPart, Norm, NormKind, OpKind, Place, Reference, Result,
    Scope, Tapped, TensorSource, Traced, WeightSource, dense, forward,
};

/// A young device: it moves, multiplies and adds, and looks embeddings up on the host; nothing else yet, and no norm
/// weights.
struct Young(Reference);

type T = <Reference as Device>::Tensor;
type W = <Reference as Device>::Weight;

impl Device for Young {
    type Tensor = T;
    type Weight = W;

    fn name(&self) -> &'static str {
        "young"
    }

    forward! { Reference.0: shape upload download embed linear add }

    fn prepare(&self, source: &WeightSource) -> Result<W> {
        match source {
            WeightSource::Norm { .. } => Err(Error::unsupported("young", OpKind::Prepare, "no norms")),
            _ => Reference.prepare(source),
        }
    }
    fn on_host(&self, op: OpKind) -> bool {
        op == OpKind::Embed
    }
    fn slice_rows(&self, _: &T, range: Range<usize>) -> Result<T> {
        Err(Error::Failed { device: "young", what: format!("broke at {range:?}") })
    }
}

/// The reference with a fused operation, a slow one.
struct Fusing(Reference);

impl Device for Fusing {
    type Tensor = T;
    type Weight = W;

    fn name(&self) -> &'static str {
        "fusing"
    }

    forward! { Reference.0: shape upload download prepare linear rms_norm add }

    fn dense(&self, call: &Dense<'_, T, W>) -> Result<T> {
        std::thread::sleep(Duration::from_millis(3));
        dense(&Reference, call)
    }
}

fn source(shape: &[usize], data: &[f32]) -> TensorSource {
    TensorSource::from_f32("w", shape.to_vec(), data).unwrap()
}

fn weights() -> [WeightSource; 2] {
    let weight = source(&[2, 2], &[1.0, 2.0, 3.0, 4.0]);
    let parts = vec![LinearPart { weight, bias: None, columns: None }];
    let norm =
        WeightSource::Norm { kind: NormKind::Rms, weight: source(&[2], &[0.0; 2]), bias: None, eps: 1e-6 };
    [WeightSource::Linear { parts, exact: false }, norm]
}

/// `x + linear(rms_norm(x))` on `d`, in the module `a.b`.
fn layer<D: Device>(d: &D) -> Result<HostTensor> {
    let [linear, norm] = weights();
    let (linear, norm) = (d.prepare(&linear)?, d.prepare(&norm)?);
    let x = d.upload(3, 2, &[1.0, 2.0, 3.0, 4.0, 5.0, 6.0])?;
    let _a = Scope::new(d, format_args!("a"));
    let _b = Scope::new(d, format_args!("{}", "b"));
    let call = Dense {
        norm: Some(Norm::Rms(&norm)),
        residual: Some(&x),
        norm_tap: Some("normed"),
        branch_tap: Some("branch"),
        ..Dense::new(&x, &linear)
    };
    d.download(&dense(d, &call)?)
}

#[test]
fn without_leave_to_fall_back_a_missing_operation_is_an_error() {
    let e = layer(&Traced::new(Young(Reference), Reference, Fallback::Fail)).unwrap_err();
    assert!(e.is_unsupported(), "{e}");
}

#[test]
fn a_fallback_gives_the_same_result_and_is_recorded_with_its_transfers() {
    let d = Traced::new(Young(Reference), Reference, Fallback::RunOnHost);
    assert_eq!(layer(&d).unwrap(), layer(&Reference).unwrap());
    let records = d.take();
    let seen: Vec<_> = records.iter().map(|r| (r.op, r.place, &*r.module)).collect();
    assert_eq!(
        seen,
        [
            (OpKind::Upload, Place::Device, ""),
            (OpKind::RmsNorm, Place::Host, "a.b"),
            (OpKind::Linear, Place::Device, "a.b"),
            (OpKind::Add, Place::Device, "a.b"),
            (OpKind::Download, Place::Device, "a.b"),
        ]
    );
    // Six values down and six up.
    assert_eq!(records[1].transfer_bytes, 48);
    assert_eq!((records[2].flop(), records[2].transfer_bytes), (2 * 3 * 2 * 2, 0));
    assert_eq!((&records[2].shapes[..], records[2].result), (&[[3, 2], [2, 2]][..], [3, 2]));
    assert!(d.take().is_empty(), "records are handed out once");
}

#[test]
fn what_a_device_leaves_to_the_host_is_recorded_there() {
    let table = WeightSource::Embedding(source(&[2, 2], &[1.0, 2.0, 3.0, 4.0]));
    // Wrappers pass it on, and it needs no leave: it is no fallback.
    let d = Traced::new(Tapped::new(&Young(Reference)), Reference, Fallback::Fail);
    let table = d.prepare(&table).unwrap();
    let y = d.embed(&table, &[1, 0, 1], 2.0).unwrap();
    assert_eq!(d.download(&y).unwrap().data, [6.0, 8.0, 2.0, 4.0, 6.0, 8.0]);
    let record = &d.take()[0];
    assert_eq!((record.op, record.place, record.transfer_bytes), (OpKind::Embed, Place::Host, 24));
}

#[test]
fn operations_can_be_forced_to_the_host() {
    let d = Traced::new(Reference, Reference, Fallback::Fail).force_to_host(vec![OpKind::Linear]);
    assert_eq!(layer(&d).unwrap(), layer(&Reference).unwrap());
    let places: Vec<_> = d.take().iter().filter(|r| r.op == OpKind::Linear).map(|r| r.place).collect();
    assert_eq!(places, [Place::Forced]);
}

#[test]
fn a_probe_times_the_device_and_what_fusing_saves() {
    let d = Traced::new(Fusing(Reference), Reference, Fallback::Fail).force_to_host(vec![OpKind::Linear]);
    d.probe(true);
    assert_eq!(layer(&d).unwrap(), layer(&Reference).unwrap());
    let records = d.take();
    assert!(records.iter().all(|r| r.device_time.is_some() == r.op.kind().is_some()), "{records:?}");
    let fusions = d.take_fusions();
    assert_eq!(fusions.len(), 1);
    assert_eq!((fusions[0].op, &fusions[0].forced[..]), (OpKind::Dense, &[OpKind::Linear][..]));
    // The fused call sleeps for longer than the rest takes.
    assert!(fusions[0].fused >= Duration::from_millis(3) && fusions[0].apart < fusions[0].fused);
    d.probe(false);
    layer(&d).unwrap();
    assert!(d.take().iter().all(|r| r.device_time.is_none()) && d.take_fusions().is_empty());
}

#[test]
fn a_failure_is_never_mistaken_for_a_missing_operation() {
    let d = Traced::new(Young(Reference), Reference, Fallback::RunOnHost);
    let x = d.upload(1, 1, &[0.0]).unwrap();
    assert_eq!(d.slice_rows(&x, 0..1).unwrap_err().to_string(), "young: broke at 0..1");
}

#[test]
fn taps_are_kept_under_their_module() {
    let d = Tapped::new(Reference);
    layer(&d).unwrap();
    let names: Vec<_> = d.take().unwrap().into_iter().map(|(name, t)| (name, t.shape)).collect();
    assert_eq!(names, [("a.b.normed".to_string(), vec![3, 2]), ("a.b.branch".to_string(), vec![3, 2])]);
}

#[test]
fn taps_and_traces_compose() {
    let d = Tapped::new(Traced::new(Young(Reference), Reference, Fallback::RunOnHost));
    layer(&d).unwrap();
    assert_eq!(d.take().unwrap().len(), 2);
}
