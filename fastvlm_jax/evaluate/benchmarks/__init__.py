"""Published benchmarks, one file each: the questions, the scoring and the summary."""
