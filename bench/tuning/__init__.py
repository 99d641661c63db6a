"""The scheduler's knobs, and a climb over them on the real system (docs/tuning.md)."""
