//! A worker never outlives its supervisor. Three signs say that the supervisor is gone: its stream ends
//! (`server`), standard input ends, or the kernel says that the parent died. Any of them ends the worker;
//! if an orderly end takes too long, the process ends without it.

use std::{
    io::{self, Read},
    thread,
    time::Duration,
};

use berth_runtime::Clock;
use nix::{
    sys::{prctl, signal::Signal},
    unistd::getppid,
};
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

/// How long an orderly end may take once the supervisor is gone.
const GRACE: Duration = Duration::from_secs(5);

/// Ties this process to its parent: `stop` is cancelled when the parent is gone, and the process ends
/// at the latest `GRACE` after that, whatever it hangs in.
///
/// The kernel's signal comes when the *thread* that started this process ends. So it is only a reason to
/// look: the worker ends if it has another parent now.
///
/// # Errors
/// When the system refuses a handler or a thread.
pub(crate) fn tie_to_parent(stop: &CancellationToken) -> io::Result<()> {
    let parent = getppid();
    let mut looks = signal(SignalKind::user_defined1())?;
    prctl::set_pdeathsig(Signal::SIGUSR1)?;
    let token = stop.clone();
    tokio::spawn(async move {
        while looks.recv().await.is_some() {
            if getppid() != parent {
                tracing::info!("the parent process is gone, the worker ends");
                token.cancel();
            }
        }
    });
    watch_input(stop.clone())?;
    end_within_grace(stop.clone())
}

/// Ends with standard input: the supervisor holds its other end and never writes.
fn watch_input(stop: CancellationToken) -> io::Result<()> {
    let read = move || {
        let mut input = io::stdin().lock();
        let mut ignored = [0_u8; 256];
        loop {
            match input.read(&mut ignored) {
                Ok(0) => break,
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => break,
            }
        }
        stop.cancel();
    };
    thread::Builder::new().name("input".to_owned()).spawn(read).map(drop)
}

/// A thread that does not depend on the runtime: it may be what hangs.
fn end_within_grace(stop: CancellationToken) -> io::Result<()> {
    let wait = move || {
        futures::executor::block_on(stop.cancelled());
        let clock = Clock::real();
        clock.in_flight().block_until(clock.now().saturating_add(GRACE));
        std::process::exit(1);
    };
    thread::Builder::new().name("grace".to_owned()).spawn(wait).map(drop)
}
