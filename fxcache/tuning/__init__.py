"""Schedules and tables from the user's own sampling."""
