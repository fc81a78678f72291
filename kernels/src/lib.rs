//! Expert mathematics: formats, routing, backends, checkpoints.
