"""The API of A1111: its fields, scripts and tasks."""
