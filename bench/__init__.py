"""Side-by-side measurements, and what they need: a real Triton, models to partition, rows to send, a monolithic baseline."""
