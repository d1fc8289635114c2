//! Serves π0 to robots: openpi's websocket protocol, many clients, one model.
//!
//! A frame goes through these modules: `server` accepts its connection, `connection` receives it, `decode` and
//! `request` read it, `service` has the policy prepare it, `queue` holds it, `engine` runs it with others, and
//! `encode` writes the reply. All but the network run on the threads of tokio. `page` keeps what each client sent last
//! for whoever looks at `GET /`, and has the doctor (`pi0-doctor`) look at all of it.

#![forbid(unsafe_code)]

mod auth;
mod connection;
mod decode;
mod encode;
mod engine;
mod error;
mod examine;
mod metrics;
mod page;
mod queue;
mod record;
mod replay;
mod request;
mod server;
mod service;
mod settings;
mod translator;
mod value;

pub use decode::{DecodeError, Limits, decode};
pub use encode::encode;
pub use error::{Error, Failure};
pub use examine::{Examined, Examiner};
pub use page::{PictureView, View, document};
pub use record::{Recording, recordings};
pub use replay::{Replayed, Verdict, replay};
pub use server::{Bound, ServeError, Served, metadata, runtime, stop_on_signal};
pub use settings::Settings;
pub use tokio_util::sync::CancellationToken;
pub use translator::{Ready, Translator};
pub use value::{Dtype, Kind, Map, NdArray, Value};
