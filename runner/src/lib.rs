//! One native model instance: attention, routing, KV cache.
