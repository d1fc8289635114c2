//! The tape: what is recorded once runs again with the same bits, within bounds, and failures are errors.

mod common;

use std::time::{Duration, Instant};

use common::{Numbers, open, open_all, open_with, put};
use pi0_device::{Device, Error, HostTensor};
use pi0_model::cases::Setup;
use pi0_model::{Extent, Pi0, SampleOptions};
use pi0_vulkan::{Format, Stage, Vulkan, VulkanOptions};

/// The network of odd sizes, with three robots.
fn setup() -> Setup {
    Setup::small().unwrap().remove(0)
}

#[test]
fn a_second_inference_replays_the_first_with_its_bits() {
    open_all(Format::Stored).iter().for_each(|(device, _)| replays(device));
}

fn replays(device: &Vulkan) {
    let setup = setup();
    let model = Pi0::load(device, setup.checkpoint.clone(), Extent::Cache, &|_| ()).unwrap();
    let options = SampleOptions { steps: Some(3), ..Default::default() };
    let first = model.sample_actions(&setup.batch, &options).unwrap();
    let before = device.stats();
    println!("{before:?}");
    assert_eq!(model.sample_actions(&setup.batch, &options).unwrap(), first);
    let after = device.stats();
    assert_eq!((after.recorded, after.replayed), (before.recorded, before.replayed + 1));

    // Other contents of the same shape, and then the first again.
    let mut other = setup.batch.clone();
    other[0].state[0] += 1.0;
    other[1].tokens[0] = 5;
    assert_ne!(model.sample_actions(&other, &options).unwrap(), first);
    assert_eq!(model.sample_actions(&setup.batch, &options).unwrap(), first);
    assert_eq!(device.stats().recorded, before.recorded);

    // Another shape.
    let alone = model.sample_actions(&setup.batch[1..2], &options).unwrap();
    assert_eq!(device.stats().recorded, before.recorded + 1);
    assert_eq!(alone[0], first[1], "a robot's actions do not depend on its neighbours");
}

#[test]
fn the_number_of_shapes_is_bounded() {
    let Some(device) = open_with(VulkanOptions { shapes: 2, ..Default::default() }) else { return };
    let mut n = Numbers(1);
    let mut held = 0;
    for round in 0..3 {
        for rows in 1..5 {
            let x = n.host(rows, 300);
            let y = device.gelu(&put(&device, &x)).unwrap();
            assert_eq!(device.download(&y).unwrap().shape, [rows, 300]);
        }
        let bytes = device.memory().unwrap().bytes();
        assert!(device.stats().kept <= 2 && (round == 0 || bytes == held), "{bytes} after {held}");
        held = bytes;
    }
}

/// Tapes that begin alike and go on otherwise: each is right, whichever ran before it.
#[test]
fn tapes_that_part_half_way_are_told_apart() {
    let Some(device) = open_with(VulkanOptions { shapes: 3, ..Default::default() }) else { return };
    let mut n = Numbers(12);
    let inputs: Vec<_> = (0..3).map(|_| n.host(5, 40)).collect();
    // Letters are operations: two tapes that share a beginning share what they write of it.
    let run = |device: &dyn Fn(&HostTensor, &str) -> HostTensor, program: &str| {
        inputs.iter().map(|x| device(x, program)).collect::<Vec<_>>()
    };
    let on_device = |x: &HostTensor, program: &str| {
        let y = perform(&device, x, program);
        device.download(&y).unwrap()
    };
    let on_reference = |x: &HostTensor, program: &str| (*perform(&pi0_device::Reference, x, program)).clone();
    let programs = ["gsa", "gsg", "g", "gsaa", "sg", "gsas", "gsa", "ggg", "gsaa", "gs", "gsa"];
    for program in programs.iter().chain(programs.iter().rev()) {
        let (got, want) = (run(&on_device, program), run(&on_reference, program));
        for (got, want) in got.iter().zip(&want) {
            let agreement = pi0_device::compare(&got.data, &want.data);
            assert!(common::F32.holds(&agreement), "{program}: {agreement}");
        }
    }
    let stats = device.stats();
    assert!(stats.replayed >= 2 * 22 && stats.kept <= 3, "{stats:?}");
}

/// GELU, SiLU and the sum of the last two.
fn perform<D: Device>(d: &D, x: &HostTensor, program: &str) -> D::Tensor {
    let mut before = put(d, x);
    let mut now = before.clone();
    for letter in program.chars() {
        let next = match letter {
            'g' => d.gelu(&now),
            's' => d.silu(&now),
            _ => d.add(&now, &before),
        };
        before = std::mem::replace(&mut now, next.unwrap());
    }
    now
}

