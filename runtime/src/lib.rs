//! What every part does: clock, lease, shutdown, telemetry, admin.
