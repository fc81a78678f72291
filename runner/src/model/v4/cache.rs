//! What V4's attention remembers of one sequence, in float32, by layer (paper §2.3):
//!
//! - a window: the newest keys (which are the values too), `head_dim` values a token;
//! - in compressed layers: entries, one per `ratio` tokens, `head_dim` values each; the tokens of the block that is still
//!   open; where blocks overlap, the part of the last closed block that the next one needs;
//! - in sparse layers the same once more for the indexer, `index_head_dim` values wide.
//!
//! Everything is bounded by the sequence's tokens: [`CacheShape::bytes`] says by how much. Per token that is
//! `Σ sparse layers 4·(head_dim + index_head_dim)/m + Σ heavy layers 4·head_dim/m'` bytes beyond a fixed part per sequence.
//! Never shared between sequences; dropping it frees it.

use crate::num::u64_of;

use super::config::{Reach, V4Config};

/// What a model's caches look like.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct CacheShape {
    /// Features of a key.
    head: usize,
    /// Features of an index key; 0 = no layer has any.
    index: usize,
    /// Tokens of the window.
    window: usize,
    /// By layer.
    reach: Vec<Reach>,
}

impl CacheShape {
    /// The shape that a configuration implies.
    pub(crate) fn of(config: &V4Config) -> Self {
        Self {
            head: config.attention.head,
            index: config.attention.index.map_or(0, |index| index.head),
            window: config.attention.window,
            reach: config.layers.iter().map(|layer| layer.reach).collect(),
        }
    }

    /// Bytes of a sequence of `tokens` tokens between two steps, at most.
    pub(crate) fn bytes(&self, tokens: usize) -> u64 {
        let window = Window::capacity(self.window).min(tokens).saturating_mul(self.head);
        let layer = |reach: &Reach| {
            let far = match *reach {
                Reach::Window => 0,
                Reach::Heavy { ratio } => BlockShape::plain(ratio, self.head).values(tokens),
                Reach::Sparse { ratio } => {
                    let keys = BlockShape::overlapping(ratio, self.head).values(tokens);
                    keys.saturating_add(BlockShape::overlapping(ratio, self.index).values(tokens))
                }
            };
            u64_of(window.saturating_add(far))
        };
        let values = self.reach.iter().map(layer).fold(0, u64::saturating_add);
        values.saturating_mul(u64_of(size_of::<f32>()))
    }
}

/// The cache of one sequence.
#[derive(Debug)]
pub(crate) struct Cache {
    layers: Vec<LayerCache>,
}

/// The cache of one layer.
#[derive(Debug)]
pub(crate) struct LayerCache {
    pub(crate) window: Window,
    /// Entries that stand for blocks of tokens, in compressed layers.
    pub(crate) entries: Option<Blocks>,
    /// The indexer's, in sparse layers.
    pub(crate) index: Option<Blocks>,
}

impl Cache {
    /// An empty cache for a sequence of at most `tokens` tokens. Takes no memory yet.
    pub(crate) fn new(shape: &CacheShape, tokens: usize) -> Self {
        let layer = |reach: &Reach| {
            let blocks = |shape| Some(Blocks::new(shape, tokens));
            let (entries, index) = match *reach {
                Reach::Window => (None, None),
                Reach::Heavy { ratio } => (blocks(BlockShape::plain(ratio, shape.head)), None),
                Reach::Sparse { ratio } => (
                    blocks(BlockShape::overlapping(ratio, shape.head)),
                    blocks(BlockShape::overlapping(ratio, shape.index)),
                ),
            };
            LayerCache { window: Window::new(shape.window, shape.head, tokens), entries, index }
        };
        Self { layers: shape.reach.iter().map(layer).collect() }
    }

    /// The cache of one layer.
    pub(crate) fn layer(&self, layer: usize) -> &LayerCache {
        &self.layers[layer]
    }

    /// The same, to change.
    pub(crate) fn layer_mut(&mut self, layer: usize) -> &mut LayerCache {
        &mut self.layers[layer]
    }

