//! A GPU that is lost or hangs while robots ask: one request gets the error, the device is opened again, the next is served.

use std::cell::Cell;
use std::path::Path;
use std::rc::Rc;
use std::time::Duration;

use pi0_cli::reopen::Reopening;
use pi0_device::Error;
use pi0_model::golden::read_inputs;
use pi0_model::{ActionModel, Checkpoint, Extent, ModelError, Pi0, SampleOptions};
use pi0_vulkan::{Vulkan, VulkanError, VulkanOptions};

fn load(options: VulkanOptions) -> Result<Box<dyn ActionModel>, VulkanError> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let checkpoint = Checkpoint::open(&root.join("models/tiny")).unwrap();
    let model = Pi0::load(Vulkan::open(options)?, checkpoint, Extent::Cache, &|_| ());
    Ok(Box::new(model.expect("a whole device loads")))
}

/// Opens the device, or says why the test is skipped.
fn whole() -> Option<Box<dyn ActionModel>> {
    match load(VulkanOptions::default()) {
        Ok(model) => Some(model),
        Err(e) => {
            assert!(std::env::var_os("PI0_REQUIRE_VULKAN").is_none(), "PI0_REQUIRE_VULKAN is set: {e}");
            eprintln!("skipped: {e}");
            None
        }
    }
}

#[test]
fn a_lost_device_is_opened_again_once() {
    let Some(model) = whole() else { return };
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let batch = read_inputs(&root.join("golden/c/cam2_short_b1.inputs.safetensors")).unwrap();
    let options = SampleOptions { steps: Some(2), ..Default::default() };
    let want = model.sample_actions(&batch, &options).unwrap();
    drop(model);
    // How many submissions loading takes depends on the driver's memory, so the device is lost at ever later ones, until
    // one is in an inference.
    let lost = (0..).map(|n| VulkanOptions { lose: Some(n), ..Default::default() }).find_map(|o| {
        let device = Vulkan::open(o).unwrap();
        let checkpoint = Checkpoint::open(&root.join("models/tiny")).unwrap();
        Pi0::load(device, checkpoint, Extent::Cache, &|_| ()).ok()
    });
    let hung = || {
        // Loading waits for copies, which no time limit of a nanosecond lets end: it stands still for the first inference.
        let device = Vulkan::open(VulkanOptions::default()).unwrap();
        let checkpoint = Checkpoint::open(&root.join("models/tiny")).unwrap();
        let model = Pi0::load(device, checkpoint, Extent::Cache, &|_| ()).unwrap();
        model.device().set_timeout(Duration::from_nanos(1));
        model
    };
    let broken: [Box<dyn ActionModel>; 2] = [Box::new(lost.unwrap()), Box::new(hung())];
    for model in broken {
        let opened = Rc::new(Cell::new(0));
        let count = opened.clone();
        let open = move || {
            count.set(count.get() + 1);
            Ok(load(VulkanOptions::default())?)
        };
        let model = Reopening::new(model, Box::new(open));
        let error = model.sample_actions(&batch, &options).unwrap_err();
        assert!(matches!(error, ModelError::Device(Error::Lost { .. })), "{error}");
        assert!(error.to_string().contains("opened again"), "{error}");
        for _ in 0..2 {
            assert_eq!(model.sample_actions(&batch, &options).unwrap(), want);
        }
        assert_eq!(opened.get(), 1);
    }
}
