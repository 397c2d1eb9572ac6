"""Estimators whose costs are nats per token: weight errors, second moments, Fisher, measured."""
