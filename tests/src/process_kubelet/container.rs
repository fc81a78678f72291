//! One container of a pod over all its runs: image, environment, start, probes, end, restart with back-off.
//! It tells everything through the pod's facts and writes nothing to the API itself.

use std::sync::Arc;
use std::time::{Duration, Instant};

use jiff::Timestamp;
use k8s_openapi::api::core::v1::Container;
use tokio::sync::watch;

use super::attempt::{Attempt, Spec};
use super::backoff::Failures;
use super::environment::{Environment, complete};
use super::image::{self, Image};
use super::pod::{PodContext, Stop};
use super::probe::{self, Findings, Target};
use super::status::{ContainerFacts, Ended, State};

/// Exit code of a container whose program never started, as container runtimes give it.
const START_ERROR: i32 = 128;

/// One container of a running pod.
pub(super) struct ContainerLife {
    pub context: Arc<PodContext>,
    pub container: Container,
    /// Its place among the init containers, or among the others.
    pub place: Place,
    pub stop: watch::Receiver<Stop>,
}

/// Where a container's facts are.
#[derive(Debug, Clone, Copy)]
pub(super) enum Place {
    Init(usize),
    Main(usize),
}

impl ContainerLife {
    /// Runs the container until its restart policy is satisfied or the pod stops. True if it succeeded.
    pub(super) async fn run(mut self) -> bool {
        let mut failures = Failures::new(self.context.kubelet.config.restart_backoff);
        let mut number = self.facts(|c| c.restarts);
        loop {
            let Some(image) = self.pull().await else { return false };
            let Some(spec) = self.configure(&image).await else { return false };
            let started = Instant::now();
            let ended = self.run_once(number, &image, spec).await;
            let exit_code = ended.exit_code;
            self.update(|c| {
                (c.pid, c.ready, c.started) = (None, false, false);
                c.state = State::Ended(ended.clone());
            });
            if self.is_stopped() || !self.restarts_after(exit_code) {
                return exit_code == 0;
            }
            let delay = failures.next(started.elapsed());
            self.update(|c| {
                c.last = Some(ended.clone());
                if !delay.is_zero() {
                    c.state = State::waiting_because("CrashLoopBackOff", self.back_off_message(delay));
                }
            });
            if !delay.is_zero() {
                self.context.warn("BackOff", &format!("Back-off restarting failed container {}", self.container.name));
            }
            if self.wait_unless_stopped(delay).await {
                return false;
            }
            number += 1;
        }
    }

    /// Finds the image's binary; shows a kubelet's reasons until it is there. `None` when the pod stops first.
    async fn pull(&mut self) -> Option<Image> {
        let reference = self.container.image.clone().unwrap_or_default();
        let mut failures = Failures::new(self.context.kubelet.config.restart_backoff);
        loop {
            let why = match image::find(&self.context.kubelet.config.images, &reference) {
                Some(image) if image.program.exists() => return Some(image),
                Some(image) => format!("{} does not exist: build it first", image.program.display()),
                None => format!("{reference}: not found"),
            };
            let why = format!("failed to pull and unpack image {reference:?}: {why}");
            self.context.warn("Failed", &format!("Failed to pull image {reference:?}: {why}"));
            let delay = failures.next(Duration::ZERO).max(self.context.kubelet.config.restart_backoff.first);
            let state = |reason: &str, message: String| State::waiting_because(reason, message);
            self.update(|c| c.state = state("ErrImagePull", why.clone()));
            if self.wait_unless_stopped(self.context.kubelet.config.restart_backoff.first).await {
                return None;
            }
            let message = format!("Back-off pulling image {reference:?}: ErrImagePull: {why}");
            self.update(|c| c.state = state("ImagePullBackOff", message.clone()));
            if self.wait_unless_stopped(delay).await {
                return None;
            }
        }
    }

    /// Puts together what to run; shows why it cannot until it can. `None` when the pod stops first.
    async fn configure(&mut self, image: &Image) -> Option<Spec> {
        loop {
            match self.spec(image).await {
                Ok(spec) => return Some(spec),
                Err(why) => {
                    self.context.warn("Failed", &format!("Error: {why}"));
                    self.update(|c| c.state = State::waiting_because("CreateContainerConfigError", why.clone()));
                }
            }
            if self.wait_unless_stopped(Duration::from_secs(1)).await {
                return None;
            }
        }
    }

    async fn spec(&self, image: &Image) -> Result<Spec, String> {
        let context = &self.context;
        let pod = context.pod();
        let base = self.base_environment(&pod);
        let environment = complete(base, &self.container, &pod, &context.addresses, &context.lookup).await?;
        let expand = |words: &Option<Vec<String>>| {
            words.iter().flatten().map(|word| environment.expand(word)).collect::<Vec<_>>()
        };
        let (command, program) = image.command(expand(&self.container.command), expand(&self.container.args));
        Ok(Spec {
            command,
            program: program.unwrap_or_default(),
            dir: self.container.working_dir.clone().unwrap_or_default(),
            env: environment.lines(),
            mounts: context.volumes.lock().await.mounts(&self.container)?,
            root: Default::default(),
            state: Default::default(),
        })
    }

