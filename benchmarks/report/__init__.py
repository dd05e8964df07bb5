"""Tables and figures of the documentation, drawn from the rows."""
