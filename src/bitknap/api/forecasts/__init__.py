"""What a job will take on a machine, before it is run: time, memory and room on the disk."""
