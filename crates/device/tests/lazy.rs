//! Tensors whose bytes are made when they are wanted.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use pi0_device::{
    Buffer, Bytes, Device, Dtype, Fallback, Lazy, LinearPart, MakeBytes, OpKind, Order, Reference,
    TensorSource, Traced, WeightSource,
};

/// Makes the same values each time, and counts how often.
#[derive(Debug)]
struct Maker {
    values: Vec<f32>,
    count: usize,
    made: AtomicUsize,
}

impl MakeBytes for Maker {
    fn count(&self) -> usize {
        4 * self.count
    }

    fn make(&self) -> Result<Buffer, String> {
        self.made.fetch_add(1, Ordering::Relaxed);
        if self.values.is_empty() { Err("the file is gone".into()) } else { Ok(bytes(&self.values).into()) }
    }
}

fn bytes(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|x| x.to_le_bytes()).collect()
}

fn lazy(values: &[f32], shape: &[usize]) -> (TensorSource, Arc<Maker>) {
    let maker =
        Arc::new(Maker { values: values.into(), count: shape.iter().product(), made: AtomicUsize::new(0) });
    let bytes = Bytes::Lazy(Lazy::new(maker.clone()));
    (TensorSource::new("w", Dtype::F32, shape.to_vec(), bytes).unwrap(), maker)
}

fn linear(weight: TensorSource) -> WeightSource {
    WeightSource::Linear { parts: vec![LinearPart { weight, bias: None, columns: None }], exact: false }
}

#[test]
fn bytes_are_made_once_and_go_with_the_tensor() {
    let (t, maker) = lazy(&[1.0, 2.0, 3.0, 4.0], &[2, 2]);
    let times = || maker.made.load(Ordering::Relaxed);
    assert_eq!((t.count(), t.byte_count(), t.is_mapped(), times()), (4, 16, false, 0));
    t.fetch().unwrap();
    let clone = t.reshaped(vec![4]).unwrap();
    assert_eq!(
        (t.to_f32(), clone.to_f32(), times()),
        (vec![1.0, 2.0, 3.0, 4.0], vec![1.0, 2.0, 3.0, 4.0], 1)
    );
    assert_eq!((t.unfetched().to_f32().len(), times()), (4, 2));
}

#[test]
fn devices_fetch_and_wrappers_do_not_keep() {
    let (t, maker) = lazy(&[1.0, 2.0, 3.0, 4.0], &[2, 2]);
    let d = Traced::new(Reference, Reference, Fallback::Fail).force_to_host(vec![OpKind::Linear]);
    let weight = d.prepare(&linear(t)).unwrap();
    assert_eq!(maker.made.load(Ordering::Relaxed), 1);
    // The host packs its own when it is first needed: from bytes made again, for nobody kept them.
    let x = d.upload(1, 2, &[1.0, 1.0]).unwrap();
    assert_eq!(d.download(&d.linear(&x, &weight).unwrap()).unwrap().data, [3.0, 7.0]);
    assert_eq!(maker.made.load(Ordering::Relaxed), 2);
}

#[test]
fn what_cannot_be_made_is_an_error() {
    let (gone, _) = lazy(&[], &[2, 2]);
    let e = Reference.prepare(&linear(gone)).unwrap_err().to_string();
    assert_eq!(e, "tensor w: the file is gone");
    let (short, _) = lazy(&[1.0], &[2, 2]);
    assert!(Reference.prepare(&linear(short)).is_err());
}

#[test]
fn columns_that_lie_together_are_read_as_rows() {
    let (out, inputs) = (6, 8);
    let value = |o: usize, i: usize| (o * 100 + i) as f32;
    let rows: Vec<f32> = (0..out * inputs).map(|at| value(at / inputs, at % inputs)).collect();
    for (splits, groups) in [(1, 1), (2, 1), (1, 3), (4, 2), (8, 6)] {
        let mut stored = Vec::new();
        for (split, group) in (0..splits * groups).map(|part| (part / groups, part % groups)) {
            let (ins, outs) = (inputs / splits, out / groups);
            for (i, o) in (0..ins * outs).map(|at| (at / outs, at % outs)) {
                stored.push(value(group * outs + o, split * ins + i));
            }
        }
        let t = TensorSource::from_f32("w", vec![out, inputs], &stored).unwrap();
        let t = t.in_order(Order::Columns { splits, groups }).unwrap();
        assert_eq!(t.to_f32(), rows, "{splits} {groups}");
        let mut some = [0.0; 5];
        t.reshaped(vec![out, inputs]).unwrap().read(13, &mut some);
        assert_eq!(some, rows[13..18]);
        assert!(t.reshaped(vec![inputs, out]).is_err());
    }
    let t = TensorSource::from_f32("w", vec![out, inputs], &rows).unwrap();
    for (splits, groups) in [(3, 1), (1, 4), (0, 1), (1, 0)] {
        assert!(t.clone().in_order(Order::Columns { splits, groups }).is_err());
    }
}

/// Takes back what it made.
#[derive(Debug, Default)]
struct Keeper(Mutex<Vec<usize>>);

impl MakeBytes for Keeper {
    fn count(&self) -> usize {
        3 << 20
    }
    fn make(&self) -> Result<Buffer, String> {
        Ok(Buffer::zeroed(4 << 20).unwrap().with_count(3 << 20))
    }
    fn take_back(&self, buffer: Buffer) {
        self.0.lock().unwrap().push(buffer.capacity());
    }
}

#[test]
fn memory_goes_back_to_the_maker_with_the_last_tensor() {
    let keeper = Arc::new(Keeper::default());
    let bytes = Bytes::Lazy(Lazy::new(keeper.clone()));
    let t = TensorSource::new("w", Dtype::F32, vec![3 << 18], bytes).unwrap();
    t.fetch().unwrap();
    let clone = t.clone();
    drop(t);
    assert!(keeper.0.lock().unwrap().is_empty());
    assert_eq!(clone.to_f32(), vec![0.0; 3 << 18]);
    drop(clone);
    assert_eq!(*keeper.0.lock().unwrap(), [4 << 20]);
}
