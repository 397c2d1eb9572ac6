"""Results: bit plans, their files and differences, and solutions with their bounds."""