/// A call that cannot be done leaves the tape as it was for the others, and is no part of what is known.
#[test]
fn a_call_that_fails_half_way_is_not_followed() {
    let Some(device) = open() else { return };
    let x = Numbers(13).host(3, 50);
    let want = device.download(&perform(&device, &x, "gs")).unwrap();
    for _ in 0..3 {
        let y = device.gelu(&put(&device, &x)).unwrap();
        // More than a buffer may have.
        let rows = device.info().max_binding as usize / 200;
        let many = (0..rows).step_by(3).map(|_| &y).collect::<Vec<_>>();
        device.concat_rows(&[&many[..], &many[..]].concat()).map(drop).unwrap_err();
        assert_eq!(device.download(&device.silu(&y).unwrap()).unwrap(), want);
        assert_eq!(device.download(&perform(&device, &x, "gs")).unwrap(), want);
    }
}

#[test]
fn results_that_are_held_keep_their_values() {
    let Some(device) = open() else { return };
    let mut n = Numbers(2);
    let inputs: Vec<_> = (0..4).map(|_| n.host(3, 50)).collect();
    let twice = |x| device.add(&put(&device, x), &put(&device, x)).unwrap();
    // The same tape each time, while all results are held.
    let results: Vec<_> = inputs
        .iter()
        .map(|x| {
            let y = twice(x);
            device.download(&y).unwrap();
            y
        })
        .collect();
    for (x, y) in inputs.iter().zip(&results) {
        let got = device.download(y).unwrap();
        assert!(got.data.iter().zip(&x.data).all(|(y, x)| *y == 2.0 * x));
    }
    // A result of one tape is an operand of another.
    let sum = device.add(&results[0], &results[3]).unwrap();
    let got = device.download(&sum).unwrap();
    let want = inputs[0].data.iter().zip(&inputs[3].data).map(|(a, b)| 2.0 * a + 2.0 * b);
    assert!(got.data.iter().zip(want).all(|(a, b)| (a - b).abs() < 1e-6));
}

/// The host's part of an inference of full size. The layers are narrow, so that the software driver can run them; rows,
/// layers and launches are all there, and the host sees nothing of the widths but the size of the pictures.
#[test]
fn dispatches_and_host_work_of_a_whole_inference() {
    let full = pi0_model::Config::full;
    for kind in [pi0_model::Kind::Pi0, pi0_model::Kind::Pi05] {
        let Some(device) = open() else { return };
        let mut config = full().of_kind(kind);
        (config.vision.hidden_size, config.vision.intermediate_size) = (16, 32);
        config.vision.num_attention_heads = 2;
        for c in [&mut config.gemma, &mut config.expert] {
            (c.width, c.mlp_dim, c.head_dim) = (16, 32, 8);
        }
        let checkpoint = pi0_model::synth::checkpoint(&config, 1).unwrap();
        let model = Pi0::load(&device, checkpoint, Extent::Cache, &|_| ()).unwrap();
        let batch = [pi0_model::cases::random_inputs(&config, 1, &[true, true], 48)];
        let options = SampleOptions::default();
        model.sample_actions(&batch, &options).unwrap();
        let first = device.stats();
        let took: Vec<_> = (0..3)
            .map(|_| {
                let (before, start) = (device.stats(), Instant::now());
                model.sample_actions(&batch, &options).unwrap();
                let (all, after) = (start.elapsed(), device.stats());
                // What the device does for the tape, and all that is no waiting: the model's and the tape's.
                (after.host - before.host, all - (after.waited - before.waited))
            })
            .collect();
        let stats = device.stats();
        println!(
            "{kind:?}, two cameras, 48 tokens, ten steps: {} launches, {} barriers; host of the tape and all of it {took:?}",
            stats.launches, stats.barriers
        );
        assert_eq!((stats.recorded, stats.replayed), (first.recorded, first.replayed + 3));
        assert!(stats.launches <= 1600, "{} launches", stats.launches);
    }
}

