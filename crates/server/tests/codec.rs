//! The message format, against bytes that Python's openpi-client 0.1.2 wrote.

use bytes::Bytes;
use pi0_server::{Dtype, Kind, Limits, Map, NdArray, Value, decode, encode};
use proptest::prelude::*;

/// `msgpack_numpy.packb` of an observation with arrays, numpy scalars and a string.
fn recorded() -> Bytes {
    let mut b: Vec<u8> = vec![0x86];
    let array = |b: &mut Vec<u8>, data: &[u8], dtype: &str, shape: &[u8]| {
        b.extend(b"\x84\xc4\x0b__ndarray__\xc3\xc4\x04data\xc4");
        b.push(data.len() as u8);
        b.extend(data);
        b.extend(b"\xc4\x05dtype\xa3");
        b.extend(dtype.as_bytes());
        b.extend(b"\xc4\x05shape");
        b.push(0x90 + shape.len() as u8);
        b.extend(shape);
    };
    let scalar = |b: &mut Vec<u8>, data: &[u8], dtype: &str| {
        b.extend(b"\x83\xc4\x0d__npgeneric__\xc3\xc4\x04data");
        b.extend(data);
        b.extend(b"\xc4\x05dtype\xa3");
        b.extend(dtype.as_bytes());
    };
    b.extend(b"\xb1observation/image");
    array(&mut b, &(0..12).collect::<Vec<u8>>(), "|u1", &[2, 2, 3]);
    b.extend(b"\xb1observation/state");
    array(&mut b, &[0.5f64, -1.0].map(f64::to_le_bytes).concat(), "<f8", &[2]);
    b.extend(b"\xa7gripper");
    scalar(&mut b, b"\xcb\x3f\xd0\0\0\0\0\0\0", "<f4");
    b.extend(b"\xa4flag");
    scalar(&mut b, b"\xc3", "|b1");
    b.extend(b"\xa1n");
    scalar(&mut b, b"\x07", "<i8");
    b.extend(b"\xa6prompt\xa7pick up");
    b.into()
}

fn parse(bytes: &[u8]) -> Result<Value, String> {
    decode(&Bytes::copy_from_slice(bytes), Limits::default()).map_err(|e| e.to_string())
}

#[test]
fn a_recorded_request_is_read() {
    let frame = recorded();
    assert_eq!(frame.len(), 296);
    let Value::Map(map) = decode(&frame, Limits::default()).unwrap() else { panic!() };
    let Some(Value::Array(image)) = map.get("observation/image") else { panic!() };
    assert_eq!((image.dtype, &image.shape[..]), (Dtype::U8, &[2, 2, 3][..]));
    assert_eq!(image.data, (0..12).collect::<Vec<u8>>());
    // Not copied: the array is part of the frame.
    assert!(frame.as_ptr_range().contains(&image.data.as_ptr()));
    let Some(Value::Array(state)) = map.get("observation/state") else { panic!() };
    assert_eq!(state.numbers().unwrap(), [0.5, -1.0]);
    assert_eq!(map.get("gripper"), Some(&Value::Float(0.25)));
    assert_eq!(map.get("flag"), Some(&Value::Bool(true)));
    assert_eq!(map.get("n"), Some(&Value::Int(7)));
    assert_eq!(map.get("prompt"), Some(&Value::Text("pick up".into())));
}

#[test]
fn arrays_are_written_as_python_writes_them() {
    let frame = recorded();
    let Value::Map(map) = decode(&frame, Limits::default()).unwrap() else { panic!() };
    let two = Map(map.0[..2].to_vec());
    let written = encode(&Value::Map(two));
    // The first two entries are arrays; what follows them in the recording starts with `gripper`.
    let end = frame.windows(8).position(|w| w == b"\xa7gripper").unwrap();
    assert_eq!(written[0], 0x82);
    assert_eq!(written[1..], frame[1..end]);
}

#[test]
fn metadata_is_written_as_python_writes_it() {
    let pose = [0.0, -1.5, 1.5, 0.0, 0.0, 0.0]
        .map(|x: f64| if x.fract() == 0.0 { Value::Int(x as i128) } else { Value::Float(x) });
    let written = encode(&Value::Map([("reset_pose", Value::List(pose.to_vec()))].into()));
    let mut wanted = b"\x81\xaareset_pose\x96\0\xcb\xbf\xf8\0\0\0\0\0\0\xcb\x3f\xf8\0\0\0\0\0\0".to_vec();
    wanted.extend([0, 0, 0]);
    assert_eq!(written, wanted);
    assert_eq!(encode(&Value::Map(Map::default())), [0x80]);
}

