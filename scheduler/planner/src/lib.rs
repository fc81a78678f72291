//! Decides where expert replicas live: pure functions from a problem to a plan.
//!
//! No I/O, no clock, no randomness but a seed, no map whose order changes between runs: the same problem
//! gives the same plan on every machine. See the README for the mathematics.

pub mod bench;
pub mod check;
pub mod experts;
pub mod forecast;
pub mod gang;
mod num;
pub mod plan;
pub mod problem;
pub mod share;
pub mod speed;
#[cfg(test)]
mod tests;

pub use check::{Finding, Rejected, check};
pub use forecast::Forecast;
pub use gang::{Infeasible, fits};
pub use plan::{
    Balance, Certificate, Checked, Committed, Decision, DeviceSlots, Layout, Limit, Plan, Proposed, Weights, diff,
};
pub use problem::{Device, Effort, Goal, Instance, Payback, Problem, Sharing, Standing, Survive};

/// The plan for the problem's instance. With `previous` (the layout of its last revision) replicas stay
/// where they may; a repair never fails for want of redundancy, it survives less and says so.
///
/// # Errors
/// [`Infeasible`] with what is missing.
pub fn solve(problem: &Problem, previous: Option<&Layout>) -> Result<Plan<Proposed>, Infeasible> {
    let plan = attempt(problem, previous);
    let frozen = |device: &Device| device.standing == Standing::Frozen;
    if plan.is_ok() || previous.is_none() || !problem.devices.iter().any(frozen) {
        return plan;
    }
    // What silent devices hold is in the way of what others must get: it is planned around them.
    let mut around = problem.clone();
    for device in around.devices.iter_mut().filter(|device| frozen(device)) {
        device.standing = Standing::Leaving;
    }
    attempt(&around, previous).or(plan)
}

fn attempt(problem: &Problem, previous: Option<&Layout>) -> Result<Plan<Proposed>, Infeasible> {
    let gang = gang::choose(problem, previous)?;
    let (target, mut certificate, balance) = experts::place(problem, &gang, previous)?;
    let waves = experts::order(problem, &target, previous, gang.survives.copies())?;
    let sharing = problem.instance.sharing;
    let mut weights = Vec::new();
    if sharing == Sharing::Weighted {
        weights = waves.iter().map(|layout| share::weights(problem, layout)).collect();
        if let (Some(layout), Some(weights)) = (waves.last(), weights.last()) {
            share::certify(problem, layout, weights, &mut certificate);
        }
    }
    let (moves, moved_bytes) = experts::moved(problem, &waves, previous);
    Ok(Plan::propose(Decision {
        name: problem.instance.name.clone(),
        revision: problem.instance.revision,
        waves,
        survives: gang.survives,
        moves,
        moved_bytes,
        certificate,
        sharing,
        weights,
        balance,
    }))
}
