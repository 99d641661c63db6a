"""Models to partition: what the demo, the benchmarks and the tests use."""