#[test]
fn memory_that_runs_out_is_an_error_and_harms_nothing() {
    let memory = Some(3 << 20);
    let Some(device) = open_with(VulkanOptions { memory, ..Default::default() }) else { return };
    let mut n = Numbers(3);
    let small = n.host(3, 8);
    let keep = device.gelu(&put(&device, &small)).unwrap();
    let want = device.download(&keep).unwrap();
    let error = device.prepare(&n.linear(&[1000], 1000, false)).unwrap_err();
    assert!(matches!(error, Error::Failed { .. }), "{error}");
    let text = error.to_string();
    assert!(text.contains("out of device memory") && text.contains("--dtype int8"), "{text}");
    // Activations too.
    let wide = put(&device, &n.host(1000, 1000));
    let error = device.download(&device.gelu(&wide).unwrap()).unwrap_err();
    assert!(error.to_string().contains("out of device memory"), "{error}");
    let error = device.download(&wide).unwrap_err();
    assert!(error.to_string().contains("never computed"), "{error}");
    assert_eq!(device.download(&keep).unwrap(), want);
    assert_eq!(device.download(&device.gelu(&put(&device, &small)).unwrap()).unwrap(), want);
}

#[test]
fn what_does_not_end_in_time_is_an_error() {
    let timeout = Duration::from_nanos(1);
    let Some(device) = open_with(VulkanOptions { timeout, ..Default::default() }) else { return };
    let mut n = Numbers(4);
    let x = put(&device, &n.host(2000, 500));
    let mut y = x.clone();
    for _ in 0..20 {
        y = device.gelu(&y).unwrap();
    }
    let error = device.download(&y).unwrap_err();
    assert!(error.to_string().contains("did not end within"), "{error}");
    // It stays so: the device is given up.
    let error = device.gelu(&x).unwrap_err();
    assert!(error.to_string().contains("opened again"), "{error}");
}

/// No software driver gives its device up, so the call that would say so is made to.
#[test]
fn a_lost_device_is_an_error_and_stays_one() {
    let Some(device) = open_with(VulkanOptions { lose: Some(1), ..Default::default() }) else { return };
    let x = Numbers(4).host(20, 50);
    let kept = device.gelu(&put(&device, &x)).unwrap();
    device.download(&kept).unwrap();
    let pending = device.silu(&put(&device, &x)).unwrap();
    let error = device.download(&pending).unwrap_err();
    assert!(matches!(error, Error::Lost { .. }) && error.to_string().contains("was lost"), "{error}");
    for error in [
        device.download(&pending).unwrap_err(),
        device.download(&kept).unwrap_err(),
        device.gelu(&kept).unwrap_err(),
        device.prepare(&Numbers(1).linear(&[3], 4, false)).map(drop).unwrap_err(),
    ] {
        assert!(matches!(error, Error::Lost { .. }), "{error}");
    }
}

#[test]
fn a_device_that_is_not_there_is_an_error() {
    if open().is_none() {
        return;
    }
    let error = Vulkan::open(VulkanOptions { index: 99, ..Default::default() }).unwrap_err();
    assert!(error.to_string().contains("no Vulkan device 99"), "{error}");
}

/// Guards the guard: the validation layer, whose silence the other tests demand, sees a barrier that is missing.
#[test]
fn a_missing_barrier_is_seen_by_the_validation_layer() {
    if std::env::var_os("PI0_VULKAN_VALIDATE").is_none() {
        eprintln!("skipped: PI0_VULKAN_VALIDATE is not set");
        return;
    }
    let chain = |skip_barrier| {
        let options = VulkanOptions { skip_barrier, format: Format::F32, ..Default::default() };
        let device = open_with(options)?;
        let x = put(&device, &Numbers(5).host(64, 64));
        let y = device.silu(&device.gelu(&x).unwrap()).unwrap();
        Some(device.download(&y).map(|_| ()))
    };
    let Some(whole) = chain(None) else { return };
    whole.unwrap();
    let error = chain(Some(0)).unwrap().unwrap_err().to_string();
    assert!(error.to_lowercase().contains("hazard"), "{error}");
}

/// Bytes still on their way must not arrive in memory that was given to something else.
#[test]
fn a_weight_dropped_at_once_harms_nothing() {
    let Some(device) = open() else { return };
    let mut n = Numbers(6);
    for _ in 0..20 {
        let dropped = n.linear(&[300], 900, false);
        drop(device.prepare(&dropped).unwrap());
    }
    let x = n.host(2, 40);
    let y = device.gelu(&put(&device, &x)).unwrap();
    assert_eq!(device.download(&y).unwrap().shape, [2, 40]);
}

/// The small networks whose inference is the same launches every time. π0-FAST goes through its network once for each
/// token, and how often depends on the tokens.
fn of_one_pass() -> impl Iterator<Item = Setup> {
    let setups = Setup::small().unwrap().into_iter();
    setups.filter(|setup| setup.checkpoint.config.kind != pi0_model::Kind::Pi0Fast)
}

