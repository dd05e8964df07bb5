"""What a user can ask for: every option declared once. Loads no torch."""
