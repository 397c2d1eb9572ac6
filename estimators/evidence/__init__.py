"""The record of one pass over a text, from which estimators run without the model."""
