/// What can go wrong in the demo.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)]
pub enum Error {
    #[error(transparent)]
    Model(#[from] pi0_model::ModelError),
    #[error(transparent)]
    Policy(#[from] pi0_policy::Error),
    /// The checkpoint is for another robot.
    #[error("the policy answers with actions of {0} values, this world's have 4: x, y, z and opening")]
    ActionWidth(usize),
    /// An actor broke its promise.
    #[error("the policy answered {got} observations out of {wanted}, or with an empty chunk")]
    Answers { got: usize, wanted: usize },
    /// A policy elsewhere.
    #[error("server: {0}")]
    Remote(String),
    /// An animation of nothing.
    #[error("no frames to write")]
    NoFrames,
    /// An image file could not be written.
    #[error("cannot write a picture: {0}")]
    Picture(String),
}

/// Result with the demo's [`Error`].
pub type Result<T> = std::result::Result<T, Error>;
