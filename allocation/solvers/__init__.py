"""Solvers of the multiple-choice knapsack: exact with a bound, by integer programs, greedy."""
