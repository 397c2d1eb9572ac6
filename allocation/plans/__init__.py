"""What was decided: bit plans, their files and differences, and solutions with their bounds."""
