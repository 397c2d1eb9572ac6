"""The main job on a model that does not fit in memory: memory, time, kills, forecasts."""