    /// Bytes it has from the allocator.
    #[cfg(test)]
    pub(crate) fn allocated(&self) -> u64 {
        let blocks = |blocks: &Option<Blocks>| blocks.as_ref().map_or(0, Blocks::allocated);
        let layer = |layer: &LayerCache| layer.window.rows.capacity() + blocks(&layer.entries) + blocks(&layer.index);
        u64_of(self.layers.iter().map(layer).sum::<usize>() * size_of::<f32>())
    }
}

/// The newest keys of a sequence.
#[derive(Debug)]
pub(crate) struct Window {
    /// Tokens that a query sees, itself counted.
    tokens: usize,
    width: usize,
    /// Rows that are kept at most between two steps.
    kept: usize,
    /// Position of the first row.
    first: usize,
    /// [rows × width].
    rows: Vec<f32>,
}

impl Window {
    /// Rows kept between two steps: the window, and a quarter more so that forgetting is seldom.
    const fn capacity(window: usize) -> usize {
        window + window.div_ceil(4)
    }

    fn new(tokens: usize, width: usize, sequence: usize) -> Self {
        Self { tokens, width, kept: Self::capacity(tokens).min(sequence), first: 0, rows: Vec::new() }
    }

    /// Appends rows, [any × width].
    pub(crate) fn append(&mut self, rows: &[f32]) {
        let wanted = (self.kept * self.width).max(self.rows.len() + rows.len());
        self.rows.reserve_exact(wanted - self.rows.len());
        self.rows.extend_from_slice(rows);
    }

    /// The keys that the query at `position` sees, oldest first: [at most window × width]. `position` is one of those
    /// appended since rows were last forgotten.
    pub(crate) fn seen_from(&self, position: usize) -> &[f32] {
        let end = (position + 1).saturating_sub(self.first);
        let start = (position + 1).saturating_sub(self.tokens).saturating_sub(self.first);
        &self.rows[start * self.width..end * self.width]
    }

    /// Lets go of what no later query sees, if there is enough of it.
    pub(crate) fn forget(&mut self) {
        let rows = self.rows.len() / self.width;
        if rows > self.kept {
            // The next query is itself one of the window.
            let gone = rows - (self.tokens - 1).min(rows);
            self.rows.drain(..gone * self.width);
            self.first += gone;
        }
        self.rows.shrink_to(self.kept * self.width);
    }
}

/// How tokens become entries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct BlockShape {
    /// Tokens of a block.
    pub(crate) ratio: usize,
    /// Features of an entry.
    pub(crate) width: usize,
    /// Series that a token contributes: 1, or 2 where a block's entry takes part of the block before it.
    pub(crate) series: usize,
}

impl BlockShape {
    /// Blocks by themselves.
    pub(crate) const fn plain(ratio: usize, width: usize) -> Self {
        Self { ratio, width, series: 1 }
    }

    /// Blocks that take part of the one before.
    pub(crate) const fn overlapping(ratio: usize, width: usize) -> Self {
        Self { ratio, width, series: 2 }
    }

    /// Values of a token's contribution, and as many of its gates.
    pub(crate) const fn token(self) -> usize {
        self.series * self.width
    }

    /// Values kept of `tokens` tokens at most.
    fn values(self, tokens: usize) -> usize {
        let entries = (tokens / self.ratio).saturating_mul(self.width);
        let open = 2 * self.token() * self.ratio.min(tokens);
        let before = if self.series == 2 && tokens >= self.ratio { 2 * self.width * self.ratio } else { 0 };
        entries.saturating_add(open).saturating_add(before)
    }
}

/// Blocks of tokens as entries, and the block that is still open.
#[derive(Debug)]
pub(crate) struct Blocks {
    pub(crate) shape: BlockShape,
    sequence: usize,
    /// [entries × width].
    pub(crate) entries: Vec<f32>,
    /// Contributions of the open block, [its tokens × token].
    pub(crate) open: Vec<f32>,
    /// Their gates, position in the block accounted for; the same shape.
    pub(crate) gates: Vec<f32>,
    /// First series of the last closed block, [ratio × width]; empty before the first, or without overlap.
    pub(crate) before: Vec<f32>,
    /// Its gates.
    pub(crate) before_gates: Vec<f32>,
}

