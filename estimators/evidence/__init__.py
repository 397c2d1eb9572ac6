"""What one pass over a text has recorded, which estimators run from without the model."""
