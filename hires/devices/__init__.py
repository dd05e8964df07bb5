"""The devices that plans are made for, and their memory."""
