"""The HTTP server: jobs, the web page, and the APIs of A1111 and OpenAI."""
