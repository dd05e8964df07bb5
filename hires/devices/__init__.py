"""Devices that plans are made for, their measured rates and their memory."""