    /// What every container gets: a path, its host name, the API server's address, its node's variables.
    fn base_environment(&self, pod: &k8s_openapi::api::core::v1::Pod) -> Environment {
        let kubelet = &self.context.kubelet;
        let mut base = Environment::default();
        base.set("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin");
        base.set("HOME", "/root");
        base.set("HOSTNAME", pod.metadata.name.clone().unwrap_or_default());
        let (host, port) = &kubelet.apiserver;
        base.set("KUBERNETES_SERVICE_HOST", host);
        base.set("KUBERNETES_SERVICE_PORT", port);
        base.set("KUBERNETES_SERVICE_PORT_HTTPS", port);
        for (name, value) in &self.context.node.wanted.env {
            base.set(name, value);
        }
        base
    }

    /// Starts it for the `number`th time after the first, follows it to its end, and says how it ended.
    async fn run_once(&mut self, number: i32, image: &Image, spec: Spec) -> Ended {
        let started_at = Timestamp::now();
        let uid = &self.context.bound.uid;
        let id = format!("process://{uid}/{}/{number}", self.container.name);
        let work = self.context.work.join(format!("{}.{number}", self.container.name));
        let log = self.context.log(&self.container.name);
        let ended = |exit_code: i32, reason: &str, message: Option<String>| Ended {
            exit_code,
            reason: reason.into(),
            message,
            started_at,
            finished_at: Timestamp::now(),
            id: Some(id.clone()),
        };
        let runner = self.context.kubelet.tool.container();
        let mut attempt = match Attempt::start(&runner, &work, spec, &log).await {
            Ok(attempt) => attempt,
            Err(why) => {
                self.context.warn("Failed", &format!("Error: {why}"));
                self.update(|c| c.restarts = number);
                return ended(START_ERROR, "StartError", Some(why));
            }
        };
        self.update(|c| {
            c.state = State::Running { since: started_at };
            c.restarts = number;
            (c.id, c.pid) = (Some(id.clone()), Some(attempt.pid()));
            c.image_id = image.program.display().to_string();
        });
        let exit_code = self.follow(&mut attempt).await;
        ended(exit_code, if exit_code == 0 { "Completed" } else { "Error" }, None)
    }

    /// Waits for the end of a run, and brings it about when a probe or the pod asks for it.
    async fn follow(&mut self, attempt: &mut Attempt) -> i32 {
        let target = Target { ip: self.context.addresses.pod.clone(), pid: attempt.pid() };
        let told = Told { context: Arc::clone(&self.context), place: self.place, name: self.container.name.clone() };
        let grace = self.context.grace();
        let mut stop = self.stop.clone();
        let asked = tokio::select! {
            // A process that has ended stays ended: asking again is safe.
            code = attempt.wait() => return code,
            // Only looks at the container.
            (why, allowed) = probe::watch(&self.container, &target, &told) => {
                self.context.warn("Unhealthy", &why);
                allowed.and_then(|s| u64::try_from(s).ok()).map_or(grace, Duration::from_secs)
            }
            // The value stays in the channel.
            _ = stop.wait_for(|s| *s != Stop::No) => self.stop.borrow().grace(),
        };
        let mut stop = self.stop.clone();
        let hurried = async {
            // A kubelet that goes away ends everything at once: the closed channel reads as that.
            let _ = stop.wait_for(|s| *s == Stop::Now).await;
        };
        let code = tokio::select! {
            // Both arms only wait for a process that is told to end.
            code = attempt.end(asked) => Some(code),
            () = hurried => None,
        };
        match code {
            Some(code) => code,
            None => attempt.end(Duration::ZERO).await,
        }
    }

    fn restarts_after(&self, exit_code: i32) -> bool {
        match (self.place, self.context.restart_policy()) {
            (_, "Never") => false,
            (Place::Main(_), "Always") => true,
            _ => exit_code != 0,
        }
    }

    /// A closed channel is a kubelet that goes away.
    fn is_stopped(&self) -> bool {
        *self.stop.borrow() != Stop::No || self.stop.has_changed().is_err()
    }

    fn back_off_message(&self, delay: Duration) -> String {
        let bound = &self.context.bound;
        format!(
            "back-off {delay:?} restarting failed container={} pod={}_{}({})",
            self.container.name, bound.name, bound.namespace, bound.uid
        )
    }

    /// True if the pod was told to stop meanwhile.
    async fn wait_unless_stopped(&mut self, delay: Duration) -> bool {
        let stopped = self.stop.wait_for(|s| *s != Stop::No);
        tokio::time::timeout(delay, stopped).await.is_ok()
    }

    fn update(&self, change: impl FnOnce(&mut ContainerFacts)) {
        self.context.update(self.place, change);
    }

    fn facts<T>(&self, read: impl FnOnce(&ContainerFacts) -> T) -> T {
        let facts = self.context.facts.borrow();
        read(match self.place {
            Place::Init(i) => &facts.init[i],
            Place::Main(i) => &facts.main[i],
        })
    }
}

/// Writes what the probes find into the pod's facts.
struct Told {
    context: Arc<PodContext>,
    place: Place,
    name: String,
}

impl Findings for Told {
    fn started(&self) {
        self.context.update(self.place, |c| c.started = true);
    }

    fn ready(&self, ready: bool, why: &str) {
        self.context.update(self.place, |c| c.ready = ready);
        if !ready {
            self.context.warn("Unhealthy", &format!("Readiness probe of {} failed: {why}", self.name));
        }
    }
}
