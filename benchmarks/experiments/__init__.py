"""What exits cost in accuracy, system by system: plans of runs, each repeated by one command.

`python -m experiments run benchmarks/experiments/plans/NAME.yaml` trains and reads what the plan
lists, in its order; every result is a row of `benchmarks/results/experiments.jsonl` at once.
"""
