"""The commands of `bitknap study`."""
