"""Allocation strategies at equal bytes: which is best for a model, by how much, and is it sure?

setting      a model, what calibration saw of it, and the texts
strategies   every way to make a plan of at most so many bytes, by name
judge        what plans lose on text that no strategy saw, domain by domain, paired
loop         calibrated plans refined by measuring them, and the gate against uniform recipes
run          strategies × budgets, what fails kept apart, resumable
output       JSON, CSV, plans, pictures and the page
"""
