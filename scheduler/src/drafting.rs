//! From a snapshot to a draft: what the solver proposes, what its checker says, what it gains and costs. Pure, and beside
//! the ring: a large model takes a second, and nobody waits for it there. Whether a draft is followed is the ring's to say.

use berth_crds::expert_placement::PlanCertificate;
use berth_planner::{
    Balance, Certificate, Checked, Layout, Limit, Plan, Problem, Proposed, Sharing, Survive, Weights, check,
    experts::LEAST_GAIN, solve,
};
use berth_types::DeviceId;

use crate::{
    balance::{self, Spread},
    replan::Cause,
    snapshot::Snapshot,
    weighing::{Weighed, rounded},
};

/// A plan, checked against the snapshot.
#[derive(Debug)]
pub struct Draft {
    /// The plan.
    pub plan: Plan<Checked>,
    /// The same, to be checked again if the world has changed.
    pub proposed: Plan<Proposed>,
    /// What it gains and costs.
    pub weighed: Weighed,
    /// How good it is.
    pub certificate: PlanCertificate,
}

/// What came of a snapshot.
#[derive(Debug)]
pub enum Drafted {
    /// Another layout, or further waves.
    Change(Box<Draft>),
    /// The layout that there is; what it survives and how good it is.
    Same {
        /// What it survives.
        survives: Survive,
        /// How good it is.
        certificate: PlanCertificate,
        /// For a plan for balance: the spread that is expected and why nothing moves.
        kept: Option<(Option<Spread>, Balance)>,
    },
    /// A sentence that says what is missing.
    Impossible(String),
}

/// Makes a plan from `snapshot`, or goes on with the `rest` of the last one.
#[must_use]
pub fn draft(snapshot: Snapshot, rest: Option<Plan<Proposed>>) -> Drafted {
    let cause = snapshot.cause;
    let (weights, speeds) = (snapshot.weights.clone(), snapshot.speeds.clone());
    let (problem, previous, loads) = snapshot.complete();
    let before = previous.as_deref().and_then(|layout| spread(&problem, layout, weights.as_deref()));
    let (plan, proposed) = match propose(&problem, previous.as_deref(), rest) {
        Ok(plan) => plan,
        Err(reason) => return Drafted::Impossible(reason),
    };
    let decision = plan.decision();
    let certificate = certificate(&plan, loads, speeds);
    let after = decision.waves.last().and_then(|layout| spread(&problem, layout, decision.weights.last()));
    let weighed = weigh(&problem, (before, after), &plan);
    // The same layout may be shared better: that moves no byte, and has to gain as much as moves have to.
    let same = decision.waves.len() < 2 && plan.first() == previous.as_deref();
    if same && (cause != Cause::Rebalance || weighed.gain() < LEAST_GAIN) {
        let kept = (cause == Cause::Rebalance).then_some((before, decision.balance));
        return Drafted::Same { survives: decision.survives, certificate, kept };
    }
    Drafted::Change(Box::new(Draft { plan, proposed, weighed, certificate }))
}

/// A checked plan, from the rest of the last one or from the solver; else a sentence.
fn propose(
    problem: &Problem,
    previous: Option<&Layout>,
    rest: Option<Plan<Proposed>>,
) -> Result<(Plan<Checked>, Plan<Proposed>), String> {
    if let Some(rest) = rest {
        // What no longer holds is planned anew.
        if let Ok(plan) = check(problem, previous, rest.clone()) {
            return Ok((plan, rest));
        }
    }
    let proposed = solve(problem, previous).map_err(|infeasible| infeasible.to_string())?;
    let plan = check(problem, previous, proposed.clone()).map_err(|rejected| {
        tracing::error!(findings = ?rejected.findings, "the checker refused a plan: this is a bug");
        format!("the planner made a plan that its checker refuses, please report this: {rejected}")
    })?;
    Ok((plan, proposed))
}

fn spread(problem: &Problem, layout: &Layout, weights: Option<&Weights>) -> Option<Spread> {
    let speed = |device: &DeviceId| {
        let known = problem.devices.binary_search_by(|known| known.id.cmp(device));
        known.ok().and_then(|at| problem.devices.get(at)).map_or(1.0, |known| known.speed)
    };
    balance::expected(layout, weights, &problem.instance.loads, speed)
}

fn weigh(problem: &Problem, spreads: (Option<Spread>, Option<Spread>), plan: &Plan<Checked>) -> Weighed {
    let decision = plan.decision();
    let devices = decision.waves.last().map_or(0, |layout| layout.devices.len());
    Weighed::new(&problem.payback, devices, spreads, (decision.moves, decision.moved_bytes))
}

/// The certificate as the status tells it.
fn certificate(plan: &Plan<Checked>, loads: String, speeds: String) -> PlanCertificate {
    let decision = plan.decision();
    let Certificate { makespan, bound, gap, limit } = &decision.certificate;
    let limit = limit.as_ref().filter(|limit| limit.makespan > 1.0005).map_or_else(String::new, sentence);
    PlanCertificate {
        revision: decision.revision.0,
        makespan: rounded(*makespan),
        bound: rounded(*bound),
        gap: rounded(*gap),
        limit,
        loads,
        speeds,
        sharing: match decision.sharing {
            Sharing::Even => "evenly",
            Sharing::Weighted => "by weight",
        }
        .to_owned(),
        survives: decision.survives.as_str().to_owned(),
    }
}

fn sentence(limit: &Limit) -> String {
    let Limit { layer, expert, makespan, relieved } = limit;
    format!(
        "layer {layer} is the slowest, at {makespan:.3} of the ideal: one more slot for expert {expert} would make that \
         {relieved:.3}"
    )
}
