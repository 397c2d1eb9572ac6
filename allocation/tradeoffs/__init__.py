"""Trade-offs: frontiers over budgets, prices of profiles, uniform recipes."""
