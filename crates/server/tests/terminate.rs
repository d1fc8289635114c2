//! SIGTERM under load: every request that came in whole is answered, and every client knows where it stands.
//! `PI0_TERM=32` sets the clients.

mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use bytes::Bytes;
use common::checkpoint::openpi_checkpoint;
use common::*;
use pi0_policy::Robot;
use pi0_server::{Bound, encode, stop_on_signal};
use tokio::net::TcpStream;
use tokio_tungstenite::tungstenite::Message;

/// The only test of its file: the signal is for the whole process.
#[cfg(unix)]
#[tokio::test(flavor = "multi_thread")]
async fn sigterm_under_load_loses_no_accepted_request() {
    let clients = amount("PI0_TERM", 8);
    let dir = openpi_checkpoint(Robot::Aloha, 10);
    let bound = Bound::new(settings()).unwrap();
    let address = bound.address();
    let stop = stop_on_signal().unwrap();
    let path = dir.path().to_owned();
    let server = tokio::spawn(bound.serve::<String>(move || Ok(load(&path, None)), stop));
    while TcpStream::connect(address).await.is_err() {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }

    let served = Arc::new(AtomicUsize::new(0));
    let mut tasks = Vec::new();
    for c in 0..clients {
        let mut client = Client::connect(address, None).await.unwrap();
        let served = served.clone();
        tasks.push(tokio::spawn(async move {
            let frame = Bytes::from(encode(&aloha(c)));
            loop {
                client.send(Message::Binary(frame.clone())).await;
                match client.receive().await {
                    Reply::Actions(_) => served.fetch_add(1, Ordering::SeqCst),
                    // Told that this request was not taken: another replica may have it.
                    Reply::Closed(Some(close)) => return u16::from(close.code),
                    other => panic!("client {c} does not know what became of its request: {other:?}"),
                };
            }
        }));
    }
    while served.load(Ordering::SeqCst) < 3 * clients {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let pid = std::process::id().to_string();
    assert!(std::process::Command::new("kill").args(["-TERM", &pid]).status().unwrap().success());
    for task in tasks {
        assert_eq!(task.await.unwrap(), 1001);
    }
    // It ends without an error, so nobody was cut off.
    server.await.unwrap().unwrap();
    println!(
        "SIGTERM under load: {clients} clients, {} requests served, none lost",
        served.load(Ordering::SeqCst)
    );
}
