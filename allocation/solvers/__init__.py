"""Solvers for the multiple-choice knapsack: exact with a bound, integer programs, greedy."""
