//! Errors as Python exceptions, with the words of the command line.

use pi0_model::ModelError;
use pyo3::prelude::*;

/// The exceptions of `pi0._errors`.
#[derive(Clone, Copy)]
pub enum Class {
    /// The checkpoint or a file beside it.
    Checkpoint,
    /// An option of `load` or of a call.
    Option,
    /// What the robot sent.
    Observation,
    /// Model tensors that the caller made.
    Input,
    /// The device refused or failed.
    Device,
    /// The network's result is not finite.
    NotFinite,
    /// A dump that cannot be judged.
    Dump,
    /// A finding that is not allowed.
    Strict,
    /// An answer without actions.
    Answer,
    /// A defect of ours.
    Internal,
}

impl Class {
    fn name(self) -> &'static str {
        match self {
            Class::Checkpoint => "CheckpointError",
            Class::Option => "OptionError",
            Class::Observation => "ObservationError",
            Class::Input => "InputError",
            Class::Device => "DeviceError",
            Class::NotFinite => "NotFiniteError",
            Class::Dump => "DumpError",
            Class::Strict => "StrictError",
            Class::Answer => "AnswerError",
            Class::Internal => "InternalError",
        }
    }

    /// The exception.
    pub fn raise(self, py: Python<'_>, text: impl Into<String>) -> PyErr {
        let text = text.into();
        let made = py
            .import("pi0._errors")
            .and_then(|m| m.getattr(self.name()))
            .and_then(|class| class.call1((text.as_str(),)));
        match made {
            Ok(exception) => PyErr::from_value(exception),
            Err(e) => e,
        }
    }
}

/// An error of the network.
pub fn of_model(py: Python<'_>, e: &ModelError) -> PyErr {
    class_of_model(e).raise(py, e.to_string())
}

fn class_of_model(e: &ModelError) -> Class {
    match e {
        ModelError::Input { .. } | ModelError::Call(_) => Class::Input,
        ModelError::NotFinite(_) => Class::NotFinite,
        ModelError::Device(_) => Class::Device,
        _ => Class::Checkpoint,
    }
}

/// An error of the policy.
pub fn of_policy(py: Python<'_>, e: &pi0_policy::Error) -> PyErr {
    class_of_policy(e).raise(py, e.to_string())
}

fn class_of_policy(e: &pi0_policy::Error) -> Class {
    match e {
        pi0_policy::Error::Option { .. } => Class::Option,
        pi0_policy::Error::Actions(_) => Class::Input,
        pi0_policy::Error::Reply(_) => Class::Answer,
        e if e.is_bad_observation() => Class::Observation,
        _ => Class::Checkpoint,
    }
}

fn class_of_judge(e: &pi0_judge::Error) -> Class {
    match e {
        pi0_judge::Error::Model(e) => match class_of_model(e) {
            // Inputs come from the dump.
            Class::Input => Class::Dump,
            other => other,
        },
        pi0_judge::Error::Option { .. } => Class::Option,
        _ => Class::Dump,
    }
}

/// Whatever went wrong while loading, with its causes.
pub fn of_any(py: Python<'_>, e: &anyhow::Error) -> PyErr {
    let class = e.chain().find_map(|cause| {
        cause
            .downcast_ref::<ModelError>()
            .map(class_of_model)
            .or_else(|| cause.downcast_ref::<pi0_policy::Error>().map(class_of_policy))
            .or_else(|| cause.downcast_ref::<pi0_judge::Error>().map(class_of_judge))
            .or_else(|| cause.downcast_ref::<pi0_cpu::CpuError>().map(|_| Class::Device))
    });
    class.unwrap_or(Class::Device).raise(py, format!("{e:#}"))
}
