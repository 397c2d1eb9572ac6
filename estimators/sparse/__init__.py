"""Cost tables from few measured cells: fuzzy rules, other predictors, and the choice of cells."""
