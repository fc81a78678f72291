//! What published balancers reach on the public cases, as printed beside our own figures. Figures only:
//! measured on 2 busy cores, medians of 5; each peer plans from nothing.

/// A published balancer on one case.
pub(super) struct Peer {
    /// Its name.
    pub(super) name: &'static str,
    /// Balancedness; next balancedness for cases with windows.
    pub(super) balance: f64,
    /// Milliseconds, where measured.
    pub(super) ms: Option<f64>,
}

const fn peer(name: &'static str, balance: f64, ms: f64) -> Peer {
    Peer { name, balance, ms: Some(ms) }
}

const fn unmeasured(name: &'static str, balance: f64) -> Peer {
    Peer { name, balance, ms: None }
}

/// The best balanced peer and, where another is, the fastest.
pub(super) fn peers(case: &str) -> &'static [Peer] {
    match case {
        "p01-v3-288-32" => {
            const {
                &[
                    peer("FlashLB", 0.9949, 292.0),
                    peer("SGLang", 0.9736, 10.5),
                    peer("EPLB", 0.9355, 322.0),
                    peer("vLLM", 0.9355, 35.0),
                ]
            }
        }
        "p02-v3-320-64" => {
            const {
                &[
                    peer("FlashLB", 0.9870, 430.0),
                    peer("SGLang", 0.9600, 15.0),
                    peer("EPLB", 0.7263, 337.0),
                    peer("vLLM", 0.7263, 38.0),
                ]
            }
        }
        "p04-v4flash-320-64" => {
            const { &[peer("evolved", 0.9889, 532.0), peer("vLLM", 0.9865, 61.0), peer("EPLB", 0.9865, 1900.0)] }
        }
        "p05-v4pro-448-64" => {
            const { &[peer("evolved", 0.9935, 649.0), peer("vLLM", 0.9892, 70.0), peer("EPLB", 0.9892, 3700.0)] }
        }
        "p06-v4pro-640-320" => {
            const { &[peer("evolved", 0.9561, 4500.0), peer("vLLM", 0.9498, 90.0), peer("EPLB", 0.9498, 16000.0)] }
        }
        "p08-v3-drift20" => {
            const {
                &[
                    unmeasured("SGLang, 95 % moved", 0.928),
                    unmeasured("EPLB, 85 % moved", 0.887),
                    unmeasured("vLLM, 85 % moved", 0.887),
                ]
            }
        }
        "p10-one-hot" => const { &[unmeasured("best peer", 0.767)] },
        "p13-planted" => const { &[unmeasured("best peer", 0.948)] },
        "p14-hetero-v3-288-32" => {
            const { &[unmeasured("best peer, makespan", 1.70), unmeasured("worst peer, makespan", 2.13)] }
        }
        _ => &[],
    }
}

/// One line per peer: its figures, and ours ÷ its time.
pub(super) fn lines(case: &str, ms: f64) -> Vec<String> {
    let line = |peer: &Peer| {
        let Peer { name, balance, ms: theirs } = peer;
        let time =
            theirs.map_or(String::new(), |theirs| format!("  {theirs:>8.1} ms, ours ÷ theirs {:.2}", ms / theirs));
        format!("    {name:<32} balancedness {balance:.4}{time}")
    };
    peers(case).iter().map(line).collect()
}
