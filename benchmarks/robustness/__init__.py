"""Campaigns against lost work: kills, malformed inputs, full disks, and two writers at once."""
