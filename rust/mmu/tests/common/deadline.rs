//! A test that would hang if what it tests were broken.

use std::sync::mpsc;
use std::thread;
use std::time::Duration;

/// Runs `body`, which hangs if what it tests is broken.
pub fn must_end(body: impl FnOnce() + Send + 'static) {
    let (ended, end) = mpsc::channel();
    thread::spawn(move || {
        body();
        // Nobody listens when the test has given up.
        let _ = ended.send(());
    });
    end.recv_timeout(Duration::from_secs(60)).expect("it ended, without a panic");
}
