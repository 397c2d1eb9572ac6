"""Optuna: a sampling solver, and studies shared by several workers."""