impl Blocks {
    fn new(shape: BlockShape, sequence: usize) -> Self {
        let empty = Vec::new;
        Self {
            shape,
            sequence,
            entries: empty(),
            open: empty(),
            gates: empty(),
            before: empty(),
            before_gates: empty(),
        }
    }

    /// Takes memory for the whole sequence, once.
    pub(crate) fn reserve(&mut self) {
        if self.open.capacity() == 0 {
            let open = self.shape.token() * self.shape.ratio.min(self.sequence);
            self.open.reserve_exact(open);
            self.gates.reserve_exact(open);
            self.entries.reserve_exact(self.sequence / self.shape.ratio * self.shape.width);
        }
    }

    /// Entries so far.
    pub(crate) fn count(&self) -> usize {
        self.entries.len() / self.shape.width
    }

    #[cfg(test)]
    fn allocated(&self) -> usize {
        [&self.entries, &self.open, &self.gates, &self.before, &self.before_gates]
            .iter()
            .map(|part| part.capacity())
            .sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const SHAPE: fn() -> CacheShape = || CacheShape {
        head: 6,
        index: 4,
        window: 5,
        reach: vec![Reach::Window, Reach::Heavy { ratio: 7 }, Reach::Sparse { ratio: 3 }],
    };

    /// Adds `count` tokens in one step, closing blocks as a compressor does.
    fn step(cache: &mut Cache, count: usize) {
        for layer in &mut cache.layers {
            layer.window.append(&vec![0.5; count * layer.window.width]);
            layer.window.forget();
            for blocks in [&mut layer.entries, &mut layer.index].into_iter().flatten() {
                for _ in 0..count {
                    blocks.reserve();
                    let BlockShape { ratio, width, series } = blocks.shape;
                    blocks.open.extend(vec![0.5; series * width]);
                    blocks.gates.extend(vec![0.5; series * width]);
                    if blocks.open.len() == ratio * series * width {
                        blocks.entries.extend(vec![0.5; width]);
                        if series == 2 && blocks.before.is_empty() {
                            blocks.before.reserve_exact(ratio * width);
                            blocks.before_gates.reserve_exact(ratio * width);
                        }
                        blocks.open.clear();
                        blocks.gates.clear();
                    }
                }
            }
        }
    }

    proptest! {
        #[test]
        fn what_is_kept_between_steps_never_exceeds_what_was_said(steps in proptest::collection::vec(1_usize..20, 1..12)) {
            let (shape, tokens) = (SHAPE(), steps.iter().sum());
            let mut cache = Cache::new(&shape, tokens);
            prop_assert_eq!(cache.allocated(), 0);
            for count in steps {
                step(&mut cache, count);
                prop_assert!(cache.allocated() <= shape.bytes(tokens), "{} {}", cache.allocated(), shape.bytes(tokens));
            }
        }

        #[test]
        fn a_query_sees_its_window_whatever_was_forgotten(steps in proptest::collection::vec(1_u16..20, 1..12)) {
            let mut window = Window::new(5, 1, 1000);
            let mut next = 0_u16;
            for count in steps {
                let rows: Vec<f32> = (next..next + count).map(f32::from).collect();
                window.append(&rows);
                for position in next..next + count {
                    let seen: Vec<f32> = (position.saturating_sub(4)..=position).map(f32::from).collect();
                    prop_assert_eq!(window.seen_from(usize::from(position)), &seen[..]);
                }
                window.forget();
                next += count;
            }
        }
    }

    #[test]
    fn a_long_sequence_costs_what_its_entries_cost() {
        let shape = SHAPE();
        // Per token: 6 / 7 values in the heavy layer, (6 + 4) / 3 in the sparse one.
        let growth = shape.bytes(42_000) - shape.bytes(21_000);
        assert_eq!(growth, 4 * (6 * 3_000 + 10 * 7_000));
    }
}
