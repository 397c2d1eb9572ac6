"""What a budget or a profile costs: frontiers, prices of profiles, uniform recipes."""
