"""The journal that lets a render continue after a stop."""