/// π0.5's modulations are computed while the model loads: they are no part of the first inference's tape.
#[test]
fn both_networks_record_once() {
    for setup in of_one_pass() {
        let Some(device) = open() else { return };
        let model = Pi0::load(&device, setup.checkpoint.clone(), Extent::Cache, &|_| ()).unwrap();
        let options = SampleOptions { steps: Some(2), ..Default::default() };
        for _ in 0..3 {
            model.sample_actions(&setup.batch, &options).unwrap();
        }
        let stats = device.stats();
        // π0.5 was loaded for the checkpoint's number of steps, so the first inference with two makes their modulations.
        let first = if setup.checkpoint.config.kind == pi0_model::Kind::Pi05 { 2 } else { 1 };
        assert_eq!(
            (stats.recorded, stats.replayed),
            (first, 3 - first),
            "{:?}",
            setup.checkpoint.config.kind
        );
        let options = SampleOptions::default();
        let model = Pi0::load(&device, setup.checkpoint.clone(), Extent::Cache, &|_| ()).unwrap();
        for _ in 0..2 {
            model.sample_actions(&setup.batch, &options).unwrap();
        }
        let now = device.stats();
        assert_eq!((now.recorded, now.replayed), (stats.recorded + 1, stats.replayed + 1));
    }
}

/// The GPU's clock gives a time to each launch, and takes no part in the result.
#[test]
fn launches_are_timed_and_told_apart() {
    let timed = || open_with(VulkanOptions { timestamps: true, ..Default::default() });
    let (Some(device), Some(plain)) = (timed(), open_with(VulkanOptions::default())) else { return };
    let setup = setup();
    let options = SampleOptions { steps: Some(2), ..Default::default() };
    let run = |device: &Vulkan| {
        let model = Pi0::load(device, setup.checkpoint.clone(), Extent::Cache, &|_| ()).unwrap();
        model.sample_actions(&setup.batch, &options).unwrap();
        device.launches();
        // From before the submission: a driver may be well into its work by the time the host begins to wait.
        let start = Instant::now();
        let actions = model.sample_actions(&setup.batch, &options).unwrap();
        (actions, device.launches(), start.elapsed().as_secs_f64())
    };
    let ((actions, launches, took), (want, untimed, _)) = (run(&device), run(&plain));
    assert_eq!(actions, want);
    assert_eq!(launches.len(), device.stats().launches);
    assert!(untimed.iter().all(|l| l.seconds.is_none()));
    let seconds: f64 = launches.iter().map(|l| l.seconds.expect("the software driver has a clock")).sum();
    assert!(seconds > 0.0 && seconds <= took, "{seconds} s of {took}");
    for stage in [Stage::Vision, Stage::Prefix, Stage::Denoise] {
        assert!(launches.iter().any(|l| l.stage == stage), "{stage:?}");
    }
    assert!(launches.iter().all(|l| l.stage != Stage::Other));
}

/// A plan without a GPU is what the GPU gets: the same launches, barriers and memory.
#[test]
fn a_plan_is_what_a_device_does() {
    for format in [Format::Stored, Format::Int8] {
        for setup in of_one_pass() {
            // New ones, which hold nothing of the last network.
            let options = VulkanOptions { format, ..Default::default() };
            let Some(device) = open_with(options.clone()) else { return };
            let plan = Vulkan::plan(device.info().clone(), options).unwrap();
            let outline = pi0_model::synth::outline(&setup.checkpoint.config).unwrap();
            let steps = SampleOptions { steps: Some(2), ..Default::default() };
            let run = |device: &Vulkan, checkpoint| {
                let model = Pi0::load(device, checkpoint, Extent::Cache, &|_| ()).unwrap();
                let weights = device.memory().unwrap().bytes();
                device.launches();
                model.sample_actions(&setup.batch, &steps).unwrap();
                let stats = device.stats();
                (device.launches(), stats.launches, stats.barriers, stats.arena_bytes, weights)
            };
            let (real, planned) = (run(&device, setup.checkpoint.clone()), run(&plan, outline));
            assert!(
                planned.0.iter().any(|l| l.flop > 0 && l.bytes > 0),
                "{:?} {}",
                setup.name,
                planned.0.len()
            );
            for (r, p) in real.0.iter().zip(&planned.0) {
                assert_eq!(
                    (r.stage, r.kernel, r.unit, r.shape, r.flop, r.groups),
                    (p.stage, p.kernel, p.unit, p.shape, p.flop, p.groups)
                );
            }
            assert_eq!((real.1, real.2, real.3), (planned.1, planned.2, planned.3));
            // Memory comes in blocks of a megabyte and more.
            assert!(real.4.abs_diff(planned.4) <= 1 << 20, "{} and {} bytes", real.4, planned.4);
        }
    }
}
