"""Allocation strategies at equal bytes: which is best, by how much, and with what certainty?

setting      a model, its calibration evidence, and the texts
strategies   every way to make a plan of at most so many bytes, by name
judge        losses of plans on text that no strategy saw, by domain, paired
loop         calibrated plans refined by measuring them, and the gate against uniform recipes
run          strategies × budgets, with failures isolated, resumable
output       JSON, CSV, plans, pictures and the page
"""
