//! Serves the ttsim simulator to `pi0-tensix`, which starts it; of no use by hand.

fn main() {
    pi0_tensix::run_child_if_asked();
    eprintln!("pi0-ttsim is started by pi0 to run the simulator; there is nothing to do by hand");
    std::process::exit(2);
}
