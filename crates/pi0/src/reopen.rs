//! A model whose device may be lost: it is opened again, with its weights, and later requests are served.

use std::cell::{Cell, RefCell};

use anyhow::Result;
use pi0_device::{Error, HostTensor, MemoryMeter};
use pi0_model::{ActionModel, Config, Inputs, ModelError, SampleOptions};

/// Opens the device and loads the model, as was done first.
type Open = Box<dyn Fn() -> Result<Box<dyn ActionModel>>>;

/// A model, and how to load it again.
pub struct Reopening {
    config: Config,
    /// None after a loss from which there was no way back.
    model: RefCell<Option<Box<dyn ActionModel>>>,
    /// Whether the device was opened again and has done nothing since.
    unproven: Cell<bool>,
    open: Open,
}

impl Reopening {
    /// `model`, and how to load it again.
    pub fn new(model: Box<dyn ActionModel>, open: Open) -> Self {
        let config = model.config().clone();
        Self { config, model: RefCell::new(Some(model)), unproven: Cell::new(false), open }
    }

    /// Opens the device again, unless that was just done in vain.
    fn reopen(&self, why: &ModelError) {
        let mut model = self.model.borrow_mut();
        // The old one first: it holds the memory.
        *model = None;
        if self.unproven.replace(true) {
            return tracing::error!(%why, "the device was lost again; it is not opened a third time");
        }
        tracing::error!(%why, "the device was lost and is opened again");
        match (self.open)() {
            Ok(new) => *model = Some(new),
            Err(error) => tracing::error!("the device cannot be opened again: {error:#}"),
        }
    }
}

impl ActionModel for Reopening {
    fn config(&self) -> &Config {
        &self.config
    }

    /// The request that lost the device gets the error; those after it run on the device opened again.
    fn sample_actions(
        &self,
        batch: &[Inputs],
        options: &SampleOptions,
    ) -> Result<Vec<HostTensor>, ModelError> {
        let result = match &*self.model.borrow() {
            Some(model) => model.sample_actions(batch, options),
            None => Err(Error::Lost {
                device: "vulkan",
                what: "the device was lost and could not be opened again; start anew".into(),
            }
            .into()),
        };
        match &result {
            Ok(_) => self.unproven.set(false),
            Err(why @ ModelError::Device(Error::Lost { .. })) if self.model.borrow().is_some() => {
                self.reopen(why);
            }
            Err(_) => {}
        }
        result
    }

    fn memory(&self) -> Option<MemoryMeter> {
        self.model.borrow().as_ref().and_then(|m| m.memory())
    }
}

#[cfg(test)]
mod tests {
    use std::rc::Rc;

    use super::*;

    /// Answers as often as told, then its device is lost.
    struct Fragile {
        config: Config,
        answers: Cell<usize>,
    }

    impl ActionModel for Fragile {
        fn config(&self) -> &Config {
            &self.config
        }
        fn sample_actions(&self, _: &[Inputs], _: &SampleOptions) -> Result<Vec<HostTensor>, ModelError> {
            match self.answers.get() {
                0 => Err(Error::Lost { device: "test", what: "gone".into() }.into()),
                n => {
                    self.answers.set(n - 1);
                    Ok(vec![])
                }
            }
        }
    }

    fn fragile(answers: usize) -> Box<dyn ActionModel> {
        Box::new(Fragile { config: Config::tiny(), answers: answers.into() })
    }

    #[test]
    fn a_lost_device_fails_one_request_and_is_opened_again_once() {
        let opened = Rc::new(Cell::new(0));
        let count = opened.clone();
        let open = move || {
            count.set(count.get() + 1);
            // The first works for a while, the second never.
            Ok(fragile(if count.get() == 1 { 2 } else { 0 }))
        };
        let model = Reopening::new(fragile(1), Box::new(open));
        let ask = || model.sample_actions(&[], &SampleOptions::default()).is_ok();
        // One answer, a loss, two answers of the next, a loss, and a device that is lost at once.
        let answers: Vec<bool> = (0..8).map(|_| ask()).collect();
        assert_eq!(answers, [true, false, true, true, false, false, false, false]);
        assert_eq!(opened.get(), 2);
    }
}