#[test]
fn other_spellings_of_arrays_are_read() {
    // Text keys, big-endian, no dimensions.
    let mut b = b"\x84\xab__ndarray__\xc3\xa4data\xc4\x04".to_vec();
    b.extend(1.5f32.to_be_bytes());
    b.extend(b"\xa5dtype\xa3>f4\xa5shape\x90");
    let Value::Array(array) = parse(&b).unwrap() else { panic!() };
    assert_eq!((array.shape.len(), array.numbers().unwrap()), (0, vec![1.5]));
    assert_eq!(array.dtype.to_string(), ">f4");

    // A string without dimensions, as `np.array("hi")`.
    let mut b = b"\x84\xc4\x0b__ndarray__\xc3\xc4\x04data\xc4\x08".to_vec();
    b.extend([b'h', 0, 0, 0, b'i', 0, 0, 0]);
    b.extend(b"\xc4\x05dtype\xa3<U2\xc4\x05shape\x90");
    let Value::Array(array) = parse(&b).unwrap() else { panic!() };
    assert_eq!(array.text().unwrap(), "hi");
    assert_eq!(array.numbers(), None);

    // Types by their names, as `str(array.dtype)` and some clients write them.
    for (name, dtype) in [
        ("uint8", "|u1"),
        ("B", "|u1"),
        ("float64", "<f8"),
        ("d", "<f8"),
        ("float", "<f8"),
        ("float32", "<f4"),
        ("float16", "<f2"),
        ("int64", "<i8"),
        ("int", "<i8"),
        ("int8", "|i1"),
        ("b", "|i1"),
        ("bool", "|b1"),
        ("uint16", "<u2"),
        ("i4", "<i4"),
    ] {
        assert_eq!(pi0_server::Dtype::parse(name).unwrap().to_string(), dtype, "{name}");
    }
    for name in ["complex64", "object", "datetime64", "Float64", "float128"] {
        assert!(pi0_server::Dtype::parse(name).unwrap_err().contains("is not accepted"), "{name}");
    }
}

#[test]
fn every_number_type_is_read() {
    let read = |dtype: &str, data: Vec<u8>| {
        NdArray::new(Dtype::parse(dtype).unwrap(), vec![1], data.into()).unwrap().numbers().unwrap()[0]
    };
    assert_eq!(read("|b1", vec![1]), 1.0);
    assert_eq!(read("|u1", vec![255]), 255.0);
    assert_eq!(read("|i1", vec![255]), -1.0);
    assert_eq!(read("<i2", (-2i16).to_le_bytes().into()), -2.0);
    assert_eq!(read(">i2", (-2i16).to_be_bytes().into()), -2.0);
    assert_eq!(read("<i4", (-2i32).to_le_bytes().into()), -2.0);
    assert_eq!(read("<i8", (-2i64).to_le_bytes().into()), -2.0);
    assert_eq!(read("<u2", 65535u16.to_le_bytes().into()), 65535.0);
    assert_eq!(read("<u4", u32::MAX.to_le_bytes().into()), f64::from(u32::MAX));
    assert_eq!(read(">u8", 3u64.to_be_bytes().into()), 3.0);
    assert_eq!(read("<f2", vec![0x00, 0x3e]), 1.5);
    assert_eq!(read(">f8", 0.1f64.to_be_bytes().into()), 0.1);
}

