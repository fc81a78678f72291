//! What a step asks of a model: some consecutive tokens of each of several sequences; and what a model needs of the
//! world meanwhile: routed experts, and somebody who watches where the time goes.

use crate::{
    error::StepError,
    experts::{LayerCall, Pending},
    num::u64_of,
};

/// Consecutive tokens of one sequence that a step computes.
#[derive(Debug)]
pub(crate) struct Chunk<'a, C> {
    /// Their ids; at least one.
    pub(crate) tokens: &'a [u32],
    /// Position of the first.
    pub(crate) start: usize,
    /// The sequence's cache; holds the positions before `start`.
    pub(crate) cache: &'a mut C,
    /// Tells the sequence from others when replicas are chosen; the same in every batch.
    pub(crate) salt: u64,
}

/// The rows of a part of a step, its chunks one after another.
#[derive(Debug, Default)]
pub(crate) struct Rows {
    /// Place of the first among all rows of the step.
    pub(crate) first: usize,
    /// Token ids, [T].
    pub(crate) tokens: Vec<u32>,
    /// Positions in their sequences, [T].
    pub(crate) positions: Vec<usize>,
    /// Chooses among replicas, [T]: sequence and position alone.
    pub(crate) spread: Vec<u64>,
}

impl Rows {
    /// The rows of `chunks`, of which the step has `first` before them.
    pub(crate) fn of<C>(chunks: &[Chunk<'_, C>], first: usize) -> Self {
        let mut rows = Self { first, ..Self::default() };
        for chunk in chunks {
            for (position, token) in (chunk.start..).zip(chunk.tokens) {
                rows.tokens.push(*token);
                rows.positions.push(position);
                rows.spread.push(chunk.salt.wrapping_add(u64_of(position)));
            }
        }
        rows
    }

    /// How many.
    pub(crate) fn len(&self) -> usize {
        self.tokens.len()
    }
}

/// A step in parts that are computed by turns: while one waits for its routed experts, the next is at work.
pub(crate) type Batches<'a, C> = Vec<Vec<Chunk<'a, C>>>;

/// The batches, each with its rows.
pub(crate) fn with_rows<'a, C>(batches: Batches<'a, C>) -> Vec<(Vec<Chunk<'a, C>>, Rows)> {
    let mut first = 0;
    let rows = |chunks: Vec<Chunk<'a, C>>| {
        let rows = Rows::of(&chunks, first);
        first += rows.len();
        (chunks, rows)
    };
    batches.into_iter().map(rows).collect()
}

/// Starts the routed experts of one layer for rows of the step, from the one at the place given.
pub(crate) type StartExperts<'a> = dyn FnMut(&LayerCall<'_>, usize) -> Result<Pending, StepError> + 'a;

/// What a forward pass needs of the world.
pub(crate) struct Outside<'a> {
    /// Starts the routed experts of one layer.
    pub(crate) start: &'a mut StartExperts<'a>,
    /// Hears which phase has just ended.
    pub(crate) ended: &'a dyn Fn(Phase),
}

/// Where a step's time goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// Looking up tokens.
    Embedding,
    /// Mixing residual streams (V4's hyper-connections).
    Streams,
    /// Queries, keys and values of the tokens.
    Projection,
    /// Closing blocks of keys and values (V4).
    Compression,
    /// Choosing compressed entries (V4's indexer).
    Index,
    /// Scores and sums over keys and values.
    Attention,
    /// From heads back to the residual.
    Output,
    /// Dense layers.
    Dense,
    /// The router.
    Routing,
    /// Starting expert calls: their bytes, and the experts themselves where they are computed in this process.
    Calls,
    /// The shared expert, while calls are under way.
    Shared,
    /// Waiting for routed experts after that.
    Waiting,
    /// The output matrix.
    Head,
}

impl Phase {
    /// Every phase, in the order of a step.
    pub const ALL: [Self; 13] = [
        Self::Embedding,
        Self::Streams,
        Self::Projection,
        Self::Compression,
        Self::Index,
        Self::Attention,
        Self::Output,
        Self::Dense,
        Self::Routing,
        Self::Calls,
        Self::Shared,
        Self::Waiting,
        Self::Head,
    ];

    /// Its word in reports.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Embedding => "embedding",
            Self::Streams => "streams",
            Self::Projection => "projection",
            Self::Compression => "compression",
            Self::Index => "index",
            Self::Attention => "attention",
            Self::Output => "output",
            Self::Dense => "dense",
            Self::Routing => "routing",
            Self::Calls => "calls",
            Self::Shared => "shared",
            Self::Waiting => "waiting",
            Self::Head => "head",
        }
    }

    /// Its place in [`Phase::ALL`].
    pub(crate) fn index(self) -> usize {
        Self::ALL.iter().position(|phase| *phase == self).unwrap_or_default()
    }
}
