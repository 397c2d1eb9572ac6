"""Optuna: a solver that samples, and studies that several workers share."""
