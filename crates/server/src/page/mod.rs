//! What the policy sees: kept for whoever looks, judged by the doctor, shown at `GET /`.
//!
//! [`Client`] is what is kept of one robot; [`Board`] all of them with the server's latency and errors; `events` sends
//! it to browsers, as `view` puts it. Pictures are kept only while somebody looks, and encoded once for all viewers.

mod board;
mod document;
mod events;
mod picture;
mod view;

pub(crate) use board::{Board, Client, Registered};
pub use document::document;
pub(crate) use document::shell;
pub(crate) use events::{live, page};
pub(crate) use view::{Answered, Latest, network_picture};
pub use view::{PictureView, View};
