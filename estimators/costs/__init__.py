"""Estimators with costs in nats per token: weight error, second moments, Fisher, measured."""