#[test]
fn what_no_policy_takes_is_refused_with_its_place() {
    let refused = |bytes: &[u8], word: &str| {
        let error = parse(bytes).unwrap_err();
        assert!(error.contains(word), "{error}");
    };
    let array = |dtype: &str, shape: &[u8], data: &[u8]| {
        let mut b = b"\x81\xa1k\x84\xc4\x0b__ndarray__\xc3\xc4\x04data\xc4".to_vec();
        b.push(data.len() as u8);
        b.extend(data);
        b.extend(b"\xc4\x05dtype");
        b.push(0xa0 + dtype.len() as u8);
        b.extend(dtype.as_bytes());
        b.extend(b"\xc4\x05shape");
        b.push(0x90 + shape.len() as u8);
        b.extend(shape);
        b
    };
    for dtype in ["|V8", "|O", "<c8", "<M8", "<f3", "", "<", "<f16", "é4"] {
        let error = parse(&array(dtype, &[1], &[0; 8])).unwrap_err();
        assert!(error.contains("`k`") && error.contains("is not accepted"), "{dtype}: {error}");
    }
    refused(&array("<f4", &[2, 2], &[0; 8]), "needs 16 bytes, 8 came");
    refused(&array("<f4", &[0xff], &[0; 8]), "something else than sizes");
    // Sizes whose product overflows.
    let mut huge =
        b"\x84\xc4\x0b__ndarray__\xc3\xc4\x04data\xc4\x00\xc4\x05dtype\xa3<f8\xc4\x05shape\x92".to_vec();
    huge.extend([0xcf, 0xff, 0xff, 0xff, 0xff, 0, 0, 0, 0, 0xcf, 0xff, 0, 0, 0, 0, 0, 0, 0]);
    refused(&huge, "too many to count");
    refused(b"\xc7\x01\x05x", "not accepted");
    refused(b"\x81\x01\x02", "a key is not a string");
    refused(b"\x01\x02", "1 bytes follow");
    refused(b"\xdd\xff\xff\xff\xff", "more than can follow");
    refused(b"\xdf\xff\xff\xff\xff", "more than can follow");
    refused(b"\xc6\xff\xff\xff\xff", "are left");
    refused(b"\xa2\xff\xfe", "not UTF-8");
    refused(b"", "cut short");
    refused(&[0x91; 64], "nested too deeply");
    let many = [&[0xdd, 0, 1, 0, 1][..], &vec![0xc0; 65537]].concat();
    refused(&many, "more than can follow");
    // Many small lists in one.
    let many = [&[0xdc, 0x80, 0][..], &vec![[0x92, 0xc0, 0xc0]; 32768].concat()].concat();
    refused(&many, "too many values");
}

#[test]
fn every_truncation_is_an_error() {
    let frame = recorded();
    for n in 0..frame.len() {
        assert!(decode(&frame.slice(..n), Limits::default()).is_err(), "{n}");
    }
}

fn value() -> impl Strategy<Value = Value> {
    let array = (
        prop::collection::vec(0usize..4, 0..4),
        prop_oneof![Just(Dtype::U8), Just(Dtype::F32), Just(Dtype { kind: Kind::Int, size: 2, big: true })],
    )
        .prop_map(|(shape, dtype)| {
            let length = shape.iter().product::<usize>() * dtype.size;
            NdArray::new(dtype, shape, (0..length).map(|i| i as u8).collect()).unwrap()
        });
    let leaf = prop_oneof![
        Just(Value::Nil),
        any::<bool>().prop_map(Value::Bool),
        any::<i64>().prop_map(|x| Value::Int(x.into())),
        any::<u64>().prop_map(|x| Value::Int(x.into())),
        any::<i8>().prop_map(|x| Value::Int(x.into())),
        (-1e300f64..1e300).prop_map(Value::Float),
        ".{0,40}".prop_map(Value::Text),
        prop::collection::vec(any::<u8>(), 0..300).prop_map(|b| Value::Binary(b.into())),
        array.prop_map(Value::Array),
    ];
    leaf.prop_recursive(3, 40, 6, |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..20).prop_map(Value::List),
            prop::collection::vec(("[a-z/_]{0,40}", inner), 0..20).prop_map(|e| Value::Map(Map(e))),
        ]
    })
}

proptest! {
    #[test]
    fn what_is_written_is_read_back(value in value()) {
        let frame = Bytes::from(encode(&value));
        prop_assert_eq!(decode(&frame, Limits::default()).unwrap(), value);
        // An independent reader takes it too, to the last byte.
        let mut rest = &frame[..];
        rmpv::decode::read_value(&mut rest).unwrap();
        prop_assert!(rest.is_empty());
    }

    #[test]
    fn no_bytes_make_it_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        let _ = decode(&bytes.into(), Limits::default());
    }

    #[test]
    fn no_change_of_a_good_message_makes_it_panic(at in 0usize..296, byte in any::<u8>(), cut in 0usize..297) {
        let mut frame = recorded().to_vec();
        frame[at] = byte;
        frame.truncate(cut);
        let _ = decode(&frame.into(), Limits::default());
    }
}
