"""What a run has to survive, part by part; `benchmarks/reliability.py` puts them together."""
