"""Side-by-side measurements; recorded results in benchmarks/results/."""
