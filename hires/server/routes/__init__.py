"""Routes of the jobs API, the OpenAI API, Deep Zoom and the page."""
